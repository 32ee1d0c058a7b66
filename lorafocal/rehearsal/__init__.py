"""A config rehearsed in a minute: the very run it describes, on a tiny model of its architecture with made-up pairs.

Under a launcher the run's engine is rehearsed too, in as many processes. What needs the real model is not: its weights,
the data and their lengths, memory and speed.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import broadcast_object_list

from lorafocal import launch, run
from lorafocal.arguments import FocalPOConfig
from lorafocal.config import Config
from lorafocal.data.held_out import HELD_OUT_FILE
from lorafocal.errors import FullDisk, InputError, UnhealthyRun
from lorafocal.evaluate.during import callbacks
from lorafocal.evaluate.score import score_file
from lorafocal.rehearsal.stage import Stage, changed_keys, joined_by, set_stage, started
from lorafocal.run_folder import METRICS_FILE

NOT_REHEARSED = "the real weights and data, their lengths, memory and speed"
ROUNDING = {"bfloat16": 2e-2, "float32": 1e-4}  # of log-probs in other packs, relative


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a rehearsal found: the run went through, and its saved adapter opens and scores as it did in training."""

    name: str
    model: str  # the tiny one, in words
    changed: tuple[str, ...]  # dotted keys of the config
    instead: tuple[str, ...]  # what stood in for what is not here, in words
    steps: int
    first_loss: float
    last_loss: float
    evaluations: int
    checkpoints: int
    made: str  # adapter or model
    scored: int  # held-out pairs that it, loaded again, scores as the run did
    elapsed_s: float
    interrupted_by: int | None = None  # signal number; then nothing else is known

    def __str__(self) -> str:
        if self.interrupted_by is not None:
            return f"stopped: {self.name} was not rehearsed to its end; nothing was kept"
        scored = f"scores {self.scored} held-out pairs as the run did" if self.scored else "scores the training pairs"
        lines = [
            f"rehearsed {self.name} on {self.model}",
            f"  changed: {', '.join(self.changed)}",
            *(f"  instead: {note}" for note in self.instead),
            f"  not rehearsed: {NOT_REHEARSED}",
            f"  {self.steps} steps: loss {self.first_loss:.6f} at the first, {self.last_loss:.6f} at the last;"
            f" {_counted(self.evaluations, 'evaluation')}, {_counted(self.checkpoints, 'checkpoint')}",
            f"  the saved {self.made}, loaded again, {scored}",
            f"this config runs ({self.elapsed_s:.0f} s); nothing was kept. Its data: `lorafocal check`",
        ]
        return "\n".join(lines)


def rehearse(config: Config, *, quiet: bool = False) -> Rehearsal | None:
    """Train three steps as `config` says, by `run.train`, in a temporary folder that is gone afterwards.

    The architecture comes from `model.shape`, or from the config.json of a local folder or of the hub's cache; nothing
    is downloaded. Under a launcher all processes call it alike; rank 0 alone is told what was found. Raises what the
    run itself raises, and InputError where the architecture is not known here.
    """
    start = time.perf_counter()
    with _shared_folder(config) as folder:
        try:
            with launch.main_process_first():
                stage = set_stage(config, folder)  # the same files from every process
            launch.meet()
            stage = started(stage, config, folder)
            if stage.config.reference is not None and stage.config.reference.kind == "cached":
                run.cache_reference(stage.config, quiet=quiet)
            summary = run.train(stage.config, quiet=quiet, runs_dir=folder / "runs", callbacks=callbacks)
            if not launch.is_main():
                return None
            if summary.interrupted_by is not None:
                return _stopped(config, stage, summary.interrupted_by)
            scored = _check_saved(stage.config, summary)
        except FullDisk as error:
            raise InputError(f"{error.where}; make room there, or name another folder by TMPDIR") from error
        except InputError as error:
            raise InputError(
                f"{error}\n(from a rehearsal of {config.name}, on a tiny model and made-up pairs; where this speaks of"
                " sizes or pairs, they may be to blame)"
            ) from error
        lines = [json.loads(line) for line in (summary.folder / METRICS_FILE).read_text().splitlines()]
        checkpoints = len(list(summary.folder.glob("checkpoint-*")))
    losses = [line["loss"] for line in lines if "loss" in line]
    return Rehearsal(
        name=config.name,
        model=stage.model,
        changed=changed_keys(config, stage.config),
        instead=stage.instead,
        steps=summary.steps,
        first_loss=losses[0],
        last_loss=losses[-1],
        evaluations=sum("eval_loss" in line for line in lines),
        checkpoints=checkpoints,
        made=summary.made,
        scored=scored,
        elapsed_s=time.perf_counter() - start,
    )


def _stopped(config: Config, stage: Stage, signal: int) -> Rehearsal:
    return Rehearsal(config.name, stage.model, (), stage.instead, 0, math.nan, math.nan, 0, 0, "", 0, 0.0, signal)


@contextmanager
def _shared_folder(config: Config) -> Iterator[Path]:
    """A temporary folder that all processes of this machine know, gone when the last of them has left."""
    if launch.world_size() == 1:
        with tempfile.TemporaryDirectory(prefix="lorafocal-rehearsal-") as folder:
            yield Path(folder)
        return
    _ = FocalPOConfig(output_dir="unused", **joined_by(config)).device  # joins this process to the others
    name = [tempfile.mkdtemp(prefix="lorafocal-rehearsal-") if launch.is_main() else ""]
    folder = broadcast_object_list(name)[0]
    try:
        yield Path(folder)
        launch.meet()
    finally:
        if launch.is_main():
            shutil.rmtree(folder, ignore_errors=True)


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _check_saved(config: Config, summary: run.RunSummary) -> int:
    """Open what was saved and score with it: how many held-out pairs it scores as the last evaluation did.

    Raises UnhealthyRun where it does not.
    """
    made, held_out = summary.folder / summary.made, summary.folder / HELD_OUT_FILE
    if not held_out.is_file():
        score_file(made, Path(config.data.train[0].path))
        return 0
    report = score_file(made, held_out)
    found = report.as_dict()
    for key in ("logps/chosen", "logps/rejected"):
        expected = summary.held_out.get(f"eval_{key}")
        if expected is not None and abs(found[key] - expected) > ROUNDING[config.model.dtype] * abs(expected):
            raise UnhealthyRun(
                f"the {summary.made} of the rehearsal, loaded again, has other log-probs than in training: {key}"
                f" {found[key]} against {expected}. What this config saves is not to be trusted: please report it"
            )
    return len(report.scores)
