"""What one pair's numbers say, in sentences and in rows that a terminal and a page share.

Each sentence and number only where it says something.
"""

from __future__ import annotations

from collections.abc import Iterator

from lorafocal.data.places import printable
from lorafocal.report.explanation import Answer, Explanation, Token, half_of_movement, parts, signed

FEW = 0.1  # share of an answer's tokens; half of its movement in fewer is worth a word
LONG = 10  # tokens from which on a share of an answer means something
MOSTLY = 0.5  # share of the difference that one stretch of the answers makes
DIFFERS = 1e-3  # from 1, a ratio of weights worth a word
UNMOVED = 1e-6  # nats; less than this no training did


def findings(explanation: Explanation) -> list[str]:
    """Sentences on ranking, displacement, weight, and where the log-ratio sits."""
    if not any(abs(moved) > UNMOVED for side in _sides(explanation).values() for moved in side.logratios):
        return ["Policy and reference agree on every token: nothing was learned of this pair, or they are one model."]
    return [*_ranking(explanation), *_weight(explanation), *_displacement(explanation), *_where(explanation)]


def _sides(explanation: Explanation) -> dict[str, Answer]:
    return {"chosen": explanation.chosen, "rejected": explanation.rejected}


def _ranking(explanation: Explanation) -> Iterator[str]:
    weighing = explanation.weighing
    if weighing is not None and weighing.p is not None and weighing.log_odds is not None:
        margin = weighing.log_odds if weighing.margin is None else weighing.margin
        how = "right" if margin > 0 else "wrong" if margin < 0 else "neither way"
        if margin * weighing.log_odds < 0:
            yield f"Ranked {how} by a margin of {margin:+.3g}, but target, scores or lengths make p = {weighing.p:.3g}."
        else:
            yield f"Ranked {how}: the chosen answer is preferred with p = {weighing.p:.3g}."
    before = explanation.chosen.reference - explanation.rejected.reference
    after = explanation.chosen.policy - explanation.rejected.policy
    if 0 in (before, after):
        return
    which = {
        (True, True): "The chosen answer was the likelier one before training, and still is",
        (True, False): "A flip: the chosen answer was the likelier one before training, and is not any more",
        (False, True): "Mended: the chosen answer was the less likely one before training, and is the likelier one now",
        (False, False): "The chosen answer was the less likely one before training, and still is",
    }[before > 0, after > 0]
    yield f"{which} (by {before:+.4g} nats under the reference, {after:+.4g} under the policy)."


def _weight(explanation: Explanation) -> Iterator[str]:
    weighing = explanation.weighing
    if weighing is None or weighing.weight is None or weighing.ratio_to_dpo is None:
        return
    if weighing.turned and weighing.weight == 0:
        yield "The objective's factor would turn its gradient round; the guard takes that away: no ranking moves."
    elif weighing.turned:
        yield (
            "Its gradient is turned round: the objective's factor falls faster than the loss grows, and a step lowers"
            " the margin of this pair further."
        )
    elif abs(weighing.ratio_to_dpo - 1) > DIFFERS:
        yield f"A step moves it by {weighing.ratio_to_dpo:.3g} of what DPO would at the same log-odds."


def _displacement(explanation: Explanation) -> Iterator[str]:
    chosen, rejected = explanation.chosen.logratio, explanation.rejected.logratio
    if chosen < -UNMOVED:
        faster = "; the rejected one fell further, so the margin hides it" if rejected < chosen else ""
        yield f"The chosen answer became less likely, by {-chosen:.4g} nats{faster}."
    per_token = chosen / len(explanation.chosen.tokens) - rejected / len(explanation.rejected.tokens)
    if per_token * explanation.logratio_difference < 0:
        yield (
            f"Length decides: in sum the {_preferred(explanation.logratio_difference)} answer gained more, a token on"
            f" average the {_preferred(per_token)} one ({len(explanation.chosen.tokens)} and"
            f" {len(explanation.rejected.tokens)} tokens)."
        )


def _where(explanation: Explanation) -> Iterator[str]:
    if explanation.shared_start:
        yield f"Both answers begin with the same {_tokens(explanation.shared_start)}, whose part cancels in the margin."
    difference = explanation.logratio_difference
    for part in parts(explanation):
        made = part.chosen - part.rejected
        if min(part.chosen_tokens, part.rejected_tokens) * 4 >= LONG and made * difference > MOSTLY * difference**2:
            yield f"The {part.name} makes {made:+.4g} of the {difference:+.4g} nats between the answers."
    for name, answer in _sides(explanation).items():
        held = half_of_movement(answer)
        if len(answer.tokens) >= LONG and len(held) <= FEW * len(answer.tokens):
            places = ", ".join(str(place + 1) for place in held[:5]) + (", ..." if len(held) > 5 else "")
            yield (
                f"Half of what moved in the {name} answer is in {_tokens(len(held))} of {len(answer.tokens)}"
                f" (number {places})."
            )
        if answer.ended is False:
            yield f"The {name} answer does not end its turn: it was cut, or is plain text without an end."


def largest(answer: Answer, count: int) -> list[tuple[int, Token]]:
    """The tokens that moved most, with their places."""
    ranked = sorted(enumerate(answer.tokens), key=lambda placed: -abs(placed[1].logratio))
    return ranked[:count]


def weights(explanation: Explanation) -> list[tuple[str, str]]:
    """The pair's p, loss and weights, as far as the objective has them."""
    weighing = explanation.weighing
    if weighing is None:
        return []
    named = [
        ("log-odds", weighing.log_odds, "+.4f"),
        ("p, chosen preferred", weighing.p, ".4g"),
        ("loss", weighing.loss, ".4g"),
        ("weight under DPO", weighing.dpo_weight, ".4g"),
        ("weight under the objective", weighing.weight, ".4g"),
        ("ratio to DPO", weighing.ratio_to_dpo, ".4g"),
    ]
    return [(name, format(value, form)) for name, value, form in named if value is not None]


def places(explanation: Explanation) -> list[tuple[str, ...]]:
    """The stretches of both answers: tokens and log-ratio of each, and the difference, nats."""
    return [
        (
            part.name,
            str(part.chosen_tokens),
            signed(part.chosen),
            str(part.rejected_tokens),
            signed(part.rejected),
            signed(part.chosen - part.rejected),
        )
        for part in parts(explanation)
    ]


def in_lines(text: str) -> str:
    """A text of the data in its lines, everything else that is not printable spelled out."""
    return "\n".join(map(printable, text.split("\n")))


def _preferred(difference: float) -> str:
    return "chosen" if difference > 0 else "rejected"


def _tokens(count: int) -> str:
    return "token" if count == 1 else f"{count} tokens"
