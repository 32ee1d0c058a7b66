"""Model cards: the README.md beside an adapter or a model. Pure text; imports nothing that loads
weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lorafocal.lineage import FULL, Lineage
from lorafocal.objectives import OBJECTIVES
from lorafocal.objectives.factor import in_words

CARD_FILE = "README.md"
LOADER = "AutoModelForCausalLM"  # of most models; `model.load.loader_of` has the others'
_NOT_QUALITY = "The numbers above compare this model with its adapter; they do not say how good it is."
_VERIFYING = (
    "`python verify.py` (torch and transformers, nothing else) compares every file with `manifest.json`, computes the"
    " log-probs of the {pairs} held-out pairs again and applies the gate. It shows that these weights do what was"
    " measured; it cannot show who measured: compare the digest that it prints with the one that was announced."
)


def adapter_card(
    lineage: Lineage,
    results: Mapping[str, float] | None = None,
    *,
    adapter: str = "LoRA",
    loader: str = LOADER,
    run: Mapping[str, Any] | None = None,
) -> str:
    """Card of an adapter; `results` are measured numbers to print, e.g. held-out metrics by name.

    `adapter` says what it is, such as "DoRA of rank 8"; `loader` is the class of transformers that loads the base.
    `run` is the manifest of the run that trained it.
    """
    name, quantization = lineage.base.name, lineage.quantization
    base = f'"{name}", revision="{lineage.base.revision}"' if lineage.base.revision else f'"{name}"'
    if "/" not in name:
        base = '"FOLDER_OF_THE_BASE"'  # a local base: its name is known, its place is nobody's business
    held = "" if lineage.dtype is None else f', dtype="{lineage.dtype}"'
    if quantization is not None:
        held += f", quantization_config={_bitsandbytes_config(quantization, lineage.dtype or 'bfloat16')}"
    return _card(
        _front_matter(lineage, loader, library="peft", relation="adapter"),
        f"# LoRA adapter for {name}",
        _origin(lineage, adapter),
        _results(results),
        *_training(run),
        _loading(
            f"from peft import PeftModel\n{_import(loader)}" + ", BitsAndBytesConfig" * (quantization is not None),
            f"base = {loader}.from_pretrained({base}{held})\n"
            'model = PeftModel.from_pretrained(base, "THIS_ADAPTER")\n'
            f"tokenizer = AutoTokenizer.from_pretrained({base})",
        ),
        _limits(
            lineage,
            *_trained_on(quantization),
            "The adapter fits this base only; `lorafocal.json` has the digest of its weights.",
        ),
    )


def model_card(
    lineage: Lineage,
    results: Mapping[str, float] | None = None,
    *,
    dtype: str,
    loader: str = LOADER,
    run: Mapping[str, Any] | None = None,
) -> str:
    """Card of a model of which every weight was trained; `results`, `loader` and `run` as of `adapter_card`."""
    kind = "preference" if _of_preferences(lineage) else "fine"
    return _card(
        _front_matter(lineage, loader, library="transformers", relation="finetune"),
        f"# {lineage.base.name}, {kind}-tuned at full parameters",
        _origin(lineage),
        f"Every weight was trained, and is stored in {dtype}.",
        _results(results),
        *_training(run),
        _loading_model("THIS_MODEL", dtype, loader),
        _limits(lineage),
    )


def merged_card(
    lineage: Lineage,
    *,
    dtype: str,
    gate: str,
    survival: str,
    notes: tuple[str, ...] = (),
    loader: str = LOADER,
    run: Mapping[str, Any] | None = None,
) -> str:
    """Card of a merged model; `gate` and `survival` are the tables of the merge report, `run` the run's manifest."""
    return _card(
        _front_matter(lineage, loader, library="transformers", relation="finetune"),
        f"# {_merged_title(lineage)}",
        _origin(lineage),
        *_measured(dtype, gate, survival),
        *_training(run),
        _loading_model("THIS_MODEL", dtype, loader),
        _limits(lineage, *notes, _NOT_QUALITY),
    )


def bundle_card(
    lineage: Lineage,
    *,
    dtype: str,
    gate: str,
    survival: str,
    pairs: int,
    notes: tuple[str, ...] = (),
    loader: str = LOADER,
    run: Mapping[str, Any] | None = None,
) -> str:
    """Card of a release bundle: the merged model with its adapter, and how a stranger checks both."""
    return _card(
        _front_matter(lineage, loader, library="transformers", relation="finetune"),
        f"# {_merged_title(lineage)}",
        "`merged/` is the model, `adapter/` what it was made of. " + _VERIFYING.format(pairs=pairs),
        _origin(lineage),
        *_measured(dtype, gate, survival),
        *_training(run),
        _loading_model("THIS_BUNDLE/merged", dtype, loader),
        _limits(lineage, *notes, _NOT_QUALITY),
    )


def compressed_card(
    lineage: Lineage,
    *,
    title: str,
    loading: str,
    measured: Mapping[str, str],
    notes: Sequence[str] = (),
    loader: str = LOADER,
    run: Mapping[str, Any] | None = None,
) -> str:
    """Card of a merged model that was then stored in fewer bits or another format.

    `title` names the format; `loading` is Python, or a command; `measured` are tables by their headings.
    """
    tables = [f"## {heading}\n\n```text\n{table}\n```" for heading, table in measured.items()]
    return _card(
        _front_matter(lineage, loader, library="transformers", relation="quantized"),
        f"# {_merged_title(lineage)}: {title}",
        _origin(lineage),
        *tables,
        *_training(run),
        f"## Loading\n\n{loading}",
        _limits(lineage, *notes, _NOT_QUALITY),
    )


def _card(*parts: str) -> str:
    return "\n\n".join(parts) + "\n"


def _merged_title(lineage: Lineage) -> str:
    kind = "preference" if _of_preferences(lineage) else "fine"
    return f"{lineage.base.name}, merged with a {kind}-tuned LoRA adapter"


def _measured(dtype: str, gate: str, survival: str) -> list[str]:
    return [
        f"Weights were merged in float32 and stored in {dtype}.",
        "## Does it do what the adapter did?",
        f"```text\n{gate}\n```",
        f"```text\n{survival}\n```",
    ]


def _training(run: Mapping[str, Any] | None) -> list[str]:
    """Data and recipe from a run's manifest, without any value that could be a path.

    Nothing where there is none: what lies under its name, beside what was saved by hand, may be of another program.
    """
    if run is None or not all(isinstance(run.get(part), Mapping) for part in ("config", "data")):
        return []
    return [_data(run["data"]), _recipe(run)]


def _data(parts: Mapping[str, Any]) -> str:
    rows = ["| part | sources | pairs read | used | left out | tokens, sha256 |", "|---|---|--:|--:|---|---|"]
    for name, part in parts.items():
        sources = part["sources"]
        named = ", ".join(f"{source['name']} ({source['form']})" for source in sources)
        left_out = ", ".join(f"{count} {reason}" for reason, count in part["left_out"].items())
        read = sum(source["pairs"] for source in sources)
        cells = (name, named or "split off", read or "", part["pairs"], left_out or "none", part["tokens_sha256"])
        rows.append(_row(*cells))
    return "## Data\n\n" + "\n".join(rows)


def _recipe(run: Mapping[str, Any]) -> str:
    settings = {
        f"{section}.{key}": value
        for section in ("adapter", "data", "training", "packing")
        for key, value in (run["config"].get(section) or {}).items()
        if key not in ("train", "eval", "start_from") and _public(value)
    }
    settings |= {f"version of {name}": value for name, value in (run.get("versions") or {}).items() if value}
    if run.get("hardware"):
        settings["hardware"] = run["hardware"]
    rows = [_row(key, value if isinstance(value, str) else json.dumps(value)) for key, value in settings.items()]
    return "## Recipe\n\n| setting | value |\n|---|---|\n" + "\n".join(rows)


def _public(value: Any) -> bool:
    """Whether a setting is a plain value that names no place: paths stay at home (row 51)."""
    if isinstance(value, Mapping):
        return bool(value) and all(_public(item) for item in (*value, *value.values()))
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(item, str | int | float) and _public(item) for item in value)
    if isinstance(value, str):
        return not any(mark in value for mark in ("/", "\\", "~"))
    return isinstance(value, bool | int | float)


def _row(*cells: object) -> str:
    """One row of a table: what a name holds must not end its cell or its line."""
    return "| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in cells) + " |"


def _front_matter(lineage: Lineage, loader: str, *, library: str, relation: str) -> str:
    """Metadata that model hubs read. A local base has no hub id, so it is left out rather than made up."""
    lora = [] if lineage.parents and lineage.parents[-1].how == FULL else ["lora"]
    tags = ["lorafocal", *lora, "preference-tuning" if _of_preferences(lineage) else "supervised-fine-tuning"]
    if lineage.objective is not None:
        tags.append(str(lineage.objective["name"]))
    task = "text-generation" if loader == LOADER else "image-text-to-text"
    fields: dict[str, Any] = {"library_name": library, "pipeline_tag": task, "tags": tags}
    if "/" in lineage.base.name:
        fields |= {"base_model": lineage.base.name, "base_model_relation": relation}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _of_preferences(lineage: Lineage) -> bool:
    """Whether any stage compared answers; an objective of unknown name is taken to."""
    objectives = [lineage.objective, *(stage.objective for stage in lineage.parents)]
    entries = [OBJECTIVES.get(objective["name"]) for objective in objectives if objective]
    return not entries or any(entry is None or entry.rejected for entry in entries)


def _origin(lineage: Lineage, adapter: str | None = None) -> str:
    base = lineage.base
    rows = [("adapter", adapter)] if adapter else []
    rows += [
        ("base", base.name),
        ("base revision", base.revision or "none (a local folder)"),
        ("base weights, sha256", base.sha256),
    ]
    as_trained = [f"quantised to {_title(lineage.quantization)} with bitsandbytes"] if lineage.quantization else []
    if lineage.dtype is not None:
        as_trained.append(f"computing in {lineage.dtype}")
    if as_trained:
        rows.append(("base in training", ", ".join(as_trained)))
    if lineage.origin is not None:
        rows.append(("first base", f"{lineage.origin.name}, sha256 {lineage.origin.sha256}"))
    for number, stage in enumerate(lineage.parents, 1):
        made_by = "" if stage.objective is None else f"{stage.objective['name']} "
        on = "" if stage.quantization is None else f" (trained on {_title(stage.quantization)})"
        if stage.how == FULL:
            rows.append((f"stage {number}: {made_by}training of all weights, sha256", stage.sha256))
            continue
        how = stage.how if stage.weight is None else f"{stage.how} with weight {stage.weight:g}"
        rows.append((f"stage {number}: {made_by}adapter `{stage.adapter}`{on}, {how}, sha256", stage.sha256))
    if lineage.combined:
        rows.append(("training", "none of its own: it is the weighted sum of the adapters above"))
    elif lineage.objective is None:
        rows.append(("training", "not recorded: the adapter was made by another tool"))
    else:
        rows.append(("objective", in_words(lineage.objective)))
        if lineage.reference is not None:
            rows.append(("reference", lineage.reference))
        rows += [
            ("optimiser steps", str(lineage.steps)),
            ("pairs seen", str(lineage.pairs_seen)),
        ]
    rows.append(("made with", f"lorafocal {lineage.as_dict()['lorafocal']}"))
    return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows)


def _title(quantization: str) -> str:
    kind, _, double = quantization.partition("-")
    return f"{kind.upper()} (double quantisation)" if double else kind.upper()


def _bitsandbytes_config(quantization: str, dtype: str) -> str:
    """The call that gives transformers the settings of training, as source."""
    if quantization == "int8":
        return "BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)"
    kind, _, double = quantization.partition("-")
    settings = f'bnb_4bit_quant_type="{kind}", bnb_4bit_use_double_quant={bool(double)}'
    return f'BitsAndBytesConfig(load_in_4bit=True, {settings}, bnb_4bit_compute_dtype="{dtype}")'


def _trained_on(quantization: str | None) -> tuple[str, ...]:
    if quantization is None:
        return ()
    return (
        f"The adapter was trained on the {_title(quantization)} base and corrects that one's rounding too: on the base"
        " in another precision it gives other answers than were measured here.",
    )


def _results(results: Mapping[str, float] | None) -> str:
    """By name: a run that was resumed has its numbers from a file, in another order."""
    if not results:
        return "No held-out numbers were measured in this run."
    return "Held-out pairs:\n\n| | |\n|---|---|\n" + "\n".join(
        f"| {key} | {value:.6g} |" for key, value in sorted(results.items())
    )


def _loading(imports: str, body: str) -> str:
    return f"## Loading\n\n```python\n{imports}\n\n{body}\n```"


def _import(loader: str) -> str:
    return f"from transformers import {loader}, AutoTokenizer"


def _loading_model(place: str, dtype: str, loader: str) -> str:
    return _loading(
        _import(loader),
        f'model = {loader}.from_pretrained("{place}", dtype="{dtype}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
    )


def _limits(lineage: Lineage, *lines: str) -> str:
    preferences = (
        "Preference tuning moves probability between answers like those of its training pairs; it adds no "
        "knowledge and is no safety measure."
    )
    common = (*[preferences] * _of_preferences(lineage), "The licence and the limits of the base apply.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in (*lines, *common))
