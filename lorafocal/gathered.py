"""What all ranks know of a step's pairs, put together on each of them: as two tables of float64, in three exchanges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lorafocal.objectives.inputs import OF_BOTH, OF_PAIRS, OtherAnswers, PairInputs, PairLogps, PairScores
from lorafocal.together import grouped

_PAIR_COLUMNS = tuple(spec.name for spec in fields(PairInputs) if spec.name not in ("others", "num_groups"))
_ANSWER_COLUMNS = OtherAnswers._fields
_WHOLE_NUMBERS = ("lengths", "groups", "pair")


class Gathered(NamedTuple):
    """The pairs of all ranks, their numbers in float64, and which of them are this rank's."""

    inputs: PairInputs
    first_pair: int
    first_answer: int  # of the further ones


def all_pairs(ours: PairInputs | None, num_groups: int | None, device: torch.device) -> Gathered:
    """Collective: the pairs of all ranks behind one another by rank; None is what a rank without any has.

    Ranks with pairs know things of the same kinds of them; one without learns here which these are.
    """
    pairs, answers = ({}, {}) if ours is None else (_columns_of_pairs(ours), _columns_of_answers(ours.others))
    num_pairs, num_answers = _rows(pairs), _rows(answers)
    widths = [_width(pairs.get(name)) for name in _PAIR_COLUMNS]
    widths += [_width(answers.get(name)) for name in _ANSWER_COLUMNS]
    header = _of_all(torch.tensor([num_pairs, num_answers, *widths], device=device))
    widths = header[:, 2:].amax(0).tolist()
    of_pairs = dict(zip(_PAIR_COLUMNS, widths[: len(_PAIR_COLUMNS)], strict=True))
    of_answers = dict(zip(_ANSWER_COLUMNS, widths[len(_PAIR_COLUMNS) :], strict=True))
    counts, rank = header[:, :2].tolist(), _rank()
    first_pair, first_answer = (sum(side[:rank]) for side in zip(*counts, strict=True))
    if "pair" in answers:
        answers["pair"] = answers["pair"] + first_pair
    tables = _table(pairs, of_pairs, num_pairs, device), _table(answers, of_answers, num_answers, device)
    sides = zip(tables, zip(*counts, strict=True), strict=True)
    of_each, of_each_other = (_rows_of_all(table, numbers) for table, numbers in sides)
    every_pair, every_answer = _split(of_each, of_pairs), _split(of_each_other, of_answers)
    every_column: dict[str, Any] = dict.fromkeys(_ANSWER_COLUMNS) | every_answer
    others = OtherAnswers(**every_column) if every_answer else None
    return Gathered(_inputs(every_pair, others, num_groups), first_pair, first_answer)


# ---- inputs as columns, and back


def _columns_of_pairs(inputs: PairInputs) -> dict[str, Tensor]:
    """(B, k) each, k numbers of a pair."""
    return {name: _column(name, value) for name in _PAIR_COLUMNS if (value := getattr(inputs, name)) is not None}


def _column(name: str, value: Any) -> Tensor:
    if name in OF_PAIRS:
        found: Tensor = value[:, None] if value.ndim == 1 else value
        return found
    return torch.stack(value.chunk(2) if name in OF_BOTH else tuple(value), dim=1)


def _columns_of_answers(others: OtherAnswers | None) -> dict[str, Tensor]:
    """(M, 1) each."""
    named = {} if others is None else others._asdict()
    return {name: value[:, None] for name, value in named.items() if value is not None}


def _inputs(columns: Mapping[str, Tensor], others: OtherAnswers | None, num_groups: int | None) -> PairInputs:
    def value(name: str, column: Tensor) -> Any:
        if name in OF_PAIRS:
            return column if name == "embeddings" else column[:, 0]
        chosen, rejected = column.unbind(1)
        if name in OF_BOTH:
            return torch.cat((chosen, rejected))
        return (PairScores if name == "scores" else PairLogps)(chosen, rejected)

    return PairInputs(
        **{name: value(name, column) for name, column in columns.items()}, others=others, num_groups=num_groups
    )


def _rows(columns: Mapping[str, Tensor]) -> int:
    return len(next(iter(columns.values()))) if columns else 0


def _width(column: Tensor | None) -> int:
    return 0 if column is None else column.shape[1]


def _table(columns: Mapping[str, Tensor], widths: Mapping[str, int], rows: int, device: torch.device) -> Tensor:
    """(rows, sum of widths), float64."""
    there = [columns[name].detach().double() for name in widths if name in columns]
    return torch.cat(there, dim=1) if there else torch.zeros(rows, sum(widths.values()), device=device).double()


def _split(table: Tensor, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """The table's columns by name; whole numbers are int64 again, and those of further answers (M,)."""
    parts = zip(widths, table.split(list(widths.values()), dim=1), strict=True)
    found = {name: part.long() if name in _WHOLE_NUMBERS else part for name, part in parts if part.shape[1]}
    return {name: part[:, 0] for name, part in found.items()} if "pair" in widths else found


# ---- exchanges


def _rank() -> int:
    return dist.get_rank() if grouped() else 0


def _of_all(row: Tensor) -> Tensor:
    """Collective: (n,) of each rank as (world, n)."""
    if not grouped():
        return row[None]
    found = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(found, row)
    return torch.stack(found)


def _rows_of_all(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Collective: (n, k) of each rank, each of its own n, behind one another; `counts` are all ranks' n."""
    if not grouped() or not rows.shape[1]:
        return rows
    slots = rows.new_zeros(max(counts), rows.shape[1])
    slots[: len(rows)] = rows
    return torch.cat([slot[:count] for slot, count in zip(_of_all(slots), counts, strict=True)])
