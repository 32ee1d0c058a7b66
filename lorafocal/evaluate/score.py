"""Per-pair log-probs, rewards and margins of a trained adapter or a model, with the very code of training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafocal.bounds import check_beta
from lorafocal.data.held_out import load_pairs
from lorafocal.data.leave_out import digest
from lorafocal.data.packing import Pack, PairCollator
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.evaluate.ches import Ches, logps_and_ches
from lorafocal.generation.subject import Subject, find_subject, speaker_folder
from lorafocal.lineage import LINEAGE_FILE, lineage_of
from lorafocal.metrics import answer_columns, summary, weight_columns
from lorafocal.model.head import causal_lm
from lorafocal.model.load import check_length, check_same_tokens
from lorafocal.model.saved import MAX_LENGTH, reward_scale, tokenization_of
from lorafocal.objectives import Objective, objective_from
from lorafocal.objectives.inputs import PairLogps
from lorafocal.objectives.pairwise import rewards
from lorafocal.policy import sequence_logps
from lorafocal.probes import choose_layout
from lorafocal.publish import check_folder_of, public_name, write_atomically
from lorafocal.reference import DisabledAdapterReference
from lorafocal.run_folder import ADAPTER_CONFIG

PACKS = PairCollator()
OWN_BASE = "its own base, the adapter off"
_WIDEST = len("rewards/accuracies_where_wrong")
_CHES = ("ches", "ches_normalised")
_IF_KNOWN = (*_CHES, "digest")


@dataclass(frozen=True, slots=True)
class PairScore:
    """One pair; log-probs are summed over the completion, in nats. What was not measured is None."""

    id: str
    chosen_tokens: int
    rejected_tokens: int
    chosen_logps: float
    rejected_logps: float
    reference_chosen_logps: float | None = None
    reference_rejected_logps: float | None = None
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    ches: float | None = None
    ches_normalised: float | None = None
    digest: str | None = None  # of the pair's texts, where rows were scored: data.steps joins by it

    @property
    def margin(self) -> float | None:
        """Chosen minus rejected reward."""
        if self.chosen_reward is None or self.rejected_reward is None:
            return None
        return self.chosen_reward - self.rejected_reward

    def as_dict(self) -> dict[str, Any]:
        """The columns of a table; CHES and digest only where they are known."""
        columns = {**asdict(self), "margin": self.margin}
        return {name: value for name, value in columns.items() if value is not None or name not in _IF_KNOWN}


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """All pairs of a file under one model.

    `left_out` counts rows of the file that gave no pair; `objective` is what the model was trained by, where a pair's
    margin alone tells what weight it gives the pair.
    """

    target: str
    beta: float | None
    scores: list[PairScore]
    left_out: int = 0
    objective: Objective | None = None

    @property
    def margins(self) -> list[float]:
        return [score.margin for score in self.scores if score.margin is not None]

    def as_dict(self) -> dict[str, Any]:
        """What training logs, under its names; the pairs themselves are in the table file."""
        return {
            "target": self.target,
            "pairs": len(self.scores),
            "left_out": self.left_out,
            "tokens": sum(score.chosen_tokens + score.rejected_tokens for score in self.scores),
            "beta": self.beta,
            **summary(self._columns()),
            **self._ches(),
        }

    def _columns(self) -> dict[str, Tensor]:
        """What is measured of each pair; rewards only where there are some."""
        policy = PairLogps(self._column("chosen_logps"), self._column("rejected_logps"))
        lengths = torch.cat((self._column("chosen_tokens"), self._column("rejected_tokens")))
        if self.scores[0].reference_chosen_logps is None:
            return answer_columns(policy)
        reference = PairLogps(self._column("reference_chosen_logps"), self._column("reference_rejected_logps"))
        if not self.margins:
            return answer_columns(policy, reference)
        chosen, rejected = self._column("chosen_reward"), self._column("rejected_reward")
        columns = answer_columns(policy, reference, (chosen, rejected), lengths)
        return columns if self.objective is None else columns | weight_columns(self.objective, chosen - rejected)

    def _column(self, name: str) -> Tensor:
        return torch.tensor([getattr(score, name) for score in self.scores], dtype=torch.float64)

    def _ches(self) -> dict[str, float]:
        """Means, where they were asked for."""
        measured = {name: [getattr(score, name) for score in self.scores] for name in _CHES}
        return {name: fmean(values) for name, values in measured.items() if None not in values}

    def table(self) -> str:
        """The totals, one a line."""
        return "\n".join(
            f"{key:<{_WIDEST}} {value:.6g}" if isinstance(value, float) else f"{key:<{_WIDEST}} {value}"
            for key, value in self.as_dict().items()
            if value is not None
        )

    def write(self, path: Path) -> None:
        """One JSON object a pair, a line each."""
        lines = (json.dumps(score.as_dict(), ensure_ascii=False) + "\n" for score in self.scores)
        write_atomically(path, "".join(lines))


def pair_logps(
    logps: Callable[[Pack], PairLogps],
    pairs: Sequence[TokenizedPair],
    *,
    device: torch.device,
    collator: PairCollator = PACKS,
) -> PairLogps:
    """Run `logps` over packs of `pairs`; chosen and rejected, each (B,) fp32 on the CPU, in the order of
    `pairs`."""
    return PairLogps(*(column.float() for column in _columns(logps, pairs, device=device, collator=collator)))


def _columns(
    score: Callable[[Pack], Iterable[Tensor]],
    pairs: Sequence[TokenizedPair],
    *,
    device: torch.device,
    collator: PairCollator,
) -> Iterable[Tensor]:
    """What `score` says of the B pairs of a pack, some columns of (B,), of all `pairs` in their order; float64."""
    numbered = [replace(pair, id=str(number)) for number, pair in enumerate(pairs)]  # ids of a user may repeat
    rows: list[int] = []
    columns: list[Tensor] = []
    with torch.no_grad():
        for pack in collator(numbered).packs:
            rows += [int(number) for number in pack.pair_ids]
            columns.append(torch.stack([column.double().cpu() for column in score(pack.to(device))]))
    return torch.cat(columns, dim=1)[:, torch.tensor(rows).argsort()]


def pair_scores(
    pairs: Sequence[TokenizedPair],
    policy: PairLogps,
    reference: PairLogps | None,
    beta: float | None,
    ches: Ches | None = None,
) -> list[PairScore]:
    """Numbers of `pairs` as rows; rewards only where both a reference and `beta` are known."""
    columns: dict[str, list[Any]] = {
        "chosen_logps": policy.chosen.tolist(),
        "rejected_logps": policy.rejected.tolist(),
    }
    if reference is not None:
        columns |= {
            "reference_chosen_logps": reference.chosen.tolist(),
            "reference_rejected_logps": reference.rejected.tolist(),
        }
    if reference is not None and beta is not None:
        chosen, rejected = rewards(policy, reference, beta=beta)
        columns |= {"chosen_reward": chosen.tolist(), "rejected_reward": rejected.tolist()}
    if ches is not None:
        columns |= {"ches": ches.plain.tolist(), "ches_normalised": ches.normalised.tolist()}
    return [
        PairScore(
            id=pair.id,
            chosen_tokens=pair.scored_tokens[0],
            rejected_tokens=pair.scored_tokens[1],
            **{name: values[row] for name, values in columns.items()},
        )
        for row, pair in enumerate(pairs)
    ]


def score_file(
    target: Path | str,
    pairs: Path,
    *,
    base: str | None = None,
    reference: str | None = None,
    beta: float | None = None,
    ches: bool = False,
    out: Path | None = None,
) -> ScoreReport:
    """Score a file of pairs with a run's adapter or model, an adapter folder, or a model (folder or hub id).

    `reference`, an adapter or a model, is what rewards are relative to. Without it an adapter that was trained
    against its base is compared with that, the adapter off; anything else has no rewards. `base` says where an
    adapter's base is, as in a merge. All compute in the dtype they were trained or stored in, an adapter on its base
    quantised as in training. `beta` defaults to that of the training, also of a merged or a wholly trained model, and
    without one there are no rewards. `pairs` holds preference rows or the token ids of a run's `held_out.jsonl`.
    `ches` measures how alike the hidden states of both answers are (`evaluate.ches`). `out` receives one JSON object
    a pair.

    Raises InputError for anything missing or unfit, before any weights are loaded where that can be known.
    """
    if out is not None:
        check_folder_of(out)
    report = score_pairs(target, pairs, base=base, reference=reference, beta=beta, ches=ches).report
    if out is not None:
        report.write(out)
    return report


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """Scores with what they are of: the pairs as tokens, in the order of the report, and the model."""

    report: ScoreReport
    pairs: list[TokenizedPair]
    subject: Subject


def score_pairs(
    target: Path | str,
    pairs: Path,
    *,
    base: str | None = None,
    reference: str | None = None,
    beta: float | None = None,
    ches: bool = False,
    check: Callable[[Sequence[TokenizedPair]], object] = len,
) -> ScoredPairs:
    """What `score_file` scores, with the pairs themselves; `check` refuses pairs before any weights are loaded."""
    if beta is not None:
        check_beta(beta)
    subject = find_subject(target, base=base)
    compared = None if reference is None else compared_with(subject, reference, base=base)
    loaded = load_pairs(pairs, subject.tokenizer, **row_settings(subject))
    check(loaded.pairs)
    beta, objective = _trained_beta(subject) if beta is None else beta, _objective_of_margins(subject)
    measured = _measured(subject, loaded.pairs, ches=ches)
    against = measured.own if compared is None else _measured(compared, loaded.pairs).policy
    digests = {row.id: digest(row) for row in loaded.rows}
    scores = [
        replace(score, digest=digests.get(score.id))
        for score in pair_scores(loaded.pairs, measured.policy, against, beta, measured.ches)
    ]
    report = ScoreReport(subject.name, beta, scores, loaded.left_out, objective)
    return ScoredPairs(report, loaded.pairs, subject)


def check_rewards(target: Path | str, *, base: str | None, reference: str | None, beta: float | None) -> None:
    """Refuse, before any weights are loaded, a target whose pairs `score_pairs` would give no rewards."""
    subject = find_subject(target, base=base)
    if beta is None and _trained_beta(subject) is None:
        lacks = "no beta is known"
    elif reference is None and not is_its_own_reference(subject):
        lacks = "there is no reference"
    else:
        return
    raise InputError(
        f"{subject.name} has no margins, as {lacks}: give --reference ADAPTER_OR_MODEL, what rewards are relative to,"
        " and --beta, the run's, where it has none"
    )


def compared_with(subject: Subject, reference: str, *, base: str | None = None) -> Subject:
    """The adapter or model that rewards of `subject` are relative to; refused where it reads other tokens."""
    compared = find_subject(reference, base=base if _is_adapter(reference) else None)
    check_same_tokens(subject.tokenizer, compared.tokenizer, reference)
    return compared


def is_its_own_reference(subject: Subject) -> bool:
    """Whether it is an adapter that was trained against its base, or whose training is not known."""
    saved = subject.saved
    return saved is not None and (saved.lineage is None or saved.lineage.reference_kind == "disabled_adapter")


def _is_adapter(target: str) -> bool:
    return Path(target).is_dir() and (speaker_folder(Path(target)) / ADAPTER_CONFIG).is_file()


def _trained_beta(subject: Subject) -> float | None:
    if subject.saved is not None:
        return subject.saved.beta
    return None if subject.folder is None else reward_scale(lineage_of(subject.folder))


def reference_name(reference: str | None) -> str:
    """What rewards are relative to, without a place on this machine."""
    return OWN_BASE if reference is None else public_name(reference)


def trained_by(subject: Subject) -> Objective | None:
    """The objective of a subject's training; None where that is unknown. Raises InputError for one that is not here."""
    record = _recorded_objective(subject)
    return None if record is None else objective_from(record)


def _recorded_objective(subject: Subject) -> Mapping[str, Any] | None:
    lineage = None if subject.folder is None else lineage_of(subject.folder)
    return None if lineage is None else lineage.objective


def _objective_of_margins(subject: Subject) -> Objective | None:
    """What the subject was trained by, where that is known and a pair's margin alone tells the pair's weight."""
    record = _recorded_objective(subject)
    try:
        objective = None if record is None else objective_from(record)
    except InputError:  # an objective of somebody's own, or of another version
        return None
    return objective if objective is not None and objective.entry.of_margin else None


def row_settings(subject: Subject) -> Mapping[str, Any]:
    """As training read its pairs; a model of others may lie beside somebody's config.yaml, which says nothing of it."""
    if subject.saved is not None:
        return subject.saved.tokenization
    if subject.folder is None or not (subject.folder / LINEAGE_FILE).is_file():
        return {"max_length": MAX_LENGTH}
    return tokenization_of(subject.folder)


class _Measured(NamedTuple):
    """Of one model: of itself, of its own reference (the adapter off, where it was trained against that), and CHES."""

    policy: PairLogps
    own: PairLogps | None
    ches: Ches | None


def _measured(subject: Subject, pairs: Sequence[TokenizedPair], *, ches: bool = False) -> _Measured:
    model = subject.load()
    packs: dict[str, Any] = {"device": next(model.parameters()).device, "collator": prepared(model, pairs)}
    own = pair_logps(DisabledAdapterReference(model).logps, pairs, **packs) if is_its_own_reference(subject) else None
    if not ches:
        return _Measured(pair_logps(partial(sequence_logps, model), pairs, **packs), own, None)
    chosen, rejected, *scores = _columns(lambda pack: chain(*logps_and_ches(model, pack)), pairs, **packs)
    return _Measured(PairLogps(chosen.float(), rejected.float()), own, Ches(*scores))


def prepared(model: torch.nn.Module, pairs: Sequence[TokenizedPair]) -> PairCollator:
    """`model` made ready to score these pairs, and what packs them in a layout that it can compute."""
    check_length(causal_lm(model), max(pair.longest for pair in pairs))
    return PairCollator(choose_layout(model, "auto").layout)
