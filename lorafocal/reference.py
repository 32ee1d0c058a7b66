"""The reference policy: one call, of a kind chosen explicitly, verified before the first step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafocal.data.packing import Pack
from lorafocal.errors import InputError
from lorafocal.model.adapters import FROZEN_COPY, AdapterSwitch
from lorafocal.model.beside import GUIDE, names_beside
from lorafocal.objectives.inputs import PairLogps
from lorafocal.ops.divergences import ReferenceRows
from lorafocal.policy import of_pairs, reference_rows, sums_of, token_logps
from lorafocal.references.combined import geometric, harmonic
from lorafocal.references.strategy import BASE, Strategy


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
    "adapter": ReferenceKind(
        False, "A finished adapter guides, and is another model than the start: leave `identity_probe` out"
    ),
    "moving": ReferenceKind(
        True, "The copy or the policy was changed after the copy was made. Build the trainer on the finished adapter"
    ),
    "several": ReferenceKind(
        False, "Several models together are another one than the start: leave `identity_probe` out"
    ),
}


class Reference(ABC):
    """Answers packs with the log-probs of another policy than the one in training."""

    @abstractmethod
    def token_logps(self, pack: Pack) -> Tensor:
        """Log-probs of a pack's N completion tokens, (N,), in nats, without gradients."""

    def rows(self, pack: Pack) -> ReferenceRows:
        """What it makes its logits of these tokens of: for objectives that compare whole distributions.

        Raises InputError for a reference that has none.
        """
        raise InputError(
            f"{type(self).__name__} has log-probs of the answers' tokens alone, and this objective compares with the"
            " reference's whole distribution at each: use a live reference, as disabled_adapter"
        )

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

    def rows(self, pack: Pack) -> ReferenceRows:
        with self._switch.off():
            return reference_rows(self.model, pack)


class AdapterReference(Reference):
    """Another adapter than the policy's, on the same base: `adapter`, by its name there."""

    def __init__(self, model: nn.Module, adapter: str) -> None:
        """`model` is the policy as it is called in training, with that adapter beside the policy's own."""
        self.model, self.adapter = model, adapter
        self._switch = AdapterSwitch(model)

    @torch.no_grad()
    def token_logps(self, pack: Pack) -> Tensor:
        with self._switch.to(self.adapter):
            return token_logps(self.model, pack)

    def rows(self, pack: Pack) -> ReferenceRows:
        with self._switch.to(self.adapter):
            return reference_rows(self.model, pack)


class SeveralReference(Reference):
    """Several references on the same base as one: each answers the pack, and their log-probs are combined."""

    def __init__(self, members: Sequence[Reference], strategy: Strategy) -> None:
        self.members, self.strategy = members, strategy

    @torch.no_grad()
    def token_logps(self, pack: Pack) -> Tensor:
        """The geometric mean's. Raises InputError for the harmonic one, which is made of whole answers."""
        if self.strategy.combine != "geometric":
            raise InputError("a harmonic reference has no log-probs of tokens: use `reference.combine: geometric`")
        return geometric(torch.stack([m.token_logps(pack) for m in self.members]), self._numbers)

    @torch.no_grad()
    def sums(self, pack: Pack) -> Tensor:
        """Raises InputError for the harmonic mean of further answers than a pair's two."""
        sums = torch.stack([member.sums(pack) for member in self.members])
        if self.strategy.combine == "geometric":
            return geometric(sums, self._numbers)
        if sums.shape[1] > 2 * pack.num_pairs:
            raise InputError("a harmonic reference is made of a pair's two answers: use `reference.combine: geometric`")
        weights, clip = self.strategy.weights, self.strategy.clip
        if weights is None or clip is None:
            raise ValueError("a harmonic reference has weights and a clip: `with_defaults` fills them in")
        return torch.cat(harmonic([of_pairs(row, pack) for row in sums], weights, clip=clip))

    @property
    def _numbers(self) -> Sequence[float]:
        if self.strategy.weights is None or isinstance(self.strategy.weights, str):
            raise ValueError("a geometric mean has a number for each member: `with_defaults` fills them in")
        return self.strategy.weights


class SeparateModelReference(Reference):
    """A second model, prepared for the policy's layout: twice the memory, and the only kind that can be any model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def token_logps(self, pack: Pack) -> Tensor:
        return token_logps(self.model, pack)

    def rows(self, pack: Pack) -> ReferenceRows:
        return reference_rows(self.model, pack, other=True)


class CachedReference(Reference):
    """Log-probs that were looked up in a store before training began: no model, no forward."""

    def sums(self, pack: Pack) -> Tensor:
        """Raises InputError for a pack of pairs that were not looked up: there is no default."""
        pairs = self._stored(pack.reference, pack)
        return torch.cat(pairs if pack.others is None else [*pairs, self._stored(pack.others.reference, pack)])

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


def build_reference(
    kind: str | None, model: nn.Module, ref_model: nn.Module | None = None, strategy: Strategy | None = None
) -> Reference:
    """The reference of `kind` for the policy `model`, as it is called in training; `ref_model` is the separate one.

    `strategy` says what belongs to its kind; adapters that it names stand beside the policy's
    (`model.beside.add_strategy`). Raises InputError for an unknown kind, and where a model is missing or would be
    ignored.
    """
    if kind not in REFERENCES:
        raise InputError(f"reference is {kind!r}; choose one of {', '.join(REFERENCES)}")
    check_ref_model(kind, ref_model)
    if kind == "cached":
        return CachedReference()
    if ref_model is not None:
        return SeparateModelReference(ref_model)
    if kind == "several":
        if strategy is None:
            raise InputError("reference is several, but nothing says of which: pass its strategy")
        names = iter(names_beside(strategy))
        live = (None if member == BASE else next(names) for member in strategy.members or ())
        members = [DisabledAdapterReference(model) if n is None else AdapterReference(model, n) for n in live]
        return SeveralReference(members, strategy)
    return DisabledAdapterReference(model) if kind == "disabled_adapter" else AdapterReference(model, FROZEN_COPY)


def build_guide(model: nn.Module) -> Reference:
    """The guide beside the policy `model`, as it is called in training."""
    return AdapterReference(model, GUIDE)


def check_ref_model(kind: str | None, ref_model: object) -> None:
    """Refuse a second model that would not be used, and a kind whose model is missing."""
    if ref_model is not None and kind is None:
        raise InputError("ref_model was given, but this objective has no reference: leave `ref_model` out")
    if ref_model is not None and kind not in ("separate_model", "cached"):
        raise InputError(
            f"ref_model was given, but the reference is {kind}: it would be ignored."
            ' Set `reference="separate_model"`, or "cached" to keep its log-probs in a store; where an adapter is'
            " trained, leave `ref_model` out (the base with its adapter off costs no second model)"
        )
    if ref_model is None and kind == "separate_model":
        raise InputError(
            'reference is "separate_model", but no model was given: pass `ref_model`'
            ' (in a config: `reference.model`), or use "disabled_adapter" or "frozen_copy"'
        )


def check_same_reference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume under another reference than the checkpoint's.

    That is its kind, the digest of what it is made of, the settings of its strategy, and the digest of the guide.
    """
    if saved["kind"] != now["kind"]:
        raise InputError(f"the checkpoint was trained with reference {saved['kind']}, this run has {now['kind']}")
    if (saved.get("settings") or {}) != (now.get("settings") or {}):
        raise InputError(
            f"the checkpoint's reference, {now['kind']}, was set to {saved.get('settings')}, this run's is set to"
            f" {now.get('settings')}: resume with the settings of then"
        )
    if saved["sha256"] != now["sha256"]:
        digests = {"saved": saved["sha256"], "now": now["sha256"]}
        raise InputError(_OTHER_REFERENCE.get(str(now["kind"]), _OTHER_COPY).format(**digests))
    if saved.get("guide") != now.get("guide"):
        raise InputError(
            f"the guide is not the one that this run began with (sha256 of its tensors {saved.get('guide')}, now"
            f" {now.get('guide')}): resume with the adapter of then"
        )


_OTHER_COPY = (
    "the frozen copy is not the one that this run began with (sha256 of its tensors {saved}, now {now}): resume with"
    " the adapter that the run started from, not with one from a checkpoint; the checkpoint brings the trained weights"
    " back by itself"
)
_OTHER_ADAPTERS = (
    "the reference's adapters are not those that this run began with (sha256 of their tensors {saved}, now {now}):"
    " resume with the folders of then"
)
_OTHER_REFERENCE = {
    "separate_model": "ref_model is not the one that this run began with (sha256 of a sample of its tensors {saved},"
    " now {now}): resume with that model, in the same dtype",
    "cached": "the stored log-probs are of another reference than this run began with (sha256 of its weights {saved},"
    " now {now}): resume on the same base, in the same dtype and quantisation, with the adapter that the run started"
    " from",
    "adapter": _OTHER_ADAPTERS,
    "several": _OTHER_ADAPTERS,
}


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
