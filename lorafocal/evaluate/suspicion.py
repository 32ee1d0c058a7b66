"""Pairs that a run ranks the wrong way round whenever it is asked: probably labelled so.

A model learns what most pairs agree on before it learns single labels by heart, so a pair that it ranks wrong at every
state that the run kept is at odds with the others. The suspicion is the mean over states of -log p with p =
sigmoid(margin): DPO's loss of the pair, followed through training as label errors are found by tracked losses (O2U-Net,
Huang et al. 2019) or tracked margins (AUM, Pleiss et al. 2020, arXiv:2001.10528).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafocal.objectives.pairwise import dpo_loss

TABLE_ROWS = 20
_WIDTH = 60  # characters of a prompt in the table


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Of B pairs at T states, (B,) each, float64."""

    nats: Tensor  # mean over states of -log p
    always_wrong: Tensor  # bool: margin below 0 at every state
    confident: Tensor  # bool: and p, exp(-nats), at most 1 minus its mean over all pairs


def suspect(margins: Tensor) -> Suspicion:
    """How suspicious pairs of these `margins`, (T, B), are.

    Confident are those whose swapped label gets as much probability as labels get on average: the threshold of
    confident learning (Northcutt et al. 2021, arXiv:1911.00068), which moves with the width of the margins, and so with
    beta. On average over all pairs p must be above 1/2, or no pair is confident.
    """
    nats = dpo_loss(margins.double()).mean(0)
    share = torch.exp(-nats)
    always_wrong = (margins < 0).all(0)
    confident = always_wrong & (share <= 1 - share.mean()) & (share.mean() > 0.5)
    return Suspicion(nats, always_wrong, confident)


@dataclass(frozen=True, slots=True)
class Suspect:
    """One pair that was ranked wrong at every state; texts as they stand in the data.

    `line` names the pair in a file for `data.leave_out`; `reference_lead` is log p(chosen) - log p(rejected) under the
    reference in nats, None for an objective without one.
    """

    id: str
    place: str
    line: str
    suspicion: float
    p: float
    confident: bool
    margins: tuple[float, ...]
    reference_lead: float | None
    chosen_tokens: int
    rejected_tokens: int
    prompt: str
    chosen: str
    rejected: str

    def as_dict(self) -> dict[str, Any]:
        """Its numbers; the texts are on the page."""
        texts = ("prompt", "chosen", "rejected", "line")
        return {key: value for key, value in asdict(self).items() if key not in texts}


@dataclass(frozen=True, slots=True)
class Suspects:
    """The pairs of a run, or of a file, that it always ranks wrong, the most suspicious first.

    `right` counts pairs ranked right at every state; `always_wrong` may be more than were asked for in `found`.
    """

    run: str
    of: str  # whose pairs: "its training pairs", or a file's name
    steps: tuple[int, ...]  # of the states
    pairs: int
    right: int
    always_wrong: int
    confident: int
    mean_p: float
    found: tuple[Suspect, ...]
    notes: tuple[str, ...] = ()
    page: Path | None = None
    written: Path | None = None

    @property
    def to_leave_out(self) -> list[Suspect]:
        """Those that `--write` names: the confident ones of `found`."""
        return [suspect for suspect in self.found if suspect.confident]

    def table(self) -> str:
        """The counts, the first rows, and where the rest is."""
        lines = [*summary(self), ""]
        if self.found:
            lines.append(f"{'suspicion':>9} {'p':>6} {'reference':>9} {'tokens':>11}  id: prompt")
        lines += map(_row, self.found[:TABLE_ROWS])
        if len(self.found) > TABLE_ROWS:
            lines.append(f"... and {len(self.found) - TABLE_ROWS} more")
        lines += [f"note: {note}" for note in self.notes]
        if self.page is not None:
            lines.append(f"page     {self.page}")
        if self.written is not None:
            count = len(self.to_leave_out)
            use = f"for data.leave_out={self.written}" if count else "nothing to leave out"
            lines.append(f"written  {self.written}: {count} ids, {use}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The same for a program; all of `found`."""
        return {
            "run": self.run,
            "of": self.of,
            "steps": list(self.steps),
            "pairs": self.pairs,
            "right_at_every_step": self.right,
            "wrong_at_every_step": self.always_wrong,
            "confident": self.confident,
            "mean_p": self.mean_p,
            "suspects": [suspect.as_dict() for suspect in self.found],
            "notes": list(self.notes),
            "page": None if self.page is None else str(self.page),
            "written": None if self.written is None else str(self.written),
        }


def summary(found: Suspects) -> list[str]:
    """What was looked at and found, in plain words."""
    steps, wrong = ", ".join(map(str, found.steps)), f"{found.always_wrong} ({found.always_wrong / found.pairs:.1%})"
    if found.mean_p > 0.5:
        sure = f"{found.confident} of them confidently (p at most {1 - found.mean_p:.3f}, where labels have"
        sure += f" {found.mean_p:.3f} on average)"
    else:
        sure = f"none of them confidently, because labels have p {found.mean_p:.3f} on average, no more than by chance"
    return [
        f"{found.run}: {found.pairs} pairs ({found.of}), scored after step {steps}",
        f"{found.right} are ranked right at every state, {wrong} wrong at every state, {sure}",
        "A suspect is a pair to read, not a proof: a hard or an unusual pair looks the same.",
    ]


def _row(suspect: Suspect) -> str:
    lead = suspect.reference_lead
    side = "-" if lead is None else "chosen" if lead > 0 else "rejected"
    tokens = f"{suspect.chosen_tokens}/{suspect.rejected_tokens}"
    mark = "*" if suspect.confident else " "
    text = " ".join(_shown(f"{suspect.id}: {suspect.prompt}").split())
    text = text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."
    return f"{suspect.suspicion:>8.3f}{mark} {suspect.p:>6.3f} {side:>9} {tokens:>11}  {text}"


def _shown(text: str) -> str:
    """A text of the data for a terminal: what is not printable becomes a blank."""
    return "".join(c if c.isprintable() else " " for c in text)
