"""The runs of a sweep, one after the other in this process, and what is computed once for all of them."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lorafocal import launch, run
from lorafocal.caching import CacheReport
from lorafocal.errors import FullDisk, InputError, UnhealthyRun
from lorafocal.evaluate.during import callbacks
from lorafocal.interrupt import StopOnSignal
from lorafocal.progress import speaker
from lorafocal.publish import alone_in, recover
from lorafocal.report.sweep_page import SweepReport, write_sweep
from lorafocal.run_folder import MANIFEST_FILE, STAGES_FILE, made_by
from lorafocal.schema import Config
from lorafocal.sweep.grid import Grid, Planned
from lorafocal.sweep.journal import Journal, held_out_metrics

STARTS_AS_THE_BASE = ("default", "gaussian", "eva")  # B = 0, whatever A is: one reference for all ranks and seeds


def sweep(
    config: str | Path,
    grid: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    runs_dir: Path = Path("runs"),
    best: str | None = None,
    quiet: bool = False,
) -> SweepReport:
    """Train every point of `grid` (`section.key=value,value`) that has not been yet, and choose the best.

    All points are checked before the first runs. A run that fails is recorded and the others go on; after a signal
    the run stops as `run.train` does, and the same call goes on there. More values extend a sweep. Raises InputError
    where nothing can be run as asked.
    """
    _check_one_process()
    asked = Grid.read(config, grid, overrides)
    for entry in asked.points:
        run.check_places(entry.config)
    folder = run.run_folder(runs_dir, asked.name)
    if (folder / MANIFEST_FILE).exists() or (folder / STAGES_FILE).exists():
        raise InputError(f"{folder} holds a run: give this sweep another `name`")
    with run.nothing_left_of(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return _sweep(asked, folder, best, quiet=quiet)


def _sweep(asked: Grid, folder: Path, best: str | None, *, quiet: bool) -> SweepReport:
    """Train what is left of the grid into its folder, and compare."""
    say = speaker(quiet)
    with alone_in(folder, "swept"):
        recover(folder)
        journal = Journal(folder, asked, best)
        journal.save()
        stop = StopOnSignal()
        left = [entry for entry in asked.points if _is_left(journal, entry)]
        runs = f"{len(asked.points)} run{'' if len(asked.points) == 1 else 's'}"
        say(f"sweep {asked.name}: {runs}, {len(left)} to train, best by {journal.criterion}")
        for note in notes(asked, left):
            say(note)
        for report in cache_references(left, quiet=quiet):
            say(str(report))
        with stop.watching():
            for number, entry in enumerate(left, start=1):
                if stop.heard is not None:
                    break
                slug = journal.entry(entry.point.identity).point.slug
                say(f"run {number} of {len(left)}: {slug}")
                _train(journal, entry.point.identity, quiet=quiet)
                say(f"{slug}: {_outcome(journal, entry.point.identity)}")
        unfinished = any(_is_left(journal, entry) for entry in left)
        return write_sweep(journal.record(), interrupted_by=int(stop.heard) if stop.heard and unfinished else None)


def _train(journal: Journal, identity: str, *, quiet: bool) -> None:
    """One run from its start or from its last checkpoint, and what came of it in the journal."""
    entry = journal.entry(identity)
    config = entry.config.model_copy(update={"name": entry.point.slug})
    begun = (journal.folder / config.name / MANIFEST_FILE).exists()
    journal.note(identity, status="running", reason="")
    try:
        summary = run.train(
            config,
            resume=begun,
            quiet=quiet,
            runs_dir=journal.folder,
            inspect=journal.same_inputs,
            callbacks=callbacks,
        )
    except UnhealthyRun as error:
        journal.note(identity, status="failed", reason=str(error))
    except FullDisk as error:  # as it would be for the other runs
        raise InputError(f"{error.where}; the sweep has ended: make room, then call it again to go on there") from error
    except InputError as error:
        journal.note(identity, status="refused", reason=str(error))
    else:
        journal.keep_inputs(identity)
        ended = "finished" if summary.interrupted_by is None else "interrupted"
        journal.note(identity, status=ended, steps=summary.steps, held_out=held_out_metrics(summary.held_out))
    gc.collect()  # trainer and callbacks hold each other, and with them the model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _is_left(journal: Journal, entry: Planned) -> bool:
    """Whether a point is still to be trained: what has failed would fail again, what was refused may be put right."""
    point = journal.entry(entry.point.identity).point
    if point.status == "finished":
        return not (journal.folder / point.slug / made_by(entry.config.adapter)).is_dir()
    return point.status != "failed"


def cache_references(left: Sequence[Planned], *, quiet: bool) -> Iterator[CacheReport]:
    """Compute what the runs will look up, once for all that share it, before the first of them loads a model.

    Log-probs of tokens first: their sums, which other runs look up, are then there.
    """
    shared: dict[str, Config] = {}
    for entry in left:
        reference = entry.config.reference
        if reference is not None and reference.kind == "cached":
            shared.setdefault(_reference_inputs(entry.config), entry.config)
    for config in sorted(shared.values(), key=lambda config: config.objective.entry.token_weights is None):
        yield run.cache_reference(config, quiet=quiet)
        gc.collect()


def _reference_inputs(config: Config) -> str:
    """What a look-up depends on that a grid may vary, as one text: the answers, what is kept of each, whose they are.

    Of an adapter that starts with B = 0 that is what is trained beside A and B: DoRA's magnitudes, a layer each, too.
    """
    values, adapter, objective = config.model_dump(mode="json"), config.adapter, config.objective.entry
    parts = [values["model"], values["data"], values["reference"]]
    parts += [objective.scores, objective.others, objective.token_weights is not None]  # scores drop pairs
    if adapter is not None and adapter.init not in STARTS_AS_THE_BASE:
        parts += [values["adapter"], values["training"]["seed"]]
    elif adapter is not None:
        parts += [adapter.start_from, adapter.modules_to_save, adapter.trainable_tokens]
        parts += [adapter.use_dora and adapter.targets]
    return json.dumps(parts, sort_keys=True)


def notes(asked: Grid, left: Sequence[Planned]) -> list[str]:
    """What is worth knowing before hours are spent."""
    found = [f"warning: {line}" for line in dict.fromkeys(w for entry in left for w in entry.config.warnings())]
    first = asked.points[0].config
    if first.reference is not None and first.reference.kind != "cached" and len(left) > 1:
        found.append(
            "note: every run computes the reference again; reference.kind=cached would compute it once for all of them"
        )
    if not first.data.cache:
        found.append("note: every run tokenises the data again; data.cache=true would keep the tokens")
    return found


def _outcome(journal: Journal, identity: str) -> str:
    """One line on a run that has ended."""
    point = journal.entry(identity).point
    if point.reason:
        return f"{point.status}: {point.reason}"
    key = journal.criterion.key
    return f"{point.status} at step {point.steps}" + (
        f", {key} {point.held_out[key]:.4f}" if key in point.held_out else ""
    )


def _check_one_process() -> None:
    if launch.world_size() > 1:
        one = launch.several("train CONFIG --runs runs/NAME name=RUN KEY=VALUE")
        raise InputError(
            "a sweep runs in one process, because a run that fails on one rank alone would leave the others waiting:"
            f" start it without the launcher. Single points may be trained before it by `{one}`; it takes them up"
        )
