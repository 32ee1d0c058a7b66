"""What several verbs have in common: options, and how a result is printed."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Values that replace the file's.")
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="An adapter's base, if not where the adapter says."),
]


def no_loading_bars() -> None:
    """transformers draws a bar a file it loads; downloads keep theirs."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def print_report(report: Any, as_json: bool) -> None:
    """A report as its table, or as one JSON object."""
    typer.echo(json.dumps(report.as_dict(), indent=2, ensure_ascii=False) if as_json else report.table())
