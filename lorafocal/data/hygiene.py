"""What good rows can do to each other: pairs told twice, judged both ways, judged for nothing, or kept from the test.

Pure functions on `Preferences`. Texts are compared without the blanks around them, and a plain text equals one message
that says the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lorafocal.data.forms import EQUAL, Side
from lorafocal.data.needs import misranked, unusable_scores
from lorafocal.data.places import BadRow, OnBadRow, RowFault, leave_out, nothing_left
from lorafocal.data.sources import Preference, Preferences
from lorafocal.errors import InputError

Key = tuple[str | tuple[str, str], ...]
Verdict = tuple[str, str] | None  # the reason to leave a pair out, and what to say


def clean(preferences: Preferences, *, on_bad_row: OnBadRow = "drop") -> Preferences:
    """Without equal answers, repeated pairs and contradictions, looked for in this order."""
    for rule in (drop_equal_answers, drop_duplicates, drop_contradictions):
        preferences = rule(preferences, on_bad_row=on_bad_row)
    return preferences


def drop_equal_answers(preferences: Preferences, *, on_bad_row: OnBadRow = "drop") -> Preferences:
    """Without pairs whose answers are the same: they teach nothing."""

    def verdict(pair: Preference) -> Verdict:
        if key(pair.chosen) != key(pair.rejected):
            return None
        return EQUAL

    return sift(preferences, verdict, on_bad_row)


def drop_duplicates(preferences: Preferences, *, on_bad_row: OnBadRow = "drop") -> Preferences:
    """Each pair of texts once, the first."""
    first: dict[tuple[Key, ...], Preference] = {}

    def verdict(pair: Preference) -> Verdict:
        earlier = first.setdefault((key(pair.prompt), key(pair.chosen), key(pair.rejected)), pair)
        if earlier is pair:
            return None
        return (
            "duplicate",
            f"the same pair as {earlier.where}; remove one (to count it twice, give its source a weight)",
        )

    return sift(preferences, verdict, on_bad_row)


def drop_contradictions(preferences: Preferences, *, on_bad_row: OnBadRow = "drop") -> Preferences:
    """Without pairs that are also there with their answers swapped: both judgements go."""
    judged = {(key(pair.prompt), key(pair.chosen), key(pair.rejected)): pair for pair in preferences.pairs}

    def verdict(pair: Preference) -> Verdict:
        swapped = judged.get((key(pair.prompt), key(pair.rejected), key(pair.chosen)))
        if swapped is None or key(pair.chosen) == key(pair.rejected):
            return None
        return "contradiction", f"judged the other way round in {swapped.where}; remove the wrong one of the two"

    return sift(preferences, verdict, on_bad_row)


def drop_unranked(preferences: Preferences, kind: str = "gap", *, on_bad_row: OnBadRow = "drop") -> Preferences:
    """Without pairs whose scores contradict who was chosen, as far as their `kind`, one of `entry.SCORES`, minds.

    Raises InputError for a pair without scores, which cannot be told from a tie, and for scores of another scale.
    """

    def verdict(pair: Preference) -> Verdict:
        if unusable := unusable_scores(pair, kind):
            raise InputError(f"{pair.where}: {unusable}")
        if found := misranked(pair, kind):
            return "not_scored_higher", f"scores {found}; remove the row"
        return None

    return sift(preferences, verdict, on_bad_row)


def drop_overlap(train: Preferences, held_out: Preferences, *, on_bad_row: OnBadRow = "drop") -> Preferences:
    """Training pairs whose prompt is not among the held-out ones."""
    kept_back = {key(pair.prompt): pair for pair in reversed(held_out.pairs)}

    def verdict(pair: Preference) -> Verdict:
        twin = kept_back.get(key(pair.prompt))
        if twin is None:
            return None
        return "in_held_out", f"its prompt is also held out ({twin.where}); remove it from one of the two"

    return sift(train, verdict, on_bad_row)


@dataclass(frozen=True, slots=True)
class ScoreOrder:
    """How a judge's scores stand to who was chosen: pairs with both scores, equal ones, and chosen below rejected."""

    scored: int
    ties: int
    inversions: int


def score_order(pairs: Iterable[Preference]) -> ScoreOrder:
    """Counts only: a tie or an inversion may be meant, as where the scores are another judge's."""
    leads = [
        pair.score_chosen - pair.score_rejected
        for pair in pairs
        if pair.score_chosen is not None and pair.score_rejected is not None
    ]
    return ScoreOrder(len(leads), leads.count(0.0), sum(lead < 0 for lead in leads))


def sift(preferences: Preferences, verdict: Callable[[Preference], Verdict], on_bad_row: OnBadRow) -> Preferences:
    """The pairs without a verdict; the others join the rows left out, or the first of them ends the run."""
    pairs: list[Preference] = []
    bad_rows: list[BadRow] = []
    for pair in preferences.pairs:
        found = verdict(pair)
        if found is None:
            pairs.append(pair)
        else:
            leave_out(RowFault(pair.where, *found), bad_rows, on_bad_row)
    if bad_rows and not pairs:
        raise nothing_left("the pairs that were read", bad_rows)
    return Preferences(pairs, [*preferences.bad_rows, *bad_rows], preferences.form)


def key(side: Side) -> Key:
    """What a text or conversation says, to compare by."""
    if isinstance(side, str):
        return (side.strip(),)
    if len(side) == 1:
        return (side[0]["content"].strip(),)
    return tuple((message["role"], message["content"].strip()) for message in side)
