"""Every objective, from its own config: 20 steps on a tiny model, the same packed and padded, and when it is resumed.

The rows have all that any objective asks for; what one does not ask for is not looked at.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorafocal import run
from lorafocal.config import Config, load_config
from lorafocal.data.toy import right_answer, toy_preferences
from lorafocal.objectives import OBJECTIVES
from lorafocal.objectives.listing import Described
from tests.saved_run import save_base
from tests.toy_run import metric_lines

pytestmark = pytest.mark.engine

TRAINING, HELD_OUT, STEPS = 72, 12, 20
WEIGHTS = Path("adapter") / "adapter_model.safetensors"


def judged(rows: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    """Rows with scores from 0 to 1, every fifth a tie, a further answer, a group and an embedding of the prompt."""
    for number, row in enumerate(rows):
        score = 0.2 + number % 7 / 10
        yield {
            **row,
            "id": f"row-{number}",
            "score_chosen": score,
            "score_rejected": score if number % 5 == 0 else score / 2,
            "others": [{"answer": row["rejected"][::-1] if number % 2 else row["chosen"], "score": score * 0.75}],
            "group": ("short", "long")[number % 2],
            "prompt_embedding": [1.0, math.sin(number), math.cos(number)],
        }


def of_two_turns(rows: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    """The same answers, asked and answered a second time."""
    for row in rows:
        question = row["prompt"][-1]["content"]
        again = [{"role": "user", "content": question}, {"role": "assistant", "content": right_answer(question)}]
        yield {**row, "chosen": [*row["chosen"], *again], "rejected": [*row["rejected"], *again]}


def written(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, rows of both kinds, and an adapter that was trained before."""
    root = tmp_path_factory.mktemp("inputs")
    save_base(root / "base", dtype=torch.float32)
    for part, count in (("train", TRAINING), ("eval", HELD_OUT)):
        rows = [*judged(toy_preferences(count, seed=count, held_out=part == "eval"))]
        written(root / f"{part}.jsonl", rows)
        written(root / f"{part}-turns.jsonl", of_two_turns(rows))
    run.train(config_of("dpo", root, "training.max_steps=4"), quiet=True, runs_dir=root)
    return root


def config_of(name: str, inputs: Path, *changes: str) -> Config:
    """The objective's own config on the tiny model and these rows, several packs a step."""
    entry = OBJECTIVES[name]
    kind = "-turns" if name == "dmpo" else ""
    overrides = [
        f"model.name={inputs / 'base'}",
        f"data.train={inputs / f'train{kind}.jsonl'}",
        f"data.eval={inputs / f'eval{kind}.jsonl'}",
        "data.max_length=96",
        "training.use_cpu=true",
        "training.learning_rate=2e-3",
        "packing.tokens=160",
        *([f"reference.guide={inputs / 'dpo' / 'adapter'}"] if entry.guide else []),
    ]
    return load_config(Described(name, entry).config, [*overrides, *changes])


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metric_lines(folder)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_trains_from_its_config_the_same_in_every_layout_and_resumes_with_its_state(name, inputs, tmp_path):
    done = run.train(config_of(name, inputs), quiet=True, runs_dir=tmp_path)
    assert done.steps == STEPS
    trained = load_file(done.folder / WEIGHTS)
    assert all(tensor.isfinite().all() for tensor in trained.values())
    assert any(tensor.any() for key, tensor in trained.items() if "lora_B" in key)
    found = losses(done.folder)
    assert all(map(math.isfinite, found))

    padded = run.train(config_of(name, inputs, "packing.layout=padded"), quiet=True, runs_dir=tmp_path / "padded")
    assert losses(padded.folder) == pytest.approx(found, rel=2e-3, abs=2e-5)
    worst = max(float((load_file(padded.folder / WEIGHTS)[key] - value).norm()) for key, value in trained.items())
    assert worst < 0.02 * max(float(value.norm()) for value in trained.values())

    killed = tmp_path / "killed" / name
    shutil.copytree(done.folder, killed)
    shutil.rmtree(killed / "adapter")
    shutil.rmtree(killed / f"checkpoint-{STEPS}")
    resumed = run.train(config_of(name, inputs), quiet=True, resume=True, runs_dir=tmp_path / "killed")
    assert resumed.steps == STEPS
    again = load_file(killed / WEIGHTS)
    assert all(torch.equal(again[key], value) for key, value in trained.items())
