"""One pair of a run, found by its id: among the pairs that the run keeps, in its data, or in a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorafocal.config import load_config
from lorafocal.data.held_out import HELD_OUT_FILE, load_pairs, read_held_out
from lorafocal.data.places import printable
from lorafocal.data.prepare import check_sources, prepare_data
from lorafocal.data.sources import nearest
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.generation.subject import Subject
from lorafocal.manifest import PARTS, notes_of_changes
from lorafocal.objectives import Entry
from lorafocal.run_folder import CONFIG_FILE, run_of


class FoundPair(NamedTuple):
    """A pair, where it is from in words, and what should be known of that."""

    pair: TokenizedPair
    place: str
    of_the_run: bool
    notes: tuple[str, ...] = ()


class _Pairs(NamedTuple):
    """Pairs that were read from one place."""

    pairs: Sequence[TokenizedPair]
    place: str
    notes: tuple[str, ...] = ()


def find_pair(
    pair_id: str, subject: Subject, pairs: Path | None, settings: Mapping[str, Any], *, objective: Entry | None = None
) -> FoundPair:
    """The pair called `pair_id` in the file `pairs`, else among those of the run that left `subject`.

    Rows are tokenised by `settings`, or as the run's config says. What an `objective` asks for beside a pair a run does
    not keep with its held-out pairs. Raises InputError where there is no such pair, or there are two.
    """
    places = [_of_file(pairs, subject, settings)] if pairs is not None else _of_run(subject, objective=objective)
    seen: dict[str, None] = {}  # a held-out pair stands in the run and in its data
    for read in places:
        found = [pair for pair in read.pairs if pair.id == pair_id]
        if len(found) > 1:
            raise InputError(
                f"{len(found)} {read.place} are called {printable(pair_id)!r}: give the rows ids that differ"
            )
        if found:
            return FoundPair(found[0], read.place, pairs is None, read.notes)
        seen |= dict.fromkeys(pair.id for pair in read.pairs)
    elsewhere = "" if pairs is not None else "; one that the run left out is found in its file by --pairs FILE"
    raise InputError(
        f"there is no pair {printable(pair_id)!r} among {len(seen)} pairs{elsewhere}; {nearest(pair_id, seen)}"
    )


def _of_file(path: Path, subject: Subject, settings: Mapping[str, Any]) -> _Pairs:
    return _Pairs(load_pairs(path, subject.tokenizer, **settings).pairs, f"pairs of {path.name}")


def _of_run(subject: Subject, *, objective: Entry | None) -> Iterator[_Pairs]:
    """The pairs that a run keeps, then those that its config names, read again only where they are needed."""
    run = None if subject.folder is None else run_of(subject.folder)
    if run is None or not any((run / file).is_file() for file in (HELD_OUT_FILE, CONFIG_FILE)):
        raise InputError(f"{subject.name} lies in no run folder with pairs: name a file of them by --pairs FILE")
    if (run / HELD_OUT_FILE).is_file() and not (objective and objective.scores):
        yield _Pairs(read_held_out(run / HELD_OUT_FILE), f"held-out pairs of {run.name}")
    yield from _of_config(run, subject, objective=objective)


def _of_config(run: Path, subject: Subject, *, objective: Entry | None) -> Iterator[_Pairs]:
    """The training and held-out pairs of a run, prepared as when it was trained."""
    try:
        section = load_config(run / CONFIG_FILE).data
        check_sources(section)
        data = prepare_data(section, subject.tokenizer, objective=objective)
    except InputError as error:
        raise InputError(
            f"the pair is not among those that {run.name} keeps, and its data cannot be read again ({error}). Name the"
            " file of rows by --pairs FILE"
        ) from error
    for name, part in data.items():
        pairs = part.tokens.pairs
        yield _Pairs(pairs, f"{PARTS[name]} pairs of {run.name}", notes_of_changes(run, name, pairs))
