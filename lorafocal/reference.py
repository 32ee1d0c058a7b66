"""The reference policy: one call, chosen explicitly, verified before the first step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorafocal.data.packing import Pack
from lorafocal.errors import InputError
from lorafocal.model.adapters import AdapterSwitch
from lorafocal.objectives.pairwise import PairLogps
from lorafocal.policy import sequence_logps

KINDS = ("disabled_adapter",)


class DisabledAdapterReference:
    """The base itself: the same weights with the adapters switched off, in the same pack, by the same kernels."""

    def __init__(self, model: nn.Module) -> None:
        """`model` is the policy as it is called in training, an engine's wrapper included."""
        self.model = model
        self._switch = AdapterSwitch(model)

    @torch.no_grad()
    def logps(self, pack: Pack) -> PairLogps:
        """Reference log-probs of a pack's B pairs, (B,) each, in nats."""
        with self._switch.off():
            return sequence_logps(self.model, pack)


@torch.no_grad()
def check_identity(policy: PairLogps, reference: PairLogps, pair_ids: tuple[str, ...]) -> None:
    """The identity probe: before the first step, policy and reference must be the same model.

    A live reference in the same pack differs by exactly 0. Raises InputError with the remedies otherwise.
    """
    gaps: Tensor = torch.stack(
        ((policy.chosen - reference.chosen).abs(), (policy.rejected - reference.rejected).abs())
    ).amax(0)
    worst = int(gaps.argmax())
    if gaps[worst] != 0 or not torch.isfinite(gaps).all():
        raise InputError(
            "the reference is not the policy's starting point: before the first step their log-probs differ by"
            f" {float(gaps[worst]):.4g} nats on pair {pair_ids[worst]!r}, and must differ by exactly 0. The adapter has"
            " been trained before, so the base with the adapter off is an older model. Either merge that adapter into"
            " its base (`lorafocal merge`) and train a fresh adapter on the result, or start from a fresh adapter on"
            " this base. If the older model is deliberately the reference, set `reference.identity_probe: false`"
        )
