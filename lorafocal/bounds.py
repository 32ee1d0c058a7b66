"""Which values of an objective's parameters and of adapter dropout make sense, checked without importing torch.

FocalPO (Eq. 4) is L(z) = -p^gamma log p with p = sigmoid(z) and z = beta * (chosen - rejected logratio).
Its slope,

    dL/dz = -(1 - p) p^gamma (1 + gamma log p),

changes sign where log p < -1/gamma: past that margin a step pushes the pair the wrong way. A run starts at
margin 0, where log p = -ln 2, so from gamma = 1/ln 2 on the very first step has no slope or the wrong one.
"""

from __future__ import annotations

import math

from lorafocal.errors import InputError

GAMMA_LIMIT = 1 / math.log(2)
"""1.4427: from here on the gradient at margin 0, where every run starts, is zero or points backwards."""

GAMMA_CAUTION = 0.2
"""Above this the turning point is nearer than a margin of about -5, which real pairs reach."""


def check_beta(beta: float) -> None:
    """Raise `InputError` unless `beta` (scale of the rewards, per nat) is a finite number above 0."""
    if not _is_number(beta) or not beta > 0:
        raise InputError(
            f"beta is {beta!r}; it must be a finite number above 0 (published runs use 0.01 to 0.3): "
            "it scales every reward, and at 0 nothing is learned"
        )


def check_gamma(gamma: float) -> str | None:
    """Check FocalPO's exponent (no unit) and return a warning for values that are legal but risky, else None.

    Raises `InputError` where gamma is negative or not finite, and from 1/ln 2 = 1.4427 on.
    """
    if not _is_number(gamma) or gamma < 0:
        raise InputError(f"gamma is {gamma!r}; it must be a finite number, 0 (no factor) or more; the paper uses 0.05")
    if gamma >= GAMMA_LIMIT:
        raise InputError(
            f"gamma is {gamma!r}; from 1/ln 2 = {GAMMA_LIMIT:.4f} on the first step, taken at margin 0, "
            "learns nothing or learns backwards; the paper uses 0.05, and up to 0.2 is safe"
        )
    if gamma > GAMMA_CAUTION:
        return (
            f"gamma is {gamma}: pairs whose log p falls below -1/gamma = {-1 / gamma:.3g} are pushed "
            "the wrong way; watch focal/turned_share, or use at most 0.2 (the paper uses 0.05)"
        )
    return None


def check_hard_gamma(gamma: float) -> None:
    """Check the exponent of 1 - p, the hard emphasis: no gamma from 0 on turns a gradient round."""
    _at_least_zero("gamma", gamma, "0 is DPO; the paper's Figure 1 has 1")


def check_detached_gamma(gamma: float) -> None:
    """Check the exponent of a p^gamma that is not differentiated: as a mere weight it turns no gradient round."""
    _at_least_zero("gamma", gamma, "0 is no factor; FocalPO's own, which is differentiated, has 0.05")


def check_gamma_of_eq3(gamma: float) -> None:
    """Check the exponent of Eq. 3's (1-p)^-gamma: above 1 the loss of well ranked pairs grows without bound."""
    if not _is_number(gamma) or not 0 <= gamma <= 1:
        raise InputError(
            f"gamma is {gamma!r}; it must be a finite number from 0 (no factor) to 1: above, (1-p)^-gamma grows faster"
            " than the loss of a well ranked pair falls, and it is pushed back; the paper uses 0.05"
        )


def check_alpha(alpha: float) -> None:
    """Check ODPO's weight of the log score gap (no unit)."""
    _at_least_zero("alpha", alpha, "0 is DPO; the paper's own code has 1")


def check_label_smoothing(rate: float) -> None:
    """Check the rate of labels that cDPO or rDPO takes to be flipped."""
    if not _is_number(rate) or not 0 <= rate < 0.5:
        raise InputError(
            f"label_smoothing is {rate!r}; it must be from 0 (this is DPO) to below 0.5, where labels say"
            " nothing; published runs have 0.1"
        )


def check_entropy(alpha: float) -> None:
    """Check H-DPO's factor of the policy's log-probs (no unit)."""
    _above_zero("alpha", alpha, "1 is DPO, below 1 is a sharper policy; 0.8 to 1.2")


def check_rejected_factor(factor: float) -> None:
    """Check DPO-Shift's factor of the rejected reward (no unit)."""
    if not _is_number(factor) or not 0 < factor <= 1:
        raise InputError(
            f"rejected_factor is {factor!r}; it must be above 0 and at most 1 (this is DPO); published runs have"
            " 0.55 to 0.99"
        )


def check_length_alpha(alpha: float) -> None:
    """Check R-DPO's margin a token of length difference."""
    _at_least_zero("alpha", alpha, "0 is DPO; published runs have 0.01 to 0.02")


def check_shape(alpha: float) -> None:
    """Check AlphaPO's shape of the reward: any finite number."""
    _finite("alpha", alpha, "0 is SimPO; published runs have 0.25")


def check_nll_weight(weight: float) -> None:
    """Check the weight of a chosen answer's likelihood beside the preference term."""
    _at_least_zero("nll_weight", weight, "0 leaves the likelihood out")


def check_eta(eta: float) -> None:
    """Check Omni-DPO's scale of score gaps, per unit of the judge's score."""
    _at_least_zero("eta", eta, "0 weighs all pairs' quality alike; its recipes have 0.7")


def check_tau_ref(tau: float) -> None:
    """Check the policy's log-odds that Omni-DPO takes for fitted: any finite number."""
    _finite("tau_ref", tau, "its recipes have 0.8 to 2")


def check_tau_good(score: float) -> None:
    """Check the score from which a chosen answer is good to Omni-DPO: any finite number."""
    _finite("tau_good", score, "its recipe for text has 3.2")


def check_desirable_weight(weight: float) -> None:
    """Check KTO's weight of chosen answers."""
    _above_zero("desirable_weight", weight, "1 weighs both kinds of answers alike")


def check_undesirable_weight(weight: float) -> None:
    """Check KTO's weight of rejected answers."""
    _above_zero("undesirable_weight", weight, "1 weighs both kinds of answers alike")


def check_lambda(weight: float) -> None:
    """Check ORPO's weight of the odds ratio beside the likelihood."""
    _above_zero("lambda", weight, "the paper has 0.1; without the odds ratio train objective sft")


def check_gamma_beta_ratio(ratio: float) -> None:
    """Check SimPO's target margin over beta, in nats a token."""
    _at_least_zero("gamma_beta_ratio", ratio, "published runs have 0.1 to 0.8")


def check_dropout(dropout: float, *, allowed: bool) -> None:
    """Raise `InputError` unless the adapters' dropout (probability) is 0 or deliberately allowed."""
    if dropout > 0 and not allowed:
        raise InputError(
            f"dropout is {dropout}, which makes policy and reference differ by noise at every step; "
            "use 0.0, or set allow_dropout to true to accept that"
        )


def _finite(name: str, value: float, usual: str) -> None:
    if not _is_number(value):
        raise InputError(f"{name} is {value!r}; it must be a finite number; {usual}")


def _at_least_zero(name: str, value: float, usual: str) -> None:
    if not _is_number(value) or value < 0:
        raise InputError(f"{name} is {value!r}; it must be a finite number, 0 or more; {usual}")


def _above_zero(name: str, value: float, usual: str) -> None:
    if not _is_number(value) or not value > 0:
        raise InputError(f"{name} is {value!r}; it must be a finite number above 0; {usual}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
