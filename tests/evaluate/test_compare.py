"""Two results over the same prompts: known differences, pairing by prompt, and what cannot be paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorafocal.errors import InputError
from lorafocal.evaluate.compare import compare_results, evaluate_comparison
from lorafocal.evaluate.intervals import bootstrap_interval, paired_interval, sign_test
from lorafocal.evaluate.result import Result, Score, prompt_sha256


def result(
    verdicts: Mapping[str, Any] | Sequence[tuple[str, Any]], *, kind: str = "right", model: str = "m", **more: Any
) -> Result:
    rows = verdicts.items() if isinstance(verdicts, Mapping) else verdicts
    items = tuple({"prompt_sha256": prompt_sha256(prompt), kind: verdict} for prompt, verdict in rows)
    return Result(**{"benchmark": "rule", "model": model, "scores": {"right": Score(0.0)}, "items": items} | more)


def random_verdicts(seed: int, count: int = 60) -> dict[str, bool]:
    rng = np.random.default_rng(seed)
    return {f"prompt {number}": bool(rng.random() < 0.5) for number in range(count)}


@pytest.mark.row("58")
def test_right_and_wrong_are_compared_prompt_by_prompt() -> None:
    before, after = random_verdicts(0), random_verdicts(1)
    found = compare_results(result(before, model="base"), result(dict(reversed(after.items())), model="tuned"))
    changes = [after[prompt] - before[prompt] for prompt in before]
    better, worse = changes.count(1), changes.count(-1)
    assert found.model == "tuned against base"
    assert found.scores["difference"].value == pytest.approx(100 * (better - worse) / 60)
    low, high = bootstrap_interval(changes)
    assert found.scores["difference"].low == pytest.approx(100 * low)
    assert found.scores["difference"].high == pytest.approx(100 * high)
    assert found.scores["sign_test_p"].value == sign_test(better, worse)
    adjusted = paired_interval(list(before.values()), [after[prompt] for prompt in before])
    assert found.scores["difference_adjusted"] == Score(*(100 * bound for bound in adjusted))
    assert found.scores["second"].value - found.scores["first"].value == pytest.approx(100 * (better - worse) / 60)
    assert dict(found.counts) == {
        "prompts": 60, "better": better, "worse": worse, "unchanged": 60 - better - worse,
        "only_first": 0, "only_second": 0, "without_verdict": 0,
    }  # fmt: skip
    assert [item["score"] for item in found.items] == [100 * change for change in changes]


def test_the_comparison_turns_its_sign_when_the_two_change_places() -> None:
    one, other = result(random_verdicts(0)), result(random_verdicts(1))
    there, back = compare_results(one, other), compare_results(other, one)
    assert back.scores["difference"].value == -there.scores["difference"].value
    assert back.scores["difference_adjusted"].low == pytest.approx(-(there.scores["difference_adjusted"].high or 0))
    assert back.scores["sign_test_p"] == there.scores["sign_test_p"]


def test_scores_and_preferences_are_compared_in_their_units() -> None:
    scores = compare_results(
        result({"a": 1.0, "b": 2.0}, kind="score"), result({"a": 1.5, "b": 4.5}, kind="score")
    ).scores
    assert scores["difference"].value == 1.5
    assert (scores["difference"].low, scores["difference"].high) == (0.5, 2.5)
    shares = compare_results(result({"a": 0.25}, kind="preference"), result({"a": 1.0}, kind="preference")).scores
    assert shares["difference"].value == 75.0
    assert "difference_adjusted" not in shares


def test_prompts_of_one_side_alone_and_missing_verdicts_are_counted() -> None:
    first = result({"a": True, "b": True, "c": None, "d": False})
    second = result({"b": False, "c": True, "d": None, "e": True, "f": True})
    found = compare_results(first, second)
    assert found.scores["difference"].value == -100.0
    counts = {key: found.counts[key] for key in ("prompts", "only_first", "only_second", "without_verdict")}
    assert counts == {"prompts": 1, "only_first": 1, "only_second": 2, "without_verdict": 2}
    assert any("3 prompts stand in one of the two alone" in note for note in found.notes)
    assert any("2 shared prompts have no verdict" in note for note in found.notes)
    assert any("only 1 prompts changed" in note for note in found.notes)


def test_a_prompt_that_stands_twice_is_paired_in_its_order() -> None:
    first = result([("a", True), ("a", False), ("b", False)])
    second = result([("a", True), ("b", True), ("a", True), ("a", True)])
    found = compare_results(first, second)
    assert [item["score"] for item in found.items] == [0.0, 100.0, 100.0]
    assert found.counts["only_second"] == 1


def test_pairs_of_one_prompt_are_told_apart_by_their_answers() -> None:
    def pairs(order: str) -> Result:
        rows = {"x": True, "y": False}
        items = [{"prompt_sha256": "p", "answers_sha256": name, "right": rows[name]} for name in order]
        return replace(result({}), benchmark="pairs", items=tuple(items))

    assert compare_results(pairs("xy"), pairs("yx")).counts["unchanged"] == 2


def test_what_differs_beside_the_model_is_said() -> None:
    first = result({"a": True}, judge="x", sampling={"temperature": 0.9, "seed": 0}, settings={"rule": "exact"})
    second = result({"a": True}, judge="y", sampling={"temperature": 0.7, "seed": 0}, settings={"rule": "number"})
    notes = " ".join(compare_results(first, second).notes)
    for text in ("the judges differ (x and y)", "drawn otherwise: temperature differ", "evaluated otherwise: rule"):
        assert text in notes
    assert not any("differ" in note.partition("difference")[2] for note in compare_results(first, first).notes)


def test_what_cannot_be_paired_is_refused() -> None:
    good = result({"a": True})
    for other, message in (
        (replace(good, benchmark="reward_model"), "one is of rule, the other of reward_model"),
        (result({}), "has no items"),
        (result({"a": 1.0}, kind="score"), "in common"),
        (result({"b": True}), "share no prompt"),
        (result({"a": None}), "has a verdict in both"),
        (result({"a": "yes"}), "not a number"),
        (replace(good, items=({"right": True},)), r"items\[0\] of m lacks prompt_sha256"),
    ):
        with pytest.raises(InputError, match=message):
            compare_results(good, other)


def test_files_are_named_with_their_digests(tmp_path: Path) -> None:
    for name, seed in (("a.json", 0), ("b.json", 1)):
        result(random_verdicts(seed), model=name).write(tmp_path / name)
    found = evaluate_comparison(tmp_path / "a.json", tmp_path / "b.json")
    assert set(found.inputs) == {"a.json", "b.json"}
    found.write(tmp_path / "c.json")
    assert evaluate_comparison(tmp_path / "a.json", tmp_path / "b.json", seed=1) != found
    result({"elsewhere": True}).write(tmp_path / "d.json")
    with pytest.raises(InputError, match=r"a\.json and .*d\.json: they share no prompt"):
        evaluate_comparison(tmp_path / "a.json", tmp_path / "d.json")
