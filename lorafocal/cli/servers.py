"""Options of verbs that ask a server, and what they come to: who is asked, at what price, with whose consent."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from lorafocal.errors import InputError

if TYPE_CHECKING:
    from lorafocal.endpoints import Endpoint, Spending

ServerOption = Annotated[
    str | None,
    typer.Option(
        "--server", metavar="URL", help="A server that speaks OpenAI's protocol, as http://localhost:8000/v1."
    ),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--key-variable",
        metavar="NAME",
        help="Environment variable with the key. OPENAI_API_KEY for OpenAI's server; another gets none unless named.",
    ),
]
ConcurrencyOption = Annotated[int, typer.Option("--concurrency", help="Requests under way at a time.")]
TimeoutOption = Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="An attempt may be silent.")]
AttemptsOption = Annotated[int, typer.Option("--attempts", help="Requests a question at most, the first included.")]
PaceOption = Annotated[
    float | None, typer.Option("--per-minute", metavar="REQUESTS", help="Requests a minute at most, of all together.")
]
PriceOption = Annotated[
    str | None,
    typer.Option("--price", metavar="IN,OUT", help="USD for a million tokens read and written, for the estimate."),
]
YesOption = Annotated[bool, typer.Option("--yes", help="Ask the server without asking you first.")]

OF_A_SERVER = ("key_variable", "concurrency", "timeout", "attempts", "per_minute")
say = partial(typer.echo, err=True)


def endpoint_of(
    model: str,
    server: str | None,
    key_variable: str | None,
    concurrency: int,
    timeout: float,
    attempts: int,
    per_minute: float | None,
) -> Endpoint:
    from lorafocal.endpoints import Endpoint

    return Endpoint(
        model,
        url=server,
        key_variable=key_variable,
        concurrency=concurrency,
        timeout_s=timeout,
        attempts=attempts,
        requests_per_minute=per_minute,
    )


def price_of(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        read, written = (float(word) for word in text.split(","))
    except ValueError:
        read = written = math.nan
    if not (0 <= read < math.inf and 0 <= written < math.inf):
        raise InputError(f"--price {text!r}: give USD for a million tokens read and written, as 2.50,10")
    return read, written


def approval_of(endpoint: Endpoint, yes: bool) -> Callable[[Spending], bool]:
    """Ask the person at the terminal, unless they agreed by --yes or nothing can be billed."""
    free = endpoint.url is not None and endpoint.key_variable is None

    def approve(spending: Spending) -> bool:
        typer.echo(f"{endpoint.model} is asked {spending.sentence()}", err=True)
        if yes or free or spending.usd == 0:
            return True
        if not sys.stdin.isatty():
            raise InputError("nothing was sent: nobody is at a terminal to agree to this; --yes agrees beforehand")
        return typer.confirm("go on?", err=True)

    return approve
