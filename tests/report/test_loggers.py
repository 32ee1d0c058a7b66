"""TensorBoard, W&B and trackio are told what `metrics.jsonl` holds, under the names transformers gives its keys."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from transformers.integrations import integration_utils

from lorafocal import training_fields
from lorafocal.run import train
from tests.toy_run import all_lines, run_config, write_inputs

LOGGERS = ("tensorboard", "wandb", "trackio")
OF_THE_LOGGER = {"train/global_step"}  # the axis of W&B and trackio
ONLY_IN_SUMMARY = {"train_runtime", "train_steps_per_second"}  # one number a run: W&B's summary, and nowhere in trackio


def stand_in(name: str) -> MagicMock:
    """A module that takes every call and remembers it."""
    module = MagicMock(name=name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    return module


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[int, dict[str, Any]]]]:
    """The folder of a run, and for each logger what it was told: step -> key -> value."""
    root = write_inputs(tmp_path_factory.mktemp("loggers"))
    modules = {name: stand_in(name) for name in LOGGERS}
    tensorboard = stand_in("torch.utils.tensorboard")
    modules |= {name: stand_in(name) for name in ("wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util")}
    modules["wandb.sdk.lib.config_util"].ConfigError = KeyError
    modules["trackio"].__version__ = "1.0.0"
    modules["trackio"].context_vars.current_space_id.get.return_value = None
    with pytest.MonkeyPatch.context() as patch:
        for name, module in {**modules, "torch.utils.tensorboard": tensorboard}.items():
            patch.setitem(sys.modules, name, module)
        for name in LOGGERS:
            patch.setattr(integration_utils, f"is_{name}_available", lambda: True)
        run = train(run_config(root, training__report_to=list(LOGGERS)), runs_dir=root / "runs", quiet=True)
    written: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in LOGGERS}
    for call in tensorboard.SummaryWriter.return_value.add_scalar.call_args_list:
        key, value, step = call.args
        written["tensorboard"].setdefault(step, {})[key] = value
    for name in ("wandb", "trackio"):
        for call in modules[name].log.call_args_list:
            [values] = call.args
            written[name].setdefault(values["train/global_step"], {}).update(values)
    return run.folder, written


def as_named_by_loggers(line: dict[str, float]) -> dict[str, float]:
    """What transformers makes of our keys: `eval_x` to `eval/x`, every other to `train/x`."""
    return {
        f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}": value
        for key, value in line.items()
        if key != "step"
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", LOGGERS)
def test_a_logger_is_told_every_key_and_value_of_the_metrics_file(
    told: tuple[Path, dict[str, dict[int, dict[str, Any]]]], name: str
) -> None:
    folder, written = told
    expected: dict[int, dict[str, float]] = {}
    for line in all_lines(folder):
        kept = {key: value for key, value in line.items() if name == "tensorboard" or key not in ONLY_IN_SUMMARY}
        expected.setdefault(int(line["step"]), {}).update(as_named_by_loggers(kept))
    received = {
        step: {key: value for key, value in values.items() if key not in OF_THE_LOGGER}
        for step, values in written[name].items()
    }
    assert received == expected
    keys = {key for values in received.values() for key in values}
    assert {"train/rewards/margins", "eval/rewards/margins", "train/logps/reference_chosen", "train/pairs_seen"} <= keys


def test_every_logger_that_may_be_named_exists_in_transformers() -> None:
    assert set(training_fields.LOGGERS) <= set(integration_utils.INTEGRATION_TO_CALLBACK)


def test_loggers_need_their_package_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    present: set[str] = set()
    find = importlib.util.find_spec
    spec = importlib.machinery.ModuleSpec("x", None)
    asked = {package for packages in training_fields.LOGGERS.values() for package in packages}
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: (spec if name in present else None) if name in asked else find(name, *rest),
    )
    for name, packages in training_fields.LOGGERS.items():
        for given in (name, [name]):
            [problem] = training_fields.check_training_fields({"report_to": given})
            assert f"pip install {packages[0]}" in problem
        for package in packages:
            present.add(package)
            assert training_fields.check_training_fields({"report_to": [name]}) == []
            present.clear()


@pytest.mark.parametrize("nothing", ["none", ["none"], [], None])
def test_no_logger_is_fine(nothing: Any) -> None:
    assert training_fields.check_training_fields({"report_to": nothing}) == []


@pytest.mark.parametrize("given", ["tensorbord", ["codecarbon"], "all", ["none", "wandb"]])
def test_loggers_that_cannot_be_meant_are_refused(given: Any) -> None:
    [problem] = training_fields.check_training_fields({"report_to": given})
    assert problem.startswith("report_to: found ")
    assert "tensorboard, trackio, wandb" in problem
