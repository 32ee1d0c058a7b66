"""Proves, on a few made-up pairs, that this model really computes what a layout assumes, before it is trained.

Some architectures never call the attention interface, mix tokens by other means, or change logits after the head:
with them a pack would be silently wrong. They train padded, or are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lorafocal.data.packing import Pack, pad_sequences, share_prefixes
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.model.head import causal_lm
from lorafocal.model.master import arithmetic_of
from lorafocal.model.quantized import quantization_of
from lorafocal.model.trained_modules import embeddings_of
from lorafocal.ops.attention import SHARED_PREFIX_ATTENTION
from lorafocal.policy import evaluating, plain_attention, prepare_policy, takes_segments, token_logps

WAY_OUT = "Set `packing.layout: padded`, or use an architecture that trains packed (docs/architectures.md)"
LAYER_TYPES = {"full_attention", "sliding_attention"}

# Largest difference of a token's log-prob between a pack and one-at-a-time scoring that rounding explains, in nats.
# bf16 keeps 8 bits: hidden states of deep models differ by some 1e-2 relative between kernels. Some models round to
# fp32 within (their softmax, their logits), whatever their dtype.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.5}
TF32 = 0.0625  # whose products keep 11 bits of float32, 3 more than bf16's 8


@dataclass(frozen=True, slots=True)
class LayoutChoice:
    """The layout a model trains in, and why packs were passed over ("" where they were not)."""

    layout: str
    reason: str = ""


def choose_layout(model: nn.Module, layout: str) -> LayoutChoice:
    """Prepare `model` for `layout` ("auto", "packed" or "padded") and prove that it computes what that assumes.

    "auto" is packed where the probes pass, else padded with the reason. Raises InputError naming what failed.
    """
    if arithmetic_of(model) not in TOLERANCE:
        raise InputError(f"the model is in {arithmetic_of(model)}, which is not supported: load it in bfloat16")
    reason = ""
    if layout != "padded":
        try:
            prepare_policy(model, layout="packed")
            check_packing(model)
            return LayoutChoice("packed")
        except InputError as problem:
            if layout == "packed":
                raise InputError(f"{problem}. {WAY_OUT}") from problem
            reason = str(problem)
    prepare_policy(model, layout="padded")
    try:
        check_padding(model)
    except InputError as problem:
        before = f"packed: {reason}; padded: " if reason else ""
        raise InputError(f"{before}{problem}. Use another architecture") from problem
    return LayoutChoice("padded", reason)


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Probe attention calls, neighbours, head and one-at-a-time scores of a policy prepared for packs.

    Raises InputError naming what failed.
    """
    base = causal_lm(model)
    name = type(base).__name__
    check_layer_types(base)
    if not takes_segments(base):
        raise InputError(f"{name} hands no further arguments to its attention, so a pack's bounds cannot reach it")
    pairs = _probe_pairs(embeddings_of(base).num_embeddings)
    pack = share_prefixes(pairs).to(next(model.parameters()).device)
    with evaluating(model):  # allowed or not, the noise of dropout would hide what is looked for
        with _attending_modules() as attending:
            packed = token_logps(model, pack)
        layers = base.config.get_text_config().num_hidden_layers
        if len(attending) != layers:
            raise InputError(
                f"{name}: of {layers} layers, {len(attending)} call the attention interface, so some mix tokens by"
                " other means and packs would be wrong"
            )
        check_neighbours(model, pack, packed, name)
        check_scores(model, pairs, packed, name)


@torch.no_grad()
def check_padding(model: nn.Module) -> None:
    """Probe neighbours, padding, head and one-at-a-time scores of a policy prepared for padded rows.

    Raises InputError naming what failed.
    """
    base = causal_lm(model)
    name = type(base).__name__
    pairs = _probe_pairs(embeddings_of(base).num_embeddings)
    pack = pad_sequences(pairs).to(next(model.parameters()).device)
    with evaluating(model):
        padded = token_logps(model, pack)
        check_neighbours(model, pack, padded, name)
        check_future(model, pack, padded, name)
        check_scores(model, pairs, padded, name)


def check_layer_types(base: nn.Module) -> None:
    """Every layer must be full or sliding-window attention: others carry state across pairs."""
    config = base.config.get_text_config()  # type: ignore[union-attr, operator]
    other = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if other or getattr(config, "attention_chunk_size", None):
        kinds = ", ".join(sorted(other)) or "chunked attention"
        raise InputError(f"{type(base).__name__} has layers that packs cannot hold apart ({kinds})")


def check_neighbours(model: nn.Module, pack: Pack, logps: torch.Tensor, name: str) -> None:
    """Changing the tokens of a pair in the middle must not move the pairs on both sides.

    `logps` are the pack's token log-probs, here and below.
    """
    middle = pack.num_pairs // 2
    if pack.segments is None:
        touched = (torch.arange(len(pack.input_ids), device=pack.input_ids.device) % pack.num_pairs == middle)[:, None]
    else:
        span, place = pack.segments.spans[middle], torch.arange(pack.num_rows, device=pack.input_ids.device)
        touched = (span.start <= place) & (place < span.stop)
    leak = _moved(model, pack, logps, touched, pack.index.sequence % pack.num_pairs != middle)
    if not leak <= _rounding(model):
        raise InputError(f"{name}: changing one pair moved another pair's log-probs by {leak:.3g} nats")


def check_future(model: nn.Module, pack: Pack, logps: torch.Tensor, name: str) -> None:
    """A completion's last token and the padding behind it predict nothing: changing them must move nothing."""
    last = pack.attention_mask.sum(1, keepdim=True) - 1  # type: ignore[union-attr]
    behind = torch.arange(pack.input_ids.shape[1], device=last.device) >= last
    leak = _moved(model, pack, logps, behind, slice(None))
    if not leak <= _rounding(model):
        raise InputError(f"{name}: a later token or the padding moved a token's log-prob by {leak:.3g} nats")


def _moved(
    model: nn.Module, pack: Pack, logps: torch.Tensor, touched: torch.Tensor, tokens: torch.Tensor | slice
) -> float:
    """How far other input ids in the places `touched` move the log-probs of the given completion tokens, in nats."""
    other = (pack.input_ids + 1) % embeddings_of(causal_lm(model)).num_embeddings
    changed = torch.where(touched, other, pack.input_ids)
    moved = logps - token_logps(model, replace(pack, input_ids=changed))
    return float(moved[tokens].abs().max())


def _rounding(model: nn.Module) -> float:
    """What a token may move by when others change: nothing, but where experts multiply the tokens sent to them
    together, and so in an order that the others have a part in."""
    experts = any("expert" in name for name, _ in model.named_modules())
    return _of_products(model) if experts else 0.0


def _tolerance(model: nn.Module) -> float:
    """What rounding explains between a pack and one sequence alone: int8 rounds activations to 8 bits, as bf16 does."""
    return TOLERANCE[torch.bfloat16] if quantization_of(model) == "int8" else _of_products(model)


def _of_products(model: nn.Module) -> float:
    """What the arithmetic of the model's matrix products explains."""
    dtype = arithmetic_of(model)
    shortened = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return TF32 if shortened else TOLERANCE[dtype]


def check_causal(model: nn.Module, pair: TokenizedPair, name: str) -> None:
    """The model's own logits must not depend on later tokens: both layouts are causal, whatever it is by itself."""
    vocabulary = embeddings_of(causal_lm(model)).num_embeddings
    *kept, last = pair.chosen_ids
    before, after = (_alone(model, pair.prompt_ids, [*kept, end]) for end in (last, (last + 1) % vocabulary))
    leak = float((before - after)[:-1].abs().max())
    if not leak <= _rounding(model):
        raise InputError(f"{name}: by itself, a later token moves a token's log-prob by {leak:.3g} nats")


def check_scores(model: nn.Module, pairs: list[TokenizedPair], logps: torch.Tensor, name: str) -> None:
    """Scores must equal the model's own logits, one sequence at a time, on transformers' own attention."""
    check_causal(model, pairs[0], name)
    alone = torch.cat(
        [_alone(model, p.prompt_ids, p.chosen_ids) for p in pairs]
        + [_alone(model, p.prompt_ids, p.rejected_ids) for p in pairs]
    )
    gap = float((logps - alone).abs().max())
    if not gap <= _tolerance(model):
        raise InputError(
            f"{name}: log-probs are {gap:.3g} nats a token away from the model's own logits, one sequence at a time, so"
            " it does something to its logits or its attention that is not followed here"
        )


def _alone(model: nn.Module, prompt_ids: list[int], completion_ids: list[int]) -> torch.Tensor:
    """Token log-probs of one completion from plain logits."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt_ids, *completion_ids]], device=device)
    dtype = arithmetic_of(model)
    with plain_attention(model), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return wide.gather(-1, ids[0, len(prompt_ids) :, None]).squeeze(-1)


def _probe_pairs(vocabulary: int) -> list[TokenizedPair]:
    """Three made-up pairs of random tokens, one with a one-token prompt and one-token answers."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    lengths = ((9, 7, 12), (5, 11, 6), (1, 1, 1))
    return [TokenizedPair(f"probe-{i}", tokens(p), tokens(c), tokens(r)) for i, (p, c, r) in enumerate(lengths)]


@contextmanager
def _attending_modules() -> Iterator[set[nn.Module]]:
    """The modules that call the shared-prefix attention within."""
    attend = ALL_ATTENTION_FUNCTIONS[SHARED_PREFIX_ATTENTION]
    modules: set[nn.Module] = set()

    def noted(module, *args, **kwargs):  # type: ignore[no-untyped-def]
        modules.add(module)
        return attend(module, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(SHARED_PREFIX_ATTENTION, noted)
    try:
        yield modules
    finally:
        ALL_ATTENTION_FUNCTIONS.register(SHARED_PREFIX_ATTENTION, attend)
