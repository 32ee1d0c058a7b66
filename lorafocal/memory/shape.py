"""The shape of a model: the layers that are counted, read from its config's values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorafocal.errors import InputError


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer of a decoder layer: its path there, its weight (rows, columns), and the tensor that it reads."""

    name: str
    rows: int
    columns: int
    bias: bool
    reads: str  # "normed" (q, k, v), "heads" (o), "hidden" (gate, up), "product" (down)

    @property
    def entries(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Family:
    """What a `model_type` has otherwise than Llama; None where its config decides, with Llama's default."""

    query_bias: bool | None = None  # of q, k and v
    output_bias: bool | None = None
    joined: bool = False  # qkv and gate_up are one matrix each
    head_norms: bool = False  # q and k are normed, each head alike
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    tied: bool = False  # where the config does not say
    head_dim: int | None = None  # where the config does not say
    period: int | None = None  # every so many layers attend without a window, and turn positions their own way
    windowed: bool = True  # where the config has a window and does not say whether it is used
    wide_norms: bool = False  # multiply by their weight in fp32
    scalars: int = 0  # other numbers of its embeddings


_FOUR_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
FAMILIES = {
    "llama": Family(),
    "mistral": Family(False, False),
    "qwen2": Family(True, False, windowed=False),
    "qwen3": Family(head_norms=True, head_dim=128, windowed=False),
    "gemma": Family(tied=True, head_dim=256, wide_norms=True, scalars=1),
    "gemma3_text": Family(
        head_norms=True, norms=_FOUR_NORMS, tied=True, head_dim=256, period=6, wide_norms=True, scalars=1
    ),
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
    linears: tuple[Linear, ...]  # of one layer
    sliding_window: int | None = None  # of all layers: where only some have one, the others decide
    rotations: int = 1  # kinds of rotary embeddings

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
        hidden, inner, heads, layers, vocabulary = (
            _positive(config, name)
            for name in (
                "hidden_size",
                "intermediate_size",
                "num_attention_heads",
                "num_hidden_layers",
                "vocab_size",
            )
        )
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or family.head_dim or hidden // heads
        return cls(
            kind,
            vocabulary,
            hidden,
            inner,
            layers,
            heads,
            kv_heads,
            head_dim,
            bool(config.get("tie_word_embeddings", family.tied)),
            tuple(_linears(config, family, hidden, inner, heads * head_dim, kv_heads * head_dim)),
            _window(config, family),
            1 if family.period is None else len(_kinds(config, family.period, layers)),
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
    def parameters(self) -> int:
        """All of the model, a tied head counted once."""
        return sum(sum(sizes) for name, sizes in self.modules() if name != "lm_head" or not self.tied)

    def modules(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every module that has parameters, by the name PEFT gives it, with the entries of each parameter."""
        yield "model.embed_tokens", (self.head_parameters,)
        norms = [(name, self.hidden_size) for name in self.family.norms]
        if self.family.head_norms:
            norms += [(f"self_attn.{name}_norm", self.head_dim) for name in "qk"]
        for layer in range(self.layers):
            for name, size in norms:
                yield f"model.layers.{layer}.{name}", (size,)
            for name, linear in self.layer_linears(layer):
                yield name, (linear.entries, linear.rows) if linear.bias else (linear.entries,)
        yield "model.norm", (self.hidden_size,)
        yield "lm_head", (self.head_parameters,)

    def layer_linears(self, layer: int) -> Iterator[tuple[str, Linear]]:
        return ((f"model.layers.{layer}.{linear.name}", linear) for linear in self.linears)


def _positive(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise InputError(f"model.shape: {name} is {value!r}; it must be a whole number above 0")
    return value


def _window(config: Mapping[str, Any], family: Family) -> int | None:
    used = family.period is None and config.get("use_sliding_window", family.windowed)
    return config.get("sliding_window") if used else None


def _kinds(config: Mapping[str, Any], period: int, layers: int) -> set[str]:
    """The kinds of attention that a model's layers have, where they have several."""
    stated = config.get("layer_types")
    return set(stated) if stated else {"full" if (layer + 1) % period == 0 else "sliding" for layer in range(layers)}


def _linears(
    config: Mapping[str, Any], family: Family, hidden: int, inner: int, queries: int, keys: int
) -> Iterator[Linear]:
    """The linear layers of one decoder layer."""
    stated = bool(config.get("attention_bias", False))
    query_bias = stated if family.query_bias is None else family.query_bias
    output_bias = stated if family.output_bias is None else family.output_bias
    mlp_bias = config.get("model_type") == "llama" and bool(config.get("mlp_bias", False))
    projections = {"qkv": queries + 2 * keys} if family.joined else {"q": queries, "k": keys, "v": keys}
    for name, rows in projections.items():
        yield Linear(f"self_attn.{name}_proj", rows, hidden, query_bias, "normed")
    yield Linear("self_attn.o_proj", hidden, queries, output_bias, "heads")
    for name, rows in ({"gate_up": 2 * inner} if family.joined else {"gate": inner, "up": inner}).items():
        yield Linear(f"mlp.{name}_proj", rows, hidden, mlp_bias, "hidden")
    yield Linear("mlp.down_proj", hidden, inner, mlp_bias, "product")
