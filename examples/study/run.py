"""The study: does it help to look away from badly ranked pairs? Figure 1 of the FocalPO paper in the small.

Trains every arm at every learning rate and seed of study.yaml on a task where a rule knows the right answer, then
compares as PREREGISTRATION.md says, and writes tables, a figure and a page. A study that was stopped goes on.

    make study
    python examples/study/run.py [--study FILE] [--out DIR] [--results DIR] [--workers 2]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: matrices this small gain nothing from a second thread

import torch
import transformers
from analysis import best_rates
from answers import answer, answer_rows, compared_cells
from cell import Place, prepare_held_out, prepare_training, run_cell
from design import Study, read_study
from page import write_page
from table import base_row, read_json, right_answers, run_row, write_csv, write_prompts
from transformers.utils.logging import disable_progress_bar

from lorafocal.errors import InputError
from lorafocal.model.toy_base import ToyRecipe, toy_base
from lorafocal.publish import write_atomically

HERE = Path(__file__).parent


def main(file: Path, out: Path, results: Path, workers: int) -> None:
    started = time.time()
    study = read_study(file)
    take_up(study, out)
    cells = list(study.cells())
    print(f"the base: trained once, then kept in your cache directory; {len(cells)} runs after it", flush=True)
    base = toy_base(recipe=ToyRecipe(**study.base))
    place = Place(out, base)
    left = [cell for cell in cells if not place.cell(cell).exists()]
    with pool_of(workers) as pool:
        if not (place.held_out() / "base.json").exists():
            pool.submit(prepare_held_out, place, study.pairs).result()
        drawn = [(condition, seed) for condition in study.conditions for seed in condition.seeds]
        finish(pool, (pool.submit(prepare_training, place, study.pairs, *one) for one in drawn), "training pairs")
        finish(pool, (pool.submit(run_cell, cell, place, study.pairs) for cell in left), "runs")
        rates = collect(study, place, results)
        asked = compared_cells(study, rates)
        written = [pool.submit(answer, cell, place, study.pairs) for cell in asked]
        finish(pool, written, "answers")
    write_csv(results / "answers.csv", answer_rows(study, asked, [one.result() for one in written]))
    note_session(out, started, len(left), workers)
    write_atomically(results / "sessions.json", (out / "sessions.json").read_bytes())
    print(f"the page is {write_page(study, results)}")


def take_up(study: Study, out: Path) -> None:
    """Begin in `out`, or go on there. Raises InputError where it holds another study."""
    marker, said = out / "study.json", json.dumps(asdict(study), sort_keys=True, indent=1)
    if out.exists() and not marker.exists():
        raise InputError(f"{out} exists and is no study's folder: move it away, or give --out")
    if marker.exists() and marker.read_text(encoding="utf-8") != said:
        raise InputError(f"{out} holds the runs of another study file: give --out for this one")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(marker, said)


class ThisProcess(Executor):
    """A pool of one worker, which is this process: what is submitted is done at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def pool_of(workers: int) -> Executor:
    """Workers that load the libraries once each."""
    if workers == 1:
        quiet_worker()
        return ThisProcess()
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=quiet_worker)


def quiet_worker() -> None:
    """One thread a worker, and no progress bars."""
    torch.set_num_threads(1)
    disable_progress_bar()


def finish(pool: Executor, tasks: Iterable[Future[Any]], what: str) -> None:
    """Wait for all of them, saying how far it is; the first one that fails stops the rest, and is raised."""
    waiting, started = list(tasks), time.monotonic()
    try:
        for done, task in enumerate(as_completed(waiting), start=1):
            task.result()
            rest = (time.monotonic() - started) / done * (len(waiting) - done)
            if done % max(1, len(waiting) // 50) == 0 or done == len(waiting):
                print(f"{what}: {done} of {len(waiting)}, about {rest / 60:.0f} minutes left", flush=True)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def note_session(out: Path, started: float, runs: int, workers: int) -> None:
    """Add a line on this call: when, how long, and what it trained."""
    begun = datetime.fromtimestamp(started, UTC).strftime("%Y-%m-%d %H:%M UTC")
    line = {
        "began": begun,
        "minutes": round((time.time() - started) / 60, 1),
        "runs": runs,
        "workers": workers,
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    earlier = (out / "sessions.json").read_text(encoding="utf-8") if (out / "sessions.json").exists() else "[]"
    write_atomically(out / "sessions.json", json.dumps([*json.loads(earlier), line], indent=1))


def collect(study: Study, place: Place, results: Path) -> dict[str, float]:
    """From the runs' files, the tables; `prompts.csv` has the rates that are compared. The primary condition's best."""
    validation, held_out = study.pairs.validation, read_json(place.held_out() / "base.json")
    found, rows = {}, []
    for cell in study.cells():
        data, result = place.data(cell.condition, cell.seed), read_json(place.cell(cell))
        bases = (held_out, read_json(data / "base.json"))
        rows.append(run_row(cell, result, bases, read_json(data / "swapped.json"), validation))
        found[cell.condition.name, cell.arm.name, cell.grid_rate, cell.seed] = right_answers(result, study)
    write_csv(results / "runs.csv", rows)
    write_csv(results / "base.csv", [base_row(held_out, validation)])
    compared = {
        (condition.name, arm, rate)
        for condition in study.conditions
        for arm, chosen in best_rates(rows, study, condition.name).items()
        for rate in {chosen, study.published_rate, best_rates(rows, study, condition.name)[study.contrast[0]]}
    }
    write_prompts(results / "prompts.csv", {key: of for key, of in found.items() if key[:3] in compared})
    return best_rates(rows, study, study.primary)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=HERE / "study.yaml", help="conditions, arms, rates and seeds")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="where the runs go")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where tables, figure and page go")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on one core")
    return parser.parse_args()


if __name__ == "__main__":
    given = parsed()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the workers end, too
    try:
        main(given.study, given.out, given.results, given.workers)
    except InputError as error:
        raise SystemExit(f"study: {error}") from None
