"""Bytes and floating-point operations of a run, from a model's shape alone: pure arithmetic, no torch.

Residents (weights, adapters, their gradients, optimiser states) do not depend on the tokens of a pack; activations
grow with them, by one of three tiers: keep all (`none`), compute gate and up again (`mlp`), compute every layer again
(`full`). `choose` weighs them. docs/memory.md has the formulas and how well they agree with what was counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorafocal.errors import InputError

TIERS = ("none", "mlp", "full")
HEAD_CHUNK_ELEMENTS = 2**26  # entries of the largest logits chunk: 256 MiB in fp32

MAX_TOKENS = 16384  # larger packs gain nothing: the matrix products are at their peak long before
TOKEN_STEP = 64  # budgets are multiples
WIDTHS = {"float32": 4, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer of a decoder layer: `name` is its path inside the layer, its weight is (rows, columns)."""

    name: str
    rows: int
    columns: int
    bias: bool = False

    @property
    def entries(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Family:
    """What a `model_type` adds to the plain Llama layer; None where its config decides."""

    query_bias: bool | None = None  # of q, k and v
    output_bias: bool | None = None
    joined: bool = False  # qkv and gate_up are one matrix each
    head_norms: bool = False  # q and k are normed a head
    norms: int = 2  # over the hidden size, a layer
    wide_norm: bool = False  # multiplies by its weight in fp32
    tied: bool = False  # where the config does not say
    head_dim: int | None = None  # where the config does not say


FAMILIES = {
    "llama": Family(),
    "mistral": Family(False, False),
    "qwen2": Family(True, False),
    "qwen3": Family(head_norms=True),
    "gemma": Family(wide_norm=True, tied=True, head_dim=256),
    "gemma2": Family(norms=4, wide_norm=True, tied=True, head_dim=256),
    "gemma3_text": Family(head_norms=True, norms=4, wide_norm=True, tied=True, head_dim=256),
    "phi3": Family(False, False, joined=True),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a dense decoder that its bytes and operations follow from."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    linears: tuple[Linear, ...]
    sliding_window: int | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """From transformers' config values, as a config's `model.shape` or a model's config.json has them.

        Raises InputError for a family that is not known here, and for missing or impossible values.
        """
        config = config.get("text_config") or config
        family = FAMILIES.get(kind := str(config.get("model_type")))
        if family is None:
            raise InputError(
                f"model.shape: the arithmetic does not know the layers of model_type {kind!r}; it knows"
                f" {', '.join(FAMILIES)}. Training itself takes any model: state `packing.tokens` as a number"
            )
        sizes = {
            name: _positive(config, name)
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
            )
        }
        hidden, inner, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or family.head_dim or hidden // heads
        return cls(
            kind,
            sizes["vocab_size"],
            hidden,
            inner,
            sizes["num_hidden_layers"],
            heads,
            kv_heads,
            head_dim,
            bool(config.get("tie_word_embeddings", family.tied)),
            _linears(config, family, hidden, inner, heads * head_dim, kv_heads * head_dim),
            config.get("sliding_window"),
        )

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linear_parameters(self) -> int:
        """Entries of the decoder layers' matrices: N of the cost model."""
        return self.layers * sum(linear.entries for linear in self.linears)

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def other_parameters(self) -> int:
        """Biases and norms."""
        biases = sum(linear.rows for linear in self.linears if linear.bias)
        norms = self.family.norms * self.hidden_size + 2 * self.head_dim * self.family.head_norms
        return self.layers * (biases + norms) + self.hidden_size

    @property
    def parameters(self) -> int:
        """All of the model, a tied head counted once."""
        ends = self.head_parameters * (1 if self.tied else 2)
        return self.linear_parameters + self.other_parameters + ends


def _positive(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise InputError(f"model.shape: {name} is {value!r}; it must be a whole number above 0")
    return value


def _linears(
    config: Mapping[str, Any], family: Family, hidden: int, inner: int, queries: int, keys: int
) -> tuple[Linear, ...]:
    """The linear layers of one decoder layer."""
    attention_bias = bool(config.get("attention_bias", False))
    query_bias = attention_bias if family.query_bias is None else family.query_bias
    output_bias = attention_bias if family.output_bias is None else family.output_bias
    mlp_bias = bool(config.get("mlp_bias", False)) and config.get("model_type") == "llama"
    if family.joined:
        entries = [("self_attn.qkv_proj", queries + 2 * keys, hidden, False)]
        mlp = [("mlp.gate_up_proj", 2 * inner, hidden, False)]
    else:
        entries = [
            ("self_attn.q_proj", queries, hidden, query_bias),
            ("self_attn.k_proj", keys, hidden, query_bias),
            ("self_attn.v_proj", keys, hidden, query_bias),
        ]
        mlp = [("mlp.gate_proj", inner, hidden, mlp_bias), ("mlp.up_proj", inner, hidden, mlp_bias)]
    entries += [
        ("self_attn.o_proj", hidden, queries, output_bias),
        *mlp,
        ("mlp.down_proj", hidden, inner, mlp_bias),
    ]
    return tuple(Linear(*entry) for entry in entries)


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
    def keys(self) -> float:
        """Rows of keys that attention gathers: the prompt once an answer."""
        return self.rows + self.prompt

    @property
    def answers(self) -> float:
        return self.chosen + self.rejected

    def visible(self, window: int | None = None) -> float:
        """Query-key pairs that causal attention sees, the prompt's own once."""
        first, second = self.prompt + self.chosen, self.prompt + self.rejected
        return _causal(first, window) + _causal(second, window) - _causal(self.prompt, window)


def _causal(length: float, window: int | None) -> float:
    """Visible pairs of `length` queries on themselves and what stands before them."""
    if window is None or length <= window:
        return length * (length + 1) / 2
    return window * (window + 1) / 2 + (length - window) * window


@dataclass(frozen=True, slots=True)
class Setup:
    """How a shape is trained: precision, adapter, optimiser, kernels, reference. Words are the config's.

    `adapter_kernels` is "fused" or "peft"; `attention` is "flash" or "sdpa".
    """

    dtype: str = "bfloat16"
    quantization: str | None = None
    r: int = 16
    targets: str | Sequence[str] = "all-linear"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    use_dora: bool = False
    modules_to_save: Sequence[str] = ()
    trainable_tokens: int = 0
    optim: str = "adamw_torch_fused"
    reference: str = "disabled_adapter"
    adapter_kernels: str = "fused"
    attention: str = "flash"
    lengths: Lengths = Lengths()

    @property
    def width(self) -> int:
        """Bytes of a computed number."""
        return WIDTHS[self.dtype]


# ---- residents ----------------------------------------------------------------------------------------------------


def weight_bytes(shape: Shape, setup: Setup) -> int:
    """The base as `load_base` holds it."""
    floats = shape.parameters * setup.width
    if setup.quantization is None:
        return floats
    held = shape.layers * sum(quantized_bytes(linear, setup.quantization) for linear in shape.linears)
    return floats - shape.linear_parameters * setup.width + held


BLOCK, OUTER_BLOCK = 64, 256  # bitsandbytes: entries that share a scale; scales that share one


def quantized_bytes(linear: Linear, quantization: str) -> int:
    """A matrix with its scales. Four bits: half a byte an entry, a scale a block, a table of 16 numbers."""
    if quantization == "int8":
        return linear.entries + 4 * linear.rows
    blocks = -(-linear.entries // BLOCK)
    scales = 4 * blocks
    if quantization.endswith("-double"):
        scales = blocks + 4 * -(-blocks // OUTER_BLOCK) + 4 * 256 + 4
    return -(-linear.entries // 2) + scales + 4 * 16


def adapter_parameters(shape: Shape, setup: Setup) -> int:
    """Entries that are trained, all of them held in fp32."""
    total = setup.trainable_tokens * shape.hidden_size
    for linear in shape.linears:
        for layer in range(shape.layers):
            name = f"model.layers.{layer}.{linear.name}"
            if any(_ends(name, module) for module in setup.modules_to_save):
                total += linear.entries + linear.bias * linear.rows
            elif setup.targets == "all-linear" or any(_ends(name, target) for target in setup.targets):
                total += _rank(name, setup) * (linear.rows + linear.columns) + setup.use_dora * linear.rows
    ends = ("model.embed_tokens", "lm_head")
    return total + shape.head_parameters * sum(_ends(end, m) for end in ends for m in setup.modules_to_save)


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _rank(name: str, setup: Setup) -> int:
    for key, rank in setup.rank_pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return rank
    return setup.r


def adapter_bytes(shape: Shape, setup: Setup) -> int:
    """The adapter in fp32; a frozen copy is held once more."""
    return adapter_parameters(shape, setup) * 4 * (2 if setup.reference == "frozen_copy" else 1)


def gradient_bytes(shape: Shape, setup: Setup) -> int:
    return adapter_parameters(shape, setup) * 4


_MOMENTS = {"sgd": 0.0, "adamw_8bit": 2.0, "paged_adamw_8bit": 2.0}


def optimizer_bytes(shape: Shape, setup: Setup) -> int:
    """Moments of the optimiser on the device: AdamW's two in fp32, or in 8 bits with their scales."""
    return round(adapter_parameters(shape, setup) * _MOMENTS.get(setup.optim, 8.0))


# ---- what grows with the tokens -----------------------------------------------------------------------------------


def head_chunk_bytes(shape: Shape, setup: Setup) -> int:
    """Peak of the log-prob head beside what it saves: the logits of a chunk in fp32 and their error."""
    rows = max(1, HEAD_CHUNK_ELEMENTS // shape.vocab_size)
    return rows * shape.vocab_size * (8 + setup.width)


def activation_bytes_per_token(shape: Shape, setup: Setup, tier: str) -> float:
    """Bytes that one forward saves for its backward, a token row of a pack.

    Raises InputError for the tier `mlp` without the fused adapter functions, which alone have it.
    """
    hidden, inner, e = shape.hidden_size, shape.intermediate_size, setup.width
    attention = 2 * shape.query_size + 2 * shape.kv_size * setup.lengths.keys / setup.lengths.rows
    if tier == "mlp" and setup.adapter_kernels != "fused":
        raise InputError("training.activation_checkpointing: mlp needs `kernels.adapters: auto`")
    if tier == "full":
        return shape.layers * hidden * e
    if setup.adapter_kernels == "fused":
        return shape.layers * e * (4 * hidden + attention + (2 * inner if tier == "none" else 0))
    norms = 2 * hidden * 4
    return shape.layers * (norms + e * (6 * hidden + attention + 4 * inner))


@dataclass(frozen=True, slots=True)
class Choice:
    """Token rows of a pack and the tier of activations, with the reason in words."""

    tokens: int
    tier: str
    reason: str
    fits: bool = True


def choose(shape: Shape, setup: Setup, free_bytes: float, longest_pair: int, tiers: Sequence[str] = TIERS) -> Choice:
    """The fastest tier and the largest token budget.

    `free_bytes` is what the device has beside weights, adapters, gradients and optimiser states; the head's chunk is
    taken off here. `tiers` limits the choice. `fits` is False where the longest pair does not fit in any of them.
    """
    budgets = {tier: tokens_that_fit(shape, setup, free_bytes, tier) for tier in tiers}
    possible = {tier: tokens for tier, tokens in budgets.items() if tokens >= longest_pair}
    if not possible:
        tier = max(budgets, key=budgets.__getitem__)
        reason = f"the longest pair has {longest_pair} tokens, {max(0, budgets[tier])} fit"
        return Choice(longest_pair, tier, reason, fits=False)
    tier = min(possible, key=lambda tier: _relative_time(shape, setup, tier, possible[tier]))
    return Choice(possible[tier], tier, f"{possible[tier]} tokens fit with tier {tier}")


def tokens_that_fit(shape: Shape, setup: Setup, free_bytes: float, tier: str) -> int:
    per_token = activation_bytes_per_token(shape, setup, tier)
    tokens = int((free_bytes - head_chunk_bytes(shape, setup)) / per_token)
    return min(MAX_TOKENS, tokens // TOKEN_STEP * TOKEN_STEP)


def _relative_time(shape: Shape, setup: Setup, tier: str, tokens: int) -> float:
    knee = 256 if setup.quantization is None else 700
    return flops_per_pair(shape, setup, tier=tier) * (1 + knee / tokens)


# ---- operations ---------------------------------------------------------------------------------------------------


def flops_per_pair(
    shape: Shape,
    setup: Setup,
    lengths: Lengths | None = None,
    *,
    tier: str = "none",
    live_reference: bool | None = None,
    shared: bool = True,
) -> float:
    """Operations (2 a multiplication and addition) of one pair's training step.

    `shared`: the prompt is computed once; otherwise once an answer. `live_reference` (by default as the setup says)
    adds a forward.
    """
    at = lengths or setup.lengths
    live = setup.reference not in ("none", "cached") if live_reference is None else live_reference
    rows = at.rows if shared else at.rows + at.prompt
    window = shape.sliding_window
    seen = at.visible(window) if shared else at.visible(window) + _causal(at.prompt, window)
    base = 2 * shape.linear_parameters * rows
    attention = 4 * shape.query_size * seen * shape.layers
    lora = 2 * adapter_parameters(shape, setup) * rows
    head = 2 * shape.head_parameters * at.answers
    total = 2 * base + 3.5 * attention + 3 * lora + 2 * head
    if tier == "full":
        total += base + attention + lora
    elif tier == "mlp":
        again = sum(
            linear.entries for linear in shape.linears if linear.name.endswith(("gate_proj", "up_proj", "gate_up_proj"))
        )
        total += base * again * shape.layers / shape.linear_parameters
    return total + (base + attention + head if live else 0)


def minimum_flops_per_pair(shape: Shape, setup: Setup, lengths: Lengths | None = None) -> float:
    """The least that the exact result needs: prompt once, nothing computed again, no reference forward."""
    return flops_per_pair(shape, setup, lengths, tier="none", live_reference=False, shared=True)
