"""Training state on disk, as safetensors by parameter name and JSON, nothing pickled; the newest checkpoint.

A checkpoint folder holds `parameters.safetensors` (trainable parameters), `optimizer.safetensors` (tensors
named "<parameter name>/<state key>") and `state.json` (everything else). No random state: the order of the
pairs is a function of seed and epoch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lorafocal.errors import InputError
from lorafocal.optimizers import kind_of, states_of_bitsandbytes
from lorafocal.publish import discard, why_incomplete
from lorafocal.tensor_files import WAY_OUT, check_keys, check_like, check_saved, differs, read_tensors

PARAMETERS_FILE = "parameters.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LIKE_PARAMETER = ("exp_avg", "momentum_buffer", "exp_avg_sq", "max_exp_avg_sq")
_FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "state1", "absmax1")  # bitsandbytes' in 8 bits: codes and their scales
_TABLES = ("qmap1", "qmap2")  # the values that bitsandbytes' 8-bit codes stand for


class Latest(NamedTuple):
    """The newest complete checkpoint of a run (None: there is none), and why newer ones were passed over."""

    path: Path | None
    skipped: list[str]


def save_state(
    folder: Path,
    *,
    parameters: Mapping[str, Parameter],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    extra: Mapping[str, Any],
) -> None:
    """Writes the three files of a checkpoint into `folder` (an unpublished one) and reads them back.

    `parameters` are the trainable ones by name and must be exactly those the optimizer holds; `optimizer` is
    the plain torch one, without accelerate's wrapper. `extra` must survive JSON unchanged. Raises
    `InputError` where the state could not be restored exactly, is empty or non-finite, or lost its moments.
    """
    groups = _named_groups(parameters, optimizer)
    tensors, values = _split_state(parameters, optimizer)
    _check_moments(tensors, OPTIMIZER_FILE)
    state = {
        "format": 1,
        "optimizer": {
            "class": kind_of(optimizer),
            "groups": _exact_json(groups, "the optimizer's settings"),
            "keys": sorted(tensors),
            "values": _exact_json(values, "the optimizer's state"),
        },
        "scheduler": {
            "class": type(scheduler).__name__,
            "state": _exact_json(scheduler.state_dict(), f"the state of {type(scheduler).__name__}"),
        },
        "extra": _exact_json(dict(extra), "the trainer's state"),
    }
    save_file(_on_cpu(parameters), folder / PARAMETERS_FILE)
    save_file(_on_cpu(tensors), folder / OPTIMIZER_FILE)
    (folder / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    check_saved(folder / PARAMETERS_FILE, parameters)
    if tensors:
        check_saved(folder / OPTIMIZER_FILE, tensors)


def load_state(
    folder: Path, *, parameters: Mapping[str, Parameter], optimizer: Optimizer, scheduler: LRScheduler
) -> dict[str, Any]:
    """Restores what `save_state` wrote, bit for bit, and returns its `extra`.

    Everything is checked, strictly both ways, before anything is changed: an `InputError` naming the file and
    the key means that parameters, optimizer and scheduler are as they were.
    """
    state = _read_state(folder / STATE_FILE)
    values = read_tensors(folder / PARAMETERS_FILE)
    tensors = read_tensors(folder / OPTIMIZER_FILE)
    check_keys(values, parameters, PARAMETERS_FILE)
    for name, parameter in parameters.items():
        check_like(values[name], parameter, f"{PARAMETERS_FILE}: {name!r}")
    made = states_of_bitsandbytes(optimizer)
    _check_optimizer(state["optimizer"], tensors, parameters, optimizer)
    if made is not None:
        _check_made(state["optimizer"], tensors, parameters, made)
    _check_scheduler(state["scheduler"], scheduler)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
    _restore_optimizer(state["optimizer"], tensors, parameters, optimizer, made)
    scheduler.load_state_dict(state["scheduler"]["state"])
    return state["extra"]


def latest_complete(run_dir: Path) -> Latest:
    """The `checkpoint-<N>` with the largest N whose record verifies; torn ones are skipped with the reason.

    Reads only. A process that is going to write calls `publish.recover(run_dir)` first.
    """
    skipped: list[str] = []
    for path in _checkpoints(run_dir):
        reason = why_incomplete(path)
        if reason is None:
            return Latest(path, skipped)
        skipped.append(f"{path.name} is passed over: {reason}")
    return Latest(None, skipped)


def rotate(run_dir: Path, keep: int) -> list[str]:
    """Removes all but the newest `keep` complete checkpoints, oldest first; returns the names removed.

    The newest one that verifies always stays. Torn ones are left alone: their owner may want to look at them.
    """
    if keep < 1:
        raise InputError(f"training.save_total_limit is {keep}: at least one checkpoint must be kept")
    newest = latest_complete(run_dir).path
    complete = [path for path in _checkpoints(run_dir) if why_incomplete(path, hashes=False) is None]
    removed = [path for path in reversed(complete[keep:]) if path != newest]
    for path in removed:
        discard(path)
    return [path.name for path in removed]


def _checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders, newest first."""
    found = [path for path in run_dir.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def _named_groups(parameters: Mapping[str, Parameter], optimizer: Optimizer) -> list[dict[str, Any]]:
    """The optimizer's groups with names for parameters; refused unless both sides hold the same ones."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        unknown = [tuple(p.shape) for p in group["params"] if id(p) not in names]
        if unknown:
            raise InputError(f"optimizer group {index} holds parameters not among the trainable: {unknown}")
        settings = {key: list(v) if isinstance(v, tuple) else v for key, v in group.items() if key != "params"}
        groups.append({"parameters": [names[id(p)] for p in group["params"]], "settings": settings})
    held = [name for group in groups for name in group["parameters"]]
    check_keys(held, parameters, "the optimizer's groups")
    return groups


def _split_state(parameters: Mapping[str, Parameter], optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as tensors and as plain values, both keyed "<parameter name>/<state key>"."""
    tensors, values = {}, {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                values[f"{name}/{key}"] = value
    return tensors, values


def _check_optimizer(
    saved: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Parameter],
    optimizer: Optimizer,
) -> None:
    _check_kind(saved["class"], kind_of(optimizer))
    live = _named_groups(parameters, optimizer)
    if len(live) != len(saved["groups"]):
        counts = f"{len(saved['groups'])} optimizer groups, the run has {len(live)}"
        raise InputError(f"{STATE_FILE}: {counts}. {WAY_OUT}")
    for index, (old, new) in enumerate(zip(saved["groups"], live, strict=True)):
        check_keys(old["parameters"], new["parameters"], f"{STATE_FILE}: optimizer group {index}")
        check_keys(old["settings"], new["settings"], f"{STATE_FILE}: settings of optimizer group {index}")
    check_keys(tensors, saved["keys"], OPTIMIZER_FILE)
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name not in parameters:
            raise InputError(f"{OPTIMIZER_FILE}: unexpected {full_name!r}. {WAY_OUT}")
        if key in _LIKE_PARAMETER and tensor.shape != parameters[name].shape:
            where = f"{OPTIMIZER_FILE}: {full_name!r}"
            raise InputError(differs(where, tensor.shape, parameters[name].shape))
    _check_moments(tensors, OPTIMIZER_FILE)


def _check_made(
    saved: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Parameter],
    made: Mapping[Parameter, Mapping[str, Any]],
) -> None:
    """The saved state must fit what the optimizer makes itself: entries, shapes, bits, and what its codes stand for."""
    for name, parameter in parameters.items():
        found = [*_state_keys(tensors, name), *_state_keys(saved["values"], name)]
        if found:
            check_keys(found, made[parameter], f"{OPTIMIZER_FILE}: {name!r}")
        for key in _state_keys(tensors, name):
            where, tensor, own = f"{OPTIMIZER_FILE}: '{name}/{key}'", tensors[f"{name}/{key}"], made[parameter][key]
            check_like(tensor, own, where)
            if key in _TABLES and not torch.equal(tensor, own.cpu()):
                raise InputError(f"{where} holds other values than this bitsandbytes' 8-bit codes mean. {WAY_OUT}")


def _check_moments(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuses first moments that are all zero: a state that was lost (any step makes some non-zero)."""
    for kind in _FIRST_MOMENTS:
        moments = [tensor for name, tensor in tensors.items() if name.rpartition("/")[2] == kind]
        if moments and not any(tensor.any() for tensor in moments):
            raise InputError(f"{where}: every first moment is zero after a step: the optimizer state was lost")


def _restore_optimizer(
    saved: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Parameter],
    optimizer: Optimizer,
    made: Mapping[Parameter, dict[str, Any]] | None,
) -> None:
    optimizer.state.clear()
    for group, old in zip(optimizer.param_groups, saved["groups"], strict=True):
        for key, value in old["settings"].items():
            group[key] = tuple(value) if isinstance(group[key], tuple) else value
        step_on_device = group.get("capturable") or group.get("fused")
        for name in old["parameters"]:
            parameter = parameters[name]
            state = {key: tensors[f"{name}/{key}"] for key in _state_keys(tensors, name)}
            state |= {key: saved["values"][f"{name}/{key}"] for key in _state_keys(saved["values"], name)}
            if not state:
                continue
            if made is not None:
                optimizer.state[parameter] = _filled(made[parameter], state)
                continue
            # torch keeps AdamW's step counts on the CPU unless its kernel reads them on the device
            devices = {"step": parameter.device if step_on_device else torch.device("cpu")}
            optimizer.state[parameter] = {
                key: value.to(devices.get(key, parameter.device)) if isinstance(value, Tensor) else value
                for key, value in state.items()
            }


def _filled(made: dict[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's own buffers with what was saved: paged ones stay paged, shared tables stay shared."""
    for key, value in saved.items():
        if isinstance(value, Tensor):
            made[key].copy_(value)
        else:
            made[key] = value
    return made


def _state_keys(flat: Iterable[str], name: str) -> list[str]:
    return [key for parent, _, key in (full.rpartition("/") for full in flat) if parent == name]


def _check_scheduler(saved: Mapping[str, Any], scheduler: LRScheduler) -> None:
    _check_kind(saved["class"], type(scheduler).__name__)
    check_keys(saved["state"], scheduler.state_dict(), f"{STATE_FILE}: scheduler")


def _check_kind(saved: str, live: str) -> None:
    if saved != live:
        raise InputError(f"{STATE_FILE}: saved by {saved}, the run uses {live}. {WAY_OUT}")


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies: a file cannot hold tensors that share memory, as bitsandbytes' tables do."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


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
