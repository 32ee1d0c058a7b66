"""The gate's numbers on made-up log-probs, where every one of them can be worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.objectives.inputs import PairLogps
from lorafocal.release.gate import FLOAT32_NOISE, MAX_DRIFT, GateFailure, GateReport, check, compare, gate_table
from lorafocal.release.merge import merge_adapter
from tests.saved_run import save_run

PAIRS = [TokenizedPair(str(n), [1], [2, 3], [4, 5, 6]) for n in range(2)]
REFERENCE = PairLogps(torch.tensor([-10.0, -20.0]), torch.tensor([-12.0, -21.0]))
LIVE = PairLogps(torch.tensor([-9.0, -19.0]), torch.tensor([-13.0, -22.0]))  # learned: 1 nat in every sequence


def report(merged: PairLogps, *, live: PairLogps = LIVE, dtype: str = "bfloat16", **others: object) -> GateReport:
    arguments = {"served": None, "gate_dtype": "float32"} | others
    return compare(PAIRS, live=live, reference=REFERENCE, merged=merged, dtype=dtype, **arguments)  # type: ignore[arg-type]


def shifted(*drift: float) -> PairLogps:
    values = torch.tensor(drift)
    return PairLogps(LIVE.chosen + values[:2], LIVE.rejected + values[2:])


def test_the_numbers_by_hand() -> None:
    served = shifted(0.25, 0.0, -0.25, 1.0)
    found = report(shifted(0.25, 0.0, -0.25, 0.5), served=served)
    assert (found.pairs, found.tokens, found.learned_rms) == (2, 10, 1.0)
    assert found.drift_rms == pytest.approx(math.sqrt((0.0625 + 0.0625 + 0.25) / 4))
    assert (found.drift_mean, found.drift_max, found.drift_per_token) == (0.25, 0.5, pytest.approx(0.1))
    assert (found.margin_drift_mean, found.margin_drift_max) == (0.5, 0.5)
    assert found.noise_rms == pytest.approx(0.25)
    assert found.rank_flips == 0


def test_a_gate_is_blind_where_the_base_itself_would_pass() -> None:
    def learned(size: float) -> GateReport:
        live = PairLogps(*((values.double() + size) for values in REFERENCE))
        return report(live, live=live)

    noise = FLOAT32_NOISE * math.sqrt((10**2 + 20**2 + 12**2 + 21**2) / 4)
    assert learned(0.0).blind
    assert learned(0.9 * noise).blind
    assert not learned(1.2 * noise / (1 - MAX_DRIFT)).blind


def test_a_margin_that_changes_sign_is_a_rank_flip_and_no_longer_right() -> None:
    found = report(shifted(-3.0, 0.0, 0.0, 0.0))
    assert (found.rank_flips, found.accuracy_live, found.accuracy_merged) == (1, 1.0, 0.5)


def test_what_gives_no_numbers_in_its_own_arithmetic_fails_however_small_the_drift() -> None:
    found = report(LIVE, served=shifted(math.nan, 0.0, 0.0, 0.0), dtype="float16")
    assert found.drift_rms == 0
    with pytest.raises(GateFailure, match=r"float16 the merged model's log-probs are not finite.*--dtype bfloat16"):
        check(found)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_verdict_does_not_depend_on_the_unit_of_what_was_learned(scale: float) -> None:
    def of(share: float) -> PairLogps:
        values = [reference + scale * share for reference in REFERENCE]
        return PairLogps(*(value.double() for value in values))

    def verdict(kept: float) -> bool:
        wide = PairLogps(*(value.double() for value in REFERENCE))
        return compare(
            PAIRS,
            live=of(1.0),
            reference=wide,
            merged=of(kept),
            served=None,
            dtype="bfloat16",
            gate_dtype="float32",
        ).passed

    assert verdict(1 - 0.9 * MAX_DRIFT)
    assert verdict(1 + 0.9 * MAX_DRIFT)
    assert not verdict(1 - 1.2 * MAX_DRIFT)
    assert not verdict(1 + 1.2 * MAX_DRIFT)
    assert not verdict(0.0)


def test_an_adapter_that_learned_nothing_passes_only_without_drift() -> None:
    assert report(REFERENCE, live=REFERENCE).passed
    rounding = PairLogps(*(value * (1 + FLOAT32_NOISE / 2) for value in REFERENCE))
    assert report(rounding, live=REFERENCE).passed
    drifted = report(LIVE, live=REFERENCE)
    assert not drifted.passed
    assert drifted.lost == math.inf
    assert json.loads(json.dumps(drifted.as_dict(), allow_nan=False))["lost"] is None


def test_numbers_that_are_not_finite_fail() -> None:
    with pytest.raises(GateFailure):
        check(report(shifted(math.nan, 0.0, 0.0, 0.0)))
    beyond = PairLogps(torch.tensor([math.inf, -19.0]), LIVE.rejected)
    limitless = compare(
        PAIRS, live=LIVE, reference=beyond, merged=LIVE, served=None, dtype="float32", gate_dtype="float32"
    )
    assert not limitless.passed


@pytest.mark.row("43")
def test_a_failure_is_a_user_s_error_and_names_the_ways_out() -> None:
    check(report(LIVE))
    with pytest.raises(InputError, match=r"--dtype float32, or publish the adapter") as failure:
        check(report(REFERENCE))
    assert "100% of the learned effect of 1 nats" in str(failure.value)
    with pytest.raises(GateFailure) as failure:
        check(report(REFERENCE, dtype="float32"))
    assert "--dtype" not in str(failure.value)
    with pytest.raises(GateFailure, match="--gate-dtype float32"):
        check(report(REFERENCE, gate_dtype="bfloat16"))


def test_the_table_shows_the_verdict() -> None:
    assert "FAILED" in report(REFERENCE).table()
    assert "passed" in report(LIVE, served=LIVE).table()
    assert report(LIVE).as_dict()["passed"] is True


@pytest.mark.row("42")
def test_merges_onto_two_bases_stand_side_by_side() -> None:
    one, other = report(LIVE), report(REFERENCE)
    table = gate_table({"onto the trained base": one, "onto the original base": other}).splitlines()
    assert one.table().splitlines()[:3] == table[:3]  # what both share is said once
    rows = [line for line in table if line.startswith(("log-prob", "margin", "accuracy", "rank", "gate"))]
    assert len(rows) == 5
    for line in rows:
        label, first, second = (part.strip() for part in (line[:22], *line[22:].split("   ", 1)))
        assert f"{label:<22}{first}" in one.table().splitlines()
        assert f"{label:<22}{second}" in other.table().splitlines()


def test_the_way_out_that_the_caller_knows_comes_first() -> None:
    with pytest.raises(GateFailure, match="Ways out: another base, or merge with --dtype float32"):
        check(report(REFERENCE), "another base")


def test_a_drift_just_past_the_limit_does_not_read_as_the_limit() -> None:
    with pytest.raises(GateFailure, match=r"0\.427% of the learned effect of .* nats; 0\.4% is allowed"):
        check(report(shifted(0.00427, 0.00427, 0.00427, 0.00427), max_drift=0.004))


@pytest.mark.row("41")
@pytest.mark.slow
def test_where_the_base_itself_would_pass_the_gate_a_note_says_so(tmp_path: Path) -> None:
    """Nearly all of what was learned rounds away, and float32 cannot see it: the gate passes, and proves nothing."""
    seen = {}
    for std in (1e-8, 0.05):
        run = save_run(tmp_path / str(std), std=std)
        report = merge_adapter(run.adapter, tmp_path / str(std) / "out")
        seen[std] = [note for note in report.notes if "the base itself would pass the gate" in note]
        assert report.gate.passed
    assert len(seen[1e-8]) == 1
    assert seen[0.05] == []
