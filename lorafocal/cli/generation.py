"""The verb `generate`: answers to a file of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafocal.cli.options import BaseOption, JsonOption, folder_made, no_loading_bars, print_report, refuse_given
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

TargetArgument = Annotated[
    str,
    typer.Argument(metavar="TARGET", help="A run, an adapter folder, a model; with --server, the name it has there."),
]
PromptsOption = Annotated[
    Path,
    typer.Option(
        "--prompts", metavar="FILE", help="AlpacaEval's or Arena-Hard's questions, preference rows, or a prompt a line."
    ),
]
PresetOption = Annotated[
    str,
    typer.Option("--preset", help="greedy, llama3-alpaca, mistral-base-alpaca or arena-hard: sampling as published."),
]
BatchOption = Annotated[
    int, typer.Option("--batch-tokens", help="Prompt and answer tokens of a batch at most; memory, not results.")
]


def generate(
    context: typer.Context,
    target: TargetArgument,
    prompts: PromptsOption,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE", help="The answers, in the benchmark's own form.", callback=folder_made),
    ],
    preset: PresetOption = "greedy",
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", help="In place of the preset's.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="1 is the whole distribution.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="0 is the whole distribution.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same answers.")] = 0,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system message.")] = None,
    base: BaseOption = None,
    engine: Annotated[str, typer.Option("--engine", help="auto, transformers or vllm.")] = "auto",
    batch_tokens: BatchOption = 65_536,
    name: Annotated[str | None, typer.Option("--name", help="What the answers' generator is called.")] = None,
    server: ServerOption = None,
    key_variable: KeyOption = None,
    concurrency: ConcurrencyOption = 8,
    timeout: TimeoutOption = 600.0,
    attempts: AttemptsOption = 6,
    per_minute: PaceOption = None,
    price: PriceOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a file of prompts. A killed command goes on where it was; the same inputs give the same bytes."""
    endpoint = approve = None
    if server is None:
        refuse_given(context, (*OF_A_SERVER, "price", "yes"), "only with --server is a server asked")
    else:
        refuse_given(context, ("base", "engine", "batch_tokens"), "the server named by --server decides that")
        endpoint = endpoint_of(target, server, key_variable, concurrency, timeout, attempts, per_minute)
        approve = approval_of(endpoint, yes)
    from lorafocal.generation import generate as run_generate

    no_loading_bars()
    report = run_generate(
        target,
        prompts,
        out=out,
        preset=preset,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        system=system,
        base=base,
        server=endpoint,
        price=price_of(price),
        approve=approve,
        engine=engine,
        batch_tokens=batch_tokens,
        name=name,
        say=say,
    )
    print_report(report, as_json)
