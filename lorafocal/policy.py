"""Log-probabilities of a pack under the policy: the one forward that everything is scored with.

Training, the reference, evaluation, `score` and the merge gate call `token_logps` or its sums, so they cannot differ.
The *wrapped* model is called, through its public arguments only, so the hooks of DDP, ZeRO and FSDP fire.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafocal.data.packing import Pack
from lorafocal.errors import InputError
from lorafocal.model.head import causal_lm, install_head, scoring
from lorafocal.model.master import arithmetic_of
from lorafocal.model.trained_modules import plain_modules
from lorafocal.objectives.inputs import PairLogps
from lorafocal.ops.attention import SHARED_PREFIX_ATTENTION
from lorafocal.ops.divergences import ComparedTokens, ReferenceRows, RowKeeper, against
from lorafocal.ops.logps import OfRows


def prepare_policy(model: nn.Module, *, layout: str = "packed") -> None:
    """Install the log-prob head and the attention of `layout`; weights and saved files stay.

    The low-level step: `probes.choose_layout` also proves that the model computes what the layout assumes.
    Raises InputError where the model has no exchangeable attention.
    """
    install_head(model)
    base = causal_lm(model)
    if layout == "packed":
        _set_attention(base, SHARED_PREFIX_ATTENTION)
    elif _attention(base) in (SHARED_PREFIX_ATTENTION, "sdpa"):
        _set_attention(base, own_attention(base))


def own_attention(base: PreTrainedModel) -> str:
    """transformers' own attention that is right for this model: SDPA would silently drop soft-caps and sinks."""
    capped = getattr(base.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "sdpa" if base._supports_sdpa and not capped else "eager"


def _attention(base: PreTrainedModel) -> str:
    return base.config.get_text_config()._attn_implementation


def _set_attention(base: PreTrainedModel, name: str) -> None:
    """Exchange the attention of the text part; other parts, such as an image encoder, keep theirs.

    Raises InputError where the model goes on with the attention that it had.
    """
    config = base.config
    text = [key for key in config.sub_configs if getattr(config, key, None) is config.get_text_config()]
    base.set_attn_implementation({"": name} | dict.fromkeys(text, name))
    if _attention(base) != name:
        raise InputError(f"{type(base).__name__} does not let its attention be exchanged")


def token_logps(model: nn.Module, pack: Pack, collisions: Tensor | None = None) -> Tensor:
    """Log-probability of each completion token in nats, (N,), in the order of `pack.index`.

    `collisions`, (N,), is overwritten with log sum_v pi_v^2 of each, which is never differentiated.
    """
    return _scored(model, pack, collisions=collisions).reshape(-1)


def compared_tokens(model: nn.Module, pack: Pack, reference: ReferenceRows) -> ComparedTokens:
    """The same, with KL(reference || policy) at each of these tokens and the reference's log-probs, (N,) each."""
    logps, divergences, before = _scored(model, pack, by=against(reference)).reshape(-1, 3).unbind(-1)
    return ComparedTokens(logps, divergences, before.detach())


@torch.no_grad()
def reference_rows(model: nn.Module, pack: Pack, *, other: bool = False) -> ReferenceRows:
    """What `model` as it is now makes its logits of these tokens of, and its head.

    `other`: it is not the model that they will be compared in, so weights that an engine splits are copied while they
    are whole.
    """
    head = plain_modules(causal_lm(model).get_output_embeddings())
    split = any(hasattr(weight, "ds_id") or hasattr(weight, "full_tensor") for weight in model.parameters())
    keeper = RowKeeper(copies=split and (other or len(head) > 1))
    _scored(model, pack, by=keeper)
    return keeper.rows


def _scored(model: nn.Module, pack: Pack, collisions: Tensor | None = None, by: OfRows | None = None) -> Tensor:
    """What the head returns of the completion tokens, (1, N, ...)."""
    _check_prepared(model, pack)
    index, device, dtype = pack.index, pack.input_ids.device, arithmetic_of(model)
    arguments = _arguments(model, pack)
    rows = None if "logits_to_keep" in arguments else index.positions
    with (
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16),
        scoring(model, index.labels, rows, collisions, by),
    ):
        output = model(**arguments)
    logits: Tensor = output.logits
    return logits


def _check_prepared(model: nn.Module, pack: Pack) -> None:
    """Refuse a pack for a model on another attention, which would pass over its bounds without a word."""
    if pack.segments is not None and (found := _attention(causal_lm(model))) != SHARED_PREFIX_ATTENTION:
        raise InputError(
            f"a pack was given to a model whose attention is {found}, which knows nothing of a pack's bounds: another"
            " trainer, or `set_attn_implementation`, has exchanged it since. Give each trainer a model of its own, or"
            " build them one after the other"
        )


def _arguments(model: nn.Module, pack: Pack) -> dict[str, object]:
    """What the model is called with: of a pack, everything that its forward names, and the segments in any case."""
    named = _forward_parameters(type(causal_lm(model)).forward)
    arguments: dict[str, object] = {"use_cache": False, "position_ids": pack.position_ids}
    if pack.segments is None:
        arguments["attention_mask"] = pack.attention_mask
    else:
        arguments["logits_to_keep"] = pack.index.positions
    arguments = {name: value for name, value in arguments.items() if name in named}
    if pack.segments is not None:
        arguments["segments"] = pack.segments
    return {"input_ids": pack.input_ids, **arguments}


def takes_segments(base: PreTrainedModel) -> bool:
    """Whether the model's forward takes arguments that it does not name, to hand them down."""
    kinds = (parameter.kind for parameter in _forward_parameters(type(base).forward).values())
    return inspect.Parameter.VAR_KEYWORD in kinds


@cache
def _forward_parameters(forward: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    """What a forward takes: some (Falcon, BLOOM, MPT) name no positions, some (Mamba) always keep all logits."""
    return inspect.signature(forward).parameters


def sequence_logps(model: nn.Module, pack: Pack) -> PairLogps:
    """Summed log-probability of each completion of a pack's B pairs, (B,) and (B,), in nats."""
    return of_pairs(sums_of(token_logps(model, pack), pack), pack)


def of_pairs(sums: Tensor, pack: Pack) -> PairLogps:
    """The pairs' own among sums over all of a pack's completions, (2B + M,)."""
    return PairLogps(sums[: pack.num_pairs], sums[pack.num_pairs : 2 * pack.num_pairs])


def sums_of(of_tokens: Tensor, pack: Pack) -> Tensor:
    """(N,) over completion tokens to (2B + M,) over completions, M of them further answers.

    In float32 a thousand tokens would lose some 1e-3 nats.
    """
    sums = torch.segment_reduce(of_tokens.double(), "sum", lengths=pack.index.lengths, unsafe=True)
    return sums.to(of_tokens.dtype)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, no dropout; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Within, the model runs on transformers' own attention: for `generate()` and for ordinary batches."""
    base = causal_lm(model)
    if _attention(base) != SHARED_PREFIX_ATTENTION:
        yield
        return
    _set_attention(base, own_attention(base))
    try:
        yield
    finally:
        _set_attention(base, SHARED_PREFIX_ATTENTION)
