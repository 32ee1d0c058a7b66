"""Rows of several judged answers to a prompt, to the pairs that the step `pairs` of `data.steps` asks for.

Such a row has a list of answers (`answers`, `responses`, `completions` or `all_generated_responses`): texts, messages,
or objects of a text with a score or rank. Scores stand there, or in a list beside (`scores`, `all_rm_scores`), or the
row has a `ranking`: the place of each answer, 1 the best. UltraFeedback's raw rows are such (`instruction`,
`completions` with `overall_score`), and Nectar's (`rank`); the raw rows are read as conversations of one question.

Which pairs: best against worst, as SimPO's data were made; best against each other one, the pairs of Curry-DPO
(arXiv:2403.07230); the answer nearest to mean - 2 standard deviations of the row's scores in place of the worst
(arXiv:2502.16825; the deviation is that of the population, for the paper does not say).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import fmean, pstdev
from typing import Any

from lorafocal.data.columns import FurtherAnswer, read_columns, read_score
from lorafocal.data.forms import Row, Side, read_sides, recognise, with_system
from lorafocal.data.hygiene import key as said
from lorafocal.data.places import Place
from lorafocal.data.sources import LISTS, Pairing, Preference, read_id
from lorafocal.schema.steps import Pairs, Step

SCORES = ("scores", "all_rm_scores")
PROMPTS = ("prompt", "instruction", "question")
TEXTS = ("text", "response", "answer", "completion", "content")
OWN_SCORES = ("score", "overall_score", "rating")


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a row: its number from 1, how good it is (higher is better), and the judge's score where known."""

    number: int
    side: Side
    value: float
    score: float | None


def pairing_of(steps: Sequence[Step] | None) -> Pairing | None:
    """How a row becomes pairs, where the first step says so: called with the row, and whether it is one question."""
    first = steps[0].pairs if steps else None
    if first is None:
        return None
    rule = first
    return lambda row, question: list(pairs_of(row, rule, question=question))


def pairs_of(row: Row, rule: Pairs, *, question: bool = False) -> Iterator[Preference]:
    """The pairs of one row. Raises RowFault where it has no answers, scores or ranks, or all are judged alike."""
    prompt = _prompt(row, question=question)
    answers = _answers(row, prompt)
    told = list(RULES[rule.of](row, answers))
    if not told:
        raise row.place.fault("judged_alike", "no answer is judged better than the other one; remove the row")
    name = read_id(row)
    for chosen, rejected in told:
        sides = with_system((prompt, chosen.side, rejected.side), row)
        own = name if rule.of in ONE_A_ROW else f"{name}/{chosen.number}-{rejected.number}"
        more = read_columns(row, sides)
        others = more.others
        if rule.of == "sets":
            others = tuple(
                FurtherAnswer(each.side, None, each.score) for each in answers if each not in (chosen, rejected)
            )
        yield Preference(*sides, own, chosen.score, rejected.score, str(row.place), others, more.group, more.embedding)


# ---- which pairs


def best_worst(row: Row, answers: Sequence[Answer]) -> Iterator[tuple[Answer, Answer]]:
    """The best against the worst."""
    ranked = _ranked(answers)
    yield from _better(ranked[0], ranked[-1])


def best_each(row: Row, answers: Sequence[Answer]) -> Iterator[tuple[Answer, Answer]]:
    """The best against each other one."""
    best, *others = _ranked(answers)
    for other in others:
        yield from _better(best, other)


def adjacent(row: Row, answers: Sequence[Answer]) -> Iterator[tuple[Answer, Answer]]:
    """Each against the next worse one."""
    for better, worse in pairwise(_ranked(answers)):
        yield from _better(better, worse)


def every(row: Row, answers: Sequence[Answer]) -> Iterator[tuple[Answer, Answer]]:
    """Each against every worse one."""
    for better, worse in combinations(_ranked(answers), 2):
        yield from _better(better, worse)


def mu_minus_2_sigma(row: Row, answers: Sequence[Answer]) -> Iterator[tuple[Answer, Answer]]:
    """The best against the one nearest to mean - 2 standard deviations of the scores. Raises RowFault for ranks."""
    if any(answer.score is None for answer in answers):
        raise row.place.fault(
            "no_scores", "mu_minus_2_sigma needs a score of each answer, and ranks are none; give them"
        )
    values = [answer.value for answer in answers]
    target = fmean(values) - 2 * pstdev(values)
    best, *others = _ranked(answers)
    yield from _better(best, min(others, key=lambda answer: (abs(answer.value - target), answer.value, answer.number)))


RULES: Mapping[str, Callable[[Row, Sequence[Answer]], Iterator[tuple[Answer, Answer]]]] = {
    "best_worst": best_worst,
    "best_each": best_each,
    "adjacent": adjacent,
    "all": every,
    "mu_minus_2_sigma": mu_minus_2_sigma,
    "sets": best_worst,  # with the others as further answers of the pair
}
ONE_A_ROW = ("best_worst", "mu_minus_2_sigma", "sets")  # pairs that keep the row's own id


def _ranked(answers: Sequence[Answer]) -> list[Answer]:
    """The best first; of equals the earlier one."""
    return sorted(answers, key=lambda answer: (-answer.value, answer.number))


def _better(chosen: Answer, rejected: Answer) -> Iterator[tuple[Answer, Answer]]:
    if chosen.value > rejected.value and said(chosen.side) != said(rejected.side):
        yield chosen, rejected


# ---- what stands in a row


def _prompt(row: Row, *, question: bool) -> Side:
    if row.values.get("chosen") is not None:  # a pair was made of some of the answers already
        return read_sides(row, recognise(row))[0]
    name = next((name for name in PROMPTS if row.values.get(name) is not None), PROMPTS[0])
    if isinstance(row.values.get(name), list):
        return row.prompt(name)
    [text] = row.texts(name)
    objects = isinstance(row.values.get("completions"), list) and isinstance(row.values["completions"][0], Mapping)
    if question or (name == "instruction" and objects):
        return [{"role": "user", "content": text}]
    return text


def _answers(row: Row, prompt: Side) -> list[Answer]:
    name = next((name for name in LISTS if isinstance(row.values.get(name), list)), None)
    if name is None:
        raise row.place.at(LISTS[0]).fault(
            "no_answers",
            f"no list of answers under {', '.join(LISTS)}, and data.steps makes pairs of them; remove the row, or say"
            " where they stand with columns: {answers: ...}",
        )
    items = row.values[name]
    if len(items) < 2:
        raise row.place.at(name).fault("one_answer", f"{len(items)} answers; a pair needs two: remove the row")
    places = [row.place.at(f"{name}[{number}]") for number in range(len(items))]
    sides = [_side(item, prompt, place) for item, place in zip(items, places, strict=True)]
    judged = _judged(row, name, items, places)
    return [Answer(number, side, *value) for number, (side, value) in enumerate(zip(sides, judged, strict=True), 1)]


def _side(item: Any, prompt: Side, place: Place) -> Side:
    """One answer in the prompt's form."""
    if isinstance(item, Mapping) and "role" not in item:
        item = next((item[name] for name in TEXTS if item.get(name) is not None), None)
    if isinstance(item, str) and not isinstance(prompt, str):
        item = [{"role": "assistant", "content": item}]
    inside = Row({"answer": item}, place.at(" "))
    return inside.text("answer") if isinstance(prompt, str) else inside.answer("answer")


def _judged(row: Row, name: str, items: Sequence[Any], places: Sequence[Place]) -> list[tuple[float, float | None]]:
    """How good each answer is, and its score: from a list beside, from the answers themselves, or from ranks."""
    beside = next((of for of in SCORES if row.values.get(of) is not None), None)
    if beside is not None:
        scores = [read_score(score, row.place.at(beside)) for score in _as_long(row, beside, len(items))]
    else:
        scores = [
            read_score(next((item[of] for of in OWN_SCORES if item.get(of) is not None), None), place)
            if isinstance(item, Mapping)
            else None
            for item, place in zip(items, places, strict=True)
        ]
    if all(score is not None for score in scores):
        return [(score, score) for score in scores if score is not None]
    if row.values.get("ranking") is not None:
        ranks = [read_score(rank, row.place.at("ranking")) for rank in _as_long(row, "ranking", len(items))]
    else:
        ranks = [
            read_score(item.get("rank"), place) if isinstance(item, Mapping) else None
            for item, place in zip(items, places, strict=True)
        ]
    if all(rank is not None for rank in ranks):
        return [(-rank, None) for rank in ranks if rank is not None]
    raise row.place.at(name).fault(
        "not_judged",
        "some answers have neither score nor rank; give `scores` or a `ranking` (the place of each answer, 1 the best)"
        " beside them, or a score in each, or remove the row",
    )


def _as_long(row: Row, name: str, count: int) -> list[Any]:
    values = row.values[name]
    if not isinstance(values, list) or len(values) != count:
        raise row.place.at(name).fault("wrong_width", f"it is no list of {count}, one for each answer; correct it")
    return values
