"""What a run does, whatever the machine: from its config and the files that are here; what is assumed is said."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from lorafocal import memory
from lorafocal.compatibility import stored_as
from lorafocal.config import Config
from lorafocal.errors import InputError
from lorafocal.memory import Lengths, Setup, Shape
from lorafocal.memory.setup import attention_on_a_gpu, count_of
from lorafocal.objectives import OBJECTIVES
from lorafocal.run_folder import ADAPTER_CONFIG
from lorafocal.schema import Adapter, Model, Reference
from lorafocal.schema.steps import held_out_of, pairs_left, part_of

TYPICAL = Lengths()  # UltraFeedback's means
TYPICAL_PAIRS, TYPICAL_HELD_OUT = 61_135, 2_000  # binarised UltraFeedback's splits
COUNTED_BELOW = {".jsonl": 2**28, ".parquet": 2**36}  # bytes of a file whose rows are counted
READ_BELOW = 2**26  # of one that must be read for it


@dataclass(frozen=True, slots=True)
class Work:
    """What a run does, whatever the machine: from the config, its files where they are here, and assumptions."""

    name: str
    shape: Shape
    setup: Setup
    pairs: int
    held_out: int
    steps: int
    evaluations: int
    pairs_per_step: int
    max_length: int
    shared: bool
    tokens: int | None  # stated, or None for auto
    tiers: tuple[str, ...]
    first_passes: int  # forwards over a step's packs before it, for what its loss needs to know of all of them
    assumed: tuple[str, ...]

    @property
    def longest(self) -> int:
        """Token rows of the longest pair that `max_length` admits, with next to no prompt."""
        return (2 if self.setup.lengths.rejected else 1) * self.max_length

    @property
    def rows_per_pair(self) -> float:
        return self.setup.lengths.rows + (0 if self.shared else self.setup.lengths.prompt)


def work_of(config: Config, *, pairs: int | None = None, lengths: Lengths | None = None) -> Work:
    """The numbers of `config`, and what had to be assumed. Raises InputError where the model's shape is not known."""
    assumed: list[str] = []
    training, fields = config.training, config.training.fields
    lengths = lengths or _typical(config.data.max_length, assumed)
    objective = OBJECTIVES[config.objective.name]
    if not objective.rejected:
        lengths = replace(lengths, rejected=0)
    trained, held_out = _pairs(config, pairs, assumed)
    trained = _after_steps(config, trained, assumed)
    steps_an_epoch = _steps_an_epoch(config, trained)
    stated_steps = fields.get("max_steps", -1)
    of_epochs = math.ceil(fields.get("num_train_epochs", 1) * steps_an_epoch)
    steps = stated_steps * (config.stages or 1) if stated_steps > 0 else of_epochs
    shape, how = shape_of(config), _how(config, lengths)
    assumed += _not_counted(shape, how["setup"])
    if objective.others:
        assumed.append(
            "further answers: what they cost is not counted; each pair's row is longer by theirs, their prompts again"
        )
    return Work(
        name=config.name,
        shape=shape,
        pairs=trained,
        held_out=held_out,
        steps=steps,
        evaluations=_evaluations(fields, steps, steps_an_epoch) if held_out else 0,
        pairs_per_step=training.pairs_per_step,
        first_passes=int(objective.whole_step),
        assumed=tuple(assumed),
        **how,
    )


def trained_otherwise(work: Work, config: Config) -> Work:
    """The same pairs and steps, trained as `config` says, which differs from that of `work` in nothing else."""
    return replace(work, **_how(config, work.setup.lengths))


def _how(config: Config, lengths: Lengths) -> dict[str, Any]:
    """How a step is computed, whatever its pairs."""
    tier, tokens = config.training.activation_checkpointing, config.packing.tokens
    return {
        "setup": setup_of(config, lengths),
        "max_length": config.data.max_length,
        "shared": config.packing.layout != "padded" and config.model.backend == "transformers",
        "tokens": tokens if isinstance(tokens, int) else None,
        "tiers": memory.TIERS if tier == "auto" else (tier,),
    }


def _pairs(config: Config, stated: int | None, assumed: list[str]) -> tuple[int, int]:
    """Pairs that are trained on, and pairs that are held out."""
    counted = stated or _count(config, "train")
    if counted is None:
        counted = TYPICAL_PAIRS
        assumed.append(f"data: {counted:,} pairs, as in binarised UltraFeedback; data.train is not here to be counted")
    share = config.data.held_out
    if share is not None:
        held_out = held_out_of(share, counted)
        return (counted if stated else max(1, counted - held_out)), held_out
    if config.data.eval is None:
        return counted, 0
    held_out = _count(config, "eval") or 0
    if not held_out:
        held_out = TYPICAL_HELD_OUT
        assumed.append(f"evaluation: {held_out:,} held-out pairs; data.eval is not here to be counted")
    return counted, held_out


def _after_steps(config: Config, pairs: int, assumed: list[str]) -> int:
    """What `data.steps` leave of the pairs."""
    steps = config.data.steps or []
    if steps and steps[0].pairs is not None:
        assumed.append("data.steps: one pair a row, and a row of several answers may give more; `lorafocal check` says")
    return pairs_left(steps, pairs)


def _steps_an_epoch(config: Config, pairs: int) -> int:
    """Optimiser steps of one pass over the pairs, where each of several stages ends with a short one."""
    stages, pairs_per_step = config.stages or 1, config.training.pairs_per_step
    return sum(math.ceil(len(part_of(take, stages, pairs)) / pairs_per_step) for take in range(1, stages + 1))


def _typical(max_length: int, assumed: list[str]) -> Lengths:
    """UltraFeedback's means, made smaller where they would be close to `max_length`."""
    scale = min(1.0, 0.75 * max_length / (TYPICAL.prompt + TYPICAL.chosen))
    found = Lengths(TYPICAL.prompt * scale, TYPICAL.chosen * scale, TYPICAL.rejected * scale)
    like = "as in UltraFeedback" if scale == 1 else "three quarters of data.max_length together"
    assumed.append(
        f"lengths: prompts of {found.prompt:.0f} and answers of {found.chosen:.0f} tokens on average, {like};"
        " `lorafocal check` counts yours, and --lengths takes them"
    )
    return found


def _evaluations(fields: Mapping[str, Any], steps: int, steps_an_epoch: int) -> int:
    """Passes over held-out pairs; a run measures its finished adapter whatever the interval is."""
    strategy = fields.get("eval_strategy", "epoch")  # as a run takes it where there are held-out pairs
    every = {"steps": fields.get("eval_steps") or fields.get("logging_steps", 10), "epoch": steps_an_epoch}
    interval = every.get(strategy, steps)
    if interval < 1:  # a share of all steps
        interval *= steps
    return math.ceil(steps / max(1, interval)) + bool(fields.get("eval_on_start"))


def shape_of(config: Config) -> Shape:
    """From `model.shape`, or the base's config.json on this machine. Raises InputError where there is neither."""
    if config.model.shape is not None:
        return Shape.of(config.model.shape)
    file = config_here(config.model)
    if file is None:
        raise InputError(
            f"model.shape is missing, and the config.json of {config.model.name} is not on this machine, so the model's"
            f" size is not known: fetch that one file (`{config.model.fetched}`), or copy these of its values to"
            " `model.shape` (model_type, vocab_size, hidden_size, intermediate_size, num_hidden_layers,"
            " num_attention_heads, num_key_value_heads)"
        )
    return Shape.of(_mapping(file))


def config_here(model: Model) -> Path | None:
    """The base's config.json in its folder or in the hub's cache: nothing is asked of a network."""
    file = Path(model.name) / "config.json"
    if file.is_file():
        return file
    try:
        cached = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
    except HFValidationError:  # a folder's name
        return None
    return Path(cached) if isinstance(cached, str) else None


def setup_of(config: Config, lengths: Lengths) -> Setup:
    """How `config` trains; its engine where it says none is that of one process."""
    engine, kernels = config.engine, config.kernels.adapters
    return Setup(
        dtype=config.model.dtype,
        quantization=_held_as(config),
        **(_adapter(config.adapter) if config.adapter is not None else {"full": True}),
        optim=str(config.training.fields.get("optim", "adamw_torch_fused")),
        **_compared(config.reference),
        divergences=config.objective.entry.divergences,
        engine="one-process" if engine is None else engine.kind,
        offload="none" if engine is None else engine.offload,
        adapter_kernels="fused" if kernels == "auto" else kernels,
        attention=attention_on_a_gpu(config.model.dtype),
        lengths=lengths,
    )


def _held_as(config: Config) -> str | None:
    """What is asked for, or what the base's weights are stored as."""
    file = None if config.model.quantization is not None else config_here(config.model)
    if file is None:
        return config.model.quantization
    stated = _mapping(file).get("quantization_config")
    return stored_as(stated, config.model.name) if isinstance(stated, dict) else None


def _compared(reference: Reference | None) -> dict[str, Any]:
    """What the arithmetic asks of a reference."""
    if reference is None:
        return {"reference": "none"}
    strategy = reference.strategy
    return {"reference": strategy.word, "members": tuple(strategy.members or ()), "guide": strategy.guide is not None}


def _adapter(adapter: Adapter) -> dict[str, Any]:
    """What the arithmetic asks of an adapter: a fresh one's settings, or those of the one that is continued."""
    names = ("r", "targets", "rank_pattern", "use_dora", "modules_to_save")
    if adapter.start_from is not None:
        return _stored_adapter(Path(adapter.start_from), allow_dropout=adapter.allow_dropout)
    found = {name: getattr(adapter, name) for name in names}
    return found | {"dropout": adapter.dropout, "trainable_tokens": len(adapter.trainable_tokens)}


def _not_counted(shape: Shape, setup: Setup) -> Iterator[str]:
    """What is to be trained by its name, and is not among the modules that the arithmetic knows."""
    linears = [name for layer in range(shape.layers) for name, _ in shape.layer_linears(layer)]
    modules = [name for name, _ in shape.modules()]
    bare = replace(setup, modules_to_save=())
    targets = [] if isinstance(setup.targets, str) else setup.targets
    strange = {
        "targets": [name for name in targets if not any(map(replace(bare, targets=[name]).rank_of, linears))],
        "modules_to_save": [
            name for name in setup.modules_to_save if not any(map(replace(bare, modules_to_save=[name]).saves, modules))
        ],
    }
    for key, names in strange.items():
        if names:
            yield (
                f"adapter.{key}: {', '.join(names)} counts as nothing, for the arithmetic knows no such module of"
                f" {shape.model_type}; its layers have {', '.join(linear.name for linear in shape.linears)}"
            )


def _stored_adapter(folder: Path, *, allow_dropout: bool) -> dict[str, Any]:
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise InputError(
            f"adapter.start_from: {folder} is no local folder with an adapter_config.json, so the adapter's size is not"
            " known here: download it first, and name its folder"
        )
    stored = _mapping(file)
    if type(stored.get("r")) is not int:
        raise InputError(f"adapter.start_from: {file} gives no rank `r`, so it is no LoRA adapter's")
    targets = stored.get("target_modules")
    return {
        "r": stored["r"],
        "targets": targets if isinstance(targets, list) else "all-linear",  # an expression: the most is assumed
        "rank_pattern": stored.get("rank_pattern") or {},
        "use_dora": bool(stored.get("use_dora")),
        "modules_to_save": stored.get("modules_to_save") or (),
        "dropout": stored.get("lora_dropout", 0.0) if allow_dropout else 0.0,
        "trainable_tokens": count_of(stored.get("trainable_token_indices") or ()),
    }


def _mapping(file: Path) -> Mapping[str, Any]:
    values = _json(file)
    if not isinstance(values, dict):
        raise InputError(f"{file} holds no JSON object: download the folder again")
    return values


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is no JSON ({error}): download the folder again") from error


def _count(config: Config, name: str) -> int | None:
    """Rows of the local files of `train` or `eval`, weighted; None where one is not here or too large to count."""
    total = 0.0
    for source in config.data.sources(name):  # type: ignore[arg-type]
        rows = _rows(Path(source.path))
        if rows is None:
            return None
        total += rows * source.weight
    return round(total) or None


def _rows(file: Path) -> int | None:
    from lorafocal.data.readers import extension_of, read_rows  # here: pyarrow takes a while

    kind = extension_of(file)
    if kind is None or not file.is_file() or file.stat().st_size > COUNTED_BELOW.get(kind, READ_BELOW):
        return None
    if kind == ".parquet":
        import pyarrow
        from pyarrow import parquet

        try:
            return int(parquet.read_metadata(file).num_rows)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{file.name}: not a readable Parquet file; write it again") from error
    if kind == ".jsonl":
        with file.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    return sum(1 for _ in read_rows(file))
