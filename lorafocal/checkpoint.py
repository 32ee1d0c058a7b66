"""Training state on disk, as safetensors by parameter name and JSON, nothing pickled; the newest checkpoint.

A checkpoint folder holds the whole trained parameters (`parameters.safetensors`, `parameters-00002.safetensors`, ...),
the optimizer's whole state of each (`optimizer...`, tensors named "<parameter name>/<state key>") and `state.json`
(everything else). So any engine in any number of processes can take it up. No random state: the order of the pairs is a
function of seed and epoch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import LRScheduler

from lorafocal import launch
from lorafocal.errors import InputError
from lorafocal.optimizers import kind_of, states_of_bitsandbytes
from lorafocal.publish import discard, why_incomplete
from lorafocal.run_folder import CHECKPOINT
from lorafocal.shard_files import SHARD_BYTES, StoredTensors, shard_name, write_shards
from lorafocal.tensor_files import WAY_OUT, check_keys, check_like, differs
from lorafocal.together import all_or_none, of_all_ranks

if TYPE_CHECKING:
    from lorafocal.engines import Engine

PARAMETERS, OPTIMIZER = "parameters", "optimizer"  # stems of the files
PARAMETERS_FILE, OPTIMIZER_FILE = (shard_name(stem, 0) for stem in (PARAMETERS, OPTIMIZER))  # where there is one
STATE_FILE = "state.json"

_LIKE_PARAMETER = ("exp_avg", "momentum_buffer", "exp_avg_sq", "max_exp_avg_sq")
_FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "state1", "absmax1")  # bitsandbytes' in 8 bits: codes and their scales
_TABLES = ("qmap1", "qmap2")  # the values that bitsandbytes' 8-bit codes stand for
_OF_EACH_GROUP = {"base_lrs", "_last_lr", "lr_lambdas"}  # of a schedule's state
_SET = {
    "initial_lr": "learning_rate",
    "weight_decay": "weight_decay",
    "betas": "adam_beta1, adam_beta2",
    "eps": "adam_epsilon",
}
_HOW = ("foreach", "fused", "capturable", "differentiable")  # settings of how a step is computed, each engine's own


class Latest(NamedTuple):
    """The newest complete checkpoint of a run (None: there is none), and why newer ones were passed over."""

    path: Path | None
    skipped: list[str]


def save_state(
    folder: Path,
    *,
    engine: Engine,
    parameters: Mapping[str, Parameter],
    scheduler: LRScheduler,
    extra: Mapping[str, Any],
    most: int = SHARD_BYTES,
) -> None:
    """Collective: write a checkpoint's files into `folder` (an unpublished one) and read them back.

    `parameters` are the trainable ones by name and must be exactly those the optimizer holds. A file has at most
    `most` bytes of tensors; the ranks that see the folder share the files. `extra` must survive JSON unchanged.
    Raises `InputError`, on every rank, where the state could not be restored exactly, is empty or non-finite, or lost
    its moments.
    """
    groups = _named_groups(engine, parameters)
    taken = _Taken()
    sees = [rank for rank, sees in enumerate(of_all_ranks(folder.is_dir())) if sees]
    share = {"rank": sees.index(launch.rank()) if launch.rank() in sees else -1, "world": len(sees), "most": most}
    with all_or_none():
        if not parameters:
            raise InputError(f"{PARAMETERS_FILE}: nothing to save: nothing is trained")
        whole = ((name, engine.full(parameter)) for name, parameter in parameters.items())
        values = write_shards(folder, PARAMETERS, whole, **share)
    with all_or_none():
        states = write_shards(folder, OPTIMIZER, taken.of(engine, parameters), **share)
        _check_moments(taken.alive)
    with all_or_none():
        state = {
            "format": 1,
            "files": {PARAMETERS: len(values), OPTIMIZER: len(states)},
            "engine": engine.word,
            "optimizer": {
                "class": kind_of(engine.optimizer),
                "groups": _exact_json(groups, "the optimizer's settings"),
                "keys": sorted(taken.keys),
                "values": _exact_json(taken.values, "the optimizer's state"),
            },
            "scheduler": {
                "class": type(scheduler).__name__,
                "state": _exact_json(scheduler.state_dict(), f"the state of {type(scheduler).__name__}"),
            },
            "extra": _exact_json(dict(extra), "the trainer's state"),
        }
        if launch.is_main():
            (folder / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")


def load_state(
    folder: Path, *, engine: Engine, parameters: Mapping[str, Parameter], scheduler: LRScheduler
) -> dict[str, Any]:
    """Collective: restore what `save_state` wrote, bit for bit, under any engine, and return its `extra`.

    Everything is checked, strictly both ways, before anything is changed: an `InputError` naming the file and
    the key means that parameters, optimizer and scheduler are as they were.
    """
    with all_or_none():
        state = _read_state(folder / STATE_FILE)
        values, tensors = (StoredTensors(_files(folder, stem, state)) for stem in (PARAMETERS, OPTIMIZER))
        check_keys(values, parameters, PARAMETERS_FILE)
    shapes = _check_values(values, engine, parameters)
    with all_or_none():
        groups = engine.groups(parameters)
        if len(groups) < len(state["optimizer"]["groups"]):
            _leave_out_empty(state)
        _check_optimizer(state["optimizer"], tensors, shapes, engine, groups)
        _check_set(state["optimizer"]["groups"], [settings for _, settings in groups])
        _check_made(state["optimizer"], tensors, engine, parameters)
        _check_scheduler(state["scheduler"], scheduler)
    keys = _by_parameter(state["optimizer"]["keys"])
    plain = _by_parameter(state["optimizer"]["values"])

    def states(name: str) -> dict[str, Any]:
        found = {key: tensors[f"{name}/{key}"].clone() for key in keys.get(name, ())}
        return found | {key: state["optimizer"]["values"][f"{name}/{key}"] for key in plain.get(name, ())}

    engine.restore(parameters, lambda name: values[name].clone(), states)
    for (_, settings), old in zip(engine.groups(parameters), state["optimizer"]["groups"], strict=True):
        for key in old["settings"].keys() & settings.keys() - {*_HOW}:
            value = old["settings"][key]
            settings[key] = tuple(value) if isinstance(settings[key], tuple) else value
    scheduler.load_state_dict(state["scheduler"]["state"])
    return state["extra"]


def latest_complete(run_dir: Path) -> Latest:
    """The `checkpoint-<N>` with the largest N whose record verifies; torn ones are skipped with the reason.

    Reads only. A process that is going to write calls `publish.recover(run_dir)` first.
    """
    skipped: list[str] = []
    for path in checkpoints(run_dir):
        reason = why_incomplete(path)
        if reason is None:
            return Latest(path, skipped)
        skipped.append(f"{path.name} is passed over: {reason}")
    return Latest(None, skipped)


def rotate(run_dir: Path, keep: int, *, newest: Path | None = None) -> list[str]:
    """Removes all but the newest `keep` complete checkpoints, oldest first; returns the names removed.

    The newest one that verifies always stays; `newest`, where it is known, since verifying reads all of it. Torn ones
    are left alone: their owner may want to look at them.
    """
    if keep < 1:
        raise InputError(f"training.save_total_limit is {keep}: at least one checkpoint must be kept")
    newest = newest or latest_complete(run_dir).path
    complete = [path for path in checkpoints(run_dir) if why_incomplete(path, hashes=False) is None]
    removed = [path for path in reversed(complete[keep:]) if path != newest]
    for path in removed:
        discard(path)
    return [path.name for path in removed]


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders, newest first."""
    found = [path for path in run_dir.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step after which it was saved."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


class _Taken:
    """The optimizer's state on its way into files: its names, what are no tensors, and whether moments are alive."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.keys: list[str] = []
        self.alive: dict[str, bool] = {}

    def of(self, engine: Engine, parameters: Mapping[str, Parameter]) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in parameters.items():
            for key, value in sorted(engine.states(parameter).items()):  # a restored state has another order
                if not isinstance(value, Tensor):
                    self.values[f"{name}/{key}"] = value
                    continue
                self.keys.append(f"{name}/{key}")
                _see_moment(self.alive, key, value)
                yield f"{name}/{key}", value


def _files(folder: Path, stem: str, state: Mapping[str, Any]) -> list[Path]:
    """The files of `stem`; a state that does not say how many has one."""
    return [folder / shard_name(stem, number) for number in range(state.get("files", {}).get(stem, 1))]


def _by_parameter(full_names: Iterable[str]) -> dict[str, list[str]]:
    """The keys of "<parameter name>/<state key>" by parameter."""
    keys: dict[str, list[str]] = {}
    for full_name in full_names:
        name, _, key = full_name.rpartition("/")
        keys.setdefault(name, []).append(key)
    return keys


def _named_groups(engine: Engine, parameters: Mapping[str, Parameter]) -> list[dict[str, Any]]:
    """The optimizer's groups as JSON; refused unless they hold exactly the trainable parameters."""
    groups = [
        {"parameters": names, "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}}
        for names, settings in _plain(engine.groups(parameters))
    ]
    check_keys([name for group in groups for name in group["parameters"]], parameters, "the optimizer's groups")
    return groups


def _plain(groups: Iterable[tuple[list[str], dict[str, Any]]]) -> list[tuple[list[str], dict[str, Any]]]:
    """Names and settings, without the tensors that a group holds."""
    return [(names, {key: v for key, v in settings.items() if key != "params"}) for names, settings in groups]


def _check_values(
    values: Mapping[str, Tensor], engine: Engine, parameters: Mapping[str, Parameter]
) -> dict[str, torch.Size]:
    """Collective: each saved parameter must be as the engine's own is; their shapes."""
    shapes = {}
    for name, parameter in parameters.items():
        own = engine.full(parameter)
        check_like(values[name], own, f"{PARAMETERS_FILE}: {name!r}")
        shapes[name] = own.shape
    return shapes


def _check_optimizer(
    saved: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    engine: Engine,
    groups: list[tuple[list[str], dict[str, Any]]],
) -> None:
    _check_kind(saved["class"], kind_of(engine.optimizer))
    if len(groups) != len(saved["groups"]):
        counts = f"{len(saved['groups'])} optimizer groups, the run has {len(groups)}"
        raise InputError(f"{STATE_FILE}: {counts}. {WAY_OUT}")
    for index, (old, (names, settings)) in enumerate(zip(saved["groups"], _plain(groups), strict=True)):
        check_keys(old["parameters"], names, f"{STATE_FILE}: optimizer group {index}")
        check_keys(old["settings"], settings, f"{STATE_FILE}: settings of optimizer group {index}")
    check_keys(tensors, saved["keys"], OPTIMIZER_FILE)
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name not in shapes:
            raise InputError(f"{OPTIMIZER_FILE}: unexpected {full_name!r}. {WAY_OUT}")
        if key in _LIKE_PARAMETER and tensor.shape != shapes[name]:
            raise InputError(differs(f"{OPTIMIZER_FILE}: {full_name!r}", tensor.shape, shapes[name]))
    alive: dict[str, bool] = {}
    for full_name, tensor in tensors.items():
        _see_moment(alive, full_name.rpartition("/")[2], tensor)
    _check_moments(alive)


def _check_set(saved: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    """What the optimizer was made with must be what it is made with: the checkpoint's would be taken up unsaid.

    Not what a schedule changes: the rate of the moment, and betas where it cycles them.
    """
    differ = []
    for index, (old, new) in enumerate(zip(saved, groups, strict=True)):
        where = f" of optimizer group {index}" if len(groups) > 1 else ""
        for key in [key for key in _SET if key in new and not (key == "betas" and "base_momentum" in new)]:
            then, now = (list(v) if isinstance(v, (list, tuple)) else v for v in (old["settings"][key], new[key]))
            if then != now:
                differ.append(f"{_SET[key]}{where}: {then} -> {now}")
    if differ:
        raise InputError(
            f"{STATE_FILE}: the optimizer was made otherwise than this run's (then -> now):\n  "
            + "\n  ".join(differ)
            + "\nset these back to resume, or start a new run"
        )


def _check_made(
    saved: Mapping[str, Any], tensors: Mapping[str, Tensor], engine: Engine, parameters: Mapping[str, Parameter]
) -> None:
    """The saved state must fit what the optimizer makes itself: entries, shapes, bits, and what its codes stand for."""
    made = states_of_bitsandbytes(engine.optimizer)
    if made is None:
        return
    saved_keys = _by_parameter([*tensors, *saved["values"]])
    for name, parameter in parameters.items():
        if found := saved_keys.get(name):
            check_keys(found, made[parameter], f"{OPTIMIZER_FILE}: {name!r}")
        for key in found or ():
            if (full_name := f"{name}/{key}") not in tensors:
                continue
            where, tensor, own = f"{OPTIMIZER_FILE}: {full_name!r}", tensors[full_name], made[parameter][key]
            check_like(tensor, own, where)
            if key in _TABLES and not torch.equal(tensor, own.cpu()):
                raise InputError(f"{where} holds other values than this bitsandbytes' 8-bit codes mean. {WAY_OUT}")


def _see_moment(alive: dict[str, bool], key: str, value: Tensor) -> None:
    """Note whether any first moment of this kind is not zero."""
    if key in _FIRST_MOMENTS and not alive.get(key):
        alive[key] = bool(value.any())


def _check_moments(alive: Mapping[str, bool]) -> None:
    """Refuses first moments that are all zero: a state that was lost (any step makes some non-zero)."""
    if not all(alive.values()):
        raise InputError(f"{OPTIMIZER_FILE}: every first moment is zero after a step: the optimizer state was lost")


def _leave_out_empty(state: Mapping[str, Any]) -> None:
    """Groups without parameters, which earlier versions saved, and what the schedule keeps of each group."""
    groups, schedule = state["optimizer"]["groups"], state["scheduler"]["state"]
    kept = [bool(group["parameters"]) for group in groups]
    for key in _OF_EACH_GROUP & schedule.keys():
        schedule[key] = list(compress(schedule[key], kept))
    groups[:] = compress(groups, kept)


def _check_scheduler(saved: Mapping[str, Any], scheduler: LRScheduler) -> None:
    _check_kind(saved["class"], type(scheduler).__name__)
    check_keys(saved["state"], scheduler.state_dict(), f"{STATE_FILE}: scheduler")


def _check_kind(saved: str, live: str) -> None:
    if saved != live:
        raise InputError(f"{STATE_FILE}: saved by {saved}, the run uses {live}. {WAY_OUT}")


def _exact_json(value: Any, what: str) -> Any:
    """`value` as JSON reads it back, refused where that differs: it would resume as something else."""
    try:
        read = json.loads(json.dumps(value))
    except TypeError as error:
        raise InputError(f"{what} cannot be saved as JSON ({error}): choose another optimizer") from error
    if read != value:
        raise InputError(f"{what} cannot be saved as JSON without a change: choose another optimizer")
    return read


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file.name} cannot be read ({error}). {WAY_OUT}") from error
    if not isinstance(state, dict) or state.get("format") != 1:
        raise InputError(f"{file.name} is not a training state of format 1. {WAY_OUT}")
    return state
