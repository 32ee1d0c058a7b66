"""Training in stages: the chunks of the data one after the other, each from where the one before ended.

Every stage is an ordinary run, `runs/<name>/stage-1` and so on, with a schedule of its own. From the second on it
continues the adapter of the stage before, and a frozen copy of that is its reference (at full parameters the model of
the stage before is both). Chunks of random pairs: sDPO (Kim et al. 2024, arXiv:2403.19270). Chunks of an order from
easy to hard, which a step of the data makes: Curry-DPO (Pattnaik et al. 2024, arXiv:2403.07230).
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorafocal import launch, run
from lorafocal.config import Config, check_config
from lorafocal.errors import InputError
from lorafocal.lineage import LINEAGE_FILE
from lorafocal.progress import speaker
from lorafocal.publish import write_atomically
from lorafocal.resume import check_resumable
from lorafocal.run import Callbacks, RunSummary, no_callbacks
from lorafocal.run_folder import ADAPTER_DIR, MANIFEST_FILE, MODEL_DIR, STAGES_FILE, SWEEP_FILE, made_by, read_manifest
from lorafocal.schema.steps import keeps_order


@dataclass(frozen=True, slots=True)
class StagedSummary:
    """What the stages left behind: `last` is the one that was trained last."""

    folder: Path
    stages: int
    number: int
    last: RunSummary

    @property
    def interrupted_by(self) -> int | None:
        return self.last.interrupted_by

    def __str__(self) -> str:
        if self.interrupted_by is not None:
            return f"stage {self.number} of {self.stages}: {self.last}"
        return f"{self.stages} stages done, and the {self.last.made} to use is that of the last one\n{self.last}"


def train_stages(
    config: Config,
    *,
    resume: bool = False,
    quiet: bool = False,
    runs_dir: Path = Path("runs"),
    callbacks: Callbacks = no_callbacks,
) -> StagedSummary:
    """Train all stages of `config` into `runs_dir`/<name>, or go on in the one that was interrupted.

    Raises InputError before anything is trained where the input is wrong, the folder is taken, or what is resumed
    would give another result.
    """
    folder = run.run_folder(runs_dir, config.name)
    stages = list(stage_configs(config, folder))
    _check_folder(folder, resume)
    if resume:
        for note in _check_same(folder, config):
            speaker(quiet)(f"note: {note}")
    run.check_places(stages[0])
    run.join(stages[0])
    with run.nothing_left_of(folder), run.claimed(folder, lambda: _check_folder(folder, resume)):
        return _train(config, stages, folder, callbacks, resume=resume, quiet=quiet)


def stage_configs(config: Config, folder: Path) -> Iterator[Config]:
    """The stages of `config` as runs of their own. Raises InputError where one of them could not be."""
    assert config.stages is not None
    values = config.model_dump(mode="json") | {"stages": None}
    for number in range(1, config.stages + 1):
        chunk: dict[str, Any] = {"take": number, "of": config.stages}
        data = values["data"] | {"steps": [*(values["data"]["steps"] or []), {"chunk": chunk}]}
        mine = values | {"name": f"stage-{number}", "data": data}
        if number > 1:
            mine |= _after(config, mine, folder / f"stage-{number - 1}")
        yield check_config(mine, source=f"{config.name}, stage {number}")


def _after(config: Config, values: Mapping[str, Any], before: Path) -> dict[str, Any]:
    """The sections of a stage that begins where the one in the folder `before` ended."""
    if config.adapter is None:
        model = values["model"] | {"name": str(before / MODEL_DIR), "revision": None}
        reference = {"kind": "separate_model", "model": str(before / MODEL_DIR)}
        return {"model": model, "reference": _reference(config, values, reference)}
    adapter = {"start_from": str(before / ADAPTER_DIR), "allow_dropout": config.adapter.allow_dropout}
    return {"adapter": adapter, "reference": _reference(config, values, {"kind": "frozen_copy"})}


def _reference(config: Config, values: Mapping[str, Any], of_the_stage_before: dict[str, Any]) -> Any:
    """The stage before, which a moving reference starts as anyway; none where the objective has none."""
    keeps = config.reference is None or config.reference.kind == "moving"
    return values["reference"] if keeps else of_the_stage_before


def _train(
    config: Config, stages: list[Config], folder: Path, callbacks: Callbacks, *, resume: bool, quiet: bool
) -> StagedSummary:
    if launch.is_main() and not resume:
        record = {"format": 1, "stages": len(stages), "config": config.model_dump(mode="json")}
        write_atomically(folder / STAGES_FILE, json.dumps(record, indent=1) + "\n")
    say = speaker(quiet)
    ordered = keeps_order(config.data.steps)
    how = "the order that data.steps makes" if ordered else "pairs drawn at random"
    say(f"{len(stages)} stages, each on a chunk of {how}; from the second on the one before is the reference")
    last: RunSummary | None = None
    for number, stage in enumerate(stages, start=1):
        place = folder / stage.name
        if (place / made_by(stage.adapter)).is_dir():
            say(f"stage {number} of {len(stages)}: done before")
            last = _done(place, stage)
            continue
        say(f"stage {number} of {len(stages)}: {place}")
        try:
            last = run.train(
                stage,
                resume=(place / MANIFEST_FILE).exists(),
                quiet=quiet,
                runs_dir=folder,
                inspect=lambda manifest: _check_same_pairs(folder, manifest),
                callbacks=callbacks,
            )
        except InputError:
            if launch.is_main() and not (folder / stages[0].name / MANIFEST_FILE).exists():
                (folder / STAGES_FILE).unlink(missing_ok=True)  # nothing was trained: the name is free
            raise
        if last.interrupted_by is None and number < len(stages):
            last = replace(last, interrupted_by=last.signalled_late)  # the stages that are left are interrupted by it
        if last.interrupted_by is not None:
            return StagedSummary(folder, len(stages), number, last)
        gc.collect()  # trainer and callbacks hold each other, and with them the model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    assert last is not None
    return StagedSummary(folder, len(stages), len(stages), last)


def _done(place: Path, stage: Config) -> RunSummary:
    """Of a stage that had ended before this call."""
    made = made_by(stage.adapter)
    lineage = json.loads((place / made / LINEAGE_FILE).read_text(encoding="utf-8"))
    return RunSummary(place, lineage["steps"], lineage["steps"], {}, made)


def _check_folder(folder: Path, resume: bool) -> None:
    """Refuse a folder that holds something else, or that is not what `resume` says."""
    if (folder / MANIFEST_FILE).exists() or (folder / SWEEP_FILE).exists():
        raise InputError(f"{folder} holds a run of one stage, or a sweep: give another `name`")
    staged = (folder / STAGES_FILE).exists()
    if staged and not resume:
        raise InputError(f"{folder} already holds a run of several stages: go on by --resume, or give another `name`")
    if resume and not staged:
        raise InputError(f"{folder} holds no stages to resume; start them without --resume")


def _check_same(folder: Path, config: Config) -> list[str]:
    """Notes on what may have changed since; refuses what would change stages that are trained already."""
    try:
        began = json.loads((folder / STAGES_FILE).read_bytes())["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / STAGES_FILE} cannot be read ({error}); put it back, or start anew") from error
    return check_resumable({"config": began}, {"config": config.model_dump(mode="json")})


def _check_same_pairs(folder: Path, manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Each stage takes its chunk of the pairs that the first one had. Raises InputError where they are others."""
    first = read_manifest(folder / "stage-1").get("data")
    if first is not None and _all_pairs(first) != _all_pairs(manifest["data"]):
        raise InputError(
            f"the training pairs are others than those of {folder / 'stage-1'}, so the chunks would overlap or lack"
            " pairs; put the data back, or start under another `name`"
        )
    return ()


def _all_pairs(data: Mapping[str, Any]) -> Any:
    return data["train"]["steps"][-1]["from_sha256"]
