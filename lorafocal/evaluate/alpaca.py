"""AlpacaEval 2: win rates against a reference model's answers, computed by the alpaca-eval package."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafocal.endpoints import Endpoint
from lorafocal.endpoints.spending import Approve, Price
from lorafocal.errors import InputError
from lorafocal.evaluate.alpaca_judging import (
    ANNOTATOR,
    ORDER_SEED,
    Judgments,
    Terms,
    annotator_config,
    first_preferred,
    judge_options,
    judge_pairs,
    signature,
    signed,
)
from lorafocal.evaluate.alpaca_package import (
    GAMED_FILE,
    GLM,
    REFERENCE_FILE,
    check_gamed,
    how_to_fetch,
    hub_file,
    length_controlled,
    win_rates,
)
from lorafocal.evaluate.alpaca_rows import PROMPTS, RAW, by_instruction, order_of, pair_up, place_rows, read_annotations
from lorafocal.evaluate.intervals import Share, bootstrap_interval
from lorafocal.evaluate.result import Result, Score, file_hashes, package_versions, prompt_sha256
from lorafocal.generation.formats import Answers, read_answers
from lorafocal.publish import check_folder_of, write_atomically

if TYPE_CHECKING:
    import pandas

# What stands behind the numbers of the leaderboard and of the paper (SimPO's setting).
JUDGE, REFERENCE, VERSION = "gpt-4-1106-preview", "gpt4_1106_preview", "0.6.2"


def evaluate_alpaca(
    answers: Path,
    *,
    judge: Endpoint,
    journal: Path,
    approve: Approve,
    reference: Path | None = None,
    gamed: Path | None = None,
    annotator: str = ANNOTATOR,
    price: Price | None = None,
    allowed_missing: int = 0,
    annotations_out: Path | None = None,
    say: Callable[[str], None] = print,
) -> Result:
    """Have `judge` compare the answers in `answers` with those in `reference`, prompt by prompt.

    Without `reference`, AlpacaEval 2's own is taken from the hub's cache; so is `gamed`, its df_gamed.csv, without
    which there is no length-controlled win rate. `annotator` is one of the package's. The replies go into `journal`
    as they come, so that the same call goes on where a killed one stopped; `annotations_out` receives the judgments
    in AlpacaEval's form. `price` is USD for a million tokens (in, out); up to `allowed_missing` prompts may stay
    without a reply. A reply without a verdict is counted and left out, as the package does.

    Raises InputError before anything is sent where that can be known, where too many replies are missing, and where
    none holds a verdict.
    """
    if annotations_out is not None:
        check_folder_of(annotations_out)
    reference = reference or hub_file(REFERENCE_FILE)
    if reference is None:
        raise InputError(
            f"no --reference was given, and AlpacaEval 2's own answers are not in the hub's cache: fetch them"
            f" ({how_to_fetch(REFERENCE_FILE)}), or give a file of answers to compare with"
        )
    ours, theirs = read_answers(answers), read_answers(reference)
    pairs = pair_up(ours, theirs)
    order = [*by_instruction(theirs)]
    control = _length_control(gamed, order, pairs)
    config = annotator_config(annotator)
    judged = judge_pairs(pairs, annotator, Terms(judge, journal, approve, price, allowed_missing, say))
    rows = _annotations(pairs, judged, signature(annotator, judge.model))
    if annotations_out is not None:
        write_atomically(annotations_out, json.dumps([*rows.values()], ensure_ascii=False, indent=1) + "\n")
    told = {
        "order_seed": ORDER_SEED,
        "judge_options": judge_options(config),
        "judge_answered_as": sorted(judged.answered_as),
    }
    known = _Judged(rows, order, annotator, judge.model, ours, judged, told)
    return _result(known, control, file_hashes(answers, reference, *control.files))


def evaluate_annotations(annotations: Path, *, reference: Path | None = None, gamed: Path | None = None) -> Result:
    """The win rates of judgments that exist: a file of annotations as alpaca-eval writes it.

    `reference`, answers to all prompts in AlpacaEval's order, tells the position of each prompt, by which the length
    control finds its difficulty; without it the file itself has to hold them all in that order.

    Raises InputError naming file, row and key for what is missing or malformed.
    """
    rows = read_annotations(annotations)
    if reference is None:
        order = [row["instruction"] for row in rows]
    else:
        order = [*by_instruction(read_answers(reference))]
    placed = place_rows(rows, order, annotations.name)
    control = _length_control(gamed, order, placed)
    annotator, judge = signed(rows[0]["annotator"])
    files = (annotations,) if reference is None else (annotations, reference)
    return _result(_Judged(placed, order, annotator, judge), control, file_hashes(*files, *control.files))


@dataclass(frozen=True, slots=True)
class _Judged:
    """Annotations by position, all prompts in order, who judged, and what only a judging of our own knows."""

    rows: Mapping[int, Mapping[str, Any]]
    order: Sequence[str]
    annotator: str
    judge: str | None
    answers: Answers | None = None
    judgments: Judgments | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Control:
    """The length control's file, or why there is none."""

    gamed: Path | None
    why_not: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        return () if self.gamed is None else (self.gamed,)


def _length_control(gamed: Path | None, order: Sequence[str], rows: Mapping[int, Mapping[str, Any]]) -> _Control:
    """A file that was given has to serve; for one in the hub's cache that does not, the reason is told."""
    found = gamed or hub_file(GAMED_FILE)
    if found is None:
        return _Control(
            None,
            f"no length-controlled win rate: it needs {GAMED_FILE}, which is neither given (--gamed) nor in the hub's"
            f" cache, where {how_to_fetch(GAMED_FILE)} brings it",
        )
    try:
        check_gamed(found, len(order))
        if order_of(order) == "another":
            raise InputError(
                "these are AlpacaEval's prompts in another order than its own, by which the length control finds their"
                " difficulty: give a --reference in the order of its data set"
            )
        if len({len(row["output_1"]) - len(row["output_2"]) for row in rows.values()}) < 2:
            raise InputError(
                "there are no two prompts whose answers differ in length by different amounts, so the length control"
                " has nothing to fit; the win rate alone needs no --gamed"
            )
    except InputError as error:
        if gamed is not None:
            raise
        return _Control(None, f"no length-controlled win rate: {error}")
    return _Control(found)


def _annotations(
    pairs: Mapping[int, Mapping[str, Any]], judged: Judgments, annotator: str
) -> dict[int, dict[str, Any]]:
    """Rows as the package writes them, without times and prices, which differ from call to call."""
    return {
        position: {
            **pair,
            "annotator": annotator,
            "preference": judged.preferences[position],
            RAW: judged.raw.get(position),
        }
        for position, pair in pairs.items()
    }


def _result(known: _Judged, control: _Control, inputs: Mapping[str, str]) -> Result:
    import pandas

    frame = pandas.DataFrame([*known.rows.values()], index=[*known.rows])
    frame["preference"] = frame["preference"].astype(float)
    _check_verdicts(frame)
    found = win_rates(frame)
    scores = _scores(found, frame["preference"].dropna().tolist())
    if control.gamed is not None:
        scores["length_controlled_win_rate"] = Score(length_controlled(frame, control.gamed))
    first = first_preferred((row[RAW] for row in known.rows.values() if row[RAW] is not None), known.annotator)
    if first is not None:
        scores["first_answer_preferred"] = first.percent
    counts = _counts(known, found)
    return Result(
        benchmark="alpaca_eval_2",
        model=frame["generator_2"].iloc[0],
        scores=scores,
        judge=known.judge,
        sampling=None if known.answers is None else known.answers.sampling,
        target=None if known.answers is None else known.answers.target,
        counts=counts,
        settings={
            "reference": frame["generator_1"].iloc[0],
            "annotator": known.annotator,
            "length_control": None if control.gamed is None else GLM,
            **known.settings,
        },
        inputs=inputs,
        versions=package_versions("alpaca-eval", "scikit-learn"),
        notes=(*_notes(known, frame["generator_1"].iloc[0], counts, first), *filter(None, [control.why_not])),
        items=tuple(_item(row) for row in known.rows.values()),
    )


def _check_verdicts(frame: pandas.DataFrame) -> None:
    """Refuse a judge that decided nothing: the draws of equal answers, of which it saw none, are no verdicts of its."""
    differ = frame["output_1"] != frame["output_2"]
    judged = frame["preference"].notna()
    if not (judged[differ] if differ.any() else judged).any():
        raise InputError(
            f"no prompt has a verdict ({differ.sum()} have two different answers), so there is no win rate: look at"
            " what the judge replied"
        )


def _scores(found: Mapping[str, float], preferences: Sequence[float]) -> dict[str, Score]:
    """The package's numbers, and a bootstrap interval over prompts, which it does not compute."""
    low, high = bootstrap_interval([100 * (preference - 1) for preference in preferences])
    error = found["standard_error"]  # not a number for one prompt
    return {
        "win_rate": Score(found["win_rate"], low, high, error if math.isfinite(error) else None),
        "discrete_win_rate": Score(found["discrete_win_rate"]),
    }


def _counts(known: _Judged, found: Mapping[str, float]) -> dict[str, int]:
    counts = {
        "prompts": len(known.order),
        "judged": int(found["n_total"]),
        "wins": int(found["n_wins"]),
        "losses": int(found["n_wins_base"]),
        "draws": int(found["n_draws"]),
        "prompts_without_answer": len(known.order) - len(known.rows),
        "prompts_without_verdict": len(known.rows) - int(found["n_total"]),
    }
    if known.judgments is not None:
        counts["malformed_verdicts"] = known.judgments.malformed
        counts["without_reply"] = known.judgments.unanswered
        counts["unweighted_verdicts"] = known.judgments.unweighted
    return counts | dict(known.answers.counts if known.answers is not None else {})


def _item(row: Mapping[str, Any]) -> dict[str, Any]:
    """The preference for the model from 0 to 1; None without a verdict."""
    preference = row["preference"]
    return {
        "prompt_sha256": prompt_sha256(row["instruction"]),
        "preference": None if preference is None else preference - 1,
    }


def _notes(known: _Judged, reference: str, counts: Mapping[str, int], first: Share | None) -> Iterator[str]:
    """What sets the number apart from the published ones, and what weakens it."""
    if known.judge != JUDGE:
        yield f"judged by {known.judge or 'a judge that is not named'}; published numbers are judged by {JUDGE}"
    if known.annotator != ANNOTATOR:
        yield f"judged with the annotator {known.annotator}; AlpacaEval 2's is {ANNOTATOR}"
    if reference != REFERENCE:
        yield f"compared with {reference}; published numbers are against {REFERENCE}"
    if order_of(known.order) == "not these prompts":
        yield f"these {counts['prompts']} prompts are not AlpacaEval's {PROMPTS}"
    version = package_versions("alpaca-eval").get("alpaca-eval")
    if version != VERSION:
        yield f"computed by alpaca-eval {version}; the paper's setting (SimPO's) has {VERSION}"
    yield from _weaknesses(counts)
    if known.answers is None or known.answers.sampling is None:
        yield "how the answers were sampled is not known"
    if first is None:
        yield "the judge's replies do not tell which answer it read first, so its order bias is not known"
    else:
        yield f"the judge preferred the answer that it read first in {first} of the {first.total} pairs that it decided"


def _weaknesses(counts: Mapping[str, int]) -> Iterator[str]:
    if unanswered := counts["prompts_without_answer"]:
        yield f"{unanswered} of the {counts['prompts']} prompts have no answer of the model and do not count"
    if lost := counts["prompts_without_verdict"]:
        of = f" ({counts['malformed_verdicts']} unreadable replies)" if counts.get("malformed_verdicts") else ""
        yield f"{lost} of the {counts['prompts']} prompts have no verdict{of} and do not count"
    if hard := counts.get("unweighted_verdicts"):
        yield f"{hard} replies give the log-prob of one token alone, so these verdicts are all or nothing"
    if cut := counts.get("length_limit"):
        yield f"{cut} answers were cut at their limit of new tokens"
