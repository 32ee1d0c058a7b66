"""Metrics are means over pairs, however the pairs were split."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafocal.errors import InputError
from lorafocal.evaluations import EvaluatedPair
from lorafocal.metrics import PairMetrics, PairTable, metric_keys, pair_values
from lorafocal.objectives import PairLogps, build_objective
from lorafocal.objectives.focal import focal_weight, turning_point
from lorafocal.objectives.pairwise import dpo_weight

GAMMA = 0.5
CPU = torch.device("cpu")
OBJECTIVE = build_objective("focalpo", beta=0.3, gamma=GAMMA)
KEYS = metric_keys(OBJECTIVE)


def twelve_logps() -> tuple[PairLogps, PairLogps]:
    """Policy and reference log-probs of twelve made-up pairs, the second a tie."""
    generator = torch.Generator().manual_seed(0)
    policy = PairLogps(*(torch.randn(12, generator=generator) * 20 for _ in range(2)))
    reference = PairLogps(*(torch.randn(12, generator=generator) * 20 for _ in range(2)))
    reference.chosen[1], reference.rejected[1] = policy.chosen[1], policy.rejected[1]
    return policy, reference


def twelve_pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, margins and losses of these pairs."""
    policy, reference = twelve_logps()
    losses = OBJECTIVE(policy, reference)
    return pair_values(OBJECTIVE, losses, policy, reference), losses.margins, losses.losses


def test_each_key_is_what_its_name_says():
    values, margins, losses = twelve_pairs()
    policy, reference = twelve_logps()
    metrics = PairMetrics(KEYS)
    metrics.add(values)
    means = metrics.means(CPU)
    assert tuple(means) == KEYS
    assert means["loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
    assert means["logps/chosen"] == pytest.approx(float(policy.chosen.mean()), rel=1e-6)
    assert means["logps/rejected"] == pytest.approx(float(policy.rejected.mean()), rel=1e-6)
    assert means["logps/reference_chosen"] == pytest.approx(float(reference.chosen.mean()), rel=1e-6)
    assert means["logps/reference_rejected"] == pytest.approx(float(reference.rejected.mean()), rel=1e-6)
    assert means["rewards/margins"] == pytest.approx(means["rewards/chosen"] - means["rewards/rejected"], rel=1e-5)
    assert means["rewards/accuracies"] == float((margins > 0).double().mean())
    assert means["rewards/ties"] == pytest.approx(1 / 12)
    weights = focal_weight(margins, gamma=GAMMA)
    assert means["focal/weight_mean"] == pytest.approx(float(weights.mean()), rel=1e-5)
    assert means["focal/ratio_to_dpo"] == pytest.approx(float((weights / dpo_weight(margins)).mean()), rel=1e-4)
    assert means["focal/turned_share"] == float((margins < turning_point(GAMMA)).double().mean()) > 0


@pytest.mark.row("17")
def test_the_share_whose_chosen_answer_fell_is_exact_and_a_tie_has_not_fallen():
    policy, reference = twelve_logps()
    fell = sum(ours < theirs for ours, theirs in zip(policy.chosen.tolist(), reference.chosen.tolist(), strict=True))
    assert 0 < fell < 12
    metrics = PairMetrics(KEYS)
    metrics.add(pair_values(OBJECTIVE, OBJECTIVE(policy, reference), policy, reference))
    assert metrics.means(CPU)["focal/chosen_fell_share"] == fell / 12
    all_but_the_tie = PairLogps(policy.chosen - 1, policy.rejected)
    metrics.reset()
    metrics.add(pair_values(OBJECTIVE, OBJECTIVE(policy, policy), policy, policy))
    assert metrics.means(CPU)["focal/chosen_fell_share"] == 0
    metrics.reset()
    metrics.add(pair_values(OBJECTIVE, OBJECTIVE(all_but_the_tie, policy), all_but_the_tie, policy))
    assert metrics.means(CPU)["focal/chosen_fell_share"] == 1


def test_nothing_is_made_up_for_answers_and_references_that_an_objective_does_not_look_at():
    sft = build_objective("sft")
    policy, lengths = twelve_logps()[0], torch.full((24,), 4)
    values = pair_values(sft, sft(policy, None, lengths), policy)
    assert metric_keys(sft) == ("loss", "logps/chosen")
    torch.testing.assert_close(values, torch.stack((-policy.chosen / 4, policy.chosen), 1).double())


@pytest.mark.row("16")
@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4), min_size=1, max_size=9), st.data())
def test_accuracies_are_shares_of_pairs_however_they_are_batched(rows, data):
    """Against the table of pairs, one at a time."""
    values = torch.tensor(rows, dtype=torch.float64)
    metrics, right = PairMetrics(KEYS), 0
    cut = data.draw(st.integers(0, len(rows)))
    for part in (values[:cut], values[cut:]):
        policy, reference = PairLogps(*part[:, :2].T), PairLogps(*part[:, 2:].T)
        metrics.add(pair_values(OBJECTIVE, OBJECTIVE(policy, reference), policy, reference))
    for row in values:
        chosen, rejected, reference_chosen, reference_rejected = row
        right += bool(0.3 * (chosen - reference_chosen) > 0.3 * (rejected - reference_rejected))
    means = metrics.means(CPU)
    assert means["rewards/accuracies"] == pytest.approx(right / len(rows), abs=1e-12)
    for key in ("rewards/accuracies", "rewards/ties", "focal/chosen_fell_share", "focal/turned_share"):
        assert 0 <= means[key] <= 1


@pytest.mark.row("15")
@pytest.mark.parametrize("sizes", [(12,), (1,) * 12, (5, 7), (11, 1)])
def test_a_split_changes_no_metric(sizes):
    values, *_ = twelve_pairs()
    whole, parts = PairMetrics(KEYS), PairMetrics(KEYS)
    whole.add(values)
    for part in values.split(sizes):
        parts.add(part)
    assert parts.means(CPU) == pytest.approx(whole.means(CPU), rel=1e-12)


def test_sums_survive_a_checkpoint_and_reset_empties_them():
    values, *_ = twelve_pairs()
    metrics, resumed = PairMetrics(KEYS), PairMetrics(KEYS)
    metrics.add(values)
    resumed.load(metrics.state(CPU))
    assert resumed.means(CPU) == metrics.means(CPU)
    metrics.reset()
    assert metrics.means(CPU) == {}
    resumed.load(metrics.state(CPU))
    assert resumed.means(CPU) == {}


def test_sums_of_other_metrics_are_refused():
    with pytest.raises(InputError, match=r"metrics: missing 'focal/chosen_fell_share'"):
        PairMetrics(KEYS).load(dict.fromkeys(set(KEYS) - {"focal/chosen_fell_share"}, 0.0) | {"num_pairs": 3})


def test_a_table_has_every_pair_in_the_order_of_the_data():
    policy, reference = twelve_logps()
    table = PairTable(3, CPU)
    for places in ([2], [1, 0]):
        table.add(places, PairLogps(*(t[places] for t in policy)), PairLogps(*(t[places] for t in reference)))
    columns = [t.tolist() for t in (*policy, *reference)]
    expected = [EvaluatedPair(name, *(column[n] for column in columns)) for n, name in enumerate(("a", "b", "b"))]
    assert table.rows(("a", "b", "b")) == expected == table.rows(("a", "b", "b"))
