"""Who judges answers during training: a rule, against the chosen answer, or a reward model, by what it gives that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lorafocal.errors import InputError
from lorafocal.evaluate.questions import Question
from lorafocal.evaluate.reward_model import RewardModel, open_reward_model
from lorafocal.evaluate.rules import rule_named
from lorafocal.schema import Evaluation

Verdicts = list[bool | None]


@dataclass(frozen=True, slots=True)
class Judge:
    """Which answers are good, in the order of the questions; None for one that cannot be judged.

    `key` names their share in the log, `words` say it to a person.
    """

    key: str
    words: str
    verdicts: Callable[[Sequence[str]], Verdicts]


def judge_of(section: Evaluation, asked: Sequence[Question], device: torch.device) -> Judge:
    """The judge that a config names, of answers to `asked`, a model on `device`.

    Raises InputError for what cannot judge these questions.
    """
    if section.reward_model is not None:
        return by_reward(section.reward_model, asked, device)
    return by_rule(str(section.rule), section.pattern, asked)


def by_rule(name: str, pattern: str | None, asked: Sequence[Question]) -> Judge:
    """Good is what the rule says, with the chosen answer as its target."""
    rule = rule_named(name, pattern=pattern)
    for question in asked if rule.needs_target else ():
        try:
            rule.holds(question.chosen, question.chosen)
        except InputError as error:
            raise InputError(f"evaluation.rule: {name} cannot judge answers to {question.id}: {error}") from error

    def verdicts(answers: Sequence[str]) -> Verdicts:
        return [rule.holds(answer, question.chosen) for question, answer in zip(asked, answers, strict=True)]

    return Judge("eval_right_answers", "right", verdicts)


def by_reward(name: str, asked: Sequence[Question], device: torch.device) -> Judge:
    """Good is what the reward model puts above the chosen answer; a tie is not, as in reward accuracy.

    Not judged is what, with its prompt, is longer than the model takes.
    """
    try:
        with torch.random.fork_rng():  # transformers may draw what it then replaces
            model = open_reward_model(name, device=device)
        theirs = _rewards(model, asked, [question.chosen for question in asked])
    except InputError as error:
        raise InputError(f"evaluation.reward_model: {error}") from error
    if all(reward is None for reward in theirs):
        raise InputError(
            f"evaluation.reward_model: {model.name} takes {model.limit} tokens, fewer than any question has"
        )

    def verdicts(answers: Sequence[str]) -> Verdicts:
        ours = _rewards(model, asked, answers)
        return [None if a is None or b is None else a > b for a, b in zip(ours, theirs, strict=True)]

    return Judge("eval_win_rate", "above the chosen answers", verdicts)


def _rewards(model: RewardModel, asked: Sequence[Question], answers: Sequence[str]) -> list[float | None]:
    prompts = [question.prompt if model.templated else question.text for question in asked]
    return model.rewards(list(zip(prompts, answers, strict=True)))
