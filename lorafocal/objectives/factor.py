"""The focal factor as a config says it: its forms, and which objectives take which. Imports no torch.

objective: {name: simpo, beta: 2, focal: {form: p_gamma, gamma: 0.05}, guard: clip}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from lorafocal import bounds
from lorafocal.errors import InputError

if TYPE_CHECKING:
    from lorafocal.objectives import Entry

DEFAULT_FORM = "p_gamma"
GUARDS = ("clip",)
_KEYS = ("form", "gamma")


class Form(NamedTuple):
    """A kind of factor: its function, `file.function` of this room, and which gamma it takes."""

    function: str
    check: Callable[[float], str | None]
    turns: bool = False  # it can turn a pair's gradient round


FORMS: dict[str, Form] = {
    "p_gamma": Form("focal.p_gamma", bounds.check_gamma, turns=True),  # FocalPO's
    "eq3": Form("focal.eq3", bounds.check_gamma_of_eq3),
    "hard": Form("focal.hard", bounds.check_hard_gamma),
    "detached": Form("focal.detached", bounds.check_detached_gamma),
}


class Factor(NamedTuple):
    """A form with its exponent."""

    form: str
    gamma: float


def factor_of(entry: Entry, parameters: Mapping[str, float], focal: Mapping[str, Any] | None) -> Factor | None:
    """The factor of an objective: its own, or the one that `focal` puts around it; None without."""
    if entry.factor is not None:
        return Factor(entry.factor, parameters["gamma"])
    return None if focal is None else Factor(focal.get("form") or DEFAULT_FORM, focal["gamma"])


def misfits(name: str, entry: Entry, focal: Mapping[str, Any] | None, guard: str | None) -> Iterator[tuple[str, str]]:
    """What is wrong with `focal` and `guard` for the objective `name`: each key with the reason and the way out."""
    if focal is not None and (why := refusal(name, entry)):
        yield "focal", why
        return
    if focal is not None:
        yield from _misfits_of_focal(name, entry, focal)
    form = entry.factor if focal is None else (focal.get("form") or DEFAULT_FORM)
    if guard is not None and guard not in GUARDS:
        yield "guard", f"{guard!r} is not known; write clip, or leave the key out"
    elif guard is not None and (form is None or (form in FORMS and not FORMS[form].turns)):
        what = "no focal factor" if form is None else f"the factor {form}"
        yield "guard", f"{name} has {what}, which turns no gradient round: nothing to clip; leave the key out"


def record_of(
    name: str, parameters: Mapping[str, float], focal: Mapping[str, Any] | None, guard: str | None
) -> dict[str, Any]:
    """An objective as manifests, lineage and configs have it: the keys `focal` and `guard` only where they are set."""
    given = {"focal": focal, "guard": guard}
    return {"name": name, **parameters, **{key: value for key, value in given.items() if value is not None}}


def in_words(objective: Mapping[str, Any]) -> str:
    """A `record_of` an objective as a person reads it: simpo (beta 2, gamma_beta_ratio 0.5, p_gamma 0.05)."""
    words = [f"{key} {value:g}" for key, value in objective.items() if isinstance(value, (int, float))]
    if focal := objective.get("focal"):
        words.append(f"{focal['form']} {focal['gamma']}")
    if guard := objective.get("guard"):
        words.append(f"guard {guard}")
    return f"{objective['name']} ({', '.join(words)})" if words else str(objective["name"])


def refusal(name: str, entry: Entry) -> str | None:
    """Why no factor goes around this objective."""
    if entry.factor is not None:
        return f"{name} has a factor of its own: set its objective.gamma, or put the factor around dpo; remove this key"
    if not entry.bradley_terry:
        return f"{name} has no Bradley-Terry form: it gives no probability p to build a factor of; remove this key"
    if entry.constants is not None:
        return (
            f"{name} has weights or targets of its own for pairs, which a factor would undo or double; remove this key"
        )
    return None


def _misfits_of_focal(name: str, entry: Entry, focal: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for stray in sorted(map(str, focal.keys() - set(_KEYS))):
        yield f"focal.{stray}", f"not known; the factor has {' and '.join(_KEYS)}"
    form = focal.get("form") or DEFAULT_FORM
    if form not in FORMS:
        yield "focal.form", f"{form!r} is not known; choose one of {', '.join(FORMS)}"
        return
    if form == "eq3" and not entry.logistic:
        why = f"eq3 does not go with {name}, whose loss is another than -log p: where it does not fall as fast as"
        yield "focal.form", f"{why} (1-p)^-gamma grows, their product diverges; use p_gamma"
    if focal.get("gamma") is None:
        yield "focal.gamma", "missing; it has no default around another loss (the paper uses 0.05; 0 is no factor)"
        return
    try:
        FORMS[form].check(focal["gamma"])
    except InputError as error:
        yield "focal.gamma", str(error)
