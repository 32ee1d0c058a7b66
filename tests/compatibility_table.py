"""Writes docs/compatibility.md from `lorafocal.compatibility`. Run it after a change of the rules:

python -m tests.compatibility_table
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from lorafocal.compatibility import (
    ADAPTERS,
    BASES,
    ENGINES,
    FULL,
    QUANTIZED,
    REFERENCES,
    RULES,
    STARTS,
    TITLES,
    Cell,
    verdict,
)

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"

# What trains by gradients equal to a twin: tests/test_compatible_cells.py makes each of these cells.
PROVED_BASES = ("float32", "bfloat16", "nf4", "int8")
PROVED_WITH_LORA = ("nf4-double", "fp4", "fp4-double")
PROVED_ADAPTERS = ("lora", "rslora", "dora")
PROVED_REFERENCES = ("disabled_adapter", "frozen_copy")

# Where what a rule says is shown to be so.
PROOFS = {
    "float16": "tests/test_compatibility.py::test_float16_overflows_where_bfloat16_does_not",
    "other-quantization": "tests/test_compatibility.py::test_the_trainer_refuses_in_the_tables_words",
    "unproved-adapter": "tests/test_compatibility.py::test_the_trainer_refuses_in_the_tables_words",
    "trained-bias": "tests/test_compatibility.py::test_a_trained_bias_stays_when_the_adapter_is_off",
    "rewritten-quantized-base": "tests/test_compatibility.py::test_quantised_weights_lose_what_a_start_takes_out",
    "orthogonal-quantized-base": "tests/test_compatibility.py::test_the_trainer_refuses_in_the_tables_words",
    "rewritten-float64-base": "tests/test_compatibility.py::test_peft_takes_no_float64_weights_apart",
    "loftq-without-4-bit": "tests/test_compatibility.py::test_the_trainer_refuses_in_the_tables_words",
    "rewritten-base-with-dora": "tests/test_compatibility.py::test_the_trainer_refuses_in_the_tables_words",
    "eva-with-tokens": "tests/test_compatibility.py::test_the_trainer_refuses_in_the_tables_words",
    "rewritten-base-as-reference": "tests/test_compatibility.py::test_the_switched_off_adapter_is_not_the_start",
    "started-elsewhere": "tests/test_compatibility.py::test_the_switched_off_adapter_is_not_the_start",
    "start-up-to-rounding": "tests/test_compatibility.py::test_the_switched_off_adapter_is_not_the_start",
    "under-finished-adapters": "tests/test_compatibility.py::test_the_trainer_refuses_in_the_tables_words",
    "averaged-dora": "tests/test_compatibility.py::test_the_average_of_two_dora_weights_is_no_dora_weight",
    "moving-split": "tests/test_compatibility.py::test_layouts_and_engines_refuse_on_their_own",
    "full-quantized": "tests/test_compatibility.py::test_configs_without_an_adapter_are_refused_so",
    "no-adapter-to-compare": "tests/test_compatibility.py::test_configs_without_an_adapter_are_refused_so",
    "split-int8-base": "tests/engine/test_zero.py::test_what_zero_3_cannot_split_is_refused",
    "tokens-on-split-embeddings": "tests/engine/test_zero.py::test_what_zero_3_cannot_split_is_refused",
}

INTRODUCTION = """\
# Compatibility

Can I train this adapter on that base, compared with this reference? Written by `python -m tests.compatibility_table`
from the rules of `lorafocal/compatibility.py`, which also refuse at run time, with the same words: a config before
anything is downloaded, a `FocalPOTrainer` before its first step. A test makes this page again.

**trains** means exact: the gradient of a packed step is that of PEFT's own forward. A number is a note below, with the
reason and the way out. Refusals add up: a cell is refused where its base, its adapter, its reference or its engine is.

"""

WORDS = """
Words: `patterns` are `rank_pattern` and `alpha_pattern`; `modules_to_save` are trained whole, `trainable_tokens` train
single rows of the embeddings; `random` is PEFT's `init_lora_weights=False`. LoRA+ is a learning rate and goes with all.
What depends on the model at hand is found out at load: tied embeddings with `modules_to_save`, ranks above a layer's
size, experts kept in one tensor (Mixtral, Qwen3-MoE) and Falcon's own layers, which bitsandbytes leaves in float. GPTQ,
AWQ, FP8 and every other way to hold a base are "other-quantization".
"""


def page() -> str:
    """The document."""
    notes = Notes()
    sections = [
        ("Base and adapter", _bases(notes) + WORDS),
        ("Adapters that do not go together", _pairs(notes)),
        ("Adapter and reference", _references(notes)),
        ("Engines", _engines(notes)),
        ("Layouts", LAYOUTS),
        ("Optimisers", OPTIMISERS),
        ("Afterwards", _afterwards()),
        ("Notes", notes.text()),
        ("What is proved, and where", _proofs()),
    ]
    return INTRODUCTION + "\n".join(f"## {title}\n\n{text}" for title, text in sections)


LAYOUTS = """\
`packed` and `padded` train the same cells with the same gradients. Which of them a model can is a matter of its
architecture ([architectures.md](architectures.md)), and `auto` finds out.
"""

OPTIMISERS = """\
AdamW of torch, and of bitsandbytes in 8 bits or paged (`adamw_8bit`, `paged_adamw_32bit`, `paged_adamw_8bit`), go with
every cell in one process and under DDP, LoRA+ with each of them; paging needs a GPU and is refused without one. Under
ZeRO and FSDP2 the optimiser is torch's AdamW ([several processes](several-processes.md)).
"""


def _afterwards() -> str:
    return (
        _wrapped(
            "- Every adapter that trains is saved as files that PEFT opens, scored (`lorafocal score`) and continued"
            " (`adapter.start_from`), on a base held as in training."
        )
        + "\n"
        + _wrapped(
            "- `lorafocal merge` folds each of them into the base: of a quantised one into its weights de-quantised, or"
            " into the floats they were made of, whichever ends nearer to the adapter. A head that is tied"
            " to the embeddings and was trained apart it refuses by name: such an adapter is published as it is."
            " Several adapters become one (`--weights`) where each is a change B A of the same base."
        )
        + "\n"
    )


NUMBERS = {rule.name: number for number, rule in enumerate(RULES, 1)}


class Notes:
    """The rules that the page mentions, with the words and the bases that they were found for."""

    def __init__(self) -> None:
        self._found: dict[str, set[str]] = {}
        self._bases: dict[str, set[str]] = {}

    def mark(self, cell: Cell) -> str:
        """ "trains", or the numbers of the notes on why the cell does not."""
        refusals = verdict(cell).refusals
        for rule in (refusal.rule for refusal in refusals):
            self._found.setdefault(rule.name, set()).update(rule.finds(cell))
            if len(refusals) == 1:
                self._bases.setdefault(rule.name, set()).add(cell.base)
        return " ".join(f"[{NUMBERS[refusal.rule.name]}]" for refusal in refusals) or "trains"

    def text(self) -> str:
        noted = []
        for rule in (rule for rule in RULES if rule.name in self._found):
            bases = [base for base in BASES if base in self._bases[rule.name]]
            refusal = rule.refusal(sorted(self._found[rule.name]), " or ".join(bases))
            reason = refusal.reason[0].upper() + refusal.reason[1:]
            noted.append(_wrapped(f"- **[{NUMBERS[rule.name]}]** {reason}. Instead: {refusal.remedy}."))
        return "\n".join(noted) + "\n"


def _wrapped(line: str) -> str:
    return textwrap.fill(line, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(base: str, words: Iterable[str], reference: str = "frozen_copy") -> Cell:
    return Cell(base, frozenset(words), reference)


def _bases(notes: Notes) -> str:
    """Bases that all adapters treat alike share a column."""
    columns: dict[tuple[str, ...], list[str]] = {}
    for base in BASES:
        columns.setdefault(tuple(notes.mark(_cell(base, {word})) for word in ADAPTERS), []).append(base)
    rows = [[title(word), *marks] for word, *marks in zip(ADAPTERS, *columns, strict=True)]
    return _table(["adapter", *(", ".join(bases) for bases in columns.values())], rows)


def _pairs(notes: Notes) -> str:
    """Pairs of words that are refused on every base where each of them alone trains."""
    rows = []
    for pair in combinations(ADAPTERS[1:], 2):
        shared = [base for base in BASES if all(verdict(_cell(base, {word})).trains for word in pair)]
        refused = not any(verdict(_cell(base, pair)).trains for base in shared)
        if shared and refused and not {*pair} <= {*STARTS}:
            rows.append([f"{title(pair[0])} and {title(pair[1])}", notes.mark(_cell(shared[0], pair))])
    return _table(["adapter", "together"], rows)


def _references(notes: Notes) -> str:
    rows = []
    for word in ADAPTERS:
        base = next((base for base in BASES if verdict(_cell(base, {word})).trains), None)
        if base is not None:
            marks = {reference: notes.mark(_cell(base, {word}, reference)) for reference in REFERENCES}
            off = "where training began" if marks["disabled_adapter"] == "trains" else "another model"
            rows.append([title(word), off, *marks.values()])
    return _table(["adapter", "with the adapter off, the model is", *map(_code, REFERENCES)], rows) + NONE


NONE = """
`none` is for objectives that need no reference, as `sft` and `simpo`. A `separate_model` is any model of the same
tokenizer, float or quantised. `cached` holds log-probs of the policy as it starts (`docs/reference-store.md`), so it
goes with every adapter that trains. `adapter` is a finished one and `several` are base and finished ones together
([references.md](references.md)); a reference that is `moving` copies the policy from time to time, or averages with it
(`moving-soft` here: `mixing` below 1). None of them needs a second model.
"""


def _engines(notes: Notes) -> str:
    columns = {
        "every parameter": Cell("bfloat16", frozenset({FULL}), "cached"),
        "adapters on float bases": Cell("bfloat16", frozenset({"lora"}), "disabled_adapter"),
        "adapters on quantised bases": Cell("nf4", frozenset({"lora"}), "disabled_adapter"),
    }
    rows = [
        [title(engine), *(_in_an_engine(notes, replace(cell, engine=engine)) for cell in columns.values())]
        for engine in ENGINES
    ]
    return _table(["engine", *columns], rows) + _full(notes)


def _in_an_engine(notes: Notes, cell: Cell) -> str:
    """The mark of a cell, and of its neighbours that the engine refuses."""
    others = {}
    if FULL not in cell.adapter:
        others["trainable_tokens"] = replace(cell, adapter=cell.adapter | {"trainable_tokens"})
        others["moving"] = replace(cell, reference="moving")
    if cell.base in QUANTIZED:
        others["int8"] = replace(cell, base="int8")
    marks = [f"{_code(word)} {mark}" for word, other in others.items() if (mark := notes.mark(other)) != "trains"]
    return notes.mark(cell) + (f", but not {', '.join(marks)}" if marks else "")


def _full(notes: Notes) -> str:
    """What trains without an adapter, by base and reference."""
    bases = [base for base in BASES if base not in ("float16", "other-quantization")]
    columns: dict[tuple[str, ...], list[str]] = {}
    for base in bases:
        marks = tuple(notes.mark(Cell(base, frozenset({FULL}), reference)) for reference in REFERENCES)
        columns.setdefault(marks, []).append(base)
    rows = [[_code(reference), *(marks[place] for marks in columns)] for place, reference in enumerate(REFERENCES)]
    return "\nWithout `adapter`, every parameter is trained:\n\n" + _table(
        ["reference", *(", ".join(held) for held in columns.values())], rows
    )


def _proofs() -> str:
    axes = " x ".join(f"{{{', '.join(words)}}}" for words in (PROVED_BASES, PROVED_ADAPTERS, PROVED_REFERENCES))
    lines = [
        f"- {axes} and {', '.join(PROVED_WITH_LORA)} with lora, packed: loss and gradients of a step equal"
        " those of PEFT's own forward, one sequence at a time, in float64, as far as rounding allows; training starts"
        " at the identity loss and leaves the base's bytes alone (`tests/test_compatible_cells.py`). Padded, too: all"
        " of float32, and on each base lora with the adapter switched off and dora against a frozen copy.",
        "- Whole modules, tokens, patterns and several at once: `tests/model/test_variants.py`. Starts:"
        " `tests/model/test_starts.py`, `tests/test_starts_in_training.py`. Quantised bases:"
        " `tests/model/test_quantized.py`.",
        "- Two processes on a quantised base: `tests/engine/test_quantized_data_parallel.py`.",
        "- Refusals, through configs and through the trainer: `tests/test_compatibility.py`.",
    ]
    rows = [[f"[{NUMBERS[name]}]", _code(test)] for name, test in PROOFS.items()]
    return "\n".join(map(_wrapped, lines)) + "\n\n" + _table(["note", "shown by"], rows)


def title(word: str) -> str:
    return TITLES.get(word, _code(word))


def _code(word: str) -> str:
    return f"`{word}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
