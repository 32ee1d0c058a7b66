"""Objectives that one more model guides: its log-probs stand beside the reference's."""

from __future__ import annotations

from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import Odds, rewards


def modpo(
    policy: PairLogps,
    reference: PairLogps,
    *,
    guide: PairLogps,
    beta: float,
    own_weight: float,
    guide_beta: float,
) -> Odds:
    """MODPO: what another objective's reward explains of a preference is taken out, and the rest grows by 1/own_weight.

    A reward is (beta * (log pi - log pi_ref) - (1 - own_weight) * m) / own_weight, where m, the other objective's, is
    the guide's implicit one, guide_beta * (log pi_guide - log pi_ref). own_weight 1 is DPO; below 1, log-odds start
    where the guide's margin puts them.
    Source: Zhou et al. 2024, arXiv:2310.03708, its loss for two objectives, as the official code has it.
    """
    own = rewards(policy, reference, beta=beta)
    others = rewards(guide, reference, beta=guide_beta)
    chosen, rejected = (
        (mine - (1 - own_weight) * other.detach()) / own_weight for mine, other in zip(own, others, strict=True)
    )
    return Odds(chosen - rejected, chosen, rejected)
