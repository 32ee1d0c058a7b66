"""Per-pair log-probs, rewards and margins of a trained adapter or a model, with the very code of training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lorafocal.bounds import check_beta
from lorafocal.data.held_out import load_pairs
from lorafocal.data.packing import Pack, PairCollator
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.lineage import LINEAGE_FILE
from lorafocal.model.head import causal_lm
from lorafocal.model.load import check_length, check_same_tokens, load_base, load_tokenizer
from lorafocal.model.saved import (
    CONFIG_FILE,
    MAX_LENGTH,
    SavedAdapter,
    open_adapter,
    read_adapter,
    read_config,
    stored_dtype,
    tokenization_of,
)
from lorafocal.objectives.pairwise import PairLogps, rewards
from lorafocal.policy import sequence_logps
from lorafocal.probes import choose_layout
from lorafocal.publish import write_atomically
from lorafocal.reference import DisabledAdapterReference

PACKS = PairCollator()


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

    @property
    def margin(self) -> float | None:
        """Chosen minus rejected reward."""
        if self.chosen_reward is None or self.rejected_reward is None:
            return None
        return self.chosen_reward - self.rejected_reward

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "margin": self.margin}


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """All pairs of a file under one model."""

    target: str
    beta: float | None
    scores: list[PairScore]

    @property
    def margins(self) -> list[float]:
        return [score.margin for score in self.scores if score.margin is not None]

    def as_dict(self) -> dict[str, Any]:
        """Means over pairs under the names of training's log; the pairs themselves are in the table file."""
        count, margins = len(self.scores), self.margins
        totals: dict[str, Any] = {
            "target": self.target,
            "pairs": count,
            "tokens": sum(score.chosen_tokens + score.rejected_tokens for score in self.scores),
            "logps/chosen": sum(score.chosen_logps for score in self.scores) / count,
            "logps/rejected": sum(score.rejected_logps for score in self.scores) / count,
            "beta": self.beta,
        }
        if margins:
            totals |= {
                "rewards/chosen": sum(score.chosen_reward or 0.0 for score in self.scores) / count,
                "rewards/rejected": sum(score.rejected_reward or 0.0 for score in self.scores) / count,
                "rewards/margins": sum(margins) / count,
                "rewards/accuracies": sum(margin > 0 for margin in margins) / count,
                "rewards/ties": sum(margin == 0 for margin in margins) / count,
            }
        return totals

    def table(self) -> str:
        """The totals, one a line."""
        return "\n".join(
            f"{key:<20} {value:.6g}" if isinstance(value, float) else f"{key:<20} {value}"
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
    numbered = [replace(pair, id=str(number)) for number, pair in enumerate(pairs)]  # ids of a user may repeat
    chosen, rejected = torch.empty(len(pairs)), torch.empty(len(pairs))
    with torch.no_grad():
        for pack in collator(numbered).packs:
            rows = [int(number) for number in pack.pair_ids]
            answer = logps(pack.to(device))
            chosen[rows], rejected[rows] = answer.chosen.float().cpu(), answer.rejected.float().cpu()
    return PairLogps(chosen, rejected)


def pair_scores(
    pairs: Sequence[TokenizedPair], policy: PairLogps, reference: PairLogps | None, beta: float | None
) -> list[PairScore]:
    """Numbers of `pairs` as rows; rewards only where both a reference and `beta` are known."""
    columns: dict[str, list[float]] = {
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
    return [
        PairScore(
            id=pair.id,
            chosen_tokens=len(pair.chosen_ids),
            rejected_tokens=len(pair.rejected_ids),
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
    out: Path | None = None,
) -> ScoreReport:
    """Score a file of pairs with an adapter folder, or with a model (folder or hub id).

    `reference`, an adapter folder or a model, is what rewards are relative to. Without it an adapter that was trained
    against its base is compared with that, the adapter off; anything else has no rewards. `base` says where an
    adapter's base is, as in a merge. All compute in the dtype they were trained or stored in, an adapter on its base
    quantised as in training. `beta` defaults to the run's, and without one there are no rewards. `pairs` holds
    preference rows or the token ids of a run's `held_out.jsonl`. `out` receives one JSON object a pair.

    Raises InputError for anything missing or unfit, before any weights are loaded where that can be known.
    """
    if beta is not None:
        check_beta(beta)
    if out is not None and not out.parent.is_dir():
        raise InputError(f"{out}: the folder {out.parent} does not exist. Make it first.")
    subject = _subject(str(target), base)
    compared = None if reference is None else _subject(reference, base if _is_adapter(reference) else None)
    if compared is not None:
        check_same_tokens(subject.tokenizer, compared.tokenizer, str(reference))
    tokenized = load_pairs(pairs, subject.tokenizer, **subject.tokenization)
    policy, own = subject.logps(tokenized)
    against = own if compared is None else compared.logps(tokenized)[0]
    beta = subject.beta if beta is None else beta
    report = ScoreReport(Path(target).name, beta, pair_scores(tokenized, policy, against, beta))
    if out is not None:
        report.write(out)
    return report


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is scored, found but not loaded: an adapter on its base, or a model."""

    tokenizer: PreTrainedTokenizerBase
    tokenization: Mapping[str, Any]
    beta: float | None
    logps: Callable[[Sequence[TokenizedPair]], tuple[PairLogps, PairLogps | None]]  # its own, and its own reference's


def _is_adapter(target: str) -> bool:
    return (Path(target) / CONFIG_FILE).is_file()


def _subject(target: str, base: str | None) -> _Subject:
    if not _is_adapter(target):
        if base is not None:
            raise InputError(f"{target} is a model and has no base; name what it is compared with by --reference")
        logps = partial(_model_logps, target, dtype=stored_dtype(read_config(target)))
        made_here = (Path(target) / LINEAGE_FILE).is_file()  # any other model may lie beside somebody's config.yaml
        tokenization = tokenization_of(Path(target)) if made_here else {"max_length": MAX_LENGTH}
        return _Subject(load_tokenizer(target), tokenization, None, logps)
    saved = read_adapter(Path(target), base=base)
    tokenizer = load_tokenizer(saved.base, saved.revision)
    return _Subject(tokenizer, saved.tokenization, saved.beta, partial(_adapter_logps, saved))


def _adapter_logps(saved: SavedAdapter, pairs: Sequence[TokenizedPair]) -> tuple[PairLogps, PairLogps | None]:
    model = open_adapter(saved, dtype=saved.dtype)
    run = _scorer(model, pairs)
    trained_against_base = saved.lineage is None or saved.lineage.reference == "disabled_adapter"
    reference = run(DisabledAdapterReference(model).logps) if trained_against_base else None
    return run(partial(sequence_logps, model)), reference


def _model_logps(name: str, pairs: Sequence[TokenizedPair], *, dtype: str) -> tuple[PairLogps, None]:
    model = load_base(name, dtype=dtype).eval()
    return _scorer(model, pairs)(partial(sequence_logps, model)), None


def _scorer(
    model: torch.nn.Module, pairs: Sequence[TokenizedPair]
) -> Callable[[Callable[[Pack], PairLogps]], PairLogps]:
    """`pair_logps` of these pairs on this model's device and in a layout it can compute."""
    check_length(causal_lm(model), max(pair.longest for pair in pairs))
    collator = PairCollator(choose_layout(model, "auto").layout)
    return partial(pair_logps, pairs=pairs, device=next(model.parameters()).device, collator=collator)
