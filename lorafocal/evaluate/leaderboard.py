"""The six tasks of the first Open LLM Leaderboard, or any others of EleutherAI's harness, on a trained model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafocal.errors import InputError
from lorafocal.evaluate.harness import (
    PLAIN,
    Measured,
    TaskRun,
    fetch_data,
    find_tasks,
    language_model,
    run_task,
)
from lorafocal.evaluate.result import Result, Score, file_hashes, package_versions
from lorafocal.generation.subject import Subject, find_subject
from lorafocal.publish import text_sha256, write_atomically

BATCH_SIZE = 8  # requests in a forward; padding and rounding follow it, the scores hardly
PERCENT = ("acc", "acc_norm", "exact_match")  # shares, printed in percent; other metrics keep the harness's unit
FLEXIBLE = "flexible-extract"


@dataclass(frozen=True, slots=True)
class Headline:
    """The number that the leaderboard took of a task: by which metric, after how many examples."""

    few_shot: int
    metric: str
    answers: str = PLAIN


# huggingface.co/docs/leaderboards/open_llm_leaderboard/archive, which names shots and metrics. GSM8K's answers were
# taken from behind `####` alone, which is today's strict-match.
LEADERBOARD: Mapping[str, Headline] = {
    "arc_challenge": Headline(25, "acc_norm"),
    "hellaswag": Headline(10, "acc_norm"),
    "mmlu": Headline(5, "acc"),
    "truthfulqa_mc2": Headline(0, "acc"),
    "winogrande": Headline(5, "acc"),
    "gsm8k": Headline(5, "exact_match", "strict-match"),
}


def evaluate_leaderboard(
    target: str | Path,
    *,
    base: str | None = None,
    tasks: Sequence[str] = tuple(LEADERBOARD),
    task_folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    journal: Path | None = None,
    say: Callable[[str], None] = print,
) -> Result:
    """Run tasks of the harness on a run, an adapter folder (attached to its base, never merged) or a model.

    The leaderboard's six run at its numbers of examples, without a chat template, as it had none; others as they are
    written. Scores are percent with the harness's standard errors; `average` is there when all six are. `task_folder`
    holds YAML tasks of the user's, which are programs (`find_tasks`). `limit` takes the first documents of each task
    alone. `journal`, a file, keeps each finished task, so that the same call goes on after a kill; another model,
    setting or version finds nothing in it, while data that changed on the hub are not noticed.

    Raises InputError for anything missing or unfit, tasks and their data before the model is loaded.
    """
    names = list(dict.fromkeys(tasks))
    if not names or batch_size < 1 or (limit is not None and limit < 1):
        raise InputError("name at least one task; limit and batch_size are whole numbers from 1 on")
    subject = find_subject(target, base=base)
    managers = find_tasks(names, task_folder, tuple(LEADERBOARD))
    files = [] if task_folder is None else sorted(path for path in task_folder.rglob("*") if path.is_file())
    inputs = file_hashes(*files)
    about: dict[str, Any] = {
        "target": subject.describe(),
        "limit": limit,
        "batch_size": batch_size,
        "inputs": inputs,
        "versions": package_versions("lm-eval", "torch", "transformers", "peft", "datasets"),
    }
    runs = _run(subject, managers, about, journal, say)
    return Result(
        benchmark="open_llm_leaderboard_1",
        model=subject.name,
        scores=_scores(runs),
        target=about["target"],
        counts=_counts(runs),
        settings={
            "tasks": {name: _setting(row) for name, row in _chosen(runs)},
            "chat_template": False,
            "batch_size": batch_size,
            "limit": limit,
        },
        inputs=inputs,
        versions=about["versions"],
        notes=tuple(_notes(runs, limit, subject)),
    )


def _run(
    subject: Subject,
    managers: Mapping[str, Any],
    about: Mapping[str, Any],
    journal: Path | None,
    say: Callable[[str], None],
) -> dict[str, TaskRun]:
    """Every task's run, those that the journal holds from there."""
    keys = {name: _key(about, name) for name in managers}
    done = {} if journal is None else _read_journal(journal)
    missing = [name for name in managers if keys[name] not in done]
    if len(missing) < len(managers):
        say(f"{len(managers) - len(missing)} tasks are done already")
    if missing:
        fetch_data({name: managers[name] for name in missing}, say)
        wrapped = language_model(subject.load(), subject.tokenizer, about["batch_size"])
    for number, name in enumerate(missing, start=1):
        few_shot = LEADERBOARD[name].few_shot if name in LEADERBOARD else None
        say(f"{name}: task {number} of {len(missing)}")
        done[keys[name]] = run_task(wrapped, managers[name], name, few_shot=few_shot, limit=about["limit"])
        if journal is not None:
            _write_journal(journal, done)
    return {name: done[key] for name, key in keys.items()}


# ---- the journal


def _key(about: Mapping[str, Any], task: str) -> str:
    """What a finished task is found again by: everything that its numbers depend on."""
    return text_sha256(json.dumps([about, task], sort_keys=True))


def _read_journal(path: Path) -> dict[str, TaskRun]:
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {
            key: TaskRun(tuple(Measured(**row) for row in run["rows"]), run["cut_contexts"])
            for key, run in record["tasks"].items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a leaderboard's journal ({error}): remove it, or name another") from error


def _write_journal(path: Path, done: Mapping[str, TaskRun]) -> None:
    tasks = {
        key: {"rows": [row.as_dict() for row in run.rows], "cut_contexts": run.cut_contexts}
        for key, run in done.items()
    }
    write_atomically(path, json.dumps({"tasks": tasks}, indent=1) + "\n")


# ---- numbers


def _chosen(runs: Mapping[str, TaskRun]) -> Iterator[tuple[str, Measured]]:
    """What is printed: the leaderboard's number of its tasks; of others every metric of the task or group.

    A name that stands for several tasks, without a number of its own, gives theirs.
    """
    for name, run in runs.items():
        if name in LEADERBOARD:
            yield name, run.row(name, LEADERBOARD[name].metric, LEADERBOARD[name].answers)
            continue
        rows = [row for row in run.rows if row.task == name] or run.rows
        for row in rows:
            yield "/".join([row.task, row.metric, *([] if row.answers == PLAIN else [row.answers])]), row


def _scores(runs: Mapping[str, TaskRun]) -> dict[str, Score]:
    scores = {name: _score(row) for name, row in _chosen(runs)}
    if not LEADERBOARD.keys() <= scores.keys():
        return scores
    six = [scores[name] for name in LEADERBOARD]
    return scores | {"average": _average(six)}


def _score(row: Measured) -> Score:
    if not math.isfinite(row.value):
        raise InputError(
            f"{row.task}: {row.metric} is {row.value}: the model's numbers overflow, or no document counts"
        )
    scale = 100 if row.metric in PERCENT else 1
    return Score(scale * row.value, standard_error=None if row.standard_error is None else scale * row.standard_error)


def _average(six: Sequence[Score]) -> Score:
    """The plain mean; its standard error is that of independent tasks."""
    errors = [score.standard_error for score in six if score.standard_error is not None]
    error = math.hypot(*errors) / len(six) if len(errors) == len(six) else None
    return Score(math.fsum(score.value for score in six) / len(six), standard_error=error)


def _counts(runs: Mapping[str, TaskRun]) -> dict[str, int]:
    documents = {name: row.documents for name, row in _chosen(runs)}
    cut = sum(run.cut_contexts for run in runs.values())
    return {f"documents/{name}": count for name, count in documents.items()} | {"cut_contexts": cut}


def _setting(row: Measured) -> dict[str, Any]:
    return {key: value for key, value in row.as_dict().items() if key not in ("value", "standard_error")}


def _notes(runs: Mapping[str, TaskRun], limit: int | None, subject: Subject) -> Iterator[str]:
    if limit is not None:
        yield f"only the first {limit} documents of each task: a trial, not to be compared"
    if runs.keys() & LEADERBOARD.keys():
        yield (
            "the leaderboard of 2023 and 2024 ran an older harness (commit b281b09); tasks, data sets and prompts have"
            " changed since, so compare with its printed numbers with care, and with models run by the same version"
        )
        if subject.speech.templated:
            yield "prompts are plain text, as the leaderboard's were; the model was trained with a chat template"
        if missing := sorted(LEADERBOARD.keys() - runs.keys()):
            yield f"no average, which is of six tasks: {', '.join(missing)} did not run"
    if "mmlu" in runs:
        yield (
            f"mmlu is over all questions, as the harness prints it; the leaderboard averaged the subjects, which gives"
            f" {_over_subjects(runs['mmlu']):.2f}"
        )
    if "gsm8k" in runs:
        flexible = _score(runs["gsm8k"].row("gsm8k", "exact_match", FLEXIBLE))
        yield f"gsm8k counts the number behind ####; the last number anywhere ({FLEXIBLE}) gives {flexible}"
    if cut := sum(run.cut_contexts for run in runs.values()):
        yield f"the harness cut contexts from the left, which did not fit into the model, {cut} times or more"


def _over_subjects(run: TaskRun) -> float:
    """The plain mean of MMLU's subjects, in percent."""
    subjects = [row.value for row in run.rows if row.metric == "acc" and not row.group]
    return 100 * math.fsum(subjects) / len(subjects)
