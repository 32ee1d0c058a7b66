"""How a shape is trained: all that bytes and operations depend on beside the model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

WIDTHS = {"bfloat16": 2, "float32": 4, "float64": 8}
WIDE = 4  # bytes of what is held in fp32 whatever the dtype: norms, sums of softmax, all that is trained
WHOLE = ("one-process", "ddp")  # engines under which every GPU holds everything


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a typical pair, or of one."""

    prompt: float = 200
    chosen: float = 305
    rejected: float = 305

    @property
    def rows(self) -> float:
        """Token rows with the prompt stored once."""
        return self.prompt + self.chosen + self.rejected

    @property
    def answers(self) -> float:
        return self.chosen + self.rejected

    def visible(self, window: int | None = None) -> float:
        """Query-key pairs that causal attention sees, the prompt's own once."""
        first, second = self.prompt + self.chosen, self.prompt + self.rejected
        return _causal(first, window) + _causal(second, window) - _causal(self.prompt, window)


def _causal(length: float, window: int | None) -> float:
    if window is None or length <= window:
        return length * (length + 1) / 2
    return window * (window + 1) / 2 + (length - window) * window


def attention_on_a_gpu(dtype: str) -> str:
    """The word of `Setup.attention` for a model that computes in `dtype`: variable-length kernels are for 16 bits."""
    return "flash" if dtype == "bfloat16" else "repeated"


def count_of(tokens: Mapping[str, Sequence[int]] | Sequence[int]) -> int:
    """How many tokens are trained, as PEFT names them: those of the embeddings, or of several modules by name."""
    return sum(map(len, tokens.values())) if isinstance(tokens, Mapping) else len(tokens)


@dataclass(frozen=True, slots=True)
class Setup:
    """How a shape is trained: precision, adapter or all parameters, optimiser, kernels, reference, objective, engine.

    Words are the config's. `full` trains every parameter, and what is said of adapters counts for nothing.
    `adapter_kernels` is "fused" or "peft"; `attention` is "flash" (one variable-length call), "sdpa" (one a segment) or
    "repeated" (one a segment, keys repeated for every head: a GPU in 32 bits, or without a variable-length kernel).
    "sdpa" is a CPU's.
    """

    dtype: str = "bfloat16"
    quantization: str | None = None
    full: bool = False
    r: int = 16
    targets: str | Sequence[str] = "all-linear"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    use_dora: bool = False
    dropout: float = 0.0
    modules_to_save: Sequence[str] = ()
    trainable_tokens: int = 0
    optim: str = "adamw_torch_fused"
    reference: str = "disabled_adapter"  # a word of the compatibility table
    members: Sequence[str] = ()  # of several references: base, or folders of adapters
    guide: bool = False  # one more adapter beside the policy's
    divergences: bool = False  # the objective compares with the reference's whole distribution at each token
    engine: str = "one-process"  # or ddp, which holds the same; zero1, zero2, zero3, fsdp2
    offload: str = "none"
    adapter_kernels: str = "fused"
    attention: str = "flash"
    lengths: Lengths = Lengths()
    head_rows: int | None = None  # of a chunk of logits; without a device's memory, as many as make 2^26 entries

    @property
    def width(self) -> int:
        """Bytes of a computed number."""
        return WIDTHS[self.dtype]

    @property
    def reference_passes(self) -> int:
        """Forwards a pack without gradients: of live references, and of a guide."""
        live = len(self.members) or int(self.reference not in ("none", "cached"))
        return live + self.guide

    @property
    def fused(self) -> bool:
        """Whether the fused adapter functions apply: DoRA and dropout fall back to PEFT's own."""
        return self.adapter_kernels == "fused" and not (self.full or self.use_dora or self.dropout)

    @property
    def widened(self) -> bool:
        """Whether all weights are held in fp32 and cast by autocast for each product: no engine keeps masters beside
        them, or casts what it gathers, as FSDP2 does."""
        return self.full and self.dtype == "bfloat16" and self.engine in WHOLE

    def rank_of(self, name: str) -> int:
        """The rank of the layer `name`, 0 where it has no adapter."""
        named = self.targets == "all-linear" or any(f".{name}".endswith(f".{target}") for target in self.targets)
        if not named or self.saves(name):
            return 0
        return next((r for key, r in self.rank_pattern.items() if re.match(rf"(.*\.)?({key})$", name)), self.r)

    def saves(self, name: str) -> bool:
        """Whether the module `name` is trained whole, by itself or as a part of another."""
        return self.full or any(f".{module}." in f".{name}." for module in self.modules_to_save)
