"""Services behind `report_to`: a training is one run of theirs, and theirs may fail."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from lorafocal import run
from lorafocal.errors import InputError
from lorafocal.loggers import services
from tests.tiny import pairs, trainer, weights
from tests.toy_run import run_config, write_inputs

pytestmark = pytest.mark.slow


class Wandb(TrainerCallback):
    """In the place of transformers' callback; fails at the event of `fails_at`, once its run is `opened_before`."""

    made: ClassVar[list[Wandb]] = []

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.fails_at, self.opened_before = "", False
        self.made.append(self)

    def tell(self, event: str, said: Any = None) -> None:
        self.events.append(event if said is None else (event, said))
        package = sys.modules["wandb"]
        if event == "finish":
            package.run = None
        elif event != self.fails_at or self.opened_before:
            package.run = package.run or self
        if event == self.fails_at:
            raise ConnectionError("the service is\nout of reach")

    def on_train_begin(self, *arguments: Any, **known: Any) -> None:
        self.tell("begin")

    def on_log(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        self.tell("log", state.global_step)

    def on_train_end(self, *arguments: Any, model: Any, processing_class: Any) -> None:
        self.tell("end")


def killed(*arguments: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    """And in the place of the package, a module that tells the newest of them."""
    module = ModuleType("wandb")
    module.run, module.finish = None, lambda exit_code: Wandb.made[-1].tell("finish", exit_code)
    module.__spec__ = ModuleSpec("wandb", None)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", Wandb)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(Wandb, "made", [])
    return Wandb()


def trained(folder: Any, service: Wandb, *callbacks: TrainerCallback) -> dict[str, torch.Tensor]:
    """Two steps and a late evaluation, as a run does them: what was trained."""
    short = trainer(folder, pairs(16), pairs(4), max_steps=2)
    for callback in (service, *callbacks):
        short.add_callback(callback)
    with services(short):
        short.train()
        short.evaluate()
    return weights(short)


def test_a_training_is_one_run_that_ends_after_the_last_evaluation(tmp_path, wandb, capsys):
    trained(tmp_path, wandb)
    logs = [("log", 1), ("log", 2), ("log", 2), ("log", 2)]  # two steps, the training's own sums, the evaluation
    assert wandb.events == ["begin", *logs, "end", ("finish", 0)]
    assert "wandb" not in capsys.readouterr().err


def test_trainings_of_one_process_are_runs_of_their_own(tmp_path, wandb):
    root = write_inputs(tmp_path)
    for name in ("first", "second"):
        run.train(run_config(root, training__report_to="wandb"), quiet=True, runs_dir=tmp_path / name)
    _, first, second = Wandb.made
    assert first.events == second.events
    assert [event for event in first.events if event[0] != "log"] == ["begin", "end", ("finish", 0)]


def test_a_run_that_was_open_before_is_left_open(tmp_path, wandb):
    sys.modules["wandb"].run = object()
    trained(tmp_path, wandb)
    assert wandb.events[-1] == "end"


def test_a_service_that_does_not_start_is_named_before_the_first_step(tmp_path, wandb):
    wandb.fails_at = "begin"
    with pytest.raises(InputError, match=r"report_to: wandb does not start \(the service is\)\. .*leave wandb out"):
        trained(tmp_path, wandb)
    assert wandb.events == ["begin"]


def test_a_run_of_a_service_that_fails_while_it_starts_is_none_of_the_next_training(tmp_path, wandb):
    wandb.fails_at, wandb.opened_before = "begin", True
    with pytest.raises(InputError, match="wandb does not start"):
        trained(tmp_path, wandb)
    assert wandb.events == ["begin", ("finish", 1)]


def test_an_evaluation_after_the_last_step_of_an_earlier_launch_is_a_run_that_ends(tmp_path, wandb):
    """A kill came between the two: nothing is left to train, and the service's run begins where it logs."""
    root = write_inputs(tmp_path)
    config = run_config(root, training__report_to="wandb", training__eval_strategy="no", training__save_steps=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_held_out_metrics", killed)
        with pytest.raises(KeyboardInterrupt):
            run.train(config, quiet=True, runs_dir=tmp_path)
    sys.modules["wandb"].run = None  # with the process
    run.train(config, resume=True, quiet=True, runs_dir=tmp_path)
    assert Wandb.made[-1].events == ["begin", ("log", 9), "end", ("finish", 0)]


@pytest.mark.parametrize("event", ["log", "end"])
def test_a_service_that_fails_later_costs_a_note_and_no_training(tmp_path, wandb, capsys, event):
    whole = trained(tmp_path / "whole", wandb)
    wandb.events, wandb.fails_at = [], event
    made = trained(tmp_path / "failing", wandb)
    assert all(torch.equal(made[name], whole[name]) for name in whole)
    assert capsys.readouterr().err.count("note: wandb failed, and gets no more of this run (the service is") == 1
    assert wandb.events[-1] == ("finish", 0)
    assert [e for e in wandb.events if e[0] == "log"] == (
        [("log", 1)] if event == "log" else [("log", n) for n in (1, 2, 2, 2)]
    )


def test_a_training_that_fails_is_a_failed_run(tmp_path, wandb):
    class Fails(TrainerCallback):
        def on_step_end(self, *arguments: Any, **known: Any) -> None:
            raise InputError("as if a number were not finite")

    with pytest.raises(InputError, match="as if"):
        trained(tmp_path, wandb, Fails())
    assert wandb.events == ["begin", ("finish", 1)]


def test_an_interrupted_training_is_a_failed_run(tmp_path, wandb):
    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
            control.should_training_stop = True

    trained(tmp_path, wandb, Stops())
    assert wandb.events[-1] == ("finish", 1)
    assert "end" not in wandb.events


def test_a_second_signal_does_not_wait_for_the_service(tmp_path, wandb):
    class Interrupted(TrainerCallback):
        def on_step_end(self, *arguments: Any, **known: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, wandb, Interrupted())
    assert wandb.events == ["begin"]
