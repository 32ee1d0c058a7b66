"""What the registry holds of an objective: what it needs, and what it is set by. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorafocal import bounds


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number that an objective is set by. `check` refuses what cannot train, and returns a warning or None."""

    default: float
    check: Callable[[float], str | None]
    help: str
    stated: bool = False  # a config must say it: its scale is the run's own


Function = str | Callable[..., Any]
"""A function, or `file.function` of this room, which then loads with torch.

It is called with the policy's log-probs, and by keyword with what it names: inputs of `inputs.PairInputs`, `state`,
and parameters of the objective.
"""
SCORES = {
    "gap": "the chosen answer's above the rejected one's",
    "ties": "the chosen answer's at or above the rejected one's",
    "unit": "from 0 to 1, the chosen answer's at or above the rejected one's",
}
OTHERS = {"one": "exactly one further answer a pair", "any": "any number of further answers a pair"}
IMPLICIT, LOGISTIC = "pairwise.implicit", "pairwise.dpo_loss"


@dataclass(frozen=True, slots=True)
class Entry:
    """An objective as the registry holds it: by its `odds`, where it has a Bradley-Terry form, or as a whole `loss`.

    `odds(policy, ...)` is an `Odds`, and a pair's loss is `factor(link(log_odds, *constants)) + beside`:
    `link` (B,), `constants(policy, ...)` a tuple of (B,) that take no gradient, as weights of its own, the `factor` one
    of `factor.FORMS` with the parameter gamma, `beside(policy, ...)` (B,). `over(losses, ...)` makes of a step's such
    losses, (B,), others with the same mean as the step's loss, (B,), and the state, or None: an `Over`.
    `loss(policy, ...)` is a `PairLosses`.
    With `whole_step` it sees all pairs of the step, over packs and ranks, at once, and its loss is their mean; else a
    pair's loss is its own, whoever shares its pack.
    `token_weights(policy_tokens, ...)` weigh the N completion tokens of a pack's pairs, (N,): of their log-probs under
    the policy, detached, and by keyword what it names of `tokens.TokenInputs`. Policy, reference and guide are then
    sums of weighted log-probs, of which rewards are told; metrics and tables of log-probs have the plain ones.
    """

    parameters: Mapping[str, Parameter]
    odds: Function | None = None
    link: Function = LOGISTIC
    constants: Function | None = None
    factor: str | None = None
    beside: Function | None = None
    over: Function | None = None
    loss: Function | None = None
    reference: bool = True  # log-probs of a reference policy
    rejected: bool = True  # log-probs of the rejected answers, and so rewards or margins
    implicit_rewards: bool = True  # beta * (policy - reference) log-probs of whole answers, and nothing else
    lengths: bool = False  # completion tokens of each sequence, (2B,)
    scores: str | None = None  # a judge's, as one of SCORES has them
    collisions: bool = False  # log sum_v pi_v^2 of the policy, summed over each answer's tokens, (2B,)
    divergences: bool = False  # KL(reference || policy), summed over each answer's tokens, (2B,), differentiable
    token_weights: Function | None = None
    differs: bool = False  # which tokens a pair's other answer does not have
    guide: bool = False  # log-probs of one more model, `reference.guide`
    others: str | None = None  # further answers to the prompt, as one of OTHERS has them
    groups: bool = False  # which group a pair is of
    embeddings: bool = False  # of the prompts
    draws: bool = False  # a random number a pair and step
    whole_step: bool = False
    state: bool = False  # numbers that a step leaves to the next

    @property
    def bradley_terry(self) -> bool:
        """Whether pairs have log-odds, and so weights."""
        return self.odds is not None

    @property
    def logistic(self) -> bool:
        """Whether the loss is -log p of its log-odds, before any factor."""
        return self.odds is not None and self.link == LOGISTIC

    @property
    def of_margin(self) -> bool:
        """Whether the log-odds are the margin of the implicit rewards, as in DPO, and alone tell a pair's weight."""
        return self.odds == IMPLICIT and self.constants is None and self.over is None and self.token_weights is None

    @property
    def of_logps(self) -> bool:
        """Whether a pair's loss can be told from its log-probs alone."""
        return not (self.lengths or self.scores or self.collisions or self.beyond_rows)

    @property
    def beyond_rows(self) -> str | None:
        """What a pair's loss takes beside its row and its answers' log-probs and collisions, in words."""
        found = {
            "the other pairs of a step": self.whole_step,
            "weights of single tokens": self.token_weights,
            "divergences over the vocabulary": self.divergences,
            "a guide": self.guide,
            "further answers": self.others,
            "embeddings of the prompts": self.embeddings,
            "random numbers": self.draws,
        }
        return next((words for words, needed in found.items() if needed), None)


BETA = Parameter(0.1, bounds.check_beta, "scale of the rewards, per nat; FocalPO's paper trains with 0.01", stated=True)
