"""AlpacaEval: known win rates from a judge of known taste, whatever its server does; and from annotations alone."""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from lorafocal.endpoints import Spending
from lorafocal.errors import InputError
from lorafocal.evaluate.alpaca import evaluate_annotations
from lorafocal.evaluate.alpaca_package import alpaca_eval
from lorafocal.evaluate.result import prompt_sha256, read_result
from tests.alpaca_files import (
    COUNT,
    MERITS,
    PROMPTS,
    SHOWN,
    WIN_RATE,
    evaluate,
    fair,
    gamed,
    log_odds,
    merit,
    numbers,
    sigmoid,
    text,
    weighed,
    write,
)
from tests.openai_server import Body, Said, cut, malformed, serving, slow, status

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def first_import() -> tuple[Any, Any]:
    """The process before and after the package is imported, which happens once."""
    before = _state()
    with alpaca_eval():
        pass
    return before, _state()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the answers of both models, where the hub's cache is empty."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    write(tmp_path / "ours.json", "ours")
    write(tmp_path / "theirs.json", "theirs")
    return tmp_path


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
    options = {"max_tokens": 1, "temperature": 1, "top_p": 1.0, "logprobs": True, "top_logprobs": 5}  # the package's
    sent = [{key: value for key, value in body.items() if key not in ("model", "messages")} for body in server.requests]
    assert all(each == options for each in sent)
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
        with pytest.raises(InputError, match=r"no prompt has a verdict \(24 have two different answers\)"):
            evaluate(files, server)


def test_draws_that_no_judge_saw_are_no_verdicts(files: Path) -> None:
    rows = json.loads((files / "theirs.json").read_text())
    for n in range(COUNT - 2):
        rows[n]["output"] = text("ours", n)
    (files / "nearly.json").write_text(json.dumps(rows))
    (files / "same.json").write_text((files / "ours.json").read_text().replace('"ours"', '"theirs"'))
    with serving(lambda body: Said("The", [{"The": -0.1, "Both": -3.0}])) as server:
        with pytest.raises(InputError, match=r"no prompt has a verdict \(2 have two different answers\)"):
            evaluate(files, server, reference=files / "nearly.json", annotations_out=files / "annotations.json")
        assert evaluate(files, server, reference=files / "same.json").counts["draws"] == COUNT  # all that there is
    with pytest.raises(InputError, match="no prompt has a verdict"):
        evaluate_annotations(files / "annotations.json")


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
        ("alpaca_eval_gpt4_turbo_fn", "needs (tool_choice, tools|function_call, functions), "),
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
