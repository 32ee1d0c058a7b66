"""EleutherAI's lm-evaluation-harness behind one door: tasks found, their data fetched, one run on a loaded model."""

from __future__ import annotations

import copy
import difflib
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from torch import nn
from transformers import PreTrainedTokenizerBase

from lorafocal.errors import InputError, first_line
from lorafocal.model.head import causal_lm

PLAIN = "none"  # the harness's name of answers taken as they are


@dataclass(frozen=True, slots=True)
class Measured:
    """One metric of one task, as the harness computed it: over `documents` of the task's `of`.

    `answers` says how they were taken out of what the model wrote ("none": as they are). The number of a `group` is
    over the documents of all its tasks.
    """

    task: str
    metric: str
    answers: str
    value: float
    standard_error: float | None
    few_shot: int | None
    version: str
    documents: int
    of: int
    group: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TaskRun:
    """What a run of one task or group measured: its rows, and how many contexts did not fit into the model."""

    rows: tuple[Measured, ...]
    cut_contexts: int

    def row(self, task: str, metric: str, answers: str = PLAIN) -> Measured:
        """The one with these names. Raises InputError where this harness does not measure that."""
        found = [row for row in self.rows if (row.task, row.metric, row.answers) == (task, metric, answers)]
        if not found:
            raise InputError(f"this version of lm-eval measures no {metric} ({answers}) of {task}: install another")
        return found[0]


def find_tasks(names: Sequence[str], folder: Path | None, reserved: Sequence[str]) -> dict[str, Any]:
    """The harness's task manager for each of `names`: that of the user's `folder` of YAML tasks, or its own.

    A folder's task is never taken for one of the harness's, nor one of these for it; `reserved` names may not stand in
    it. Raises InputError for a name that neither has, and where lm-eval is not installed. Tasks are programs: their
    templates are not fenced in and may name Python functions, so a folder is to be trusted as a script is.
    """
    if folder is not None and not folder.is_dir():
        raise InputError(f"{folder} is no folder; tasks are YAML files of the harness's form in a folder")
    manager = _module("lm_eval.tasks").TaskManager
    own = None if folder is None else manager(include_path=str(folder), include_defaults=False)
    held = set() if own is None else set(own.all_tasks)
    if clash := sorted(held & {*reserved}):
        raise InputError(f"{folder} defines {', '.join(clash)}, a name of the leaderboard: give its task another")
    theirs = None if held.issuperset(names) else manager()
    known = held | (set() if theirs is None else set(theirs.all_tasks))
    if unknown := [name for name in names if name not in known]:
        near = difflib.get_close_matches(unknown[0], sorted(known), 3)
        raise InputError(
            f"there is no task {unknown[0]!r}"
            + (f"; did you mean {' or '.join(near)}?" if near else "")
            + ("" if folder is None else f" (a YAML file of {folder} that is malformed defines none)")
        )
    return {name: own if name in held else theirs for name in names}


def fetch_data(managers: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Have every task's data sets on this machine. Raises InputError, naming the first that cannot be had."""
    for name, manager in managers.items():
        say(f"{name}: looking for its data")
        load = getattr(manager, "load", None) or manager.load_task_or_group  # as versions before 0.4.12 call it
        try:
            load([name])
        except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, TemplateError) as error:
            raise InputError(
                f"the task {name} cannot be made ready ({first_line(error)}): its data come from the hub, online or"
                " from the cache of an earlier time (HF_HOME); a task of your own names its files in dataset_kwargs"
            ) from error


def language_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """A loaded model, an adapter attached or not, as the harness takes one."""
    wrapper = _module("lm_eval.models.huggingface").HFLM
    with _tied_as_loaded(model):
        return wrapper(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def run_task(wrapped: Any, manager: Any, task: str, *, few_shot: int | None, limit: int | None) -> TaskRun:
    """Run one task or group; `few_shot` None is the task's own number, `limit` None all of its documents."""
    with _whole_answers(wrapped.model), _counted_cuts() as cuts:
        report = _module("lm_eval").simple_evaluate(
            wrapped, tasks=[task], num_fewshot=few_shot, limit=limit, task_manager=manager, log_samples=False
        )
    return TaskRun(tuple(_rows(report)), len(cuts))


def _rows(report: Mapping[str, Any]) -> Iterator[Measured]:
    for task, numbers in report["results"].items():
        leaves = [leaf for leaf in report["n-samples"] if leaf in _leaves(task, report["group_subtasks"])]
        counts = [report["n-samples"][leaf] for leaf in leaves]
        for key, value in numbers.items():
            metric, comma, answers = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = numbers.get(f"{metric}_stderr,{answers}")
            yield Measured(
                task=task,
                metric=metric,
                answers=answers,
                value=float(value),
                standard_error=float(error) if isinstance(error, int | float) else None,
                few_shot=report["n-shot"].get(task),
                version=str(report["versions"].get(task)),
                documents=sum(count["effective"] for count in counts),
                of=sum(count["original"] for count in counts),
                group=task not in report["n-samples"],
            )


def _leaves(task: str, groups: Mapping[str, Sequence[str]]) -> set[str]:
    """The tasks of a group, through groups within it; a task itself."""
    below = groups.get(task) or []
    return {leaf for each in below for leaf in _leaves(each, groups)} if below else {task}


@contextmanager
def _tied_as_loaded(model: nn.Module) -> Iterator[None]:
    """The harness ties a model's weights anew, which fails on, or undoes, a head that was trained beside an adapter."""
    inner = causal_lm(model)
    inner.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del inner.tie_weights


@contextmanager
def _whole_answers(model: nn.Module) -> Iterator[None]:
    """Without lengths in the model's own generation config, which go before those that the harness asks for."""
    inner = causal_lm(model)
    own = inner.generation_config
    inner.generation_config = copy.deepcopy(own)
    inner.generation_config.max_new_tokens = inner.generation_config.min_new_tokens = None
    try:
        yield
    finally:
        inner.generation_config = own


@contextmanager
def _counted_cuts() -> Iterator[list[str]]:
    """What the harness says of contexts that it cut from the left; it only logs that."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "runcat" in (text := record.getMessage()):
                said.append(text)

    listener = Listener(logging.WARNING)
    logger = logging.getLogger("lm_eval")
    logger.addHandler(listener)
    try:
        yield said
    finally:
        logger.removeHandler(listener)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, AttributeError) as error:  # 0.4.9 asks transformers for what 5 no longer has
        raise InputError(
            f"the leaderboard's tasks need lm-eval, which cannot be used here ({first_line(error)}): pip install"
            " 'lorafocal[eval]'"
        ) from error
