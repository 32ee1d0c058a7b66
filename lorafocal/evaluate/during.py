"""Answers on the way: a callback that writes answers to a few held-out prompts every so many steps, and judges them.

`lorafocal.run.train` is given `callbacks` at the door, so that the trainer imports nothing from here. Training goes on
as if nobody had looked: no random number is drawn from torch, every module gets its mode back, nothing has a gradient.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from lorafocal import launch
from lorafocal.arguments import FocalPOConfig
from lorafocal.compatibility import SPLIT_WEIGHTS
from lorafocal.config import Config
from lorafocal.data.prepare import Part
from lorafocal.errors import InputError, ran_out
from lorafocal.evaluate.answered import FOLDER, Answered, first_verdicts, write_answered
from lorafocal.evaluate.intervals import Share, paired_interval, share
from lorafocal.evaluate.judges import Judge, Verdicts, judge_of
from lorafocal.evaluate.questions import Question, questions
from lorafocal.evaluations import drop_later
from lorafocal.generation.batches import Completion, complete_batch, plan_batches
from lorafocal.generation.presets import Sampling
from lorafocal.generation.speech import Speech
from lorafocal.model.head import causal_lm
from lorafocal.model.load import check_length
from lorafocal.model.master import arithmetic_of
from lorafocal.policy import plain_attention
from lorafocal.progress import beside_progress
from lorafocal.publish import public_name, text_sha256
from lorafocal.report.read import RunRecord
from lorafocal.report.words import answers_fell
from lorafocal.run import Watchers, no_watchers
from lorafocal.schema import NO_ANSWERS, Evaluation
from lorafocal.together import all_or_none, of_all_ranks
from lorafocal.trainer import FocalPOTrainer

BATCH_TOKENS = 16_384  # of prompts and answers together: the training's own memory stays taken meanwhile
TRIAL_TOKENS = 4
SEED = 0  # of drawing: every evaluation draws alike, so that a change is the model's


def callbacks(
    config: Config, args: FocalPOConfig, data: Mapping[str, Part], tokenizer: PreTrainedTokenizerBase
) -> Watchers:
    """What `config.evaluation` asks for, made of the trainer once there is one; none without that section.

    A reward model is loaded at once, so that packs are planned beside it. A trial answer is written as soon as there
    is a trainer. Raises InputError where either fails, before the run writes anything.
    """
    section = config.evaluation
    if section is None:
        return no_watchers
    if args.engine in SPLIT_WEIGHTS:  # as accelerate's launcher names it; the config's own is refused when it is read
        raise InputError(f"evaluation: {NO_ANSWERS.format(engine=args.engine)}")
    with all_or_none():
        asked = questions(data["eval"], tokenizer, config.data.chat_template_kwargs, section.count)
        judge = judge_of(section, asked, args.device) if launch.is_main() else None
    return partial(_watchers, section, asked, judge)


def _watchers(
    section: Evaluation, asked: Sequence[Question], judge: Judge | None, trainer: FocalPOTrainer
) -> Sequence[TrainerCallback]:
    with all_or_none():
        sampling = Sampling(max_new_tokens=section.max_new_tokens, temperature=section.temperature, seed=SEED)
        watcher = AnswersOnTheWay(trainer, asked, judge, sampling, every=section.every, how=_how(section, asked))
        watcher.rehearse()
    return (watcher,)


class AnswersOnTheWay(TrainerCallback):
    """Answers and verdicts before the first step, after every `every`th and after the last; logged with intervals.

    Every rank answers its share of the questions, and rank 0 judges. The first evaluation must succeed; where a later
    one cannot, that is said, and the run goes on. `how` is what makes two evaluations comparable.
    """

    def __init__(
        self,
        trainer: FocalPOTrainer,
        asked: Sequence[Question],
        judge: Judge | None,
        sampling: Sampling,
        *,
        every: int,
        how: Mapping[str, Any],
    ) -> None:
        self._trainer, self._asked, self._judge, self._sampling = trainer, asked, judge, sampling
        self._every, self._how = every, how
        self._run = Path(trainer.args.output_dir)
        self._device, self._batch_tokens = trainer.args.device, BATCH_TOKENS
        self._first: Verdicts | None = None
        self._parted = False
        tokenizer = trainer.processing_class
        speech = Speech.of(tokenizer, templated=bool(tokenizer.chat_template))
        self._ends = speech.ends(getattr(causal_lm(trainer.model), "generation_config", None))
        self._say = beside_progress(trainer)

    def rehearse(self) -> None:
        """A few tokens of an answer to the longest prompt. Raises InputError where there is no room for a whole one."""
        place = max(range(len(self._asked)), key=lambda place: len(self._asked[place].ids))
        longest, new = len(self._asked[place].ids), self._sampling.max_new_tokens
        try:
            check_length(causal_lm(self._trainer.model), longest + new)
        except InputError as error:
            raise InputError(
                f"evaluation.max_new_tokens: a prompt of {longest} tokens with {new} new ones passes the length up to"
                " which this model's positions hold: lower it"
            ) from error
        self._complete([place], replace(self._sampling, max_new_tokens=min(new, TRIAL_TOKENS)))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The first evaluation, unless the run resumes after it."""
        with all_or_none():
            if state.is_world_process_zero:
                drop_later(self._run, state.global_step, FOLDER)
                self._first = first_verdicts(self._run, self._how, [question.id for question in self._asked])
        if of_all_ranks(self._first is None)[0]:
            self._evaluate(state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._every and state.global_step != state.max_steps:
            return
        try:
            self._evaluate(state, control)
        except (InputError, OSError) as error:
            if state.is_world_process_zero:
                self._say(f"warning: no answers at step {state.global_step}, training goes on: {error}")

    def _evaluate(self, state: TrainerState, control: TrainerControl) -> None:
        """Collective. Raises InputError or OSError, on every rank, where answers cannot be written, judged or kept."""
        answers = self._answers()
        verdicts: Verdicts = []
        with all_or_none():
            if self._judge is not None:
                verdicts = self._verdicts(self._judge, [answer.text for answer in answers])
                rows = [
                    Answered(question.id, answer.text, good, not answer.ended)
                    for question, answer, good in zip(self._asked, answers, verdicts, strict=True)
                ]
                write_answered(self._run, state.global_step, self._how, rows)
        if self._judge is not None:
            self._tell(self._judge, answers, verdicts, state, control)

    def _verdicts(self, judge: Judge, answers: Sequence[str]) -> Verdicts:
        """What the judge says; what its device's cache took is given back to the training."""
        try:
            return judge.verdicts(answers)
        except RuntimeError as error:  # with which go the tensors that its traceback holds
            if not ran_out(error):
                raise
        finally:
            self._give_back()
        raise InputError(
            "evaluation.reward_model: the device has no memory to judge answers beside the training: lower"
            " packing.tokens or evaluation.max_new_tokens"
        )

    def _give_back(self) -> None:
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _answers(self) -> list[Completion]:
        """Collective: every question's answer, in order."""
        with all_or_none():
            share_of_rank = range(launch.rank(), len(self._asked), launch.world_size())
            found = self._complete(share_of_rank, self._sampling)
        everybodys = dict(gather_object(list(found.items())))
        return [everybodys[place] for place in range(len(self._asked))]

    def _complete(self, places: Sequence[int], sampling: Sampling) -> dict[int, Completion]:
        """Answers to the questions at `places`; where the device runs out of memory, in smaller batches."""
        found: dict[int, Completion] = {}
        while left := [place for place in places if place not in found]:
            lengths = [len(self._asked[place].ids) for place in left]
            batch = [left[number] for number in plan_batches(lengths, sampling.max_new_tokens, self._batch_tokens)[0]]
            answers = self._attempt(batch, sampling)
            if answers is None and len(batch) == 1:
                raise InputError(
                    "the device has no memory for one answer beside the training: lower evaluation.max_new_tokens"
                )
            if answers is None:
                self._batch_tokens //= 2
            else:
                found |= zip(batch, answers, strict=True)
        return found

    def _attempt(self, batch: Sequence[int], sampling: Sampling) -> list[Completion] | None:
        """None where memory does not suffice. What the device's cache took is given back to the training."""
        model, tokenizer = self._trainer.model, self._trainer.processing_class
        prompts = [self._asked[place].ids for place in batch]
        bfloat16 = arithmetic_of(model) == torch.bfloat16
        try:
            with plain_attention(model), torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=bfloat16):
                return complete_batch(model, tokenizer, prompts, [(place,) for place in batch], sampling, self._ends)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            return None
        finally:
            self._give_back()

    def _tell(
        self,
        judge: Judge,
        answers: Sequence[Completion],
        verdicts: Verdicts,
        state: TrainerState,
        control: TrainerControl,
    ) -> None:
        """Into the log, on the progress line, and a warning where reward accuracy and the answers part."""
        seen = Seen.of(verdicts, self._first, [not answer.ended for answer in answers])
        if self._first is None:
            self._first = verdicts
        asked_to_log = control.should_log
        self._trainer.log(seen.as_logs(judge.key))
        control.should_log = asked_to_log  # which whoever logs takes back
        self._say(f"answers at step {state.global_step}/{state.max_steps} · {judge.words} {seen}")
        remark = answers_fell(RunRecord(self._run.name, state.log_history))
        if remark is not None and not self._parted:
            self._say(f"warning: {remark.seen} {remark.means} {remark.do}")
        self._parted = remark is not None


@dataclass(frozen=True, slots=True)
class Seen:
    """One evaluation: the share of good answers, its change since the first on the same prompts, what was cut."""

    good: Share
    change: tuple[float, float, float] | None  # with its interval
    cut: float
    unjudged: int

    @classmethod
    def of(cls, verdicts: Verdicts, first: Verdicts | None, cut: Sequence[bool]) -> Seen:
        """Raises InputError where no answer was judged."""
        known = [good for good in verdicts if good is not None]
        if not known:
            raise InputError("no answer could be judged")
        both = [(a, b) for a, b in zip(first or [], verdicts, strict=bool(first)) if a is not None and b is not None]
        change = paired_interval([a for a, _ in both], [b for _, b in both]) if both else None
        return cls(share(known), change, sum(cut) / len(cut), len(verdicts) - len(known))

    def as_logs(self, key: str) -> dict[str, float]:
        """Under names of the trainer's log; shares, not percent."""
        logs = {key: self.good.value, f"{key}_low": self.good.low, f"{key}_high": self.good.high}
        if self.change is not None:
            logs |= dict(zip((f"{key}_change", f"{key}_change_low", f"{key}_change_high"), self.change, strict=True))
        return logs | {"eval_answers_cut": self.cut, "eval_answers_unjudged": self.unjudged}

    def __str__(self) -> str:
        words = [str(self.good)]
        if self.change is not None:
            points, low, high = (100 * value for value in self.change)
            words.append(f"{points:+.1f} points [{low:+.1f}, {high:+.1f}] since the first")
        if self.cut:
            words.append(f"{self.cut:.0%} cut at the limit")
        return " · ".join(words)


def _how(section: Evaluation, asked: Sequence[Question]) -> dict[str, Any]:
    """What two evaluations must share to be compared; a reward model by its own name, whatever its place."""
    prompts = json.dumps([[question.id, list(question.ids), question.chosen] for question in asked])
    model = section.reward_model
    return {
        **section.model_dump(exclude={"every", "count"}),
        "reward_model": None if model is None else public_name(model),
        "prompts_sha256": text_sha256(prompts),
    }
