"""The one removable door through which fused functions come into a policy: `fuse` and `unfuse`.

It exchanges the `forward` of generic blocks and rewrites no attention code: gated MLP blocks, linear layers that read
one tensor (query, key, value), single adapted layers, RMS norms, rotary embeddings. Parameters, names, saved files and
the adapter switch stay as they are. Each block is tried on random input beside its own forward first; what is not
known, or computes something else, stays as it is and is reported by name.

Bytes a token that a fused Llama layer keeps, with numbers of w bytes, hidden width D, inner width F, keys and values of
width K each, H heads and R the sum of its adapters' ranks (where the attention keeps queries, keys, values, its output
and a sum a head):

    none    w (4 D + 2 K + 2 F + R) + 4 H + 8        8B, bf16, r = 16: 92.4 KiB
    mlp     w (4 D + 2 K + R) + 4 H + 8              36.4 KiB

Rotary embeddings are functions that attention code calls by name. That code is not rewritten: a copy of its forward
finds another function under the name, one that saves nothing of a token's size either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafocal.errors import InputError, ran_out
from lorafocal.model.adapters import AdapterSwitch, adapter_layers
from lorafocal.model.base_config import of_layers
from lorafocal.model.head import causal_lm, logit_transform
from lorafocal.model.quantized import base_dtype, quantization_of
from lorafocal.model.stand_ins import (
    NORM_FORMS,
    Arithmetic,
    FusedLinear,
    FusedMlp,
    FusedNorm,
    FusedRotary,
    SharedInput,
    StandIn,
    read,
    rotary,
)
from lorafocal.model.trained_modules import plain_modules
from lorafocal.ops.elementwise import GEGLU, TORCH, Elementwise, load
from lorafocal.ops.kernel_check import (
    TOLERANCE,
    furthest,
    head_fold_results,
    rms_norm_results,
    rope_results,
    swiglu_results,
)

RECOMPUTE = ("none", "mlp")
_MLPS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_SHARED = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("wq", "wk", "wv"), _MLPS[0][:2], _MLPS[1][:2])
_PROBE_TOKENS = 3
_MLP_SCALES = (1.0, 2.0, 60.0)  # activations differ about the first two; the last is beyond what a block clamps at
_NORM_SCALES = (1.0, 1e-3, 1e3)  # of the second, eps is a good part


@dataclass(frozen=True, slots=True)
class FusedReport:
    """What a fused policy computes through fused functions, and what it does not."""

    mlps: int  # gated MLP blocks
    shared: int  # groups of linear layers that read one tensor
    linears: int  # single linear layers
    norms: int
    rotary: int  # attention blocks that turn queries and keys
    elementwise: str  # torch, or triton and its version
    recompute: str  # none, or mlp
    fallbacks: dict[str, int]  # why PEFT's or transformers' own forward stays, and for how many blocks or layers

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        counts = {"MLP blocks": self.mlps, "shared inputs": self.shared, "linear layers": self.linears}
        counts |= {"norms": self.norms, "rotary embeddings": self.rotary}
        said = [f"{count} {what}" for what, count in counts.items() if count]
        line = f"fused ({self.elementwise}): {', '.join(said) or 'nothing'}"
        line += "; gate and up computed again" if self.recompute == "mlp" else ""
        left = ", ".join(f"{count} for {reason}" for reason, count in self.fallbacks.items())
        return line + (f"; left as they are: {left}" if left else "")


def fuse(policy: nn.Module, elementwise: str = "torch", recompute: str = "none") -> FusedReport:
    """Install fused functions wherever they compute what `policy` does; a second call replaces the first.

    `recompute="mlp"` has the gate and up products of MLP blocks computed again in the backward: 2 of their 3 saved
    tensors less, for 2 matrix products more a block. Raises InputError for an unknown word, where Triton cannot run,
    and where there is no MLP block for `recompute` to work on.
    """
    unfuse(policy)
    if recompute not in RECOMPUTE:
        raise InputError(f"recompute: {recompute!r} is unknown; choose one of {', '.join(RECOMPUTE)}")
    door = _Door(policy, load(elementwise), recompute=recompute == "mlp")
    door.open()
    report = door.report()
    if recompute == "mlp" and not report.mlps:
        unfuse(policy)
        raise InputError(
            f"training.activation_checkpointing: mlp computes gate and up products again, but in"
            f" {type(causal_lm(policy)).__name__} no MLP block can be fused ({report}): use full or none"
        )
    return report


def unfuse(policy: nn.Module) -> None:
    """Give every module its own forward back."""
    for module in policy.modules():
        StandIn.remove(module)


def forget(policy: nn.Module) -> None:
    """Let go of what a pass that broke off (out of memory) has computed for layers that it never called."""
    for module in policy.modules():
        if isinstance(stand_in := StandIn.of(module), FusedLinear):
            stand_in.shared.forget()


class _Door:
    """One run of `fuse`: what was installed, and what was left and why."""

    def __init__(self, policy: nn.Module, functions: Elementwise, *, recompute: bool) -> None:
        self.base = causal_lm(policy)
        self.modules = list(self.base.modules())
        self.functions, self.recompute = functions, recompute
        self.dtype = base_dtype(policy)
        self.arithmetic = Arithmetic(self.dtype, self.dtype == torch.bfloat16)
        self.fused: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self._done: set[nn.Module] = set()
        self.switch = AdapterSwitch(policy) if adapter_layers(policy) else None
        self.four_bit = quantization_of(policy) is not None
        device = next(policy.parameters()).device
        if functions is not TORCH and device.type != "cuda":
            raise InputError(f"kernels.elementwise: {functions.name} computes on CUDA, and the model is on {device}")

    def open(self) -> None:
        if self.dtype not in TOLERANCE:
            self.left[f"a base in {str(self.dtype).removeprefix('torch.')}"] += 1
            return
        for module in self.modules:
            self._mlp(module)
        for module in self.modules:
            for names in _SHARED:
                self._shared([getattr(module, name, None) for name in names])
        for module in self.modules:
            if isinstance(module, LoraLayer):
                self._shared([module])
        for module in self.modules:
            self._norm(module)
            self._rotary(module)
        self._head()

    def report(self) -> FusedReport:
        counts = {kind: self.fused[kind] for kind in ("mlps", "shared", "linears", "norms", "rotary")}
        recompute = "mlp" if self.recompute else "none"
        return FusedReport(**counts, elementwise=self.functions.name, recompute=recompute, fallbacks=dict(self.left))

    def _mlp(self, block: nn.Module) -> None:
        names = next((names for names in _MLPS if all(hasattr(block, name) for name in names)), None)
        if names is None or "forward" in vars(block):
            return
        stand_in = FusedMlp(block, names, TORCH.gated, recompute=False)
        if isinstance(stand_in.read(self.arithmetic), str):
            return  # its layers are told of one by one
        gate = getattr(block, names[0])
        x = self._input(gate)
        x = _scaled(x / self._run(gate, x).square().mean().sqrt().clamp(min=1e-6), _MLP_SCALES)
        for gated, own in ((TORCH.gated, self.functions.gated), (GEGLU, GEGLU)):
            stand_in.gated = gated
            if self._agree(stand_in, x):
                stand_in.gated, stand_in.recompute = own, self.recompute
                if own is not GEGLU:
                    rows = _random(9, _width(getattr(block, names[2])), x, self.dtype)
                    self._check_kernels(block, swiglu_results, *(_scaled(of, _MLP_SCALES) for of in rows.split(3)))
                    self._check_near(block, self._difference(stand_in, x))
                stand_in.install()
                self._done.update(getattr(block, name) for name in names)
                self.fused["mlps"] += 1
                return
        self.left[f"an MLP ({type(block).__name__}) with another formula than SwiGLU or GeGLU"] += 1

    def _shared(self, layers: Sequence[Any]) -> None:
        """Fuse those of the layers that are not yet, together where they can read one tensor."""
        layers = [layer for layer in layers if isinstance(layer, nn.Module) and layer not in self._done]
        if not any(isinstance(layer, LoraLayer) for layer in layers):
            return
        reasons = {layer: read(layer, self.arithmetic) for layer in layers}
        self._done.update(layers)
        for layer, reason in reasons.items():
            if isinstance(reason, str) and isinstance(layer, LoraLayer):
                self.left[reason] += 1
        fit = [layer for layer, reason in reasons.items() if not isinstance(reason, str)]
        for width in sorted({_width(layer) for layer in fit}):
            self._install_shared([layer for layer in fit if _width(layer) == width])

    def _install_shared(self, layers: list[nn.Module]) -> None:
        if not any(isinstance(layer, LoraLayer) for layer in layers) or any("forward" in vars(m) for m in layers):
            return
        x = self._input(layers[0])
        if not all(self._agree(FusedLinear(SharedInput([layer]), 0), x) for layer in layers):
            self.left["linear layers that compute otherwise than PEFT's"] += len(layers)
            return
        shared = SharedInput(layers)
        for position in range(len(layers)):
            FusedLinear(shared, position).install()
        self.fused["shared" if len(layers) > 1 else "linears"] += 1

    def _norm(self, module: nn.Module) -> None:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        own = dict(module.named_parameters())
        if "Norm" not in type(module).__name__ or list(module.children()):
            return
        weight = own.get("weight")
        if eps is None or weight is None or len(own) > 1 or weight.ndim != 1:
            self.left[f"{type(module).__name__}, which is no RMS norm with one weight"] += 1
            return
        if weight.requires_grad or "forward" in vars(module):
            self.left["norms that are trained" if weight.requires_grad else "norms exchanged by others"] += 1
            return
        x = _scaled(_random(_PROBE_TOKENS, len(weight), weight), _NORM_SCALES)
        for form in NORM_FORMS:
            stand_in = FusedNorm(module, form, eps, TORCH)
            if self._difference(stand_in, x) == 0:
                stand_in.functions = self.functions
                upstream = _random(2 * _PROBE_TOKENS, len(weight), weight)[_PROBE_TOKENS:]
                self._check_kernels(module, rms_norm_results, x, upstream, form(weight), eps)
                self._check_near(module, self._difference(stand_in, x))
                stand_in.install()
                self.fused["norms"] += 1
                return
        self.left[f"{type(module).__name__}, which rounds or computes otherwise"] += 1

    def _rotary(self, module: nn.Module) -> None:
        own = FusedRotary.own_function(module)
        if own is None or "forward" in vars(module):
            return
        values = _random(5, _PROBE_TOKENS * 8, next(module.parameters()), self.dtype).view(1, 5, _PROBE_TOKENS, 8)
        probe = values[:, :2], values[:, 2:3], values[:, 3], values[:, 4]  # queries, keys, cos, sin
        if _turns_halves(own, probe):
            width, layers = getattr(module, "head_dim", 8), of_layers(self.base.config.get_text_config())
            counts = ("num_attention_heads", "num_key_value_heads")
            for heads in {getattr(layer, name, None) or 2 for layer in layers for name in counts}:  # a kernel for each
                rows = _random(_PROBE_TOKENS, (heads + 2) * width, next(module.parameters()), self.dtype)
                x, cos, sin = (part.contiguous() for part in rows.split([heads * width, width, width], dim=1))
                self._check_kernels(module, rope_results, x.view(-1, heads, width), cos, sin)
            FusedRotary(module, self.functions).install()
            self.fused["rotary"] += 1
        else:
            self.left[f"a rotary embedding ({type(module).__name__}) of another formula"] += 1

    def _head(self) -> None:
        """The log-prob head is installed later, and folds its logits by the same set."""
        if self.functions is TORCH:
            return
        head: Any = plain_modules(self.base.get_output_embeddings())[0]
        wide = torch.promote_types(self.dtype, torch.float32)
        transform, vocabulary = logit_transform(self.base), int(head.out_features)
        logits = 4 / abs(transform.scale) * _random(_PROBE_TOKENS, vocabulary, head.weight, wide)
        labels = torch.tensor([0, vocabulary // 2, vocabulary - 1], device=logits.device)  # in several blocks
        self._check_kernels(head, head_fold_results, logits, labels, self.dtype, transform)

    def _input(self, layer: nn.Module) -> Tensor:
        return _random(_PROBE_TOKENS, _width(layer), next(layer.parameters()), self.dtype)

    @torch.no_grad()
    def _run(self, call: Callable[[Tensor], Any], x: Tensor) -> Any:
        cast = torch.autocast(x.device.type, dtype=torch.bfloat16) if self.arithmetic.casts else nullcontext()
        with cast:
            return call(x[None])

    def _agree(self, stand_in: StandIn, x: Tensor) -> bool:
        """Whether the stand-in computes what its module does: with adapters off the same bits, but on a 4-bit base."""
        with self.switch.off() if self.switch else nullcontext():
            base = self._difference(stand_in, x)
        exact = base == 0 or (self.four_bit and base <= TOLERANCE[self.dtype])
        return exact and self._difference(stand_in, x) <= TOLERANCE[self.dtype]

    @torch.no_grad()
    def _check_kernels(self, module: nn.Module, results: Callable[..., list[Tensor]], *given: Any) -> None:
        """Refuse functions that fail, or are further from the definitions than rounding is, at a module's own widths.

        Backwards too, before a step relies on them.
        """
        if self.functions is TORCH:
            return
        try:
            difference = furthest(results(self.functions, *given), results(TORCH, *given))
        except self.functions.failures as error:
            if ran_out(error):
                raise
            raise InputError(
                f"kernels.elementwise: {self.functions.name} cannot run on this device ({type(module).__name__}:"
                f" {type(error).__name__}: {error}): use torch"
            ) from error
        self._check_near(module, difference)

    def _check_near(self, module: nn.Module, difference: float) -> None:
        if self.functions is not TORCH and not difference <= TOLERANCE[self.dtype]:
            raise InputError(
                f"kernels.elementwise: {self.functions.name} computes something else than torch does on this device"
                f" ({type(module).__name__}, off by {difference:.2g}): use torch, and report the card and the versions"
            )

    def _difference(self, stand_in: StandIn, x: Tensor) -> float:
        """The largest of a row: norm of the difference over the norm; infinite where outputs cannot be compared."""
        try:
            ours, theirs = self._run(stand_in.fused, x), self._run(stand_in.module, x)
        except (RuntimeError, TypeError, AttributeError, ValueError, IndexError) as error:
            if ran_out(error):  # says nothing of the block
                raise
            return float("inf")  # a block that is called otherwise
        if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
            return float("inf")
        return furthest([ours], [theirs])


def _turns_halves(own: Callable[..., Any], probe: Sequence[Tensor]) -> bool:
    """Whether a rotary embedding gives the very bits of `elementwise.rope`."""
    try:
        return all(map(torch.equal, own(*probe), rotary(own, TORCH, *probe)))
    except (RuntimeError, TypeError, AttributeError, ValueError, IndexError) as error:
        if ran_out(error):
            raise
        return False  # one that is called otherwise


def _width(layer: nn.Module) -> int:
    """Inputs of a linear layer, adapted or not."""
    base: Any = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    return int(base.nx if isinstance(base, Conv1D) else base.in_features)


def _scaled(x: Tensor, factors: Sequence[float]) -> Tensor:
    """Each row of x by a factor of its own."""
    return x * torch.tensor(factors, dtype=x.dtype, device=x.device)[:, None]


def _random(rows: int, width: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Always the same numbers; the process's own generator is left alone."""
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    return values.to(like.device, like.dtype if dtype is None else dtype)
