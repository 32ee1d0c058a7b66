"""MODPO as its paper prints it, one pair at a time, in decimal arithmetic: the oracle of test_guided.py."""

from __future__ import annotations

from decimal import Decimal

from tests.objectives.oracles import ONE, Pair, cross_entropy


def modpo(
    x: Pair, guide: tuple[Decimal, Decimal], beta: Decimal, own_weight: Decimal, guide_beta: Decimal
) -> tuple[Decimal, Decimal]:
    """Zhou et al. 2024 (arXiv 2310.03708), two objectives: loss and log-odds.

    -log sigma(beta/w_k (log pi/ref)_w - beta/w_k (log pi/ref)_l - 1/w_k w_-k (r_-k(y_w) - r_-k(y_l))), where r_-k is
    guide_beta log pi_guide / pi_ref.
    """
    won, lost = x.logratios
    margin = guide_beta * ((guide[0] - x.b_w) - (guide[1] - x.b_l))
    z = beta / own_weight * won - beta / own_weight * lost - (ONE - own_weight) / own_weight * margin
    return cross_entropy(z), z
