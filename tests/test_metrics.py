"""Metrics are means over pairs, however the pairs were split."""

from __future__ import annotations

import pytest
import torch

from lorafocal.metrics import KEYS, PairMetrics, pair_values
from lorafocal.objectives import PairLogps, build_objective
from lorafocal.objectives.focal import focal_weight, turning_point
from lorafocal.objectives.pairwise import dpo_weight

GAMMA = 0.5
CPU = torch.device("cpu")


def twelve_pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, margins and losses of twelve made-up pairs, the second a tie."""
    generator = torch.Generator().manual_seed(0)
    policy = PairLogps(*(torch.randn(12, generator=generator) * 20 for _ in range(2)))
    reference = PairLogps(*(torch.randn(12, generator=generator) * 20 for _ in range(2)))
    reference.chosen[1], reference.rejected[1] = policy.chosen[1], policy.rejected[1]
    losses = build_objective("focalpo", beta=0.3, gamma=GAMMA)(policy, reference)
    return pair_values(losses, policy, gamma=GAMMA), losses.margins, losses.losses


def test_each_key_is_what_its_name_says():
    values, margins, losses = twelve_pairs()
    metrics = PairMetrics()
    metrics.add(values)
    means = metrics.means(CPU)
    assert tuple(means) == KEYS
    assert means["loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
    assert means["rewards/margins"] == pytest.approx(means["rewards/chosen"] - means["rewards/rejected"], rel=1e-5)
    assert means["rewards/accuracies"] == float((margins > 0).double().mean())
    assert means["rewards/ties"] == pytest.approx(1 / 12)
    weights = focal_weight(margins, gamma=GAMMA)
    assert means["focal/weight_mean"] == pytest.approx(float(weights.mean()), rel=1e-5)
    assert means["focal/ratio_to_dpo"] == pytest.approx(float((weights / dpo_weight(margins)).mean()), rel=1e-4)
    assert means["focal/turned_share"] == float((margins < turning_point(GAMMA)).double().mean()) > 0


@pytest.mark.row("15")
@pytest.mark.parametrize("sizes", [(12,), (1,) * 12, (5, 7), (11, 1)])
def test_a_split_changes_no_metric(sizes):
    values, *_ = twelve_pairs()
    whole, parts = PairMetrics(), PairMetrics()
    whole.add(values)
    for part in values.split(sizes):
        parts.add(part)
    assert parts.means(CPU) == pytest.approx(whole.means(CPU), rel=1e-12)


def test_sums_survive_a_checkpoint_and_reset_empties_them():
    values, *_ = twelve_pairs()
    metrics, resumed = PairMetrics(), PairMetrics()
    metrics.add(values)
    resumed.load(metrics.state(CPU))
    assert resumed.means(CPU) == metrics.means(CPU)
    metrics.reset()
    assert metrics.means(CPU) == {}
    resumed.load(metrics.state(CPU))
    assert resumed.means(CPU) == {}
