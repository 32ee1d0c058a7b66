"""Answers, judgments and a df_gamed.csv in AlpacaEval's forms, made up; a judge of known taste; and the numbers due."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pandas

from lorafocal.endpoints import Endpoint
from lorafocal.evaluate.alpaca import evaluate_alpaca
from lorafocal.evaluate.result import Result
from lorafocal.generation.formats import AnswerRow, write_answers
from tests.openai_server import Body, Said, Server

COUNT = 24
DRAW = random.Random(0)
MERITS = {owner: [round(DRAW.gauss(0, 1), 3) for _ in range(COUNT)] for owner in ("ours", "theirs")}
PROMPTS = [f"Question number {n}, please?" for n in range(COUNT)]


def text(owner: str, n: int) -> str:
    """An answer whose length is a matter of its prompt, and whose merit can be read in it."""
    return f"merit {MERITS[owner][n]} " + "x" * (n % 7 if owner == "ours" else 3 * (n % 5))


def merit(answer: str) -> float:
    return float(answer.split()[1])


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


WIN_RATE = 100 * sum(sigmoid(MERITS["ours"][n] - MERITS["theirs"][n]) for n in range(COUNT)) / COUNT


def write(path: Path, owner: str, order: list[int] | None = None, **fields: Any) -> Path:
    """Answers of `owner` to the prompts of `order`, with the provenance of `generate`."""
    rows = [AnswerRow(text(owner, n), owner, PROMPTS[n], "toy") for n in (range(COUNT) if order is None else order)]
    provenance = {
        "target": {"name": owner},
        "sampling": {"preset": "llama3-alpaca"},
        "prompts": {},
        "versions": {},
        "counts": {"length_limit": 2},
    }
    write_answers(path, rows, provenance | fields)
    return path


def gamed(path: Path, count: int = COUNT, **fields: Any) -> Path:
    """A file of the form of df_gamed.csv: two wordy or terse twins of the reference, which lose or win by length."""
    rows = [
        {
            "model": f"reference_{way}",
            "index": n,
            "preference": sigmoid(2.0 * way * (0.5 + n % 3)),
            "std_delta_len": -way * (0.5 + n % 3),
            "instruction_difficulty": MERITS["ours"][n % COUNT],
            "not_gamed_baseline": False,
        }
        | fields
        for way in (1, -1)
        for n in range(count)
    ]
    pandas.DataFrame(rows).to_csv(path, index=False)
    return path


def judgments(path: Path, preferences: list[Any], order: list[int] | None = None, **fields: Any) -> Path:
    """Judgments of that form."""
    rows = [
        {
            "instruction": PROMPTS[n],
            "output_1": text("theirs", n),
            "generator_1": "theirs",
            "dataset": "toy",
            "output_2": text("ours", n),
            "generator_2": "ours",
            "annotator": "weighted_alpaca_eval_gpt4_turbo",
            "preference": preferences[n],
        }
        | fields
        for n in (order or range(COUNT))
    ]
    path.write_text(json.dumps(rows))
    return path


PREFERENCES = [1 + sigmoid(MERITS["ours"][n] - MERITS["theirs"][n]) for n in range(COUNT)]
SHUFFLED = random.Random(1).sample(range(COUNT), COUNT)


SHOWN = re.compile(r'"output": """(.*?)"""', re.DOTALL)
ASKED = re.compile(r"Question number (\d+)")


def log_odds(body: Body) -> tuple[int, float]:
    """What the judge is asked about, and how much more merit the answer has that it reads first."""
    said = body["messages"][-1]["content"]
    first, second = SHOWN.findall(said)
    found = ASKED.search(said)
    assert found is not None
    return int(found[1]), merit(first) - merit(second)


def weighed(z: float) -> Said:
    """A verdict with the log-probs of both identifiers; `m` is the answer shown first."""
    odds = {"m": math.log(sigmoid(z)), "M": math.log(sigmoid(-z)), "The": -20.0}
    return Said("m" if z > 0 else "M", [odds], finish_reason="length")


def fair(body: Body) -> Said:
    return weighed(log_odds(body)[1])


def evaluate(folder: Path, server: Server, **changed: Any) -> Result:
    options: dict[str, Any] = {"approve": lambda _: True, "reference": folder / "theirs.json", "say": lambda _: None}
    judge = Endpoint("judge", server.url, attempts=6, timeout_s=30.0)  # one question may meet all of a test's faults
    return evaluate_alpaca(folder / "ours.json", judge=judge, journal=folder / "journal.jsonl", **options | changed)


def numbers(result: Result) -> dict[str, Any]:
    return {name: score.value for name, score in result.scores.items()}
