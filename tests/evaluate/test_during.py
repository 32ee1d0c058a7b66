"""Answers during training: the run stays the same bit for bit, and what is said of the answers is what they are."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from lorafocal import run
from lorafocal.config import Config, check_config
from lorafocal.data.prepare import prepare_data
from lorafocal.data.toy import toy_preferences, toy_tokenizer
from lorafocal.errors import InputError
from lorafocal.evaluate import during
from lorafocal.evaluate.answered import read_answered
from lorafocal.evaluate.judges import Judge
from lorafocal.evaluate.questions import questions
from lorafocal.generation import generate
from lorafocal.generation.formats import read_answers
from lorafocal.model.load import load_tokenizer
from lorafocal.publish import sha256
from lorafocal.report.read import read_run
from lorafocal.report.words import answers_fell
from lorafocal.run import Callbacks, Watchers, no_callbacks
from tests.evaluate.test_reward import save_causal
from tests.no_memory import NO_MEMORY, whoever_says_it
from tests.test_config import VALUES, mistakes
from tests.toy_run import HELD_OUT, metric_lines, run_config, write_inputs

pytestmark = pytest.mark.slow

ASKED: dict[str, Any] = {"every": 2, "count": 4, "rule": "regex", "pattern": r"9.*9", "max_new_tokens": 6}
STEPS = 5  # an epoch ends after the third
EVALUATED = [0, 2, 4, STEPS]
SHARE = "eval_right_answers"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def alone(root: Path) -> Path:
    """A run that nobody watches."""
    return trained(config_of(root, None), root / "alone")


@pytest.fixture(scope="module")
def watched(root: Path) -> Path:
    return trained(config_of(root, ASKED), root / "watched")


def config_of(root: Path, evaluation: dict[str, Any] | None, *, steps: int = STEPS, **changes: Any) -> Config:
    config = run_config(root, training__num_train_epochs=None, training__max_steps=steps, **changes)
    return check_config({**config.model_dump(mode="json"), "evaluation": evaluation})


def trained(config: Config, runs: Path, *more: TrainerCallback, resume: bool = False, quiet: bool = True) -> Path:
    """The run's folder; `more` watch it too."""
    made: Callbacks = no_callbacks if config.evaluation is None else during.callbacks

    def callbacks(*parts: Any) -> Watchers:
        watchers = made(*parts)
        return lambda trainer: [*watchers(trainer), *more]

    return run.train(config, quiet=quiet, resume=resume, runs_dir=runs, callbacks=callbacks).folder


def weights(folder: Path) -> str:
    return sha256(folder / "adapter" / "adapter_model.safetensors")


def logged(folder: Path, key: str) -> list[dict[str, float]]:
    """The lines with `key`, without what was timed."""
    return [
        {name: value for name, value in line.items() if not name.endswith(("_runtime", "_per_second"))}
        for line in metric_lines(folder, key=key)
    ]


def shares(folder: Path, key: str = SHARE) -> dict[int, dict[str, float]]:
    """The logged lines about answers, by step; each step once."""
    lines = metric_lines(folder, key=key)
    assert len(lines) == len({line["step"] for line in lines})
    return {int(line["step"]): line for line in lines}


def answers_at(folder: Path, step: int) -> list[str]:
    return [row.answer for row in read_answered(folder / "answers" / f"step-{step}.jsonl")[1]]


class Killed(TrainerCallback):
    """Sends this process the signal to stop at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class RandomStates(TrainerCallback):
    """What torch would draw from at the start of each step."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(torch.get_rng_state().numpy().tobytes())


# ---- the run is the same


@pytest.mark.row("F14")
def test_a_watched_run_is_the_unwatched_one_bit_for_bit(alone: Path, watched: Path) -> None:
    assert weights(watched) == weights(alone)
    for name in ("parameters.safetensors", "optimizer.safetensors"):
        place = f"checkpoint-{STEPS}/{name}"
        assert sha256(watched / place) == sha256(alone / place)
    for key in ("loss", "eval_loss"):
        assert logged(watched, key) == logged(alone, key)


@pytest.mark.parametrize(
    ("changes", "evaluation"),
    [
        ({"adapter__dropout": 0.1, "adapter__allow_dropout": True}, {"temperature": 0.9}),
        ({"model__dtype": "bfloat16", "training__activation_checkpointing": "full"}, {}),
    ],
    ids=["noise, and answers that are drawn", "bfloat16, recomputed"],
)
def test_neither_noise_nor_random_state_nor_precision_is_another(
    root: Path, tmp_path: Path, changes: dict[str, Any], evaluation: dict[str, Any]
) -> None:
    states = RandomStates(), RandomStates()
    plain = trained(config_of(root, None, steps=2, **changes), tmp_path / "plain", states[0])
    watching = config_of(root, {**ASKED, "every": 1, **evaluation}, steps=2, **changes)
    asked = trained(watching, tmp_path / "asked", states[1])
    assert weights(asked) == weights(plain)
    assert states[0].seen == states[1].seen
    assert list(shares(asked)) == [0, 1, 2]


def test_every_parameter_may_be_trained(root: Path, tmp_path: Path) -> None:
    values = config_of(root, None, steps=2).model_dump(mode="json")
    values |= {"adapter": None, "reference": {"kind": "separate_model", "model": values["model"]["name"]}}
    values["model"]["dtype"] = "bfloat16"
    found = {}
    for name, evaluation in (("plain", None), ("asked", {**ASKED, "every": 1})):
        folder = trained(check_config({**values, "evaluation": evaluation}), tmp_path / name)
        found[name] = sha256(folder / "model" / "model.safetensors")
        card = (folder / "model" / "README.md").read_text(encoding="utf-8")
        assert "## Data" in card
        assert "| training.learning_rate |" in card
    assert found["plain"] == found["asked"]


# ---- what is said of it


def test_answers_are_those_of_the_finished_adapter_and_the_log_counts_them(watched: Path, tmp_path: Path) -> None:
    rows = toy_preferences(HELD_OUT, seed=2, held_out=True)[: ASKED["count"]]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "answers.json"
    generate(watched, tmp_path / "held_out.jsonl", out=out, max_new_tokens=ASKED["max_new_tokens"])
    expected = [row.output for row in read_answers(out).rows]
    assert answers_at(watched, STEPS) == expected
    assert answers_at(watched, 0) != expected
    lines = shares(watched)
    assert list(lines) == EVALUATED
    first = lines[0][SHARE]
    for step, line in lines.items():
        right = sum(answer.count("9") > 1 for answer in answers_at(watched, step)) / ASKED["count"]
        assert line[SHARE] == right
        assert line[f"{SHARE}_low"] <= right <= line[f"{SHARE}_high"]
        assert line.get(f"{SHARE}_change") == (None if step == 0 else right - first)
        assert line["eval_answers_cut"] == 1.0  # random weights end no answer
    assert first not in (0.0, 1.0)  # the pattern tells answers apart


@pytest.mark.row("55")
def test_a_resumed_run_says_everything_once_and_the_same(root: Path, tmp_path: Path, watched: Path) -> None:
    config = config_of(root, ASKED)
    trained(config, tmp_path, Killed(3))
    assert list(shares(tmp_path / "toy")) == [0, 2]
    (tmp_path / "toy" / "answers" / "step-4.jsonl").write_text("of weights that are gone")
    resumed = trained(config, tmp_path, resume=True)
    assert shares(resumed) == shares(watched)
    assert weights(resumed) == weights(watched)
    assert [answers_at(resumed, step) for step in EVALUATED] == [answers_at(watched, step) for step in EVALUATED]


@pytest.mark.row("16")
def test_answers_that_were_judged_otherwise_are_no_beginning(root: Path, tmp_path: Path) -> None:
    trained(config_of(root, ASKED), tmp_path, Killed(3))
    resumed = trained(config_of(root, {**ASKED, "pattern": "9"}), tmp_path, resume=True)
    lines = shares(resumed)
    assert list(lines) == [0, 2, 3, 4, STEPS]
    assert f"{SHARE}_change" not in lines[3]
    right = {step: sum("9" in answer for answer in answers_at(resumed, step)) / ASKED["count"] for step in (3, STEPS)}
    assert lines[STEPS][f"{SHARE}_change"] == right[STEPS] - right[3]


def test_the_alarm_is_said_once_while_the_run_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts = iter([True, False, False, False])
    judge = Judge(SHARE, "right", lambda answers: [next(verdicts)] * len(answers))
    monkeypatch.setattr(during, "judge_of", lambda *_: judge)
    folder = trained(config_of(root, ASKED, training__logging_steps=1), tmp_path, quiet=False)
    assert capsys.readouterr().err.count("warning: Right answers by rule fell from 100.0% to 0.0%, while reward") == 1
    record = read_run(folder, "toy")
    assert answers_fell(record) is not None
    assert answers_fell(replace(record, lines=[line for line in record.lines if line["step"] == 0])) is None


def test_questions_are_distinct_prompts_as_generation_reads_them(root: Path) -> None:
    config = config_of(root, ASKED)
    tokenizer = load_tokenizer(str(root / "base"))
    part = prepare_data(config.data, tokenizer)["train"]
    asked = questions(part, tokenizer, {}, 1000)
    ids = {pair.id: pair.prompt_ids for pair in part.tokens.pairs}
    assert [list(question.ids) for question in asked] == [ids[question.id] for question in asked]
    assert len({tuple(question.ids) for question in asked}) == len(asked) == len(part.tokens.pairs)
    assert {isinstance(question.prompt, str) for question in asked} == {True, False}
    twice = replace(part, preferences=[preference for preference in part.preferences for _ in range(2)])
    assert questions(twice, tokenizer, {}, 3) == asked[:3]
    said = [{"role": role, "content": text} for role, text in zip(("assistant", "user") * 2, "abcd", strict=True)][:3]
    of_turns = replace(part, preferences=[replace(each, chosen=said) for each in part.preferences])
    assert {question.chosen for question in questions(of_turns, tokenizer, {}, 3)} == {"a"}


def test_a_reward_model_says_which_answers_beat_the_chosen_ones(root: Path, tmp_path: Path) -> None:
    evaluation = {"every": 2, "count": 4, "reward_model": str(save_causal(root / "reward")), "max_new_tokens": 6}
    folder = trained(config_of(root, evaluation, steps=2), tmp_path)
    how, rows = read_answered(folder / "answers" / "step-2.jsonl")
    assert how["reward_model"] == "reward"
    assert shares(folder, "eval_win_rate")[2]["eval_win_rate"] == sum(bool(row.good) for row in rows) / 4
    assert weights(folder) == weights(trained(config_of(root, None, steps=2), tmp_path / "plain"))
    assert str(root) not in (folder / "answers" / "step-2.jsonl").read_text()


def test_a_reward_model_is_where_the_policy_is(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `use_cpu` beside a GPU; without a device it goes to the machine's, which is one that computes nothing."""
    monkeypatch.setattr("lorafocal.evaluate.reward_model.local_device", lambda: torch.device("meta"))
    evaluation = {"every": 1, "count": 2, "reward_model": str(save_causal(root / "reward")), "max_new_tokens": 4}
    assert shares(trained(config_of(root, evaluation, steps=1), tmp_path), "eval_win_rate")


# ---- what goes wrong


def out_of_memory(when: Callable[[Sequence[Any]], bool], error: RuntimeError = NO_MEMORY[0]) -> Callable[..., Any]:
    real = during.complete_batch

    def complete(model: Any, tokenizer: Any, prompts: Sequence[Any], *rest: Any) -> Any:
        if when(prompts):
            raise error
        return real(model, tokenizer, prompts, *rest)

    return complete


@whoever_says_it
def test_without_memory_batches_get_smaller(
    root: Path, tmp_path: Path, watched: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    monkeypatch.setattr(during, "complete_batch", out_of_memory(lambda prompts: len(prompts) > 1, error))
    folder = trained(config_of(root, ASKED), tmp_path)
    assert shares(folder) == shares(watched)


def test_a_failure_on_the_way_is_said_and_loses_nothing(
    root: Path, tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def later(prompts: Sequence[Any]) -> bool:
        calls.append(len(prompts))
        return len(calls) > 2  # the trial and the first evaluation succeed

    monkeypatch.setattr(during, "complete_batch", out_of_memory(later))
    folder = trained(config_of(root, ASKED), tmp_path, quiet=False)
    assert weights(folder) == weights(alone)
    assert list(shares(folder)) == [0]
    said = capsys.readouterr().err
    assert "warning: no answers at step 2, training goes on: the device has no memory for one answer" in said


@whoever_says_it
def test_a_judge_without_memory_is_said_and_the_run_goes_on(
    root: Path,
    alone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: RuntimeError,
) -> None:
    seen: list[int] = []

    def verdicts(answers: Sequence[str]) -> list[bool]:
        seen.append(len(answers))
        if len(seen) > 1:
            raise error
        return [True] * len(answers)

    monkeypatch.setattr(during, "judge_of", lambda *_: Judge(SHARE, "right", verdicts))
    folder = trained(config_of(root, ASKED), tmp_path, quiet=False)
    assert weights(folder) == weights(alone)
    assert list(shares(folder)) == [0]
    said = capsys.readouterr().err
    assert "training goes on: evaluation.reward_model: the device has no memory to judge answers" in said


def test_the_judge_takes_its_memory_before_the_base_does(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packs are planned for the memory that is left; a reward model that came later would have none."""
    order: list[str] = []
    real = during.judge_of, run.load_base
    monkeypatch.setattr(during, "judge_of", lambda *parts: order.append("judge") or real[0](*parts))
    monkeypatch.setattr(run, "load_base", lambda *a, **k: order.append("base") or real[1](*a, **k))
    trained(config_of(root, ASKED, steps=1), tmp_path)
    assert order == ["judge", "base"]


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_answers_need_whole_weights_whoever_names_the_engine(root: Path, engine: str) -> None:
    """accelerate's launcher may name it, of which the config knows nothing."""
    args: Any = SimpleNamespace(engine=engine, device=torch.device("cpu"))
    with pytest.raises(InputError, match=f"evaluation: {engine} splits the weights"):
        during.callbacks(config_of(root, ASKED), args, {}, toy_tokenizer())


def test_what_cannot_be_judged_is_refused_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    for evaluation, told in (
        ({"every": 1, "reward_model": str(root / "base")}, "evaluation.reward_model: "),
        ({"every": 1, "rule": "exact", "max_new_tokens": 6, "temperature": 1e9}, "temperature"),
    ):
        with pytest.raises(InputError, match=told):
            trained(config_of(root, evaluation), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_rule_needs_targets_that_it_can_read(root: Path, tmp_path: Path) -> None:
    rows = [row | {"chosen": [{"role": "assistant", "content": "sort"}]} for row in toy_preferences(3, held_out=True)]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(root, {"every": 1, "rule": "number"}, data__eval=str(tmp_path / "words.jsonl"))
    with pytest.raises(InputError, match=r"evaluation.rule: number cannot judge answers to words.jsonl:1: .*no number"):
        trained(config, tmp_path / "runs")


def test_a_section_that_nobody_would_answer_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="evaluation: nobody answers"):
        run.train(config_of(root, ASKED), quiet=True, runs_dir=tmp_path)


@pytest.mark.parametrize(
    ("evaluation", "told"),
    [
        ({"every": 10}, "evaluation.rule: missing; say who judges"),
        ({"every": 0, "rule": "exact"}, "evaluation.every: found 0"),
        ({"rule": "exact"}, "evaluation.every: missing"),
        ({"every": 1, "rule": "exakt"}, "evaluation.rule: found 'exakt'"),
        ({"every": 1, "rule": "exact", "reward_model": "m"}, "evaluation.rule: evaluation.reward_model judges"),
        ({"every": 1, "rule": "regex"}, "evaluation.pattern: rule: regex needs one"),
        ({"every": 1, "rule": "exact", "pattern": "a"}, "evaluation.pattern: rule: regex needs one"),
        ({"every": 1, "rule": "regex", "pattern": "("}, "evaluation.pattern: '(' is no regular expression"),
        ({"every": 1, "rule": "exact", "max_new_token": 3}, "did you mean evaluation.max_new_tokens"),
    ],
)
def test_mistakes_are_told_at_their_key(evaluation: dict[str, Any], told: str) -> None:
    assert told in mistakes({**VALUES, "data": {"train": "a.jsonl", "held_out": 9}, "evaluation": evaluation})


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"data": {"train": "a.jsonl"}}, "evaluation: answers the prompts of held-out pairs, and there are none"),
        ({"engine": {"kind": "zero3"}}, "evaluation: zero3 splits the weights"),
        ({"engine": {"kind": "fsdp2"}}, "evaluation: fsdp2 splits the weights"),
        ({"model": {"name": "base", "dtype": "bfloat16", "backend": "unsloth"}}, "evaluation: unsloth exchanges"),
    ],
)
def test_where_no_answers_can_be_written_the_section_is_refused(more: dict[str, Any], told: str) -> None:
    values = {**VALUES, "data": {"train": "a.jsonl", "held_out": 9}, "evaluation": {"every": 1, "rule": "exact"}}
    assert told in mistakes({**values, **more})
    assert check_config({**values, "engine": {"kind": "zero2"}}).evaluation is not None
