"""Verbs around what was trained: read it, ask it, merge it, hand it on."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from lorafocal.cli.options import (
    BaseOption,
    JsonOption,
    ReferenceOption,
    finish,
    no_loading_bars,
    numbers,
    only_over,
    print_report,
)
from lorafocal.errors import InputError
from lorafocal.publish import check_free
from lorafocal.run_folder import check_there

AdaptersArgument = Annotated[
    list[Path], typer.Argument(metavar="ADAPTER...", help="The adapter folder of a run, or several of one base.")
]
WeightsOption = Annotated[
    str | None,
    typer.Option("--weights", metavar="W1,W2,...", help="Signed weights of several adapters, as 1,-0.5; 1 each."),
]
OntoOption = Annotated[
    str,
    typer.Option(
        "--onto",
        help="Of a quantised base: trained (de-quantised), original (its float weights), auto (what drifts less).",
    ),
]
OriginalOption = Annotated[
    str | None,
    typer.Option("--original", metavar="MODEL", help="The float model that a base stored quantised was made of."),
]
PairsOption = Annotated[
    Path | None,
    typer.Option("--pairs", metavar="FILE", help="Held-out pairs of the gate; the run's own if absent."),
]
OutputDtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="Output dtype: bfloat16, float16 or float32; the run's own if absent."),
]
GateDtypeOption = Annotated[
    str, typer.Option("--gate-dtype", help="What the gate computes in; bfloat16 halves its memory.")
]
MaxDriftOption = Annotated[
    float | None, typer.Option("--max-drift", help="Share of the learned effect that may be lost [0.1].")
]
PublicOption = Annotated[bool, typer.Option("--public", help="Let everybody read what is pushed.")]
WithPairsOption = Annotated[bool, typer.Option("--with-pairs", help="Push the gate's held-out pairs too.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Push without asking.")]


def report(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run folders; with --paper results, with --answers files of answers."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="PATH", help="Folder of the report (RUN/report for one run); a page of answers."),
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Results of `evaluate` beside the paper's tables, into the folder --out.")
    ] = False,
    answers: Annotated[
        bool, typer.Option("--answers", help="Answers of `generate` side by side, on one page to browse, --out.")
    ] = False,
    verdicts: Annotated[
        list[Path] | None,
        typer.Option("--verdicts", metavar="RESULT", help="With --answers: a result to show beside; may be repeated."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="With --answers of Arena-Hard: its question.jsonl.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw runs and say in plain words what happened: one web page, and its pictures. Also the paper's tables with
    yours (--paper), and answers side by side (--answers)."""
    if paper and answers:
        raise InputError("--paper and --answers are two reports: ask for one at a time")
    if not answers and (verdicts or prompts is not None):
        raise InputError("--verdicts and --prompts go with --answers: leave them out")
    if (paper or answers) and out is None:
        raise InputError(f"say by --out where {'the page' if answers else 'the report'} goes")
    if paper:
        from lorafocal.report.paper_page import write_paper

        print_report(write_paper(files, Path(out or "")), as_json)
    elif answers:
        from lorafocal.report.answers_page import write_answers_page

        print_report(write_answers_page(files, Path(out or ""), verdicts=verdicts or (), prompts=prompts), as_json)
    else:
        from lorafocal.report.write import write_report

        print_report(write_report(files, out), as_json)


def curves(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the pictures and curves.csv.")],
    gamma: Annotated[float, typer.Option("--gamma", help="FocalPO's exponent.")] = 0.05,
    as_json: JsonOption = False,
) -> None:
    """Draw the paper's Figures 2, 3 and 4 from the losses that train, and say where FocalPO's weight peaks."""
    from lorafocal.report.curves import write_curves

    print_report(write_curves(out, gamma=gamma), as_json)


def scores_place(path: Path | None) -> Path | None:
    """A file for scores, in the place of nothing but earlier scores: what is scored has the same ending."""
    return only_over(path, _are_scores, "--out would replace what it did not write")


def _are_scores(path: Path) -> bool:
    from lorafocal.evaluate.score import PairScore

    known = {"margin", *(column.name for column in fields(PairScore))}
    needed = {column.name for column in fields(PairScore) if column.default is MISSING}
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    except (ValueError, RecursionError):
        return False
    return all(isinstance(row, dict) and needed <= row.keys() <= known for row in rows)


def score(
    target: Annotated[str, typer.Argument(metavar="ADAPTER_OR_MODEL", help="An adapter folder, or a model.")],
    pairs: Annotated[Path, typer.Argument(help="Preference rows, or a run's held_out.jsonl.")],
    base: BaseOption = None,
    reference: ReferenceOption = None,
    beta: Annotated[float | None, typer.Option("--beta", help="Reward scale; the run's own if absent.")] = None,
    ches: Annotated[
        bool, typer.Option("--ches", help="Also how alike both answers' hidden states are, which displacement follows.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write one JSON object a pair here.", callback=scores_place),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Log-probs, rewards and margins of each pair, computed by the code that trains."""
    from lorafocal.evaluate.score import score_file

    no_loading_bars()
    finish(score_file(target, pairs, base=base, reference=reference, beta=beta, ches=ches), out, as_json)


def chat(
    target: Annotated[Path, typer.Argument(metavar="RUN", help="A run, an adapter folder, or a merged model.")],
    base: BaseOption = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="Answer this and leave; may be repeated.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens of an answer at most.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.7,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same answers.")] = 0,
) -> None:
    """Ask a trained model one question at a time: the answers with the adapter and without, side by side."""
    from lorafocal.chat import chat as run_chat

    no_loading_bars()
    drawing: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    run_chat(target, base=base, prompts=tuple(prompts or ()), system=system, **drawing)


def merge(
    adapters: AdaptersArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the merged model; must not exist.")],
    weights: WeightsOption = None,
    base: BaseOption = None,
    onto: OntoOption = "auto",
    original: OriginalOption = None,
    pairs: PairsOption = None,
    dtype: OutputDtypeOption = None,
    gate_dtype: GateDtypeOption = "float32",
    max_drift: MaxDriftOption = None,
    as_json: JsonOption = False,
) -> None:
    """Merge adapters into their base, and publish the result only if it answers as they do."""
    _check_places(adapters, out)
    from lorafocal.release.merge import merge_adapter

    no_loading_bars()
    asked = _merging(weights, base, onto, original, pairs, dtype, gate_dtype, max_drift)
    report = merge_adapter(adapters, out, **asked)
    print_report(report, as_json)
    if not as_json:
        typer.echo(f"merged model          {out}")


def export(
    adapters: AdaptersArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of what is exported; must not exist.")],
    form: Annotated[
        str,
        typer.Option(
            "--as", metavar="FORM", help="bundle, merged, adapter, nf4, nf4-double, fp4, fp4-double, int8, fp8 or gguf."
        ),
    ] = "bundle",
    weights: WeightsOption = None,
    base: BaseOption = None,
    onto: OntoOption = "auto",
    original: OriginalOption = None,
    pairs: PairsOption = None,
    dtype: OutputDtypeOption = None,
    gate_dtype: GateDtypeOption = "float32",
    max_drift: MaxDriftOption = None,
    converter: Annotated[
        Path | None,
        typer.Option("--converter", metavar="FILE", help="llama.cpp's convert_hf_to_gguf.py, for --as gguf."),
    ] = None,
    outtype: Annotated[
        str | None, typer.Option("--outtype", help="What the converter stores, as bf16 or q8_0, for --as gguf.")
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push", metavar="OWNER/NAME", help="Then upload it, after asking; private.")
    ] = None,
    public: PublicOption = False,
    with_pairs: WithPairsOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Package adapters for others: a bundle that a stranger can verify, a merged model, GGUF, 4 or 8 bits."""
    if push is None and (public or with_pairs or yes):
        raise InputError("--public, --with-pairs and --yes say how to push: add --push OWNER/NAME, or leave them out")
    if with_pairs and form != "bundle":
        raise InputError("--with-pairs goes with --as bundle, which alone holds pairs: leave it out")
    if form != "gguf" and (converter is not None or outtype is not None):
        raise InputError("--converter and --outtype go with --as gguf: leave them out")
    _check_places(adapters, out)
    from lorafocal.release.export import export as run_export

    no_loading_bars()
    asked = _merging(weights, base, onto, original, pairs, dtype, gate_dtype, max_drift)
    if push is not None:
        from lorafocal.release.push import check_destination

        check_destination(push, public=public)  # an export takes long, and this may be known to fail
    report = run_export(adapters, out, form=form, converter=converter, outtype=outtype, **asked)
    print_report(report, as_json)
    if push is not None:
        _push(out, push, public=public, with_pairs=with_pairs, yes=yes, err=as_json)


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `lorafocal export` or `merge` wrote.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository; made if there is none.")],
    public: PublicOption = False,
    with_pairs: WithPairsOption = False,
    yes: YesOption = False,
) -> None:
    """Upload an exported folder to a model hub: shown first, private, one commit."""
    _push(folder, repo, public=public, with_pairs=with_pairs, yes=yes, err=False)


def _push(folder: Path, repo: str, *, public: bool, with_pairs: bool, yes: bool, err: bool) -> None:
    """Ask, upload, and say where it went; on standard error where the output is for a program (`err`)."""
    from lorafocal.release.push import push as run_push

    say = partial(typer.echo, err=err)
    confirm = (lambda question: say(question) is None) if yes else partial(typer.confirm, err=True)
    say(f"pushed to {run_push(folder, repo, public=public, with_pairs=with_pairs, confirm=confirm)}")


def _check_places(adapters: list[Path], out: Path) -> None:
    """What can be refused before the libraries are loaded, which takes seconds."""
    check_free(out)
    for adapter in adapters:
        check_there(adapter)


def _merging(
    weights: str | None,
    base: str | None,
    onto: str,
    original: str | None,
    pairs: Path | None,
    dtype: str | None,
    gate_dtype: str,
    max_drift: float | None,
) -> dict[str, Any]:
    """The options of `merge` as `release.merge.merge_adapter` takes them."""
    limits = {} if max_drift is None else {"max_drift": max_drift}
    signed = None if weights is None else numbers("--weights", weights)
    given = {"weights": signed, "base": base, "onto": onto, "original": original, "pairs": pairs}
    return {**given, "dtype": dtype, "gate_dtype": gate_dtype, **limits}
