"""What a run knows of its adapter, against what lies in its folder now.

The gate compares the live adapter with the merged model, and both are made of the same files. Whether these are still
the ones that were trained is told by what training left: the log-probs of its last evaluation, and the digests of
tokenizer and chat template in its manifest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from lorafocal.data.held_out import HELD_OUT_FILE, read_held_out
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.evaluations import EvaluatedPair, evaluation_file, read_evaluation
from lorafocal.model.load import tokenizer_digests
from lorafocal.model.saved import TEMPLATE_FILE, SavedAdapter
from lorafocal.release.measure import Live
from lorafocal.run_folder import ADAPTER_CONFIG, read_manifest, run_of

# A token is rounded in bfloat16, or on a GPU in TF32 at the coarsest; what that makes of an answer adds up like a
# random walk, and other machines, kernels and layouts round otherwise.
ROUNDING = {"bfloat16": torch.finfo(torch.bfloat16).eps, "float32": 2.0**-10}
SLACK = 32.0
_COMPARED = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
_WAYS_OUT = (
    "Restore it. If it is meant to be so, copy the adapter's folder out of the run, where nothing is known of its"
    " training, and say --base and --pairs"
)


def check_tokenizer(adapter: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse another vocabulary or chat template than the run that left `adapter` was trained with, where it says."""
    own = adapter / TEMPLATE_FILE
    if own.is_file() and own.read_text(encoding="utf-8") != tokenizer.chat_template:
        raise InputError(
            f"{adapter} was trained with another chat template than the one that would be published: merge or export it"
            " by itself"
        )
    run = run_of(adapter)
    manifest = read_manifest(run)
    for key, found in tokenizer_digests(tokenizer).items():
        if manifest.get(key) not in (None, found):
            what = key.removesuffix("_sha256").replace("_", " ")
            raise InputError(
                f"the base's {what} is not the one of training ({key} in the manifest of {run}:"
                f" {str(manifest[key])[:12]}..., now {found[:12]}...), and the model would be published with it."
                f" {_WAYS_OUT}"
            )


def check_measured(saved: SavedAdapter, live: Live) -> None:
    """Refuse an adapter whose log-probs are not those that its run measured after its last step, where it did.

    Compared are the pairs of `live` that are the run's own held-out ones; the reference only where it was the base.
    """
    if saved.lineage is None:
        return
    coarse = saved.quantization is not None or "bfloat16" in (saved.dtype, live.dtype)
    rounding = SLACK * ROUNDING["bfloat16" if coarse else "float32"]
    columns = tuple(zip(*(side.tolist() for side in (*live.logps, *live.reference)), strict=True))
    for pair, before in _measured(run_of(saved.folder), saved.lineage.steps):
        if pair not in live.pairs:
            continue
        now = EvaluatedPair(pair.id, *columns[live.pairs.index(pair)])
        for name, tokens in zip(_COMPARED, pair.scored_tokens * 2, strict=True):
            if name.startswith("reference") and saved.lineage.reference != "disabled_adapter":
                continue
            then, here, allowed = getattr(before, name), getattr(now, name), rounding * tokens**0.5
            if not abs(here - then) <= allowed:
                raise InputError(
                    f"{saved.folder} is not what its run measured: {name} of pair {pair.id} was {then:.6g} nats at the"
                    f" end of training, and is {here:.6g} now ({allowed:.2g} are allowed for rounding). The adapter,"
                    f" its {ADAPTER_CONFIG} or the base was changed since. {_WAYS_OUT}"
                )


def _measured(run: Path, step: int) -> Iterator[tuple[TokenizedPair, EvaluatedPair]]:
    """The held-out pairs that a run kept, each with what was measured after `step`; none where nothing was."""
    kept, measured = run / HELD_OUT_FILE, evaluation_file(run, step)
    if kept.is_file() and measured.is_file():
        # The pairs are the first of those that were measured, in order: ids of a user may repeat.
        both = zip(read_held_out(kept), read_evaluation(measured), strict=False)
        yield from ((pair, row) for pair, row in both if pair.id == row.id)
