"""Log-probs of held-out pairs on both sides of a merge: the live adapter on its base, and the files that were written.

Both compute in the gate's dtype, in one layout, with the code of training.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lorafocal.data.packing import PairCollator
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError, ran_out
from lorafocal.evaluate.score import pair_logps
from lorafocal.model.head import causal_lm
from lorafocal.model.load import check_length
from lorafocal.model.saved import SavedAdapter, cast_parameters
from lorafocal.model.trained_modules import is_tied
from lorafocal.objectives.inputs import PairLogps
from lorafocal.policy import sequence_logps
from lorafocal.probes import choose_layout
from lorafocal.reference import DisabledAdapterReference
from lorafocal.release.gate import GateEvidence
from lorafocal.release.offload import open_live, open_merged


@dataclass(frozen=True, slots=True)
class Live:
    """What a merge must reproduce: log-probs of `pairs` with the adapter on and off, (B,) each.

    They were computed in `dtype`, in the `layout` that the model computes right in.
    """

    pairs: tuple[TokenizedPair, ...]
    logps: PairLogps
    reference: PairLogps
    dtype: str
    layout: str
    notes: tuple[str, ...] = ()

    def evidence(self, merged: PairLogps) -> GateEvidence:
        return GateEvidence(self.pairs, self.logps, self.reference, merged, self.dtype, self.layout)


def live_logps(saved: SavedAdapter, pairs: Sequence[TokenizedPair], dtype: str) -> Live:
    """Open the adapter on the base that training saw, and score `pairs` in `dtype`."""
    with _enough_memory():
        policy, notes = open_live(saved, dtype)
        check_length(causal_lm(policy), max(pair.longest for pair in pairs))
        layout = choose_layout(policy, "auto").layout
        run = partial(pair_logps, pairs=pairs, device=policy.device, collator=PairCollator(layout))
        live, reference = run(partial(sequence_logps, policy)), run(DisabledAdapterReference(policy).logps)
        return Live(tuple(pairs), live, reference, dtype, layout, notes)


@dataclass(frozen=True, slots=True)
class Merged:
    """Log-probs of a merged model, (B,) each: in the gate's arithmetic and, where that is finer, as it is `served`."""

    logps: PairLogps
    served: PairLogps | None
    notes: tuple[str, ...]


def merged_logps(folder: Path, live: Live, *, dtype: str, tied: bool) -> Merged:
    """Score the pairs of `live` with the model in `folder`, which is stored in `dtype`.

    Raises InputError where output head and embeddings are not one tensor as in the base (`tied`), or the reverse.
    """
    with _enough_memory():
        model, notes = open_merged(str(folder), live.dtype)
        if is_tied(model) != tied:
            raise InputError(
                "output head and embeddings are tied in the base, but not in the merged model, or the reverse."
            )
        choose_layout(model, live.layout)
        collator = PairCollator(live.layout)
        run = partial(pair_logps, partial(sequence_logps, model), live.pairs, device=model.device, collator=collator)
        merged = run()
        if live.dtype != "float32" or dtype == "float32":
            return Merged(merged, None, notes)
        cast_parameters(model, getattr(torch, dtype))  # exact: they were stored in it
        return Merged(merged, run(), notes)


@contextmanager
def _enough_memory() -> Iterator[None]:
    gc.collect()  # the model before: quantised layers have forwards that hold them in turn
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        raise InputError(
            "the model does not fit the GPU's memory. Gate in half of it with --gate-dtype bfloat16, or "
            "merge on the CPU by setting CUDA_VISIBLE_DEVICES to nothing."
        ) from error
