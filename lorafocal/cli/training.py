"""Verbs around training: from a config to a trained run."""

from __future__ import annotations

import json
import math
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafocal import launch
from lorafocal.cli.options import JsonOption, OverridesArgument, no_loading_bars, numbers, page_place, print_report
from lorafocal.errors import InputError

if TYPE_CHECKING:
    from lorafocal.config import Config
    from lorafocal.memory import Lengths
    from lorafocal.run import RunSummary
    from lorafocal.stages import StagedSummary

EngineOption = Annotated[
    str | None,
    typer.Option("--engine", metavar="KIND", help="ddp, zero1, zero2, zero3 or fsdp2: engine.kind of the config."),
]
ProcessesOption = Annotated[
    int | None,
    typer.Option("--processes", min=1, metavar="N", help="Start N processes on this machine, one a GPU."),
]


def train(
    config: Annotated[Path | None, typer.Argument(help="The YAML file that describes the run.")] = None,
    overrides: OverridesArgument = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last whole checkpoint.")] = False,
    repro: Annotated[
        Path | None,
        typer.Option(
            "--repro",
            metavar="MANIFEST",
            help="In place of CONFIG: the manifest.json of a run, to train it again and refuse other inputs.",
        ),
    ] = None,
    tiny: Annotated[
        bool,
        typer.Option(
            "--tiny",
            help="Rehearse CONFIG on a tiny model of its architecture with made-up pairs; writes nothing to keep.",
        ),
    ] = False,
    engine: EngineOption = None,
    processes: ProcessesOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress line.")] = False,
    runs: Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder that holds the run folders.")] = Path(
        "runs"
    ),
) -> None:
    """Train as CONFIG says, adapters or every parameter, into the run folder DIR/<name>."""
    if tiny and (resume or repro):
        raise InputError(f"--tiny keeps nothing, and {'--resume' if resume else '--repro'} needs a run: leave one out")
    checked = _run_of(config, _with_engine(overrides, engine), repro)
    engine_kind = None if checked.engine is None else checked.engine.kind
    _prepare(checked, engine_kind, processes, None if tiny else checked.model.backend)  # it rehearses on transformers
    for warning in checked.warnings() if launch.is_main() else []:
        typer.echo(f"warning: {warning}", err=True)

    if tiny:
        from lorafocal.rehearsal import rehearse

        rehearsal = rehearse(checked, quiet=quiet)
        if rehearsal is None:  # not the process that speaks
            return
        typer.echo(str(rehearsal))
        raise typer.Exit(0 if rehearsal.interrupted_by is None else 128 + rehearsal.interrupted_by)

    summary: RunSummary | StagedSummary
    if repro is not None:
        from lorafocal import provenance

        done = provenance.reproduce(checked, repro, resume=resume, quiet=quiet, runs_dir=runs)
        summary, said = done.summary, str(done)
    else:
        from lorafocal import run, stages
        from lorafocal.evaluate.during import callbacks

        begin = run.train if checked.stages is None else stages.train_stages
        summary = begin(checked, resume=resume, quiet=quiet, runs_dir=runs, callbacks=callbacks)
        said = str(summary)
    if launch.is_main():
        from lorafocal.progress import tell  # as the run's own lines, which a reader who left does not fail

        tell(sys.stdout, f"{said}\n")
        if summary.interrupted_by is not None:
            tell(sys.stdout, f"go on with:\n  {resume_command()}\n")
    launch.meet()  # a launcher stops the others when one has ended, and rank 0 had something to say
    if summary.interrupted_by is not None:
        raise typer.Exit(128 + summary.interrupted_by)


def check(
    config: Annotated[Path, typer.Argument(help="The YAML file that describes the run.")],
    overrides: OverridesArgument = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Also write the findings as one web page.", callback=page_place),
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
        from lorafocal.report.check_page import check_page
        from lorafocal.report.html import write_page

        write_page(html, check_page(report))
    print_report(report, as_json)


def plan(
    config: Annotated[Path, typer.Argument(help="The YAML file that describes the run.")],
    overrides: OverridesArgument = None,
    gpus: Annotated[str | None, typer.Option("--gpus", metavar="NxGPU", help="As 1xRTX4090 or 8xA100-40.")] = None,
    engine: EngineOption = None,
    tflops: Annotated[
        float | None, typer.Option("--tflops", help="TFLOP/s of one GPU as measured; a share of its peak if absent.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", metavar="P,C,R", help="Mean tokens of prompts, chosen and rejected answers."),
    ] = None,
    price: Annotated[float | None, typer.Option("--price", help="Of one GPU for an hour, in any currency.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What a run needs: memory by part, what fits on a GPU, how long it takes. Loads nothing, downloads nothing."""
    from lorafocal.config import load_config
    from lorafocal.plan import plan as make_plan

    checked = load_config(config, _with_engine(overrides, engine))
    means = None if lengths is None else _mean_lengths(lengths)
    print_report(make_plan(checked, gpus, tflops=tflops, lengths=means, price_per_hour=price), as_json)


def _mean_lengths(text: str) -> Lengths:
    from lorafocal.memory import Lengths

    found = numbers("--lengths", text)
    if len(found) != 3 or not all(0 < length < math.inf for length in found):
        raise InputError(f"--lengths {text!r}: give three numbers above 0, of prompts, chosen and rejected answers")
    return Lengths(*found)


def cache_reference(
    config: Annotated[Path, typer.Argument(help="The YAML file that describes the run; its reference.kind: cached.")],
    overrides: OverridesArgument = None,
    per_token: Annotated[bool, typer.Option("--per-token", help="Keep the log-prob of each token too.")] = False,
    processes: ProcessesOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result only.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compute the reference's log-probs once and keep them: training then runs no reference forward.

    A call that was killed goes on where it was; runs of other learning rates and seeds share what is there.
    """
    from lorafocal.config import load_config

    checked = load_config(config, overrides or [])
    _prepare(checked, None, processes, checked.model.backend)

    from lorafocal import run

    with ends_tidily("stopped: what was computed is kept, and the same command goes on there"):
        report = run.cache_reference(checked, per_token=per_token, quiet=quiet)
    if launch.is_main():
        typer.echo(json.dumps(report.as_dict()) if as_json else str(report))
    launch.meet()


def objectives(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One of them; all if absent.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the objectives: parameters with their defaults; of one also its paper, what it needs, and a config."""
    from lorafocal.objectives.listing import described

    print_report(described(name), as_json)


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

    no_loading_bars()
    report = run_sweep(config, grid or [], overrides or [], runs_dir=runs, best=best, quiet=quiet)
    print_report(report, as_json)
    if report.interrupted_by is not None:
        raise typer.Exit(128 + report.interrupted_by)
    if not report.record.of("finished"):
        raise typer.Exit(1)


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
def ends_tidily(words: str) -> Iterator[None]:
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


def _run_of(config: Path | None, overrides: list[str], repro: Path | None) -> Config:
    """The run that a command line describes: by a file, or by the manifest of one that was done."""
    if repro is not None:
        from lorafocal.provenance import config_of

        if config is not None and "=" not in str(config):
            raise InputError(f"--repro trains what {repro} says: leave {config} out, or --repro")
        return config_of(repro, overrides if config is None else [str(config), *overrides])
    if config is None:
        raise InputError("which run? Name its CONFIG, or --repro the manifest.json of one that was done")
    from lorafocal.config import load_config

    return load_config(config, overrides)


def _with_engine(overrides: list[str] | None, engine: str | None) -> list[str]:
    return [*(overrides or []), *([] if engine is None else [f"engine.kind={engine}"])]


def _prepare(config: Config, engine: str | None, processes: int | None, backend: str | None) -> None:
    """This process among those of the launch, before any library that computes is imported, in this order."""
    _launch(engine, processes)
    if backend is not None:
        _begin(backend)
    launch.settle_precision(config.model.dtype)
    launch.check_launch()
    no_loading_bars()
    launch.quiet_unless_main()


def _launch(engine: str | None, processes: int | None) -> None:
    """Become the launcher of `processes` of this very command, where that is asked for or the engine needs one."""
    if launch.launched():
        if processes not in (None, launch.world_size()):
            raise InputError(
                f"--processes {processes}, but a launcher has started {launch.world_size()}: leave --processes out"
            )
    elif processes is not None or engine not in (None, "ddp"):
        launch.start(without_option(sys.argv[1:], "--processes"), processes or launch.visible_gpus() or 1)


def without_option(words: list[str], option: str) -> list[str]:
    """A command line without `option` and its value."""
    kept, skip = [], False
    for word in words:
        if not skip and word != option and not word.startswith(f"{option}="):
            kept.append(word)
        skip = not skip and word == option
    return kept


def resume_command() -> str:
    """This command line with --resume, under a launcher where there was one."""
    words = shlex.join([*(word for word in sys.argv[1:] if word != "--resume"), "--resume"])
    if launch.world_size() == 1:
        return f"lorafocal {words}"
    if launch.local_world_size() < launch.world_size():  # how they meet, their launcher alone knows
        return f"(the launcher as before, on every machine) -m lorafocal {words}"
    return launch.several(words, processes=launch.local_world_size())


def _begin(backend: str) -> None:
    """Let a backend be imported before the libraries that it changes."""
    if backend != "transformers":
        from lorafocal.model import backends

        backends.named(backend).start()
