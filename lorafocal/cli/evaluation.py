"""The verbs of `evaluate` that ask nobody: rules, reward models, harnesses, pairs, comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafocal.cli.options import JsonOption, ResultOption, finish, no_loading_bars
from lorafocal.cli.servers import say


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
    from lorafocal.evaluate.compare import evaluate_comparison

    finish(evaluate_comparison(first, second), out, as_json)
