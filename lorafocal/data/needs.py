"""What an objective asks of its data beside a pair (scores, further answers, groups, embeddings), checked.

Pairs may be rows (`Preference`) or token ids (`TokenizedPair`): what is asked for has the same names in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lorafocal.errors import InputError
from lorafocal.objectives.entry import Entry

if TYPE_CHECKING:
    from lorafocal.data.tokens import TokenizedPair

Pair = Any  # a Preference or a TokenizedPair
RESCALE = "rescale them, as by (score - lowest) / (highest - lowest) of the judge's scale"


def check_needs(pairs: Sequence[TokenizedPair], name: str, entry: Entry) -> None:
    """Refuse pairs that lack what an objective asks for, or that score their answers the wrong way round.

    `name` is what the data are called. Raises InputError naming the pair and the way out.
    """

    def where(pair: TokenizedPair) -> str:
        return f"{name}: pair {pair.id!r}"

    if entry.scores:
        check_scores(pairs, name, entry.scores)
    check_columns(pairs, where, entry)


def check_scores(pairs: Sequence[TokenizedPair], name: str, kind: str = "gap") -> None:
    """Refuse pairs that lack a judge's scores, or whose scores are not of `kind`, one of `entry.SCORES`.

    Raises InputError naming the pair and the way out.
    """
    for pair in pairs:
        if found := unusable_scores(pair, kind):
            raise InputError(f"{name}: pair {pair.id!r} {found}")
        if found := misranked(pair, kind):
            raise InputError(f"{name}: pair {pair.id!r} scores {found}: remove such rows")


def unusable_scores(pair: Pair, kind: str) -> str | None:
    """What makes a pair's scores no scores of `kind`: one is missing, or on another scale."""
    scores = {"score_chosen": pair.score_chosen, "score_rejected": pair.score_rejected}
    for key, score in scores.items():
        if score is None:
            return (
                f"has no {key}, and the objective is a loss of both scores: give every row both (columns: names them"
                " where they are called otherwise), or choose an objective without scores"
            )
        if kind == "unit" and not 0 <= score <= 1:
            return f"has {key} {score:g}, and the objective needs scores from 0 to 1: {RESCALE}"
    return None


def misranked(pair: Pair, kind: str) -> str | None:
    """How a pair's scores contradict who was chosen, as far as `kind` minds."""
    chosen, rejected = pair.score_chosen, pair.score_rejected
    if chosen > rejected or (chosen == rejected and kind != "gap"):
        return None
    wanted = "above" if kind == "gap" else "no lower"
    return f"chosen {chosen:g} and rejected {rejected:g}, and the objective needs the chosen one {wanted}"


def check_columns(pairs: Iterable[Pair], where: Callable[[Pair], str], entry: Entry) -> None:
    """Refuse pairs without the further answers, group or embedding that an objective asks for.

    `where` says where a pair stands. Raises InputError naming the first and the way out.
    """
    pairs = list(pairs)
    if entry.others:
        _check_others(pairs, where, entry)
    if entry.groups and (alone := next((pair for pair in pairs if pair.group is None), None)):
        raise InputError(
            f"{where(alone)} has no group, and the objective weighs groups of pairs: give every row a `group` (or"
            " several sources and no `group` at all: each is then a group), or choose another objective"
        )
    if entry.embeddings:
        _check_embeddings(pairs, where)


def _check_others(pairs: Sequence[Pair], where: Callable[[Pair], str], entry: Entry) -> None:
    columns = "the column is `others` (or `rationale`), or columns: {others: NAME} says where it is"
    if pairs and not any(pair.others for pair in pairs):
        raise InputError(
            f"{where(pairs[0])} has no further answers, nor has any other pair, and the objective needs them: {columns}"
        )
    for pair in pairs:
        if entry.others == "one" and len(pair.others) != 1:
            raise InputError(
                f"{where(pair)} has {len(pair.others)} further answers, and the objective needs exactly one: {columns}"
            )
        if not entry.scores:
            continue
        for number, other in enumerate(pair.others):
            if other.score is None:
                raise InputError(
                    f"{where(pair)}: its further answer {number + 1} has no score, and the objective is a loss of all"
                    ' scores: write it as {"answer": ..., "score": ...}'
                )
            if entry.scores == "unit" and not 0 <= other.score <= 1:
                raise InputError(
                    f"{where(pair)}: its further answer {number + 1} has the score {other.score:g}, and the objective"
                    f" needs scores from 0 to 1: {RESCALE}"
                )


def _check_embeddings(pairs: Sequence[Pair], where: Callable[[Pair], str]) -> None:
    first = next((pair.embedding for pair in pairs if pair.embedding is not None), ())
    for pair in pairs:
        if not pair.embedding:
            raise InputError(
                f"{where(pair)} has no prompt_embedding, and the objective compares prompts by theirs: give every row"
                " one, of the same encoder, or choose another objective"
            )
        if len(pair.embedding) != len(first):
            raise InputError(
                f"{where(pair)} has a prompt_embedding of {len(pair.embedding)} numbers and an earlier pair one of"
                f" {len(first)}: make all of them with the same encoder"
            )
        if not any(pair.embedding):
            raise InputError(f"{where(pair)} has a prompt_embedding of zeros, which points nowhere: correct it")


def asked_of_packs(entry: Entry, train: Sequence[TokenizedPair]) -> dict[str, Any]:
    """What `packing.PairCollator` puts into packs for an objective that trains on these pairs, by keyword."""
    return {
        "rejected": entry.rejected,
        "differs": entry.differs,
        "others": entry.others is not None,
        "groups": tuple(sorted({pair.group for pair in train if pair.group is not None})) if entry.groups else (),
        "embedding": max((len(pair.embedding or ()) for pair in train), default=0) if entry.embeddings else 0,
    }


def check_like_training(held_out: Sequence[Pair], train: Sequence[Pair], name: str, entry: Entry) -> None:
    """Refuse held-out pairs of a group, or with an embedding of a size, that no training pair has.

    `name` is what the held-out pairs are called. Raises InputError naming the pair and the way out.
    """
    groups = {pair.group for pair in train}
    if entry.groups and (alone := next((pair for pair in held_out if pair.group not in groups), None)):
        raise InputError(
            f"{name}: pair {alone.id!r} is of group {alone.group!r}, which no training pair is of; known:"
            f" {', '.join(sorted(map(str, groups)))[:200]}"
        )
    if entry.embeddings:
        _check_embeddings([*train[:1], *held_out], lambda pair: f"{name}: pair {pair.id!r}")
