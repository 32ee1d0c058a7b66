"""AlpacaEval: known win rates from a judge of known taste, whatever its server does; and from annotations alone."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pandas
import pytest

from lorafocal.endpoints import Endpoint, Spending
from lorafocal.errors import InputError
from lorafocal.evaluate import alpaca_rows
from lorafocal.evaluate.alpaca import evaluate_alpaca, evaluate_annotations
from lorafocal.evaluate.alpaca_package import alpaca_eval, length_controlled
from lorafocal.evaluate.alpaca_rows import order_of, prompts_digest
from lorafocal.evaluate.result import Result, prompt_sha256, read_result
from lorafocal.generation.formats import AnswerRow, write_answers
from tests.openai_server import Body, Said, Server, cut, malformed, serving, slow, status

COUNT = 24
DRAW = random.Random(0)
MERITS = {owner: [round(DRAW.gauss(0, 1), 3) for _ in range(COUNT)] for owner in ("ours", "theirs")}
PROMPTS = [f"Question number {n}, please?" for n in range(COUNT)]
SHOWN = re.compile(r'"output": """(.*?)"""', re.DOTALL)
ASKED = re.compile(r"Question number (\d+)")


def text(owner: str, n: int) -> str:
    """An answer whose length is a matter of its prompt, and whose merit can be read in it."""
    return f"merit {MERITS[owner][n]} " + "x" * (n % 7 if owner == "ours" else 3 * (n % 5))


def merit(answer: str) -> float:
    return float(answer.split()[1])


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


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


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write(tmp_path / "ours.json", "ours")
    write(tmp_path / "theirs.json", "theirs")
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def first_import() -> tuple[Any, Any]:
    """The process before and after the package is imported, which happens once."""
    before = _state()
    with alpaca_eval():
        pass
    return before, _state()


@pytest.fixture(autouse=True)
def _no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def evaluate(folder: Path, server: Server, **changed: Any) -> Result:
    options: dict[str, Any] = {"approve": lambda _: True, "reference": folder / "theirs.json", "say": lambda _: None}
    judge = Endpoint("judge", server.url, attempts=2, timeout_s=30.0)
    return evaluate_alpaca(folder / "ours.json", judge=judge, journal=folder / "journal.jsonl", **options | changed)


def numbers(result: Result) -> dict[str, Any]:
    return {name: score.value for name, score in result.scores.items()}


# ---- judging


def test_the_win_rate_of_a_judge_of_known_taste(files: Path) -> None:
    with serving(fair) as server:
        result = evaluate(files, server, annotations_out=files / "annotations.json")
    assert result.scores["win_rate"].value == pytest.approx(WIN_RATE, abs=1e-9)
    wins = sum(MERITS["ours"][n] > MERITS["theirs"][n] for n in range(COUNT))
    assert (result.counts["wins"], result.counts["losses"]) == (wins, COUNT - wins)
    assert result.scores["discrete_win_rate"].value == pytest.approx(100 * wins / COUNT)
    assert result.scores["win_rate"].low < WIN_RATE < result.scores["win_rate"].high  # type: ignore[operator]
    assert (result.model, result.judge, result.settings["reference"]) == ("ours", "judge", "theirs")
    assert [item["prompt_sha256"] for item in result.items] == [prompt_sha256(prompt) for prompt in PROMPTS]
    assert sum(item["preference"] for item in result.items) / COUNT == pytest.approx(WIN_RATE / 100)


def test_what_is_asked_is_the_packages_prompt_once_a_pair_and_in_both_orders(files: Path) -> None:
    with serving(fair) as server:
        evaluate(files, server)
    assert {(body["max_tokens"], body["logprobs"], body["top_logprobs"]) for body in server.requests} == {(1, True, 5)}
    assert {tuple(message["role"] for message in body["messages"]) for body in server.requests} == {("system", "user")}
    asked = Counter(log_odds(body)[0] for body in server.requests)
    assert asked == Counter(range(COUNT))
    first = [SHOWN.findall(body["messages"][-1]["content"])[0] for body in server.requests]
    ours = sum(answer in {text("ours", n) for n in range(COUNT)} for answer in first)
    assert 0 < ours < COUNT


@pytest.mark.row("58")
def test_annotations_give_the_same_numbers_alone(files: Path) -> None:
    with serving(fair) as server:
        judged = evaluate(files, server, annotations_out=files / "annotations.json")
    alone = evaluate_annotations(files / "annotations.json")
    assert numbers(alone) == numbers(judged)
    assert alone.items == judged.items
    assert alone.judge == "judge"
    rows = json.loads((files / "annotations.json").read_text())
    with alpaca_eval() as package:
        assert package.metrics.get_winrate(rows)["win_rate"] == pytest.approx(WIN_RATE)


def test_a_judge_that_likes_what_it_reads_first_is_found_out(files: Path) -> None:
    with serving(lambda body: weighed(30.0)) as server:
        result = evaluate(files, server)
    bias = result.scores["first_answer_preferred"]
    assert (bias.value, bias.high) == (100.0, 100.0)
    assert bias.low is not None
    assert bias.low > 80
    assert 20 < result.scores["win_rate"].value < 80  # the order was drawn, so the taste for it cancels
    assert any("read first in 100.0%" in note for note in result.notes)


def test_equal_answers_are_a_draw_and_nobody_is_asked(files: Path) -> None:
    rows = json.loads((files / "theirs.json").read_text())
    rows[3]["output"] = text("ours", 3)
    (files / "same.json").write_text(json.dumps(rows))
    with serving(fair) as server:
        result = evaluate(files, server, reference=files / "same.json")
    assert len(server.requests) == COUNT - 1
    assert result.items[3]["preference"] == 0.5
    assert result.counts["draws"] == 1


@pytest.mark.row("58")
def test_a_verdict_that_cannot_be_read_is_counted_and_not_guessed(files: Path) -> None:
    def babbling(body: Body) -> Said:
        n, z = log_odds(body)
        return Said("The", [{"The": -0.1, "Both": -3.0}]) if n < 6 else weighed(z)

    with serving(babbling) as server:
        result = evaluate(files, server, annotations_out=files / "annotations.json")
    known = [sigmoid(MERITS["ours"][n] - MERITS["theirs"][n]) for n in range(6, COUNT)]
    assert result.scores["win_rate"].value == pytest.approx(100 * sum(known) / len(known))
    assert (result.counts["malformed_verdicts"], result.counts["judged"]) == (6, COUNT - 6)
    assert [item["preference"] for item in result.items[:6]] == [None] * 6
    assert any("6 of the 24 prompts have no verdict (6 unreadable replies)" in note for note in result.notes)
    assert numbers(evaluate_annotations(files / "annotations.json")) == numbers(result)


def test_no_verdict_at_all_is_no_win_rate(files: Path) -> None:
    with serving(lambda body: Said("The", [{"The": -0.1, "Both": -3.0}])) as server:
        with pytest.raises(InputError, match="no prompt has a verdict"):
            evaluate(files, server)


def test_log_probs_of_one_token_alone_are_told(files: Path) -> None:
    def hard(body: Body) -> Said:
        said = "m" if log_odds(body)[1] > 0 else "M"
        return Said(said, [{said: -0.3}])

    with serving(hard) as server:
        result = evaluate(files, server)
    assert result.counts["unweighted_verdicts"] == COUNT
    assert result.scores["win_rate"].value == pytest.approx(result.scores["discrete_win_rate"].value)


def test_a_judge_without_log_probs_is_refused_after_one_question(files: Path) -> None:
    with serving(lambda body: "m") as server:
        with pytest.raises(InputError, match=r"judge gives no log-probs.*--annotator alpaca_eval_gpt4"):
            evaluate(files, server)
    assert len(server.requests) == 1


def test_an_annotator_that_reads_words(files: Path) -> None:
    def ranks(body: Body) -> str:
        said = body["messages"][-1]["content"]
        if "number 2," in said:
            return "I would rather not"
        first, second = (merit(answer) for answer in re.findall(r'"answer": """(.*?)"""', said, re.DOTALL))
        order = ["model_1", "model_2"] if first > second else ["model_2", "model_1"]
        return str([{"model": name, "rank": rank} for rank, name in enumerate(order, start=1)])

    with serving(ranks) as server:
        result = evaluate(files, server, annotator="alpaca_eval_gpt4")
    wins = sum(MERITS["ours"][n] > MERITS["theirs"][n] for n in range(COUNT) if n != 2)
    assert result.scores["win_rate"].value == pytest.approx(100 * wins / (COUNT - 1))
    assert result.counts["malformed_verdicts"] == 1
    assert any("AlpacaEval 2's is weighted_alpaca_eval_gpt4_turbo" in note for note in result.notes)


# ---- what a server does


def test_faults_that_pass_change_nothing(files: Path) -> None:
    with serving(fair) as server:
        expected = evaluate(files, server)
    (files / "journal.jsonl").unlink()
    faults = [status(500), None, status(429), malformed, cut, None, status(503), slow(0.2)]
    with serving(fair, faults=faults[:-1]) as server:
        result = evaluate(files, server)
    assert result.as_dict() == expected.as_dict()


@pytest.mark.row("58")
def test_missing_replies_are_refused_or_allowed_and_the_same_call_goes_on(files: Path) -> None:
    refuse = True

    def picky(body: Body, key: str | None, respond: Callable[..., None]) -> None:
        fail = status(400, "content_filter") if refuse and log_odds(body)[0] in (1, 2, 3) else None
        said = fair(body)
        top = [{"token": t, "logprob": p} for t, p in said.top_logprobs[0].items()]  # type: ignore[index]
        choice = {"message": {"content": said.text}, "logprobs": {"content": [{"top_logprobs": top}]}}
        fail(body, key, respond) if fail else respond(200, json.dumps({"choices": [choice]}).encode(), {})

    with serving(faults=[picky] * 100) as server:
        with pytest.raises(InputError, match=r"3 of 24 questions have no reply.*content_filter.*--allow-missing"):
            evaluate(files, server)
        allowed = evaluate(files, server, allowed_missing=3)
        assert (allowed.counts["without_reply"], allowed.counts["malformed_verdicts"]) == (3, 0)
        assert allowed.counts["judged"] == COUNT - 3
        refuse = False
        before = len(server.requests)
        result = evaluate(files, server)
        assert len(server.requests) == before + 3
    assert result.scores["win_rate"].value == pytest.approx(WIN_RATE)


def test_a_second_call_asks_nothing_and_writes_the_same_bytes(files: Path) -> None:
    with serving(fair) as server:
        for name in ("one", "two"):
            evaluate(files, server, annotations_out=files / f"{name}.annotations.json").write(files / f"{name}.json")
        assert len(server.requests) == COUNT
    assert (files / "one.json").read_bytes() == (files / "two.json").read_bytes()
    assert (files / "one.annotations.json").read_bytes() == (files / "two.annotations.json").read_bytes()
    assert read_result(files / "one.json").scores["win_rate"].value == pytest.approx(WIN_RATE)


def test_nothing_is_sent_before_the_bill_is_agreed_to(files: Path) -> None:
    bills: list[Spending] = []

    def no(spending: Spending) -> bool:
        bills.append(spending)
        return False

    with serving(fair) as server:
        with pytest.raises(InputError, match="nothing was sent"):
            evaluate(files, server, approve=no, price=(2.0, 8.0))
    assert server.requests == []
    [bill] = bills
    assert (bill.questions, bill.completion_tokens) == (COUNT, COUNT)
    assert bill.usd == pytest.approx((2 * bill.prompt_tokens + 8 * COUNT) / 1e6)


# ---- what is refused before anything is sent


def changed(rows: list[dict[str, Any]], **fields: str) -> list[dict[str, Any]]:
    return [row | fields for row in rows]


BEFORE: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "one name for two models": (lambda rows: changed(rows, generator="theirs"), "compared with itself.*--name"),
    "two models": (lambda rows: changed(rows[:9], generator="x") + rows[9:], "answers of 2 models"),
    "a prompt twice": (lambda rows: rows + rows[:1], "ours.json, row 25, key `instruction`: this prompt has an answer"),
    "other prompts": (lambda rows: changed(rows[:1], instruction="else"), "no prompt in common"),
    "a template's mark": (lambda rows: changed(rows[:1], output="a<|im_end|>b"), "prompt 1 of the reference.*im_end"),
    "a placeholder": (lambda rows: changed(rows[:1], output="a {output_2} b"), "the text of ours holds {output_2}"),
}


@pytest.mark.row("58")
@pytest.mark.parametrize("case", BEFORE)
def test_answers_that_cannot_be_compared_are_refused_before_anything_is_sent(files: Path, case: str) -> None:
    change, message = BEFORE[case]
    rows = json.loads((files / "ours.json").read_text())
    (files / "ours.provenance.json").unlink()
    (files / "ours.json").write_text(json.dumps(change(rows)))
    with serving(fair) as server, pytest.raises(InputError, match=message):
        evaluate(files, server)
    assert server.requests == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weighted_alpaca_eval", "no single annotator.*nearest: weighted_alpaca_eval_gpt4_turbo"),
        ("../gpt4", "no single annotator"),
        ("alpaca_eval_gpt4_turbo_fn", "needs tool_choice, tools"),
        ("claude", "does not ask a chat model"),
        ("alpaca_farm", "no single annotator"),
    ],
)
def test_an_annotator_that_cannot_be_asked_is_refused(files: Path, name: str, message: str) -> None:
    with serving(fair) as server, pytest.raises(InputError, match=message):
        evaluate(files, server, annotator=name)
    assert server.requests == []


def test_without_a_reference_and_without_the_hubs_the_way_to_it_is_told(files: Path) -> None:
    with serving(fair) as server, pytest.raises(InputError, match="hf download tatsu-lab/alpaca_eval alpaca_eval_gpt4"):
        evaluate(files, server, reference=None)


def test_prompts_that_one_file_lacks_are_counted(files: Path) -> None:
    write(files / "ours.json", "ours", [*range(10)])
    with serving(fair) as server:
        result = evaluate(files, server)
    assert (result.counts["prompts"], result.counts["prompts_without_answer"]) == (COUNT, COUNT - 10)
    assert any("14 of the 24 prompts have no answer of the model" in note for note in result.notes)


# ---- the length control


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


def test_the_length_controlled_rate_is_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = judgments(tmp_path / "a.json", PREFERENCES)
    result = evaluate_annotations(file, gamed=gamed(tmp_path / "g.csv"))
    with alpaca_eval() as package:
        from alpaca_eval.metrics import glm_winrate

        monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **_: str(tmp_path / "g.csv"))
        rows = json.loads(file.read_text())
        expected = package.metrics.get_length_controlled_winrate(rows, save_weights_dir=None)
    assert result.scores["length_controlled_win_rate"].value == pytest.approx(expected["length_controlled_winrate"])
    assert result.scores["win_rate"].value == pytest.approx(expected["win_rate"])
    assert result.scores["win_rate"].standard_error == pytest.approx(expected["standard_error"])
    assert result.settings["length_control"] == "length_controlled_v1"
    assert result.inputs.keys() == {"a.json", "g.csv"}


def test_a_model_that_wins_by_length_alone_comes_to_a_half(tmp_path: Path) -> None:
    words = [2 * (n % 5) + 4 for n in range(COUNT)]
    rows = pandas.DataFrame(
        {
            "preference": [1 + sigmoid(3 * math.tanh(length / 3)) for length in words],
            "output_1": "x",
            "output_2": ["x" * (1 + length) for length in words],
            "generator_1": "theirs",
            "generator_2": "ours",
        }
    )
    raw = 100 * (rows["preference"].mean() - 1)
    assert raw > 85
    assert abs(length_controlled(rows, gamed(tmp_path / "g.csv")) - 50) < abs(raw - 50) / 2


@pytest.mark.row("58")
def test_the_order_of_the_rows_does_not_matter_where_a_reference_tells_the_positions(files: Path) -> None:
    table = gamed(files / "g.csv")
    expected = numbers(evaluate_annotations(judgments(files / "a.json", PREFERENCES), gamed=table))
    shuffled = judgments(files / "b.json", PREFERENCES, SHUFFLED)
    found = evaluate_annotations(shuffled, reference=files / "theirs.json", gamed=table)
    assert numbers(found) == pytest.approx(expected, abs=1e-9)
    in_file_order = numbers(evaluate_annotations(shuffled, gamed=table))
    assert abs(in_file_order["length_controlled_win_rate"] - expected["length_controlled_win_rate"]) > 0.01


def test_answers_in_another_order_are_judged_to_the_same_numbers(files: Path) -> None:
    table = gamed(files / "g.csv")
    with serving(fair) as server:
        expected = numbers(evaluate(files, server, gamed=table))
        write(files / "ours.json", "ours", SHUFFLED)
        assert numbers(evaluate(files, server, gamed=table)) == pytest.approx(expected, abs=1e-9)
        assert len(server.requests) == COUNT
    assert "length_controlled_win_rate" in expected


def test_the_file_in_the_hubs_cache_is_used(tmp_path: Path) -> None:
    file = judgments(tmp_path / "a.json", PREFERENCES)
    without = evaluate_annotations(file)
    assert "length_controlled_win_rate" not in without.scores
    assert any("hf download tatsu-lab/alpaca_eval df_gamed.csv" in note for note in without.notes)
    snapshot = tmp_path / "hub" / "datasets--tatsu-lab--alpaca_eval" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    gamed(snapshot / "df_gamed.csv")
    given = evaluate_annotations(file, gamed=gamed(tmp_path / "g.csv"))
    assert evaluate_annotations(file).scores == given.scores
    gamed(snapshot / "df_gamed.csv", COUNT + 1)
    assert any("of 25 prompts by their position, and there are 24" in note for note in evaluate_annotations(file).notes)


GAMED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (lambda path: None, "cannot be read as df_gamed.csv"),
    "empty": (lambda path: path.write_text(""), "cannot be read as df_gamed.csv"),
    "a column less": (lambda path: path.write_text("model,index\na,0\n"), "no column preference"),
    "words": (lambda path: gamed(path, preference="high"), "column preference holds values of another kind"),
    "no flags": (lambda path: gamed(path, not_gamed_baseline=3), "column not_gamed_baseline"),
    "fewer prompts": (lambda path: gamed(path, 20), "of 20 prompts by their position, and there are 24"),
}


@pytest.mark.parametrize("case", GAMED)
def test_a_given_file_that_does_not_serve_is_refused_before_anything_is_sent(files: Path, case: str) -> None:
    make, message = GAMED[case]
    make(files / "g.csv")
    with serving(fair) as server, pytest.raises(InputError, match=message):
        evaluate(files, server, gamed=files / "g.csv")
    assert server.requests == []


def test_alpaca_evals_prompts_in_another_order_have_no_length_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = [prompt_sha256(prompt) for prompt in PROMPTS]
    monkeypatch.setattr(alpaca_rows, "IN_ORDER", prompts_digest(hashes))
    monkeypatch.setattr(alpaca_rows, "IN_ANY_ORDER", prompts_digest(sorted(hashes)))
    assert order_of(PROMPTS) == "own"
    assert order_of(PROMPTS[1:]) == "not these prompts"
    file, table = judgments(tmp_path / "a.json", PREFERENCES, SHUFFLED), gamed(tmp_path / "g.csv")
    with pytest.raises(InputError, match="in another order than its own"):
        evaluate_annotations(file, gamed=table)
    assert not any("are not AlpacaEval's" in note for note in evaluate_annotations(file).notes)


# ---- annotations that exist


def test_old_and_missing_spellings_of_a_preference(tmp_path: Path) -> None:
    values: list[Any] = [2.0, 1.0, 0, 1.5, None, -1, float("nan"), *[1.0] * (COUNT - 7)]
    result = evaluate_annotations(judgments(tmp_path / "a.json", values), gamed=gamed(tmp_path / "g.csv"))
    assert 0 < result.scores["length_controlled_win_rate"].value < 50
    assert result.counts["prompts_without_verdict"] == 3
    assert result.counts["draws"] == 2
    assert result.scores["win_rate"].value == pytest.approx(100 * 2 / (COUNT - 3))
    assert result.judge == "gpt-4-1106-preview"
    assert any("order bias is not known" in note for note in result.notes)


ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "a word": ({"preference": "2"}, "row 1, key `preference`"),
    "too high": ({"preference": 2.5}, "row 1, key `preference`"),
    "a flag": ({"preference": True}, "row 1, key `preference`"),
    "no text": ({"output_2": 3}, "row 1, key `output_2`"),
    "one prompt": ({"instruction": "same"}, "row 2, key `instruction`: an earlier row judges this prompt"),
    "itself": ({"generator_1": "ours"}, "are one model, 'ours'"),
}


@pytest.mark.parametrize("case", ROWS)
def test_annotations_that_are_none_are_refused_by_row_and_key(tmp_path: Path, case: str) -> None:
    fields, message = ROWS[case]
    with pytest.raises(InputError, match=message):
        evaluate_annotations(judgments(tmp_path / "a.json", PREFERENCES, **fields))


@pytest.mark.parametrize("key", ["instruction", "output_1", "generator_2", "annotator", "preference"])
def test_a_key_that_is_missing_is_named(tmp_path: Path, key: str) -> None:
    rows = json.loads(judgments(tmp_path / "a.json", PREFERENCES).read_text())
    del rows[4][key]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=f"a.json, row 5, key `{key}`: missing"):
        evaluate_annotations(tmp_path / "a.json")


# ---- the package leaves nothing behind


def _state() -> tuple[Any, ...]:
    root = logging.getLogger()
    return root.level, root.handlers[:], root.manager.disable, dict(os.environ), warnings.filters[:]


def _written(folder: Path) -> Iterator[tuple[str, float]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            yield str(path.relative_to(folder)), path.stat().st_mtime


def test_the_import_changes_nothing_outside_the_package(first_import: tuple[Any, Any]) -> None:
    before, after = first_import
    assert after == before


def test_the_process_and_the_package_are_as_they_were(files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import sklearn
    from alpaca_eval import __file__ as package

    folder, state, config = Path(package).parent, _state(), sklearn.get_config()
    before = dict(_written(folder))
    with serving(fair) as server:
        evaluate(files, server, gamed=gamed(files / "g.csv"), annotations_out=files / "annotations.json")
    assert _state() == state
    assert sklearn.get_config() == config
    assert dict(_written(folder)) == before
    assert capfd.readouterr() == ("", "")
