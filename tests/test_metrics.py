"""Metrics are means over pairs, however the pairs were split."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafocal.errors import InputError
from lorafocal.evaluations import EvaluatedPair
from lorafocal.metrics import (
    PairMetrics,
    PairTable,
    answer_columns,
    effective_share,
    pair_values,
    sum_keys,
    summary,
)
from lorafocal.objectives import PairLogps, build_objective
from lorafocal.objectives.focal import focal_weight, turning_point
from lorafocal.objectives.pairwise import dpo_weight

GAMMA = 0.5
CPU = torch.device("cpu")
OBJECTIVE = build_objective("focalpo", beta=0.3, gamma=GAMMA)
KEYS = sum_keys(OBJECTIVE)
LENGTHS = torch.randint(1, 90, (24,), generator=torch.Generator().manual_seed(5))


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
    return pair_values(OBJECTIVE, losses, policy, reference, LENGTHS), losses.margins, losses.losses


def means_of(policy: PairLogps, reference: PairLogps, lengths: torch.Tensor = LENGTHS) -> dict[str, float]:
    """What is logged of these pairs."""
    metrics = PairMetrics(KEYS)
    metrics.add(pair_values(OBJECTIVE, OBJECTIVE(policy, reference), policy, reference, lengths))
    return metrics.means(CPU)


def test_each_key_is_what_its_name_says():
    values, margins, losses = twelve_pairs()
    policy, reference = twelve_logps()
    metrics = PairMetrics(KEYS)
    metrics.add(values)
    means = metrics.means(CPU)
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
    assert means_of(policy, reference)["focal/chosen_fell_share"] == fell / 12
    assert means_of(policy, policy)["focal/chosen_fell_share"] == 0
    assert means_of(PairLogps(policy.chosen - 1, policy.rejected), policy)["focal/chosen_fell_share"] == 1


def test_nothing_is_made_up_for_answers_and_references_that_an_objective_does_not_look_at():
    sft = build_objective("sft")
    policy, lengths = twelve_logps()[0], torch.full((24,), 4)
    values = pair_values(sft, sft(policy, None, lengths), policy, None, lengths)
    assert sum_keys(sft) == ("loss", "logps/chosen")
    torch.testing.assert_close(values, torch.stack((-policy.chosen / 4, policy.chosen), 1).double())


def ranked_pairs(rows: Sequence[Sequence[float]]) -> tuple[PairLogps, PairLogps]:
    """Policy and reference, of rows of their chosen and rejected log-probs."""
    columns = torch.tensor(rows, dtype=torch.float64).T
    return PairLogps(*columns[:2]), PairLogps(*columns[2:])


@pytest.mark.row("16")
def test_rankings_and_what_became_of_them_are_shares_of_whole_pairs() -> None:
    rows = [
        [-1.0, -2.0, -1.0, -3.0],  # right before and now, though the margin fell
        [-1.0, -2.0, -4.0, -4.5],  # right before and now, the margin grew
        [-5.0, -2.0, -1.0, -3.0],  # lost
        [-1.0, -2.0, -3.0, -1.0],  # won
        [-3.0, -2.0, -9.0, -1.0],  # still wrong, though the margin grew
        [-2.0, -2.0, -3.0, -3.0],  # a tie of both is right for neither
        [-1.0, -2.0, -3.0, -3.0],  # won from a tie
    ]
    found = means_of(*ranked_pairs(rows), lengths=torch.arange(14.0))
    assert (found["ranking/policy"], found["ranking/reference"]) == (4 / 7, 3 / 7)
    assert (found["ranking/lost"], found["ranking/won"]) == (1 / 7, 2 / 7)
    assert (found["ranking/kept"], found["ranking/mended"]) == (2 / 3, 2 / 4)
    assert (found["rewards/accuracies_where_right"], found["rewards/accuracies_where_wrong"]) == (1 / 3, 3 / 4)
    assert found["displacement/chosen"] == pytest.approx((0 + 3 - 4 + 2 + 6 + 1 + 2) / 7)
    assert found["displacement/rejected"] == pytest.approx((1 + 2.5 + 1 - 1 - 1 + 1 + 1) / 7)


@pytest.mark.row("16")
def test_shares_of_no_pair_are_left_out_and_not_0() -> None:
    right = ranked_pairs([[-1.0, -2.0, -1.0, -3.0]] * 3)
    wrong = ranked_pairs([[-2.0, -1.0, -3.0, -1.0]] * 3)
    of_right = {"ranking/kept", "rewards/accuracies_where_right"}
    of_wrong = {"ranking/mended", "rewards/accuracies_where_wrong"}
    for pairs, there, absent in ((right, of_right, of_wrong), (wrong, of_wrong, of_right)):
        found = means_of(*pairs, lengths=torch.arange(6.0)).keys()
        assert there <= found
        assert not absent & found


def test_the_effective_share_is_kishs_of_the_weights_and_1_where_all_weigh_alike() -> None:
    policy, reference = twelve_logps()
    weights = focal_weight(OBJECTIVE(policy, reference).margins.double(), gamma=GAMMA)
    expected = float(weights.sum() ** 2 / weights.square().sum()) / 12
    assert means_of(policy, reference)["focal/effective_share"] == pytest.approx(expected, rel=1e-9)
    assert means_of(policy, policy)["focal/effective_share"] == pytest.approx(1.0, abs=1e-12)
    assert effective_share(8, 2.0, 4.0) == 1 / 8  # one of eight has all the weight
    assert effective_share(8, 0.0, 0.0) is None


def test_the_length_correlation_is_pearsons_of_margin_and_lead_in_tokens() -> None:
    policy, reference = twelve_logps()
    margins = OBJECTIVE(policy, reference).margins.double()
    lead = (LENGTHS[:12] - LENGTHS[12:]).double()
    expected = float(torch.corrcoef(torch.stack((margins, lead)))[0, 1])
    assert means_of(policy, reference)["rewards/length_correlation"] == pytest.approx(expected, rel=1e-9)
    along = PairLogps(reference.chosen + lead, reference.rejected)
    assert means_of(along, reference)["rewards/length_correlation"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.row("16")
@pytest.mark.parametrize("margin", [0.0, 0.1, 1e5])
def test_a_correlation_with_what_does_not_vary_is_left_out(margin: float) -> None:
    """Of 4099 equal margins the raw moments leave a variance of rounding."""
    logps = PairLogps(torch.full((4099,), margin / 0.3, dtype=torch.float64), torch.zeros(4099, dtype=torch.float64))
    nought = PairLogps(torch.zeros(4099), torch.zeros(4099))
    lengths = torch.arange(8198.0).remainder(77)
    assert "rewards/length_correlation" not in means_of(logps, nought, lengths)
    policy, reference = twelve_logps()
    assert "rewards/length_correlation" not in means_of(policy, reference, torch.full((24,), 7))
    two = (PairLogps(*(side[:2] for side in logps)) for logps in (policy, reference))
    assert "rewards/length_correlation" not in means_of(*two, lengths=LENGTHS[:4])


def test_an_objective_without_a_reference_logs_what_is_defined() -> None:
    simpo = build_objective("simpo", beta=2.0, gamma_beta_ratio=0.5)
    policy = twelve_logps()[0]
    metrics = PairMetrics(sum_keys(simpo))
    metrics.add(pair_values(simpo, simpo(policy, None, LENGTHS), policy, None, LENGTHS))
    found = metrics.means(CPU)
    assert found["ranking/policy"] == float((policy.chosen > policy.rejected).double().mean())
    assert {"rewards/length_correlation", "focal/effective_share", "focal/turned_share"} <= found.keys()
    of_a_reference = ("ranking/reference", "ranking/kept", "displacement/chosen", "rewards/accuracies_where_right")
    assert not found.keys() & set(of_a_reference)


def test_one_formula_for_the_log_the_report_and_score() -> None:
    policy, reference = twelve_logps()
    rewards = OBJECTIVE(policy, reference)[1:3]
    of_all = summary(answer_columns(policy, reference, rewards, LENGTHS))
    logged = means_of(policy, reference)
    assert of_all.items() <= logged.items()
    assert set(logged) - set(of_all) == {"loss"} | {key for key in logged if key.startswith("focal/w")} | {
        "focal/ratio_to_dpo", "focal/turned_share", "focal/effective_share",
    }  # fmt: skip


@pytest.mark.row("16")
@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4), min_size=1, max_size=9), st.data())
def test_accuracies_are_shares_of_pairs_however_they_are_batched(rows, data):
    """Against the table of pairs, one at a time."""
    values = torch.tensor(rows, dtype=torch.float64)
    metrics, right = PairMetrics(KEYS), 0
    cut = data.draw(st.integers(0, len(rows)))
    for part in (values[:cut], values[cut:]):
        policy, reference = PairLogps(*part[:, :2].T), PairLogps(*part[:, 2:].T)
        lengths = torch.ones(2 * len(part))
        metrics.add(pair_values(OBJECTIVE, OBJECTIVE(policy, reference), policy, reference, lengths))
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


def test_sums_of_an_older_version_are_refused_by_what_they_lack():
    older = dict.fromkeys(set(KEYS) - {"ranking/lost", "weights_squared"}, 0.0) | {"num_pairs": 3}
    with pytest.raises(InputError, match=r"missing 'ranking/lost', missing 'weights_squared'\. .*library version"):
        PairMetrics(KEYS).load(older)


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
