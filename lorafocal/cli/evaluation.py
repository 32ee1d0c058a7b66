"""The verbs of `evaluate` that ask nobody: rules, reward models, harnesses, pairs, comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorafocal.cli.options import (
    BaseOption,
    JsonOption,
    ReferenceOption,
    ResultOption,
    finish,
    no_loading_bars,
    refuse_given,
)
from lorafocal.cli.servers import say
from lorafocal.errors import InputError


def rule(
    context: typer.Context,
    answers: Annotated[Path, typer.Argument(metavar="ANSWERS", help="What `generate` wrote.")],
    rule: Annotated[str, typer.Option("--rule", help="exact, contains, number, regex or json.")],
    targets: Annotated[
        Path | None,
        typer.Option("--targets", metavar="FILE", help="Prompts with what is right for each; preference rows will do."),
    ] = None,
    field: Annotated[
        str, typer.Option("--field", metavar="KEY", help="Of the targets' rows: what is right; chosen for pairs.")
    ] = "target",
    pattern: Annotated[
        str | None, typer.Option("--pattern", metavar="REGEX", help="For regex: one pattern, in place of targets.")
    ] = None,
    keys: Annotated[
        list[str] | None, typer.Option("--key", metavar="KEY", help="For json: a key it must have; may be repeated.")
    ] = None,
    out: ResultOption = None,
    as_json: JsonOption = False,
) -> None:
    """The share of right answers by a rule that nobody can argue with: no judge, no bill."""
    if rule == "json" or pattern is not None:
        refuse_given(context, ("field",), "nothing is compared with targets here")
    from lorafocal.evaluate.by_rule import evaluate_rule

    found = evaluate_rule(answers, rule=rule, targets=targets, field=field, pattern=pattern, keys=tuple(keys or ()))
    finish(found, out, as_json)


def reward(
    answers: Annotated[Path, typer.Argument(metavar="ANSWERS", help="What `generate` wrote.")],
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="A reward model: a classifier of one output.")],
    against: Annotated[
        Path | None, typer.Option("--against", metavar="FILE", help="Another model's answers: adds a win rate.")
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="What it computes in; its own if absent.")] = None,
    out: ResultOption = None,
    as_json: JsonOption = False,
) -> None:
    """A reward model's view of the answers: the mean reward, and a win rate against others."""
    from lorafocal.evaluate.reward import evaluate_reward

    no_loading_bars()
    finish(evaluate_reward(answers, model=model, against=against, dtype=dtype, say=say), out, as_json)


def compare(
    first: Annotated[Path, typer.Argument(metavar="RESULT", help="A result that an evaluation wrote.")],
    second: Annotated[Path, typer.Argument(metavar="RESULT", help="Another of the same kind, on the same prompts.")],
    out: ResultOption = None,
    as_json: JsonOption = False,
) -> None:
    """What the second result has more than the first, prompt by prompt: paired bootstrap and sign test."""
    if out is not None and any(out.resolve() == read.resolve() for read in (first, second)):
        raise InputError(f"--out would replace {out}, which is compared: choose another name")
    from lorafocal.evaluate.compare import evaluate_comparison

    finish(evaluate_comparison(first, second), out, as_json)


def leaderboard(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A run, an adapter folder, or a model.")],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task", metavar="NAME", help="A task of lm-eval, may be repeated; the leaderboard's six if absent."
        ),
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option("--task-folder", metavar="DIR", help="Tasks of your own: lm-eval's YAML files.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", min=1, help="Questions a task, to try things out: noted in the result."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences of a forward pass.")] = 8,
    base: BaseOption = None,
    out: ResultOption = None,
    as_json: JsonOption = False,
) -> None:
    """The six tasks of the first Open LLM Leaderboard by lm-eval, or others; an adapter is attached, never merged."""
    from lorafocal.evaluate.leaderboard import LEADERBOARD, evaluate_leaderboard
    from lorafocal.evaluate.result import TASKS, beside

    no_loading_bars()
    asked = tuple(tasks or LEADERBOARD)
    journal = None if out is None else beside(out, TASKS)
    options: dict[str, Any] = {"base": base, "task_folder": task_folder, "journal": journal}
    result = evaluate_leaderboard(target, tasks=asked, limit=limit, batch_size=batch_size, say=say, **options)
    finish(result, out, as_json)


def pairs(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A run, an adapter folder, or a model.")],
    pairs: Annotated[Path, typer.Argument(metavar="PAIRS", help="Preference rows, or a run's held_out.jsonl.")],
    base: BaseOption = None,
    reference: ReferenceOption = None,
    beta: Annotated[float | None, typer.Option("--beta", help="Reward scale; the run's own if absent.")] = None,
    labels: Annotated[
        str,
        typer.Option(
            "--labels", help="verdicts: chosen is better; shares: score_chosen, score_rejected as annotators' shares."
        ),
    ] = "verdicts",
    out: ResultOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ranking accuracy, margins, and how well p = sigmoid(margin) is calibrated, on any preference file."""
    from lorafocal.evaluate.pairs import evaluate_pairs

    no_loading_bars()
    asked = evaluate_pairs(target, pairs, base=base, reference=reference, beta=beta, labels=labels)
    finish(asked, out, as_json)


def fingerprint(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Your run, adapter folder, or model.")],
    released: Annotated[
        str, typer.Option("--with", metavar="MODEL", help="What it should have become: a released checkpoint.")
    ],
    pairs: Annotated[Path, typer.Option("--pairs", metavar="FILE", help="Held-out preference rows, ten at least.")],
    base: BaseOption = None,
    reference: ReferenceOption = None,
    released_reference: Annotated[
        str | None,
        typer.Option("--released-reference", metavar="MODEL", help="What the released checkpoint was trained from."),
    ] = None,
    out: ResultOption = None,
    as_json: JsonOption = False,
) -> None:
    """Did I reproduce it? The correlation of two models' implicit rewards on held-out pairs: no judge, no bill."""
    from lorafocal.evaluate.fingerprint import evaluate_fingerprint

    no_loading_bars()
    result = evaluate_fingerprint(
        target,
        released=released,
        pairs=pairs,
        base=base,
        target_reference=reference,
        released_reference=released_reference,
        say=say,
    )
    finish(result, out, as_json)
