"""A Python run that goes on: no more than was left to do, in the same steps, nothing lost at the end of an epoch."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback

from lorafocal.errors import InputError
from lorafocal.evaluations import evaluation_files
from lorafocal.lineage import lineage_of
from lorafocal.model.load import load_base
from lorafocal.trainer import FocalPOTrainer
from tests.tiny import lora, pairs, tiny_base, tiny_policy, trainer

DATA = pairs(16)
EPOCHS = {"max_steps": -1, "pairs_per_step": 4, "save_strategy": "steps", "lr_scheduler_type": "constant"}


def weights(run: FocalPOTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.trained.items()}


def loaded(folder: Path) -> PreTrainedModel:
    """From somewhere, so that it has a lineage."""
    tiny_base().save_pretrained(folder)
    return load_base(str(folder), dtype="float32")


def test_a_finished_run_of_a_share_of_epochs_is_not_trained_further(tmp_path: Path) -> None:
    settings = EPOCHS | {"num_train_epochs": 1.5, "save_steps": 1}
    run = trainer(tmp_path, DATA, **settings)
    run.train()
    again = trainer(tmp_path, DATA, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == run.state.global_step == 6
    before, after = weights(run), weights(again)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "checkpoint-7").exists()


@pytest.mark.row("55")
@pytest.mark.parametrize(
    ("settings", "data", "key"),
    [
        ({"pairs_per_step": 2}, DATA, "pairs_per_step: 4 -> 2"),
        ({"seed": 7}, DATA, "seed: 42 -> 7"),
        ({"keep_order": True}, DATA, "seed: 42 -> "),
        ({}, [*DATA[1:], DATA[0]], "tokens_sha256"),
        ({}, [replace(DATA[0], chosen_ids=[3]), *DATA[1:]], "tokens_sha256"),
    ],
    ids=["step", "seed", "order", "turned", "changed"],
)
def test_another_order_of_pairs_is_refused(settings, data, key, tmp_path: Path) -> None:
    """Resumed so, some pairs would be seen twice in the epoch, and others never."""
    kept = {"save_strategy": "steps", "save_steps": 2, "pairs_per_step": 4, "max_steps": 2}
    trainer(tmp_path, DATA, **kept).train()
    with pytest.raises(InputError, match=rf"seen twice(?s:.*){key}"):
        trainer(tmp_path, data, **(kept | {"max_steps": 4} | settings)).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"learning_rate": 1e-3}, "learning_rate: 0.01 -> 0.001"),
        ({"weight_decay": 0.5}, "weight_decay: 0.0 -> 0.5"),
        ({"adam_beta1": 0.5}, r"adam_beta1, adam_beta2: \[0.9, 0.999\] -> \[0.5, 0.999\]"),
        ({"adam_epsilon": 1e-5}, "adam_epsilon: 1e-08 -> 1e-05"),
    ],
    ids=str,
)
def test_another_setting_of_the_optimizer_is_refused(setting: dict[str, float], named: str, tmp_path: Path) -> None:
    kept = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(tmp_path, DATA, **kept).train()
    with pytest.raises(InputError, match=named):
        trainer(tmp_path, DATA, **(kept | setting)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"max_steps": 6}, "steps: 4 -> 6"),
        ({"warmup_steps": 2}, "warmup_steps: 0 -> 2"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type: 'linear' -> 'cosine'"),
        ({"max_grad_norm": 0.5}, "max_grad_norm: 1.0 -> 0.5"),
        ({"logging_steps": 2}, ""),
    ],
    ids=str,
)
def test_steps_that_go_on_otherwise_are_told(setting, named, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(tmp_path, DATA, **kept).train()
    trainer(tmp_path, DATA, **(kept | setting)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    told = [text.partition("now): ")[2] for text in caplog.messages if "from here on the steps" in text]
    assert told == ([named] if named else [])


def test_a_checkpoint_beyond_the_last_step_says_that_nothing_is_trained(tmp_path: Path, caplog) -> None:
    kept = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    first = trainer(tmp_path, DATA, **kept)
    first.train()
    checkpoint = str(tmp_path / "checkpoint-4")
    for steps, told in ((4, []), (3, ["the checkpoint is of step 4, and this run has 3: nothing is trained"])):
        caplog.clear()
        again = trainer(tmp_path, DATA, **(kept | {"max_steps": steps}))
        again.train(resume_from_checkpoint=checkpoint)
        assert [text for text in caplog.messages if "the checkpoint" in text] == told
        torch.testing.assert_close(weights(again), weights(first), rtol=0, atol=0)


def test_checkpoints_of_an_earlier_run_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    with caplog.at_level(logging.WARNING, "lorafocal"):
        trainer(tmp_path, DATA, **kept).train()
        assert "earlier run" not in caplog.text
        trainer(tmp_path, DATA, **kept).train()
    assert "holds checkpoints of an earlier run up to checkpoint-4" in caplog.text


def test_an_epochs_evaluation_is_in_the_checkpoint_that_ends_it(tmp_path: Path) -> None:
    """Written between the two, a kill would lose it: the resumed run begins the next epoch."""
    run = trainer(tmp_path, DATA, DATA[:3], **EPOCHS, num_train_epochs=2, save_steps=4, eval_strategy="epoch")
    run.train()
    for step in (4, 8):
        log = json.loads((tmp_path / f"checkpoint-{step}/trainer_state.json").read_text())["log_history"]
        assert [line["step"] for line in log if "eval_loss" in line] == list(range(4, step + 1, 4))
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 8]


@pytest.mark.parametrize("save", [{"save_steps": 100}, {"save_steps": 4}, {"save_strategy": "epoch"}], ids=str)
def test_an_evaluation_that_is_delayed_is_not_made_early_for_a_checkpoint(save: dict, tmp_path: Path) -> None:
    delayed = EPOCHS | {"num_train_epochs": 3, "eval_strategy": "epoch", "eval_delay": 2} | save
    run = trainer(tmp_path, DATA, DATA[:3], **delayed)
    run.train()
    assert [line["step"] for line in run.state.log_history if "eval_loss" in line] == [8, 12]


def test_what_was_measured_before_training_stays(tmp_path: Path) -> None:
    """Of this process; what an earlier run left goes."""
    trainer(tmp_path, DATA, DATA[:3], eval_strategy="steps", eval_steps=2, eval_on_start=True).train()
    run = trainer(tmp_path, DATA, DATA[:3], max_steps=1)
    first = run.evaluate()
    run.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line] == [(0, first["eval_loss"])]
    assert {line["step"] for line in lines} == {0, 1}
    assert [*evaluation_files(tmp_path)] == [0]


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}


def left_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_training_that_is_refused_has_not_been(tmp_path: Path) -> None:
    """Its reference is where the first began, which the first step's probe finds; it has evaluated by then."""
    model = loaded(tmp_path / "base")
    run = trainer(tmp_path / "run", DATA, DATA[:3], model=model, peft_config=lora(), **EVALUATED)
    run.train()
    run.save_model()
    before, log, counts = left_in(tmp_path / "run"), list(run.state.log_history), run.lineage()
    with pytest.raises(InputError, match="starting point"):
        run.train()
    run.save_model()
    assert left_in(tmp_path / "run") == before
    assert (run.state.log_history, run.lineage()) == (log, counts)
    assert (counts.steps, counts.pairs_seen) == (run.state.global_step, run.pairs_seen) == (4, 32)
    with pytest.raises(InputError, match="starting point"):
        trainer(tmp_path / "run", DATA, DATA[:3], model=run.model, **EVALUATED).train()
    assert left_in(tmp_path / "run") == before
    run.evaluate()
    assert len(left_in(tmp_path / "run")["metrics.jsonl"].splitlines()) == len(before["metrics.jsonl"].splitlines()) + 1


class NoMemory(TrainerCallback):
    """Where the optimizer's step would find none, with its gradients all there."""

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError


def test_a_second_training_that_ends_within_its_first_step_has_not_been(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", DATA, model=loaded(tmp_path / "base"), peft_config=lora(), objective="sft")
    run.train()
    counts = run.lineage()
    run.add_callback(NoMemory)
    with pytest.raises(torch.OutOfMemoryError):
        run.train()
    assert (run.state.global_step, run.pairs_seen, run.lineage()) == (4, 32, counts)


def test_a_first_training_that_is_refused_leaves_no_evaluation(tmp_path: Path) -> None:
    run = trainer(tmp_path, DATA, DATA[:3], model=tiny_policy(), peft_config=None, **EVALUATED)
    measured = run.evaluate()
    before = left_in(tmp_path)
    with pytest.raises(InputError, match="starting point"):
        run.train()
    assert left_in(tmp_path) == before
    run.args.identity_probe = False
    run.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first = [line["eval_loss"] for line in lines if line["step"] == 0]
    assert first == [measured["eval_loss"]] * 2
    assert [*evaluation_files(tmp_path)] == [0, 2, 4]


def test_a_checkpoint_that_is_refused_leaves_the_trainer_at_its_own_weights(tmp_path: Path) -> None:
    kept = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(tmp_path / "run", DATA, **kept, learning_rate=1e-3).train()
    run = trainer(tmp_path / "own", DATA, max_steps=3)
    run.train()
    with pytest.raises(InputError, match="learning_rate"):
        run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert (run.state.global_step, run.pairs_seen) == (3, 24)


def test_the_lineage_counts_all_trainings_of_the_same_weights(tmp_path: Path) -> None:
    def made() -> FocalPOTrainer:
        settings = {"objective": "sft", "save_strategy": "steps", "save_steps": 2, "max_steps": 3}
        return trainer(tmp_path / "run", DATA, model=loaded(tmp_path / "base"), peft_config=lora(), **settings)

    run = made()
    for count in (1, 2):
        run.train()
        run.save_model()
        for lineage in (run.lineage(), lineage_of(tmp_path / "run" / "adapter")):
            assert lineage is not None
            assert (lineage.steps, lineage.pairs_seen) == (3 * count, 24 * count)
    resumed = made()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))  # the second training's
    assert resumed.lineage() == run.lineage()


class Looks(TrainerCallback):
    """A callback of a user that asks for the loader, and the pairs that each epoch began with."""

    def __init__(self) -> None:
        self.run: FocalPOTrainer | None = None
        self.first: list[list[int]] = []

    def on_epoch_begin(self, args, state, control, **kwargs):
        assert self.run is not None
        self.run.get_train_dataloader()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % 4 == 0:
            self.first.append(next(iter(kwargs["train_dataloader"].batch_sampler)))


@pytest.mark.row("F2")
def test_who_asks_for_the_loader_does_not_stop_the_epochs_order(tmp_path: Path) -> None:
    looks = Looks()
    run = trainer(tmp_path, DATA, **EPOCHS, num_train_epochs=3)
    run.add_callback(looks)
    looks.run = run
    run.train()
    assert len({tuple(first) for first in looks.first}) == len(looks.first) == 3


class Stops(TrainerCallback):
    def __init__(self, flag: str, after: int) -> None:
        self.flag, self.after = flag, after

    def on_step_end(self, args, state, control, **kwargs):
        setattr(control, self.flag, state.global_step == self.after)


def test_an_epoch_that_is_broken_off_is_not_begun_again(tmp_path: Path) -> None:
    run = trainer(tmp_path / "broken", DATA, **EPOCHS, num_train_epochs=2)
    run.add_callback(Stops("should_epoch_stop", 2))
    with pytest.raises(InputError, match=r"should_epoch_stop after step 2: .* set control.should_training_stop"):
        run.train()
    for flag, after, steps in (("should_training_stop", 2, 2), ("should_epoch_stop", 4, 8)):
        run = trainer(tmp_path / flag, DATA, **EPOCHS, num_train_epochs=2)
        run.add_callback(Stops(flag, after))
        assert run.train().global_step == steps


def test_steps_without_any_gradient_move_nothing_and_are_no_fault(tmp_path: Path) -> None:
    """As where every margin is beyond a hinge's, or a guard takes all gradients away."""
    run = trainer(tmp_path, DATA, max_steps=2)
    before = weights(run)
    for parameter in run.trained.values():
        parameter.register_hook(torch.zeros_like)
    run.train()
    assert not run.health.moved
    after = weights(run)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_chooses_among_checkpoints_or_predicts_is_refused_by_name(tmp_path: Path) -> None:
    run = trainer(tmp_path, DATA, peft_config=lora())
    with pytest.raises(InputError, match="EarlyStoppingCallback stops by the best checkpoint"):
        run.add_callback(EarlyStoppingCallback())
    with pytest.raises(InputError, match=r"predict: .*evaluate"):
        run.predict(DATA)
