"""Log-probs of held-out pairs on both sides of a merge: the live adapter on its base, and the files that were written.

Both compute in the gate's dtype, in one layout, with the code of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lorafocal.data.packing import PairCollator
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.evaluate.score import pair_logps
from lorafocal.model.head import causal_lm
from lorafocal.model.load import check_length, load_base
from lorafocal.model.saved import SavedAdapter, cast_parameters, open_adapter
from lorafocal.objectives.pairwise import PairLogps
from lorafocal.policy import sequence_logps
from lorafocal.probes import choose_layout
from lorafocal.reference import DisabledAdapterReference
from lorafocal.release.gate import GateEvidence


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

    def evidence(self, merged: PairLogps) -> GateEvidence:
        return GateEvidence(self.pairs, self.logps, self.reference, merged, self.dtype, self.layout)


def live_logps(saved: SavedAdapter, pairs: Sequence[TokenizedPair], dtype: str) -> Live:
    """Open the adapter on the base that training saw, and score `pairs` in `dtype`."""
    with _enough_memory():
        policy = open_adapter(saved, dtype=dtype)
        check_length(causal_lm(policy), max(pair.longest for pair in pairs))
        layout = choose_layout(policy, "auto").layout
        run = partial(pair_logps, pairs=pairs, device=policy.device, collator=PairCollator(layout))
        live, reference = run(partial(sequence_logps, policy)), run(DisabledAdapterReference(policy).logps)
        return Live(tuple(pairs), live, reference, dtype, layout)


def merged_logps(folder: Path, live: Live, *, dtype: str, tied: bool) -> tuple[PairLogps, PairLogps | None]:
    """Log-probs of the model in `folder`, stored in `dtype`: in the gate's dtype and, where that is finer, in its own.

    Raises InputError where output head and embeddings are not one tensor as in the base (`tied`), or the reverse.
    """
    with _enough_memory():
        model = load_base(str(folder), dtype=live.dtype).eval()
        if is_tied(model) != tied:
            raise InputError(
                "output head and embeddings are tied in the base, but not in the merged model, or the reverse."
            )
        choose_layout(model, live.layout)
        collator = PairCollator(live.layout)
        run = partial(pair_logps, partial(sequence_logps, model), live.pairs, device=model.device, collator=collator)
        merged = run()
        if live.dtype != "float32" or dtype == "float32":
            return merged, None
        cast_parameters(model, getattr(torch, dtype))  # exact: they were stored in it
        return merged, run()


def is_tied(model: PreTrainedModel) -> bool:
    """Whether output head and embeddings are one tensor."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            "the model does not fit the GPU's memory. Gate in half of it with --gate-dtype bfloat16, or "
            "merge on the CPU by setting CUDA_VISIBLE_DEVICES to nothing."
        ) from error
