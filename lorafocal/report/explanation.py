"""One pair token by token: what the policy and the reference give each token, and what the objective makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from lorafocal.objectives.factor import in_words

QUARTERS = ("first quarter", "second quarter", "third quarter", "last quarter")


@dataclass(frozen=True, slots=True)
class Token:
    """One scored token: the text that it adds, empty where a later one completes its character; log-probs in nats.

    `context` stands directly before it and is not scored: what a user and the template say between two turns.
    """

    text: str
    policy: float
    reference: float
    context: str = ""

    @property
    def logratio(self) -> float:
        return self.policy - self.reference


@dataclass(frozen=True, slots=True)
class Answer:
    """The scored tokens of one answer. `ended`: the last one ends the turn; None where it is not known what does."""

    tokens: tuple[Token, ...]
    ended: bool | None = None

    @property
    def policy(self) -> float:
        """Log-probability under the policy, nats."""
        return math.fsum(token.policy for token in self.tokens)

    @property
    def reference(self) -> float:
        return math.fsum(token.reference for token in self.tokens)

    @property
    def logratio(self) -> float:
        """The sum of its tokens' log-ratios, nats: the reward over beta, where rewards are relative to a reference."""
        return math.fsum(self.logratios)

    @property
    def logratios(self) -> list[float]:
        return [token.logratio for token in self.tokens]

    @property
    def turns(self) -> list[int]:
        """The places of the tokens that each turn begins with."""
        return [place for place, token in enumerate(self.tokens) if place == 0 or token.context]


@dataclass(frozen=True, slots=True)
class Weighing:
    """What the objective makes of the pair by itself.

    Rewards are its own: beta times the log-ratio where it has a reference. `log_odds` are those of the chosen answer
    being preferred, with probability `p`; `weight` is -dL/dlog_odds, and `dpo_weight` DPO's at the same log-odds; None
    where the objective has no such form. `turned`: its factor turns the gradient round, which a guard then takes away.
    """

    loss: float | None  # None where it depends on the other pairs of a step
    chosen_reward: float | None
    rejected_reward: float | None
    log_odds: float | None = None
    p: float | None = None
    weight: float | None = None
    dpo_weight: float | None = None
    turned: bool = False

    @property
    def margin(self) -> float | None:
        if self.chosen_reward is None or self.rejected_reward is None:
            return None
        return self.chosen_reward - self.rejected_reward

    @property
    def ratio_to_dpo(self) -> float | None:
        return None if self.weight is None or not self.dpo_weight else self.weight / self.dpo_weight


@dataclass(frozen=True, slots=True)
class Explanation:
    """All that is known of one pair under one trained model.

    `place` says where the pair was found, `reference_name` what it is compared with, `objective` is its name and
    parameters as recorded. `history` are steps with the difference of the answers' log-ratios then, in nats.
    """

    id: str
    place: str
    policy_name: str
    reference_name: str
    objective: Mapping[str, Any] | None
    prompt: tuple[str, ...]
    chosen: Answer
    rejected: Answer
    shared_start: int  # scored tokens with which both answers begin
    weighing: Weighing | None = None
    history: tuple[tuple[int, float], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def logratio_difference(self) -> float:
        """Chosen minus rejected log-ratio, nats."""
        return self.chosen.logratio - self.rejected.logratio

    @property
    def objective_text(self) -> str:
        """The objective's name, parameters, factor and guard in one line."""
        return "not known" if self.objective is None else in_words(self.objective)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a program, every token among them."""
        found = asdict(self)
        for side in ("chosen", "rejected"):
            answer: Answer = getattr(self, side)
            found[side] |= {name: getattr(answer, name) for name in ("policy", "reference", "logratio")}
            found[side]["tokens"] = [asdict(token) | {"logratio": token.logratio} for token in answer.tokens]
        if self.weighing is not None:
            derived = ("margin", "ratio_to_dpo")
            found["weighing"] |= {name: getattr(self.weighing, name) for name in derived}
        return found

    def text(self, *, colour: bool, width: int | None = None) -> str:
        """For a terminal of `width` columns; without colours the tokens are rows of a table, as a log takes it."""
        from lorafocal.report.explain_text import explain_text

        return explain_text(self, colour=colour, width=width)

    def table(self) -> str:
        """`text` as standard output takes it: coloured where that is a terminal and NO_COLOR is not set."""
        from rich.console import Console

        console = Console()
        return self.text(colour=console.is_terminal and not console.no_color, width=console.width)

    def html(self) -> str:
        """The same as one self-contained web page."""
        from lorafocal.report.explain_page import explain_page

        return explain_page(self)


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of both answers: tokens and their summed log-ratio, nats."""

    name: str
    chosen_tokens: int
    chosen: float
    rejected_tokens: int
    rejected: float


def parts(explanation: Explanation) -> list[Part]:
    """Where the log-ratio sits: what both answers begin with, then each answer's rest in stretches of equal length.

    Together they are the whole of both answers; what the answers share cancels in the difference.
    """
    chosen, rejected = explanation.chosen.logratios, explanation.rejected.logratios
    shared = explanation.shared_start
    found = []
    if shared:
        found.append(_part("shared start", chosen[:shared], rejected[:shared]))
    stretches = zip(_split(chosen[shared:]), _split(rejected[shared:]), strict=True)
    return found + [_part(name, *sides) for name, sides in zip(QUARTERS, stretches, strict=True)]


def half_of_movement(answer: Answer) -> list[int]:
    """The places of the fewest tokens that hold half of the sum of |log-ratio|, in order."""
    ranked = sorted(range(len(answer.tokens)), key=lambda place: -abs(answer.tokens[place].logratio))
    half = math.fsum(map(abs, answer.logratios)) / 2
    held, places = 0.0, []
    for place in ranked:
        if held >= half:
            break
        held += abs(answer.tokens[place].logratio)
        places.append(place)
    return sorted(places)


@dataclass(frozen=True, slots=True)
class Gap:
    """Neighbouring tokens that are not shown one by one, and their summed log-ratio, nats."""

    tokens: int
    logratio: float


def folded(answer: Answer, *, most: int, block: int = 1) -> list[int | Gap]:
    """The places of about `most` tokens, in order, and gaps for two or more others; sums over all are exact.

    Shown are the first and the last block of `block` tokens, those that moved most, and where a turn begins.
    """
    moved = answer.logratios
    blocks = [range(start, min(start + block, len(moved))) for start in range(0, len(moved), block)]
    inner = sorted(blocks[1:-1], key=lambda places: -math.fsum(abs(moved[place]) for place in places))
    kept = blocks[:1] + blocks[1:][-1:] + inner[: max(most // block - 2, 0)]
    shown = set(range(len(moved))) if len(moved) <= most else {*answer.turns, *(at for places in kept for at in places)}
    pieces: list[int | Gap] = []
    place = 0
    while place < len(moved):
        if place in shown:
            pieces.append(place)
            place += 1
            continue
        end = next(later for later in range(place, len(moved)) if later in shown)  # the last one is
        hidden = math.fsum(moved[place:end])
        pieces.append(Gap(end - place, hidden) if end - place > 1 else place)
        place = end
    return pieces


def full_colour(explanation: Explanation) -> float:
    """The |log-ratio| in nats from which on a token has its full colour: nineteen of twenty tokens have less."""
    moved = sorted(abs(value) for answer in (explanation.chosen, explanation.rejected) for value in answer.logratios)
    return max(moved[int(0.95 * (len(moved) - 1))], 1e-6)


def _part(name: str, chosen: Sequence[float], rejected: Sequence[float]) -> Part:
    return Part(name, len(chosen), math.fsum(chosen), len(rejected), math.fsum(rejected))


def _split(values: Sequence[float]) -> list[Sequence[float]]:
    bounds = [round(len(values) * part / len(QUARTERS)) for part in range(len(QUARTERS) + 1)]
    return [values[start:end] for start, end in pairwise(bounds)]


def signed(value: float) -> str:
    """A number of nats or rewards with its sign; what rounds to 0 has none."""
    return f"{value:+.4f}" if abs(value) >= 5e-5 else "0.0000"
