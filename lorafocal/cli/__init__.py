"""The `lorafocal` command: doors only. Nothing heavy is imported before a verb has read its arguments.

Exit codes: 0 done; 2 the user's input is wrong, or a file cannot be read or written (one message, no traceback);
130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP, once the run has finished its step and saved; 1 anything else.
"""

from __future__ import annotations

import errno
import logging
import sys
from typing import Annotated

import typer

from lorafocal import __version__, launch
from lorafocal.cli import diagnostics, evaluation, generation, judging, results, training
from lorafocal.errors import NO_ROOM, InputError, UnhealthyRun, first_line, ran_out

app = typer.Typer(
    name="lorafocal",
    help="Preference tuning with FocalPO, on LoRA adapters or on every parameter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_TRAINING = (
    training.train,
    training.check,
    training.plan,
    training.cache_reference,
    training.sweep,
    training.objectives,
)
_RESULTS = (results.report, results.curves, results.score, results.chat, results.merge, results.export, results.push)
_DIAGNOSTICS = (diagnostics.explain, diagnostics.suspects, diagnostics.advise)
_EVALUATIONS = (
    judging.alpaca,
    judging.arena,
    evaluation.rule,
    evaluation.reward,
    evaluation.leaderboard,
    evaluation.pairs,
    evaluation.compare,
    evaluation.fingerprint,
)
for verb in (*_TRAINING, *_RESULTS, *_DIAGNOSTICS, generation.generate, training.from_trl):
    app.command(verb.__name__.replace("_", "-"))(verb)
evaluations = typer.Typer(
    help="Judge answers or measure a model: the benchmarks people compare, and judge-free ones.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
for evaluation_verb in _EVALUATIONS:
    evaluations.command(evaluation_verb.__name__)(evaluation_verb)
app.add_typer(evaluations, name="evaluate")


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


def _told(error: OSError) -> str:
    """What the system says, of which file, and the way out of a disk that cannot be written."""
    words = (error.strerror, error.filename2 or error.filename)
    told = ": ".join(str(word) for word in words if word)
    ways_out = {
        **dict.fromkeys(NO_ROOM, "make room there, or name another folder by --runs or --out"),
        errno.EFBIG: "allow larger files there, or name another folder by --runs or --out",
        errno.EROFS: "name another folder by --runs or --out",
    }
    return f"{told}; {ways_out[error.errno]}" if error.errno in ways_out else told


def _ended_by(error: BaseException) -> int:
    """Say why the process ends; the exit code."""
    if isinstance(error, InputError):
        message, code = str(error), 2
    elif isinstance(error, OSError) and error.errno is not None:  # the system's word, else a library's
        message, code = _told(error), 2
    elif isinstance(error, UnhealthyRun):
        message, code = str(error), 1
    elif ran_out(error):
        message = f"the device has no memory left ({first_line(error)}); `lorafocal plan` says what a config needs"
        code = 1
    else:  # a defect, here or below
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    launch.last_words(f"lorafocal: {message}")
    return code


def _met_alone(end: SystemExit) -> bool:
    """Whether typer ends what this process alone has met: an interruption, or an output that nobody reads any more."""
    met = end.__context__
    return isinstance(met, OSError) or isinstance(getattr(met, "__cause__", None), KeyboardInterrupt)


def main() -> None:
    """Entry point of the console script; ends the process with one of the exit codes above."""
    code = 0
    # It misses a kernel for repacked 4-bit weights, which are never used here, and says so at every start.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        app(prog_name="lorafocal")
    except SystemExit as end:
        if not _met_alone(end):
            launch.shutdown()  # as all ranks agreed
            raise
        code = int(end.code or 1)
    except BaseException as error:  # noqa: BLE001 whatever it is, the process ends by it
        code = _ended_by(error)
    launch.leave(code)  # the error is let go of by now, and with it the trainer
