"""Verbs that look into a run: what a pair says, which pairs may be wrong, whether gamma matters on this data."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lorafocal.cli.options import (
    BaseOption,
    JsonOption,
    ReferenceOption,
    no_loading_bars,
    numbers,
    only_over,
    page_place,
    print_report,
)
from lorafocal.errors import InputError


def list_place(path: Path | None) -> Path | None:
    """A list to be written, in the place of nothing but a list that was written so."""
    return only_over(path, _is_written_list, "--write would replace what it did not write")


def _is_written_list(path: Path) -> bool:
    from lorafocal.data.leave_out import read_list

    try:
        return all(named.digest is not None for named in read_list(path))
    except InputError:
        return False


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
PageOption = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Write the web page here.", callback=page_place)
]


def advise(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders with held-out pairs.")],
    gammas: Annotated[
        str | None, typer.Option("--gammas", metavar="G1,G2,...", help="Exponents to look at [0.01 to 1].")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Whether FocalPO would differ from DPO on this run's pairs, and from which gamma on."""
    given = {} if gammas is None else {"gammas": numbers("--gammas", gammas)}
    from lorafocal.report.advice import advise as run_advise

    print_report(run_advise(runs, **given), as_json)


def explain(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, an adapter, or a model.")],
    pair: Annotated[str, typer.Option("--pair", metavar="ID", help="The pair, by its id.")],
    pairs: Annotated[
        Path | None, typer.Option("--pairs", metavar="FILE", help="Where the pair is, if not in the run's own data.")
    ] = None,
    base: BaseOption = None,
    reference: ReferenceOption = None,
    out: PageOption = None,
    as_json: JsonOption = False,
) -> None:
    """One pair, token by token: coloured by the log-ratio to the reference, its margin, and its weight in training."""
    from lorafocal.report.explain import explain as run_explain

    no_loading_bars()
    print_report(run_explain(run, pair, pairs=pairs, base=base, reference=reference, out=out), as_json)
    if out is not None and not as_json:
        typer.echo(f"\npage       {out}")


def suspects(
    run: RunArgument,
    pairs: Annotated[
        Path | None, typer.Option("--pairs", metavar="FILE", help="Look at these pairs, not at those it trained on.")
    ] = None,
    base: BaseOption = None,
    reference: ReferenceOption = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Suspects at most, the most suspicious first.")] = None,
    out: PageOption = None,
    write: Annotated[
        Path | None,
        typer.Option(
            "--write", metavar="FILE", help="Write the confident ones here, for data.leave_out.", callback=list_place
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Training pairs that the run ranks wrong at every state it kept: perhaps labelled the wrong way round."""
    from lorafocal.evaluate.suspects import find_suspects

    no_loading_bars()
    say = partial(typer.echo, err=True)
    against = {"base": base, "reference": reference}
    print_report(find_suspects(run, pairs=pairs, **against, limit=limit, out=out, write=write, say=say), as_json)
