"""Sequence log-probabilities of a pack under the policy: the one forward that everything is scored with.

Training, the reference, evaluation, `score` and the merge gate all call `sequence_logps`, so they cannot differ.
The *wrapped* model is called, through its public arguments only, so the hooks of DDP, ZeRO and FSDP fire.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafocal.data.packing import Pack
from lorafocal.errors import InputError
from lorafocal.model.head import causal_lm, install_head, scoring
from lorafocal.objectives.pairwise import PairLogps
from lorafocal.ops.attention import SHARED_PREFIX_ATTENTION


def prepare_policy(model: nn.Module, *, layout: str = "packed") -> None:
    """Install the log-prob head and the attention of `layout`; weights and saved files stay.

    The low-level step: `probes.choose_layout` also proves that the model computes what the layout assumes.
    Raises InputError where the model has no exchangeable attention.
    """
    install_head(model)
    base = causal_lm(model)
    if layout == "packed":
        _set_attention(base, SHARED_PREFIX_ATTENTION)
    elif base.config._attn_implementation == SHARED_PREFIX_ATTENTION:
        _set_attention(base, own_attention(base))


def own_attention(base: PreTrainedModel) -> str:
    """transformers' own attention for this model: "sdpa" drops soft-caps and sinks, so models with them have none."""
    return "sdpa" if base._supports_sdpa else "eager"


def _set_attention(base: PreTrainedModel, name: str) -> None:
    """Raises InputError where the model goes on with the attention that it had."""
    base.set_attn_implementation(name)
    if base.config._attn_implementation != name:
        raise InputError(f"{type(base).__name__} does not let its attention be exchanged")


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The base's floating dtype. A bf16 base computes under bf16 autocast, with fp32 adapters and log-probs."""
    return causal_lm(model).get_input_embeddings().weight.dtype


def token_logps(model: nn.Module, pack: Pack) -> Tensor:
    """Log-probability of each completion token in nats, (N,), in the order of `pack.index`."""
    index, packed = pack.index, pack.segments is not None
    arguments: dict[str, object] = (
        {"logits_to_keep": index.positions, "segments": pack.segments}
        if packed
        else {"attention_mask": pack.attention_mask}
    )
    device = pack.input_ids.device
    dtype = compute_dtype(model)
    with (
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16),
        scoring(model, index.labels, rows=None if packed else index.positions),
    ):
        output = model(input_ids=pack.input_ids, position_ids=pack.position_ids, use_cache=False, **arguments)
    return output.logits.reshape(-1)


def sequence_logps(model: nn.Module, pack: Pack) -> PairLogps:
    """Summed log-probability of each completion of a pack's B pairs, (B,) and (B,), in nats."""
    sums = torch.segment_reduce(token_logps(model, pack), "sum", lengths=pack.index.lengths, unsafe=True)
    chosen, rejected = sums.split(pack.num_pairs)
    return PairLogps(chosen, rejected)


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Within, the model runs on transformers' own attention: for `generate()` and for ordinary batches."""
    base = causal_lm(model)
    if base.config._attn_implementation != SHARED_PREFIX_ATTENTION:
        yield
        return
    _set_attention(base, own_attention(base))
    try:
        yield
    finally:
        _set_attention(base, SHARED_PREFIX_ATTENTION)
