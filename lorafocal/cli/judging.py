"""The verbs of `evaluate` that ask a judge, or read what one said: AlpacaEval 2 and Arena-Hard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafocal.cli.options import JsonOption, ResultOption, finish, refuse_given
from lorafocal.cli.servers import (
    OF_A_SERVER,
    AttemptsOption,
    ConcurrencyOption,
    KeyOption,
    PaceOption,
    PriceOption,
    ServerOption,
    TimeoutOption,
    YesOption,
    approval_of,
    endpoint_of,
    price_of,
    say,
)
from lorafocal.errors import InputError

JudgeOption = Annotated[
    str | None, typer.Option("--judge", metavar="MODEL", help="The judge: its name on OpenAI's server or on --server.")
]
MissingOption = Annotated[
    int,
    typer.Option(
        "--allow-missing",
        metavar="N",
        min=0,
        help="Questions that may stay without a reply. Replies without a verdict are left out, each of them counted.",
    ),
]

OF_A_JUDGE = ("judge", "server", *OF_A_SERVER, "price", "yes", "missing")
NOBODY_IS_ASKED = "no judge is asked where judgments are given"


def alpaca(
    context: typer.Context,
    answers: Annotated[
        Path | None, typer.Argument(metavar="ANSWERS", help="What `generate` wrote, or any model_outputs.json.")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option("--reference", metavar="FILE", help="The answers compared with; AlpacaEval's own, from the hub."),
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option("--annotations", metavar="FILE", help="Judgments there are: no judge is asked.")
    ] = None,
    gamed: Annotated[
        Path | None,
        typer.Option("--gamed", metavar="FILE", help="df_gamed.csv, for the length-controlled rate, if not cached."),
    ] = None,
    annotator: Annotated[
        str, typer.Option("--annotator", help="Of alpaca-eval: its prompt, parser and order.")
    ] = "weighted_alpaca_eval_gpt4_turbo",
    judge: JudgeOption = None,
    server: ServerOption = None,
    key_variable: KeyOption = None,
    concurrency: ConcurrencyOption = 8,
    timeout: TimeoutOption = 120.0,
    attempts: AttemptsOption = 6,
    per_minute: PaceOption = None,
    price: PriceOption = None,
    yes: YesOption = False,
    missing: MissingOption = 0,
    out: ResultOption = None,
    as_json: JsonOption = False,
) -> None:
    """AlpacaEval 2: win rate and length-controlled win rate, by the alpaca-eval package."""
    if answers is None and annotations is not None:
        refuse_given(context, (*OF_A_JUDGE, "annotator"), NOBODY_IS_ASKED)
        from lorafocal.evaluate.alpaca import evaluate_annotations

        finish(evaluate_annotations(annotations, reference=reference, gamed=gamed), out, as_json)
        return
    if answers is None or annotations is not None:
        raise InputError("give the answers to be judged, or --annotations with judgments that exist: one of the two")
    place, asking_price = _with_a_judge(judge, out), price_of(price)
    endpoint = endpoint_of(str(judge), server, key_variable, concurrency, timeout, attempts, per_minute)
    from lorafocal.evaluate.alpaca import evaluate_alpaca
    from lorafocal.evaluate.result import ANNOTATIONS, beside

    result = evaluate_alpaca(
        answers,
        judge=endpoint,
        journal=beside(place, "journal.jsonl"),
        approve=approval_of(endpoint, yes),
        reference=reference,
        gamed=gamed,
        annotator=annotator,
        price=asking_price,
        allowed_missing=missing,
        annotations_out=beside(place, ANNOTATIONS),
        say=say,
    )
    finish(result, out, as_json)


def arena(
    context: typer.Context,
    answers: Annotated[Path | None, typer.Argument(metavar="ANSWERS", help="Answers in Arena-Hard's JSONL.")] = None,
    questions: Annotated[Path | None, typer.Option("--questions", metavar="FILE", help="Its question.jsonl.")] = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="FILE", help="The baseline's answers; the paper's: gpt-4-0314.")
    ] = None,
    judgments: Annotated[
        Path | None, typer.Option("--judgments", metavar="FILE", help="Judgments there are: no judge is asked.")
    ] = None,
    judge_config: Annotated[
        Path | None,
        typer.Option("--judge-config", metavar="FILE", help="Arena-Hard's YAML with its judge prompt; ours otherwise."),
    ] = None,
    judge: JudgeOption = None,
    server: ServerOption = None,
    key_variable: KeyOption = None,
    concurrency: ConcurrencyOption = 8,
    timeout: TimeoutOption = 300.0,
    attempts: AttemptsOption = 6,
    per_minute: PaceOption = None,
    price: PriceOption = None,
    yes: YesOption = False,
    missing: MissingOption = 0,
    out: ResultOption = None,
    as_json: JsonOption = False,
) -> None:
    """Arena-Hard v0.1: pairwise verdicts in both orders, a bootstrapped win rate against the baseline."""
    if judgments is not None:
        refuse_given(context, (*OF_A_JUDGE, "judge_config"), NOBODY_IS_ASKED)
        from lorafocal.evaluate.arena import evaluate_judgments

        found = evaluate_judgments(judgments, answers=answers, questions=questions, baseline=baseline)
        finish(found, out, as_json)
        return
    if answers is None or questions is None or baseline is None:
        raise InputError("give the answers, --questions and --baseline; or --judgments with judgments that exist")
    place, asking_price = _with_a_judge(judge, out), price_of(price)
    endpoint = endpoint_of(str(judge), server, key_variable, concurrency, timeout, attempts, per_minute)
    from lorafocal.evaluate.arena import evaluate_arena
    from lorafocal.evaluate.result import beside

    result = evaluate_arena(
        answers,
        questions=questions,
        baseline=baseline,
        judge=endpoint,
        journal=beside(place, "journal.jsonl"),
        judgments=beside(place, "judgments.jsonl"),
        approve=approval_of(endpoint, yes),
        judge_config=judge_config,
        price=asking_price,
        allowed_missing=missing,
        say=say,
    )
    finish(result, out, as_json)


def _with_a_judge(judge: str | None, out: Path | None) -> Path:
    """Where the result goes: what the judge said is kept beside it."""
    if judge is None:
        raise InputError("name the judge by --judge MODEL (and --server URL for one of your own)")
    if out is None:
        raise InputError("give --out FILE: what the judge says is kept beside it, so that nothing is asked twice")
    return out
