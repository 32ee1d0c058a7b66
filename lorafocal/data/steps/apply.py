"""The steps of a config one after the other, and what each did."""

from __future__ import annotations

from collections.abc import Sequence

from lorafocal.data.sources import Preference
from lorafocal.data.steps.chunk import chunk
from lorafocal.data.steps.flip import flip
from lorafocal.data.steps.outcome import Outcome, StepDone, ids_sha256
from lorafocal.data.steps.select import order, select
from lorafocal.schema.steps import Chunk, Order, Pairs, Select, Step, keeps_order


def apply_steps(
    steps: Sequence[Step], pairs: Sequence[Preference], *, read: int | None = None
) -> tuple[list[Preference], tuple[StepDone, ...]]:
    """`pairs` after all steps, and a record of each; `pairs`, where a step, was done in reading `read` rows.

    Raises InputError, naming the step by its key in the config, where one cannot do what it says.
    """
    now, done = list(pairs), []
    for number, step in enumerate(steps):
        before = len(now) if step.pairs is None or read is None else read
        outcome = _outcome(step, now, f"data.steps.{number}.{step.name}", ordered=keeps_order(steps[:number]))
        record = step.model_dump(mode="json")[step.name]
        digests = ids_sha256(now), ids_sha256(outcome.pairs)
        done.append(StepDone(step.name, record, before, len(outcome.pairs), *digests, outcome.words, outcome.found))
        now = outcome.pairs
    return now, tuple(done)


def _outcome(step: Step, pairs: list[Preference], where: str, *, ordered: bool) -> Outcome:
    settings = step.settings
    if isinstance(settings, Pairs):
        return Outcome(pairs, f"{settings.of} of each row's answers")
    if isinstance(settings, Select):
        return select(pairs, settings, where)
    if isinstance(settings, Order):
        return order(pairs, settings, where)
    if isinstance(settings, Chunk):
        return chunk(pairs, take=settings.take, of=settings.of, seed=settings.seed, ordered=ordered, where=where)
    return flip(pairs, share=settings.share, seed=settings.seed, scores=settings.scores, where=where)
