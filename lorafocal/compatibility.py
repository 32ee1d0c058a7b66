"""The one table of what trains with what: base x adapter x reference x layout x engine.

A cell trains, or rules refuse it, each with its reason and the way out. The refusals at run time, docs/compatibility.md
and the tests all come from `RULES`. Nothing here looks at a model: what depends on one (tied embeddings, attention that
packs cannot hold apart) is found out at load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lorafocal.errors import InputError

FLOAT = ("float32", "bfloat16", "float64")
FOUR_BIT = ("nf4", "nf4-double", "fp4", "fp4-double")
QUANTIZED = (*FOUR_BIT, "int8")
BASES = (*FLOAT, *QUANTIZED, "float16", "other-quantization")

VARIANTS = ("lora", "rslora", "dora", "patterns", "modules_to_save", "trainable_tokens")
_CHANGE_THE_BASE = ("pissa", "olora")  # starts that take their part out of the base
STARTS = ("gaussian", "eva", "orthogonal", "random", "pissa", "olora", "loftq")
ADAPTERS = (*VARIANTS, *STARTS, "bias", "corda", "lora_ga", "mica")
FULL = "full"  # in an adapter's place: every parameter of the base is trained

REFERENCES = (
    "none", "disabled_adapter", "frozen_copy", "separate_model", "cached",
    "adapter", "moving", "moving-soft", "several",
)  # fmt: skip
# In the words of `reference.kind`: moving-soft is a moving one with a mixing below 1.
REFERENCE_KINDS = tuple(word for word in REFERENCES if word not in ("none", "moving-soft"))
LAYOUTS = ("packed", "padded")
ENGINES = ("one-process", "ddp", "zero1", "zero2", "zero3", "fsdp2")
SPLIT_WEIGHTS = ("zero3", "fsdp2")
# What an engine can keep in the machine's memory, beside nothing: the optimiser's states, or all that it splits.
OFFLOADS = {"zero1": ("optimizer",), "zero2": ("optimizer",), "zero3": ("optimizer", "all"), "fsdp2": ("all",)}

# How messages and the page write a word, where that is not the word itself.
TITLES = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "loftq": "LoftQ",
    "eva": "EVA",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
    "mica": "MiCA",
    "one-process": "one process",
    "ddp": "DDP",
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
    "fsdp2": "FSDP2",
    FULL: "full-parameter training",
    "moving-soft": "a moving average",
}

# What an adapter's setting is called in the table, by its name in a config or in `peft.LoraConfig`.
_WORDS = {
    "use_rslora": "rslora",
    "use_dora": "dora",
    "rank_pattern": "patterns",
    "alpha_pattern": "patterns",
    "modules_to_save": "modules_to_save",
    "trainable_tokens": "trainable_tokens",
    "trainable_token_indices": "trainable_tokens",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination, in the words of `BASES`, `ADAPTERS` (all that apply, or `FULL` alone), and so on.

    Words that the table does not have are refused by name.
    """

    base: str
    adapter: frozenset[str]
    reference: str = "none"
    layout: str = "packed"
    engine: str = "one-process"


@dataclass(frozen=True, slots=True)
class Rule:
    """Why some cells do not train: `finds` names the words of a cell that it is about, none where it does not apply.

    `axis` is the part of the cell to change; `reason` and `remedy` may hold {found}, those words, and {base}.
    """

    name: str
    axis: Literal["base", "adapter", "reference", "layout", "engine"]
    finds: Callable[[Cell], Iterable[str]]
    reason: str
    remedy: str

    def refusal(self, words: Iterable[str], base: str) -> Refusal:
        """This rule about `words` that it found, on `base`."""
        *others, last = (TITLES.get(word, word) for word in words)
        facts = {"found": f"{', '.join(others)} and {last}" if others else last, "base": base}
        return Refusal(self, self.reason.format(**facts), self.remedy.format(**facts))


@dataclass(frozen=True, slots=True)
class Refusal:
    """A rule on a cell, in words."""

    rule: Rule
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.remedy}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the table says of a cell: every rule that refuses it, none where it trains."""

    refusals: tuple[Refusal, ...]

    @property
    def trains(self) -> bool:
        return not self.refusals

    @property
    def reason(self) -> str:
        return "; ".join(refusal.reason for refusal in self.refusals)

    @property
    def remedy(self) -> str:
        return "; ".join(dict.fromkeys(refusal.remedy for refusal in self.refusals))

    def __str__(self) -> str:
        return "; ".join(map(str, self.refusals))


def _engines_on(bases: Iterable[str], *words: str) -> Callable[[Cell], Iterable[str]]:
    return lambda cell: {cell.engine} & {*words} if cell.base in bases else ()


def _off_is_not_the_start(*words: str) -> Callable[[Cell], Iterable[str]]:
    return lambda cell: cell.adapter & {*words} if cell.reference == "disabled_adapter" else ()


def _on_bases(bases: Iterable[str], *words: str) -> Callable[[Cell], Iterable[str]]:
    return lambda cell: cell.adapter & {*words} if cell.base in bases else ()


def _beside(other: str, *words: str) -> Callable[[Cell], Iterable[str]]:
    return lambda cell: cell.adapter & {*words} if other in cell.adapter else ()


_ON_ADAPTERS = {"disabled_adapter", "frozen_copy", "adapter", "moving", "moving-soft", "several"}
_COPY = "compare with `frozen_copy`, the adapter as it starts on the same base"
_WHOLE = "split 4-bit weights by FSDP2 (`engine.kind: fsdp2`), hold it whole (`ddp`), or split a bfloat16 base"
_ENGINES_HERE = "say `engine.kind: zero3` (or zero1, zero2, fsdp2, ddp) in the config, which any launcher starts"

_REWRITTEN = (
    "with {found}, the start is taken out of the base's weights, and a finished adapter that is put beside would sit on"
    " another base than its own"
)
_ANOTHER_START = "use the default start, eva or loftq, which leave the base as it was"

RULES: tuple[Rule, ...] = (
    Rule(
        "float16",
        "base",
        lambda cell: {cell.base} & {"float16"},
        "a float16 base overflows in preference losses (NaN, or loss 0 after a step)",
        "load it in bfloat16 or float32",
    ),
    Rule(
        "other-quantization",
        "base",
        lambda cell: {cell.base} - {*FLOAT, *QUANTIZED, "float16"},
        "the base is held in a form that is not proved here ({found}; GPTQ, AWQ, FP8 and their like are all others)",
        "load its float original, as it is or quantised by bitsandbytes (`model.quantization: nf4` or int8)",
    ),
    Rule(
        "unproved-adapter",
        "adapter",
        lambda cell: {word.removeprefix("other:") for word in cell.adapter - {*VARIANTS, *STARTS, "bias", FULL}},
        "the adapter asks for {found}, for which nothing here proves gradients, reference or the saved file",
        "leave it at its default; starts that are proved: default, gaussian, orthogonal, pissa, olora, loftq, eva",
    ),
    Rule(
        "trained-bias",
        "adapter",
        lambda cell: cell.adapter & {"bias"},
        "trained biases belong to the base's layers and stay when the adapter is switched off or left out",
        'use bias="none"',
    ),
    Rule(
        "rewritten-quantized-base",
        "adapter",
        _on_bases(QUANTIZED, *_CHANGE_THE_BASE),
        "with {found}, the start is taken out of the base's weights, and quantised weights ({base}) cannot hold what is"
        " left",
        "use a bfloat16 base, or another start: loftq on 4-bit bases, eva or the default on all",
    ),
    Rule(
        "orthogonal-quantized-base",
        "adapter",
        _on_bases(QUANTIZED, "orthogonal"),
        "with {found}, PEFT makes the start in the dtype that the base's weights are stored in, and quantised ones"
        " ({base}) are stored as whole numbers",
        "use the default start or gaussian, or a bfloat16 base",
    ),
    Rule(
        "rewritten-float64-base",
        "adapter",
        _on_bases(("float64",), *_CHANGE_THE_BASE),
        "with {found}, the start is computed in single precision by PEFT, which takes no {base} weights",
        "use a float32 base",
    ),
    Rule(
        "loftq-without-4-bit",
        "adapter",
        lambda cell: cell.adapter & {"loftq"} if cell.base not in FOUR_BIT else (),
        "with {found}, training starts from what rounding to 4 bits lost, and a base in {base} was not rounded so",
        "quantise the base to 4 bits (`model.quantization: nf4`), or use the default start",
    ),
    Rule(
        "rewritten-base-with-dora",
        "adapter",
        _beside("dora", *_CHANGE_THE_BASE),
        "with {found}, the adapter is saved as plain LoRA on the base as it was, and DoRA's magnitudes, which belong to"
        " the changed base, have no place in that",
        "use one of the two: DoRA with the default start, or {found} without DoRA",
    ),
    Rule(
        "eva-with-tokens",
        "adapter",
        _beside("trainable_tokens", "eva"),
        "with {found}, PEFT takes the embeddings, where single tokens are trained, for one more layer to start from"
        " data",
        "leave the trained tokens out, or use the default start",
    ),
    Rule(
        "rewritten-base-as-reference",
        "reference",
        _off_is_not_the_start(*_CHANGE_THE_BASE),
        "with {found}, the start is taken out of the base's weights, so with the adapter off that part is missing",
        _COPY,
    ),
    Rule(
        "started-elsewhere",
        "reference",
        _off_is_not_the_start("loftq", "random"),
        "with the start {found}, the adapter is not zero, so with it off the model is not where training began",
        _COPY,
    ),
    Rule(
        "start-up-to-rounding",
        "reference",
        _off_is_not_the_start("orthogonal"),
        "with the start {found}, the adapter's matrices multiply to zero up to rounding only, so with it off the model"
        " is not exactly where training began",
        _COPY,
    ),
    Rule(
        "under-finished-adapters",
        "reference",
        lambda cell: cell.adapter & {*_CHANGE_THE_BASE} if cell.reference in ("adapter", "several") else (),
        _REWRITTEN,
        _ANOTHER_START,
    ),
    Rule(
        "averaged-dora",
        "reference",
        lambda cell: cell.adapter & {"dora"} if cell.reference == "moving-soft" else (),
        "with {found}, the rows of the changed weight are scaled, and the average of two such weights is neither of"
        " their kind nor a change of low rank",
        "let the reference be a copy each time (`reference.mixing: 1.0`), or use LoRA without DoRA",
    ),
    Rule(
        "moving-split",
        "engine",
        lambda cell: {cell.engine} & {*SPLIT_WEIGHTS} if cell.reference in ("moving", "moving-soft") else (),
        "under {found}, adapters are split over processes, and a reference that moves is exchanged whole",
        "hold adapters whole (`ddp`, `zero1` or `zero2`), or keep the reference where it is (`frozen_copy`)",
    ),
    Rule(
        "full-quantized",
        "base",
        lambda cell: {cell.base} & {*QUANTIZED} if FULL in cell.adapter else (),
        "without `adapter`, every parameter is trained, and quantised weights ({found}) take no gradient steps",
        "train an adapter (`adapter: {{r: 16, alpha: 32}}`), or leave `model.quantization` out",
    ),
    Rule(
        "no-adapter-to-compare",
        "reference",
        lambda cell: {cell.reference} & _ON_ADAPTERS if FULL in cell.adapter else (),
        "without `adapter`, every parameter is trained, and the reference {found} is one of adapters",
        "store the reference's log-probs first (`reference.kind: cached`, by `lorafocal cache-reference CONFIG`), hold"
        " a second model (`separate_model`), or train an adapter (`adapter: {{r: 16, alpha: 32}}`; in Python"
        " `peft_config=LoraConfig(...)`)",
    ),
    Rule(
        "split-int8-base",
        "engine",
        _engines_on(("int8",), "zero3"),
        "under {found}, weights are split over processes, but bitsandbytes keeps each int8 weight whole beside that, so"
        " nothing would be saved",
        _WHOLE,
    ),
    Rule(
        "tokens-on-split-embeddings",
        "engine",
        lambda cell: {cell.engine} & {"zero3"} if "trainable_tokens" in cell.adapter else (),
        "under {found}, embeddings are split over processes, and PEFT reads them where it trains single tokens while"
        " DeepSpeed has not fetched them",
        "split them by FSDP2 (`engine.kind: fsdp2`), hold them whole (`zero2` or `ddp`), or leave the tokens out",
    ),
    Rule(
        "another-engine",
        "engine",
        lambda cell: {cell.engine} - {*ENGINES},
        "{found} is no engine that lorafocal trains in",
        _ENGINES_HERE,
    ),
    Rule(
        "another-reference",
        "reference",
        lambda cell: {cell.reference} - {*REFERENCES},
        "there is no reference {found}",
        f"choose one of {', '.join(REFERENCE_KINDS)}",
    ),
    Rule(
        "another-layout",
        "layout",
        lambda cell: {cell.layout} - {*LAYOUTS},
        "there is no layout {found}",
        f"choose {' or '.join(LAYOUTS)}",
    ),
)


def verdict(cell: Cell) -> Verdict:
    """Whether the cell trains, and what refuses it otherwise. Answers every cell."""
    found = ((rule, sorted(rule.finds(cell))) for rule in RULES)
    return Verdict(tuple(rule.refusal(words, cell.base) for rule, words in found if words))


def check(cell: Cell) -> None:
    """Raise InputError with every reason and its remedy, unless the cell trains."""
    found = verdict(cell)
    if not found.trains:
        raise InputError(str(found))


def offload_refusal(engine: str, offload: str) -> str:
    """Why `engine` cannot keep `offload` in the machine's memory; "" where it can."""
    possible = OFFLOADS.get(engine, ())
    if offload in ("none", *possible):
        return ""
    return f"{offload!r} is not what {TITLES.get(engine, engine)} can offload: {' or '.join((*possible, 'none'))}"


def guide_refusal(adapter: frozenset[str]) -> str:
    """Why no guide can stand beside an adapter of these words; "" where one can."""
    if FULL in adapter:
        return "without `adapter`, every parameter is trained, and the guide has no base beside it: train an adapter"
    if found := adapter & {*_CHANGE_THE_BASE}:
        return f"{_REWRITTEN.format(found=TITLES[min(found)])}: {_ANOTHER_START}"
    return ""


def engine_refusal(engine: str) -> str:
    """Why nothing trains in `engine`, and the way out; "" where something does."""
    return str(verdict(Cell("float32", frozenset({"lora"}), engine=engine)))


def adapter_words(settings: Mapping[str, object] | None) -> frozenset[str]:
    """The table's words for an adapter's settings, named as in a config's `adapter` or in `peft.LoraConfig`.

    None is full-parameter training.
    """
    if settings is None:
        return frozenset({FULL})
    start = settings.get("init", settings.get("init_lora_weights", True))
    words = {word for name, word in _WORDS.items() if settings.get(name)}
    if not words & {"rslora", "dora"}:
        words.add("lora")
    if start is False:
        words.add("random")
    elif start not in (True, "default"):
        words.add(str(start).lower().partition("_niter_")[0])
    if settings.get("bias", "none") != "none":
        words.add("bias")
    return frozenset(words)


# ---- what a checkpoint is held as


def stored_as(stated: Mapping[str, Any], name: str) -> str:
    """The word for what a checkpoint's `quantization_config` says; InputError for every method but bitsandbytes."""
    four, eight = (bool(stated.get(key) or stated.get(f"_{key}")) for key in ("load_in_4bit", "load_in_8bit"))
    method = stated.get("quant_method") or ("bitsandbytes" if four or eight else "a method without a name")
    method = str(getattr(method, "value", method))
    if method.startswith("bitsandbytes") and four == eight:
        raise InputError(
            f"model.name: {name} is quantised with bitsandbytes, but its config.json does not say as what: of"
            " load_in_4bit and load_in_8bit one must be true. The checkpoint is damaged; use its float original"
        )
    if not method.startswith("bitsandbytes"):
        raise InputError(
            f"model.name: {name} is quantised with {method}, which lorafocal does not train: use its float original"
            " (and `model.quantization: nf4` to hold that in 4 bits), or a bitsandbytes checkpoint"
        )
    if eight:
        return "int8"
    return quantized_word(
        str(stated.get("bnb_4bit_quant_type", "fp4")), bool(stated.get("bnb_4bit_use_double_quant", False))
    )


def quantized_word(kind: str, double: bool) -> str:
    return f"{kind}-double" if double else kind
