"""The `lorafocal` command: doors only. Nothing heavy is imported before a verb has read its arguments.

Exit codes: 0 done; 2 the user's input is wrong (one message, no traceback); 130 after Ctrl-C and 143 after
SIGTERM, once the run has finished its step and saved; 1 anything else.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from lorafocal import __version__, launch
from lorafocal.errors import InputError, UnhealthyRun

app = typer.Typer(
    name="lorafocal",
    help="Preference tuning with FocalPO on LoRA adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Values that replace the file's.")
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="An adapter's base, if not where the adapter says."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The YAML file that describes the run.")],
    overrides: OverridesArgument = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last whole checkpoint.")] = False,
    tiny: Annotated[
        bool,
        typer.Option(
            "--tiny",
            help="Rehearse CONFIG on a tiny model of its architecture with made-up pairs; writes nothing to keep.",
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress line.")] = False,
    runs: Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder that holds the run folders.")] = Path(
        "runs"
    ),
) -> None:
    """Train adapters as CONFIG says, into the run folder DIR/<name>."""
    from lorafocal.config import load_config

    if tiny and resume:
        raise InputError("--tiny keeps nothing that --resume could go on from: leave one of the two out")
    checked = load_config(config, overrides or [])
    launch.check_launch()
    _no_loading_bars()
    launch.quiet_unless_main()
    for warning in checked.warnings() if launch.is_main() else []:
        typer.echo(f"warning: {warning}", err=True)

    if tiny:
        from lorafocal.rehearsal import rehearse

        rehearsal = rehearse(checked, quiet=quiet)
        typer.echo(str(rehearsal))
        raise typer.Exit(0 if rehearsal.interrupted_by is None else 128 + rehearsal.interrupted_by)

    from lorafocal import run

    summary = run.train(checked, resume=resume, quiet=quiet, runs_dir=runs)
    if launch.is_main():
        typer.echo(str(summary))
        if summary.interrupted_by is not None:
            typer.echo(f"go on with:\n  {_resume_command()}")
    launch.meet()  # a launcher stops the others when one has ended, and rank 0 had something to say
    if summary.interrupted_by is not None:
        raise typer.Exit(128 + summary.interrupted_by)


@app.command()
def check(
    config: Annotated[Path, typer.Argument(help="The YAML file that describes the run.")],
    overrides: OverridesArgument = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write the findings as one web page.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read and tokenise a run's data as training would, and show what is in them. Needs no weights and no GPU."""
    from lorafocal.config import load_config

    checked = load_config(config, overrides or [])
    for warning in checked.warnings():
        typer.echo(f"warning: {warning}", err=True)

    from lorafocal.report.check import check_data

    report = check_data(checked)
    if html is not None:
        from lorafocal.report.check_page import write_check_page

        write_check_page(report, html)
    _print_report(report, as_json)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="The YAML file that describes the run.")],
    overrides: OverridesArgument = None,
    gpus: Annotated[str | None, typer.Option("--gpus", metavar="NxGPU", help="As 1xRTX4090 or 8xA100-40.")] = None,
    tflops: Annotated[
        float | None, typer.Option("--tflops", help="TFLOP/s of one GPU as measured; a share of its peak if absent.")
    ] = None,
    price: Annotated[float | None, typer.Option("--price", help="Of one GPU for an hour, in any currency.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What a run needs: memory by part, what fits on a GPU, how long it takes. Loads nothing, downloads nothing."""
    from lorafocal.config import load_config
    from lorafocal.plan import plan as make_plan

    _print_report(make_plan(load_config(config, overrides or []), gpus, tflops=tflops, price_per_hour=price), as_json)


@app.command("cache-reference")
def cache_reference(
    config: Annotated[Path, typer.Argument(help="The YAML file that describes the run; its reference.kind: cached.")],
    overrides: OverridesArgument = None,
    per_token: Annotated[bool, typer.Option("--per-token", help="Keep the log-prob of each token too.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result only.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compute the reference's log-probs once and keep them: training then runs no reference forward.

    A call that was killed goes on where it was; runs of other learning rates and seeds share what is there.
    """
    from lorafocal.config import load_config

    checked = load_config(config, overrides or [])
    launch.check_launch()
    _no_loading_bars()
    launch.quiet_unless_main()

    from lorafocal import run

    with _ends_tidily("stopped: what was computed is kept, and the same command goes on there"):
        report = run.cache_reference(checked, per_token=per_token, quiet=quiet)
    if launch.is_main():
        typer.echo(json.dumps(report.as_dict()) if as_json else str(report))
    launch.meet()


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(help="The YAML file that the runs have in common.")],
    overrides: OverridesArgument = None,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="KEY=V1,V2,...", help="Values of a key, as training.learning_rate=1e-6,5e-6."),
    ] = None,
    best: Annotated[
        str | None,
        typer.Option(
            "--best", metavar="METRIC", help="eval_loss or eval_rewards/accuracies; what is comparable if absent."
        ),
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder that holds the run folders.")] = Path(
        "runs"
    ),
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress line.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train every point of a grid, compare the runs on held-out pairs, name the best. The same command resumes."""
    from lorafocal.sweep import sweep as run_sweep

    _no_loading_bars()
    report = run_sweep(config, grid or [], overrides or [], runs_dir=runs, best=best, quiet=quiet)
    _print_report(report, as_json)
    if report.interrupted_by is not None:
        raise typer.Exit(128 + report.interrupted_by)
    if not report.record.of("finished"):
        raise typer.Exit(1)


@app.command()
def score(
    target: Annotated[str, typer.Argument(metavar="ADAPTER_OR_MODEL", help="An adapter folder, or a model.")],
    pairs: Annotated[Path, typer.Argument(help="Preference rows, or a run's held_out.jsonl.")],
    base: BaseOption = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="ADAPTER_OR_MODEL", help="What rewards are relative to, if not the base."),
    ] = None,
    beta: Annotated[float | None, typer.Option("--beta", help="Reward scale; the run's own if absent.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write one JSON object a pair here.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Log-probs, rewards and margins of each pair, computed by the code that trains."""
    from lorafocal.evaluate.score import score_file

    _no_loading_bars()
    _print_report(score_file(target, pairs, base=base, reference=reference, beta=beta, out=out), as_json)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="The adapter folder of a run.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the merged model; must not exist.")],
    base: BaseOption = None,
    pairs: Annotated[
        Path | None,
        typer.Option("--pairs", metavar="FILE", help="Held-out pairs of the gate; the run's own if absent."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Output dtype, bfloat16 or float32; the run's own if absent.")
    ] = None,
    gate_dtype: Annotated[
        str, typer.Option("--gate-dtype", help="What the gate computes in; bfloat16 halves its memory.")
    ] = "float32",
    max_drift: Annotated[
        float | None, typer.Option("--max-drift", help="Share of the learned effect that may be lost [0.1].")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Merge an adapter into its base, and publish the result only if it answers as the adapter does."""
    from lorafocal.release.merge import merge_adapter

    _no_loading_bars()
    limits: dict[str, Any] = {} if max_drift is None else {"max_drift": max_drift}
    report = merge_adapter(adapter, out, base=base, pairs=pairs, dtype=dtype, gate_dtype=gate_dtype, **limits)
    _print_report(report, as_json)
    if not as_json:
        typer.echo(f"merged model          {out}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, one or several to compare.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of the report; RUN/report for one run.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw runs and say in plain words what happened: one web page, and its pictures."""
    from lorafocal.report.write import write_report

    _print_report(write_report(runs, out), as_json)


@app.command("from-trl")
def from_trl(
    file: Annotated[Path, typer.Argument(metavar="TRL_YAML", help="A config of `trl dpo`.")],
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="Training rows in place of its data set.")
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option("--eval-data", metavar="FILE", help="Held-out rows in place of its own.")
    ] = None,
    objective: Annotated[str, typer.Option("--objective", help="focalpo or dpo.")] = "focalpo",
    gamma: Annotated[float | None, typer.Option("--gamma", help="FocalPO's exponent [0.05].")] = None,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="How many it ran on: its batch size was per process.")
    ] = 1,
) -> None:
    """Print a `trl dpo` config as a lorafocal config, each key with where it comes from."""
    from lorafocal.compat.trl_yaml import Options, yaml_from_trl

    options = Options(objective=objective, gamma=gamma, data=data, eval_data=eval_data, processes=processes)
    typer.echo(yaml_from_trl(file, options), nl=False)


@contextmanager
def _ends_tidily(words: str) -> Iterator[None]:
    """SIGTERM as an exception, as Ctrl-C is one: temporary folders are cleared away, and `words` are said."""

    def leave(received: int, _: object) -> None:
        raise SystemExit(128 + received)

    alone = launch.world_size() == 1  # a rank that waits for the others would not hear it
    before = signal.signal(signal.SIGTERM, leave) if alone else None
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        launch.last_words(words)
        raise
    finally:
        if alone:
            signal.signal(signal.SIGTERM, before)


def _no_loading_bars() -> None:
    """transformers draws a bar a file it loads; downloads keep theirs."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _resume_command() -> str:
    """This command line with --resume, under a launcher where there was one."""
    words = shlex.join([*(word for word in sys.argv[1:] if word != "--resume"), "--resume"])
    return (
        f"lorafocal {words}" if launch.world_size() == 1 else launch.several(words, processes=launch.local_world_size())
    )


def _print_report(report: Any, as_json: bool) -> None:
    typer.echo(json.dumps(report.as_dict(), indent=2, ensure_ascii=False) if as_json else report.table())


def main() -> None:
    """Entry point of the console script; ends the process with one of the exit codes above."""
    code = 0
    try:
        app(prog_name="lorafocal")
    except InputError as error:
        launch.last_words(f"lorafocal: {error}")
        code = 2
    except UnhealthyRun as error:
        launch.last_words(f"lorafocal: {error}")
        code = 1
    finally:
        launch.shutdown()
    sys.exit(code)
