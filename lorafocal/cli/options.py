"""What several verbs have in common: options, and how a result is printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from lorafocal.errors import InputError
from lorafocal.publish import check_file

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Values that replace the file's.")
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="An adapter's base, if not where the adapter says."),
]
ReferenceOption = Annotated[
    str | None,
    typer.Option("--reference", metavar="ADAPTER_OR_MODEL", help="What rewards are relative to, if not the base."),
]


def folder_made(path: Path | None) -> Path | None:
    """A file to be written, whose folder is made before anything is computed or paid for it."""
    if path is not None:
        check_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def only_over(path: Path | None, ours: Callable[[Path], bool], refusal: str) -> Path | None:
    """A file to be written, in a folder that is there then, in the place of nothing but an earlier one of `ours`."""
    folder_made(path)
    if path is not None and path.is_file() and path.stat().st_size and not ours(path):
        raise InputError(f"{refusal}: {path}; choose another name or remove it")
    return path


def page_place(path: Path | None) -> Path | None:
    """A web page to be written: its name says so, and so no data are replaced by it."""
    folder_made(path)
    if path is not None:
        from lorafocal.report.html import check_place

        check_place(path)
    return path


def result_place(path: Path | None) -> Path | None:
    """A file for a result, which replaces nothing else, as what is judged."""
    return only_over(path, _is_result, "--out would replace what is no result")


def _is_result(path: Path) -> bool:
    from lorafocal.evaluate.result import read_result

    try:
        read_result(path)
    except InputError:
        return False
    return True


ResultOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE",
        help="Write the result (JSON) here; `report --paper` reads it.",
        callback=result_place,
    ),
]


def numbers(option: str, text: str) -> tuple[float, ...]:
    """The numbers of `1,-0.5`."""
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise InputError(f"{option} {text!r}: give numbers with commas between them, as 1,-0.5") from error


def no_loading_bars() -> None:
    """transformers draws a bar a file it loads; downloads keep theirs."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def print_report(report: Any, as_json: bool) -> None:
    """A report as its table, or as one JSON object; on a terminal in ASCII: texts of data could write codes to it."""
    ascii_only = sys.stdout is not None and sys.stdout.isatty()  # None where it was closed
    typer.echo(json.dumps(report.as_dict(), indent=2, ensure_ascii=ascii_only) if as_json else report.table())


class Written(Protocol):
    """A report with a file of its own."""

    def write(self, path: Path) -> None: ...


def finish(result: Written, out: Path | None, as_json: bool) -> None:
    """Write what was computed where that is asked for, and print it."""
    try:
        if out is not None:
            result.write(out)
    finally:  # where it cannot be written, what was computed is shown all the same
        print_report(result, as_json)


def refuse_given(context: typer.Context, parameters: Iterable[str], why: str) -> None:
    """Refuse those of `parameters` that stand on the command line, where they would be ignored."""
    sources = {name: context.get_parameter_source(name) for name in parameters}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    words = ["/".join(parameter.opts) for parameter in context.command.params if parameter.name in given]
    if words:
        raise InputError(f"{', '.join(words)}: {why}; leave it out")
