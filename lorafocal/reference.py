"""The reference policy: one call, of a kind chosen explicitly, verified before the first step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafocal.data.packing import Pack
from lorafocal.errors import InputError
from lorafocal.model.adapters import FROZEN_COPY, AdapterSwitch
from lorafocal.objectives.inputs import PairLogps
from lorafocal.policy import of_pairs, sums_of, token_logps


@dataclass(frozen=True, slots=True)
class ReferenceKind:
    """What is known of a kind before it is built."""

    starts_as_policy: bool  # so that the identity probe is on, unless it is switched off
    remedy: str  # where the probe finds that it does not


REFERENCES = {
    "disabled_adapter": ReferenceKind(
        True,
        "The adapter has been trained before, so the base with the adapter off is an older model. Either keep the"
        " adapter as it is now for the reference (`reference.kind: frozen_copy`), or merge it into its base first"
        " (`lorafocal merge`) and train a fresh adapter on the result",
    ),
    "frozen_copy": ReferenceKind(
        True, "The copy or the policy was changed after the copy was made. Build the trainer on the finished adapter"
    ),
    "separate_model": ReferenceKind(
        False, "Give the model that the policy starts from, in the same dtype, or use `reference.kind: frozen_copy`"
    ),
    "cached": ReferenceKind(
        True,
        "The stored log-probs are of another model than the policy starts from, or the policy was changed after it was"
        " built. Build the trainer on the model that the store was computed with, or compute the log-probs of this one:"
        " `lorafocal cache-reference CONFIG`",
    ),
}


class Reference(ABC):
    """Answers packs with the log-probs of another policy than the one in training."""

    @abstractmethod
    def token_logps(self, pack: Pack) -> Tensor:
        """Log-probs of a pack's N completion tokens, (N,), in nats, without gradients."""

    def sums(self, pack: Pack) -> Tensor:
        """The same summed over each of its 2B + M completions, (2B + M,)."""
        return sums_of(self.token_logps(pack), pack)

    def logps(self, pack: Pack) -> PairLogps:
        """The same of its B pairs, (B,) each."""
        return of_pairs(self.sums(pack), pack)


class DisabledAdapterReference(Reference):
    """The base itself: the same weights with the adapters switched off, in the same pack, by the same kernels."""

    def __init__(self, model: nn.Module) -> None:
        """`model` is the policy as it is called in training, an engine's wrapper included."""
        self.model = model
        self._switch = AdapterSwitch(model)

    @torch.no_grad()
    def token_logps(self, pack: Pack) -> Tensor:
        with self._switch.off():
            return token_logps(self.model, pack)


class FrozenCopyReference(Reference):
    """A frozen copy of the adapter as it was at the start, on the same base: for an adapter that is continued."""

    def __init__(self, model: nn.Module) -> None:
        """`model` is the policy as it is called in training, `model.adapters.add_frozen_copy` done."""
        self.model = model
        self._switch = AdapterSwitch(model)

    @torch.no_grad()
    def token_logps(self, pack: Pack) -> Tensor:
        with self._switch.to(FROZEN_COPY):
            return token_logps(self.model, pack)


class SeparateModelReference(Reference):
    """A second model, prepared for the policy's layout: twice the memory, and the only kind that can be any model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def token_logps(self, pack: Pack) -> Tensor:
        return token_logps(self.model, pack)


class CachedReference(Reference):
    """Log-probs that were looked up in a store before training began: no model, no forward."""

    def sums(self, pack: Pack) -> Tensor:
        """Raises InputError for a pack of pairs that were not looked up: there is no default."""
        return torch.cat(self._stored(pack.reference, pack))

    def token_logps(self, pack: Pack) -> Tensor:
        """Raises InputError likewise: of tokens, a store has log-probs where it was asked for them."""
        found: Tensor = self._stored(pack.reference_tokens, pack)
        return found

    @staticmethod
    def _stored(found: Any, pack: Pack) -> Any:
        if found is None:
            raise InputError(
                f"pair {pack.pair_ids[0]!r} comes without its reference log-probs: look its pairs up in the reference"
                " store first (`store.look_up(pairs)`), or use a live reference"
            )
        return found


def build_reference(kind: str | None, model: nn.Module, ref_model: nn.Module | None = None) -> Reference:
    """The reference of `kind` for the policy `model`, as it is called in training; `ref_model` is the separate one.

    Raises InputError for an unknown kind, and where a model is missing or would be ignored.
    """
    if kind not in REFERENCES:
        raise InputError(f"reference is {kind!r}; choose one of {', '.join(REFERENCES)}")
    check_ref_model(kind, ref_model)
    if kind == "cached":
        return CachedReference()
    if ref_model is not None:
        return SeparateModelReference(ref_model)
    return DisabledAdapterReference(model) if kind == "disabled_adapter" else FrozenCopyReference(model)


def check_ref_model(kind: str | None, ref_model: object) -> None:
    """Refuse a second model that would not be used, and a kind whose model is missing."""
    if ref_model is not None and kind not in ("separate_model", "cached"):
        raise InputError(
            f"ref_model was given, but the reference is {kind or 'not needed by this objective'}: it would be ignored."
            " Leave `ref_model` out (the base with its adapter off costs no second model), or set"
            ' `reference="separate_model"`, or "cached" to keep its log-probs in a store'
        )
    if ref_model is None and kind == "separate_model":
        raise InputError(
            'reference is "separate_model", but no model was given: pass `ref_model`'
            ' (in a config: `reference.model`), or use "disabled_adapter" or "frozen_copy"'
        )


def check_same_reference(saved: Mapping[str, str | None], now: Mapping[str, str | None]) -> None:
    """Refuse to resume under another reference than the checkpoint's: its kind, and the digest of a copy or model."""
    if saved["kind"] != now["kind"]:
        raise InputError(f"the checkpoint was trained with reference {saved['kind']}, this run has {now['kind']}")
    if saved["sha256"] != now["sha256"] and now["kind"] == "separate_model":
        raise InputError(
            "ref_model is not the one that this run began with (sha256 of a sample of its tensors"
            f" {saved['sha256']}, now {now['sha256']}): resume with that model, in the same dtype"
        )
    if saved["sha256"] != now["sha256"] and now["kind"] == "cached":
        raise InputError(
            "the stored log-probs are of another reference than this run began with (sha256 of its weights"
            f" {saved['sha256']}, now {now['sha256']}): resume on the same base, in the same dtype and quantisation,"
            " with the adapter that the run started from"
        )
    if saved["sha256"] != now["sha256"]:
        raise InputError(
            "the frozen copy is not the one that this run began with (sha256 of its tensors"
            f" {saved['sha256']}, now {now['sha256']}): resume with the adapter that the run started from, not with"
            " one from a checkpoint; the checkpoint brings the trained weights back by itself"
        )


@torch.no_grad()
def check_identity(
    policy: PairLogps,
    reference: PairLogps,
    pair_ids: tuple[str, ...],
    *,
    kind: str = "disabled_adapter",
    tolerance: float = 0.0,
) -> None:
    """The identity probe: before the first step, policy and reference must be the same model.

    A live reference in the same pack differs by exactly 0; a stored one, which was packed otherwise, by `tolerance`
    nats at most (`caching.spot_check` measures it). Raises InputError with the remedies otherwise.
    """
    gaps: Tensor = torch.stack(
        ((policy.chosen - reference.chosen).abs(), (policy.rejected - reference.rejected).abs())
    ).amax(0)
    worst = int(gaps.argmax())
    if not gaps[worst] <= tolerance:  # NaN among them is the maximum, and no number at most
        allowed = f"by at most {tolerance:.4g} (its noise)" if tolerance else "by exactly 0"
        raise InputError(
            "the reference is not the policy's starting point: before the first step their log-probs differ by"
            f" {float(gaps[worst]):.4g} nats on pair {pair_ids[worst]!r}, and must differ {allowed}."
            f" {REFERENCES[kind].remedy}. If another model is deliberately the reference, set"
            " `reference.identity_probe: false`"
        )
