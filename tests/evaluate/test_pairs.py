"""Ranking of pairs: a run's numbers against its scores, known margins, soft labels, and what has no margins."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorafocal.data.toy import toy_preferences
from lorafocal.errors import InputError
from lorafocal.evaluate.compare import compare_results
from lorafocal.evaluate.intervals import share
from lorafocal.evaluate.pairs import evaluate_pairs, pairs_result
from lorafocal.evaluate.result import Result, read_result
from lorafocal.evaluate.score import PairScore, ScoredPairs, ScoreReport, score_file, score_pairs
from lorafocal.release.merge import merge_adapter
from tests.saved_run import BETA, SavedRun, save_run

SETTINGS = {"labels": "verdicts", "bins": 10, "resamples": 1000, "seed": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return save_run(tmp_path_factory.mktemp("pairs"), base_dtype=torch.float32, dtype="float32")


@pytest.fixture(scope="module")
def scored(run: SavedRun) -> ScoredPairs:
    return score_pairs(run.folder, run.folder / "held_out.jsonl")


def with_margins(scored: ScoredPairs, rows: list[tuple[float, int, int]]) -> Result:
    """The result of pairs with these margins and answers of these numbers of tokens."""
    scores = [
        PairScore(str(number), chosen, rejected, 0.0, 0.0, 0.0, 0.0, chosen_reward=margin, rejected_reward=0.0)
        for number, (margin, chosen, rejected) in enumerate(rows)
    ]
    pairs = [scored.pairs[number % len(scored.pairs)] for number in range(len(rows))]
    known = replace(scored, report=ScoreReport("known", BETA, scores), pairs=pairs)
    return pairs_result(known, settings=SETTINGS, inputs={})


def test_a_run_is_ranked_as_its_scores_say(run: SavedRun, tmp_path: Path) -> None:
    pairs = run.folder / "held_out.jsonl"
    found = evaluate_pairs(run.folder, pairs)
    scores = score_file(run.adapter, pairs)
    assert found.model == scores.target == "run"
    assert found.scores["accuracy"].value == pytest.approx(100 * scores.as_dict()["rewards/accuracies"])
    assert found.scores["margin"].value == pytest.approx(scores.as_dict()["rewards/margins"])
    assert found.settings["beta"] == BETA
    assert [item["margin"] for item in found.items] == scores.margins
    assert len({item["prompt_sha256"] for item in found.items}) == len(run.pairs)
    assert found.target is not None
    assert found.target["kind"] == "adapter"
    found.write(tmp_path / "pairs.json")
    assert read_result(tmp_path / "pairs.json").scores == found.scores
    assert str(run.folder) not in (tmp_path / "pairs.json").read_text()
    assert compare_results(found, found).counts["unchanged"] == len(run.pairs)


def test_a_merged_model_has_the_beta_of_its_training_and_needs_a_reference(run: SavedRun, tmp_path: Path) -> None:
    merge_adapter([run.adapter], tmp_path / "merged", dtype="float32")
    pairs = run.folder / "held_out.jsonl"
    merged = evaluate_pairs(tmp_path / "merged", pairs, reference=str(run.base))
    live = evaluate_pairs(run.folder, pairs)
    assert merged.settings["beta"] == BETA
    assert merged.settings["reference"] == "base"
    assert [item["margin"] for item in merged.items] == pytest.approx([item["margin"] for item in live.items], abs=1e-4)
    assert [item["prompt_sha256"] for item in merged.items] == [item["prompt_sha256"] for item in live.items]
    with pytest.raises(InputError, match=r"no margins, as there is no reference.*--reference"):
        evaluate_pairs(tmp_path / "merged", pairs)
    with pytest.raises(InputError, match=r"no margins, as no beta is known"):
        evaluate_pairs(run.base, pairs, reference=str(run.base))


def test_known_margins_have_known_numbers(scored: ScoredPairs) -> None:
    """Ten pairs: 6 right, 1 tie, 3 wrong; the chosen answer longer in 5, shorter in 3, as long in 2."""
    rows = [(2.0, 9, 5)] * 4 + [(2.0, 5, 9)] * 2 + [(0.0, 5, 5)] + [(-1.0, 9, 5), (-1.0, 5, 9), (-1.0, 5, 5)]
    found = with_margins(scored, rows)
    assert found.scores["accuracy"] == share([True] * 6 + [False] * 4).percent
    assert found.scores["longer_answer_accuracy"] == share([True] * 5 + [False] * 3).percent
    assert found.scores["accuracy_longer_chosen"] == share([True] * 4 + [False]).percent
    assert found.scores["accuracy_shorter_chosen"] == share([True] * 2 + [False]).percent
    assert dict(found.counts) == {"pairs": 10, "ties": 1, "longer_chosen": 5, "shorter_chosen": 3, "left_out": 0}
    assert found.scores["margin"].value == pytest.approx(0.9)
    p, q = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))
    assert found.scores["brier"].value == pytest.approx((6 * (1 - p) ** 2 + 0.25 + 3 * (1 - q) ** 2) / 10)
    assert found.scores["log_loss"].value == pytest.approx(-(6 * math.log(p) + math.log(0.5) + 3 * math.log(q)) / 10)
    # Confidences are 0.5 once, 1 - q three times and p six times, agreements 0.5, 0 and 1.
    assert found.scores["calibration_error"].value == pytest.approx((3 * (1 - q) + 6 * (1 - p)) / 10)
    assert [row["pairs"] for row in found.details["reliability"]] == [1, 3, 6]
    assert {row["quantile"]: row["margin"] for row in found.details["margins"]}[0.5] == 2.0
    assert any("1 of 10 margins are exactly 0" in note for note in found.notes)
    alike = with_margins(scored, [(1.0, 5, 5)] * 3).scores
    assert not [name for name in alike if "longer" in name or "shorter" in name]


def test_labels_may_be_shares_of_annotators(run: SavedRun, scored: ScoredPairs) -> None:
    def labelled(chosen: float | None, rejected: float | None, labels: str = "shares") -> Result:
        pairs = [replace(pair, score_chosen=chosen, score_rejected=rejected) for pair in scored.pairs]
        return pairs_result(replace(scored, pairs=pairs), settings=SETTINGS | {"labels": labels}, inputs={})

    even = labelled(0.5, 0.5)
    assert [row["agreement"] for row in even.details["reliability"]] == [0.5] * len(even.details["reliability"])
    assert "calibration_error_by_chance" not in even.scores
    assert labelled(1.0, 0.0).scores == labelled(0.5, 0.5, "verdicts").scores
    for wrong in ((7.0, 3.0), (0.9, 0.9)):
        with pytest.raises(InputError, match="no shares of annotators"):
            labelled(*wrong)
    with pytest.raises(InputError, match="no score_chosen and score_rejected"):
        labelled(None, None)
    with pytest.raises(InputError, match="labels is verdicts or shares"):
        evaluate_pairs(run.folder, run.folder / "held_out.jsonl", labels="soft")


def test_pairs_without_shares_are_refused_before_weights_are_loaded(
    run: SavedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafocal.evaluate.score._measured", lambda *_, **__: pytest.fail("computed for nothing"))
    with pytest.raises(InputError, match="no score_chosen and score_rejected"):
        evaluate_pairs(run.folder, run.folder / "held_out.jsonl", labels="shares")


def test_rows_that_give_no_pair_are_counted(run: SavedRun, tmp_path: Path) -> None:
    rows = toy_preferences(5, seed=3, held_out=True)
    rows[2]["rejected"] = rows[2]["chosen"]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate_pairs(run.folder, file)
    assert (found.counts["pairs"], found.counts["left_out"]) == (4, 1)
    assert any("1 rows of the file gave no pair" in note for note in found.notes)
    assert score_file(run.folder, file).as_dict()["left_out"] == 1
