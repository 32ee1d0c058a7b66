"""`torch.compile` of a model's decoder layers, on packed rows of bucketed lengths.

The bounds of a pack reach a compiled layer as one byte a token and leave it unread into one opaque operator, so a new
pack makes no new graph: there is one for each length, kind of layer, and state of the adapters (and one more for the
first layer, whose input needs no gradient). Rows that are no multiple of the bucket, as those of probes and of
generation, run uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lorafocal.errors import InputError
from lorafocal.model.quantized import base_dtype
from lorafocal.model.stand_ins import FusedLinear, FusedMlp, FusedNorm, StandIn
from lorafocal.ops.kernel_check import TOLERANCE, largest
from lorafocal.ops.segments import Segments, roles
from lorafocal.ops.trace_check import traced_linears, traced_mlp, traced_norm

# Graphs that one kind of layer may have; past it torch would quietly go on uncompiled.
MOST_GRAPHS = 64
BUCKET, LENGTHS = 256, 16  # of packs, in token rows: their smallest bucket, and how many lengths they may have


def bucket_of(most: int) -> int:
    """What packs of up to `most` rows are rounded up to: few lengths, of three graphs each; of a full pack 3 % are
    filler on average."""
    return max(1, -(-most // (LENGTHS * BUCKET))) * BUCKET


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(model: nn.Module, bucket: int, *, backend: str | Callable[..., Any] = "inductor") -> str | None:
    """Compile the decoder layers for rows that are multiples of `bucket`; None, or why they stay as they are.

    Call it last: after adapters, heads and fused functions are in place. Values and gradients stay, up to rounding.
    Raises InputError for a bucket that is none, and where this torch gets fused functions wrong.
    """
    if bucket < 2:
        raise InputError(f"compiled layers need packs of few lengths: a bucket of {bucket} rounds nothing up")
    layers = decoder_layers(model)
    if not layers:
        return f"{type(model).__name__} has no decoder layers that are known here"
    if reason := _not_compiled(model):
        return reason
    _allow_graphs()
    _check_traced(model)
    compiled: dict[type, Callable[..., Any]] = {}
    for layer in layers:
        kind = type(layer)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, dynamic=False, backend=backend)
        layer.forward = _Compiled(layer, compiled[kind], bucket).forward
    return None


def restore_layers(model: nn.Module) -> None:
    """Take the compiled forwards away again; what others have exchanged stays."""
    for layer in _compiled(model):
        del layer.forward


def is_compiled(model: nn.Module) -> bool:
    return bool(_compiled(model))


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Within, the layers compute with their own forwards."""
    forwards = _compiled(model)
    restore_layers(model)
    try:
        yield
    finally:
        for layer, forward in forwards.items():
            layer.forward = forward


def _compiled(model: nn.Module) -> dict[nn.Module, Callable[..., Any]]:
    """The layers that have a compiled forward, with it."""
    found = {layer: vars(layer).get("forward") for layer in decoder_layers(model)}
    return {layer: own for layer, own in found.items() if own and isinstance(getattr(own, "__self__", None), _Compiled)}


def _not_compiled(model: nn.Module) -> str | None:
    for layer in decoder_layers(model):
        if "forward" in vars(layer):
            return f"the forward of {type(layer).__name__} has been exchanged already"
    return None


def _check_traced(model: nn.Module) -> None:
    """Refuse a torch that compiles the functions of a fused model into others; see `ops.trace_check`."""
    stand_ins = [found for layer in decoder_layers(model) for part in layer.modules() if (found := StandIn.of(part))]
    if not stand_ins:
        return
    how = base_dtype(model), next(model.parameters()).device
    way_out = "use kernels.compile: false, or kernels.adapters: peft, and report the versions"
    try:
        apart = largest(_traced_apart(stand_in, *how) for stand_in in stand_ins)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise InputError(
            f"kernels.compile: torch {torch.__version__} cannot compile fused functions: {way_out}"
        ) from error
    if not apart <= TOLERANCE[how[0]]:
        raise InputError(
            f"kernels.compile: torch {torch.__version__} compiles fused functions into something else (values or"
            f" gradients are off by {apart:.2g}): {way_out}"
        )


def _traced_apart(stand_in: StandIn, dtype: torch.dtype, device: torch.device) -> float:
    """How far compiling leads a stand-in's functions from themselves."""
    if isinstance(stand_in, FusedNorm):
        return traced_norm(stand_in.functions, dtype, device)
    if isinstance(stand_in, FusedLinear):
        return traced_linears(dtype, device)
    if isinstance(stand_in, FusedMlp):
        return traced_mlp(stand_in.gated, stand_in.recompute, dtype, device)
    return 0.0


def _allow_graphs() -> None:
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, MOST_GRAPHS)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 4 * MOST_GRAPHS)
    settings.optimize_ddp = False  # it cuts a graph where DDP's buckets end; layers are graphs of their own as it is


class _Compiled:
    """In place of one layer's forward, as a bound method: a deep copy of the model takes it along."""

    def __init__(self, layer: nn.Module, compiled: Callable[..., Any], bucket: int) -> None:
        self.layer, self.compiled, self.bucket = layer, compiled, bucket

    def forward(self, hidden_states: Tensor, *args: Any, segments: Segments | None = None, **kwargs: Any) -> Any:
        if segments is None or hidden_states.shape[1] % self.bucket:
            return type(self.layer).forward(self.layer, hidden_states, *args, segments=segments, **kwargs)
        return self.compiled(self.layer, hidden_states, *args, segments=roles(segments), **kwargs)
