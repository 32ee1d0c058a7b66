"""Several processes under one launcher: which of them speaks, what is refused, who goes first, how they end.

torchrun and `accelerate launch --multi_gpu` say in the environment which process this is. The command line asks before
anything heavy is loaded, so torch is imported by the functions that need it.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from lorafocal.compatibility import ENGINES, engine_refusal
from lorafocal.errors import InputError

FIRST_SPEAKS_S = 5.0  # how long the other ranks leave it to rank 0 to say what went wrong
STOPPED_WITHIN_S = "300"  # of a signal: a step and a checkpoint; torchrun's own 30 kill them half-way

# Set by a launcher for each process it starts, beside torchrun's WORLD_SIZE where it starts torchrun.
_COUNTS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}

# What accelerate's launcher hands on in the environment: engines, with the variable that says which kind and its
# prefix in the words of `lorafocal.compatibility`,
_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "zero"),
    "ACCELERATE_USE_FSDP": (None, "accelerate's own FSDP"),  # on CPUs it would silently be DDP
    "ACCELERATE_USE_MEGATRON_LM": (None, "Megatron-LM"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (None, "a parallelism config"),
}
# and settings, with the values that ask for nothing.
_ACCELERATE = {
    "ACCELERATE_MIXED_PRECISION": (("no",), "mixed precision (here the base's dtype decides: `model.dtype`)"),
    "ACCELERATE_DYNAMO_BACKEND": (("no",), "torch.compile (here `kernels.compile`)"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("1",), "accumulation (here `training.pairs_per_step` is the step)"),
    "ACCELERATE_GRADIENT_CLIPPING": (("none",), "clipping (here `training.max_grad_norm`)"),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": (("none",), "a DeepSpeed config file (here the `engine` section says it)"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": (("none",), "offload (here `engine.offload`)"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": (("none",), "offload of parameters (here `engine.offload: all`)"),
}


def rank() -> int:
    """Number of this process among all of the launch, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes of the launch; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Processes of the launch on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this process writes files and speaks."""
    return rank() == 0


def several(arguments: str = "train CONFIG", *, processes: int | str = "N") -> str:
    """The command that starts lorafocal in several processes of this machine."""
    return f"torchrun --standalone --nproc-per-node {processes} -m lorafocal {arguments}"


def launched() -> bool:
    """Whether a launcher has started this process."""
    return "WORLD_SIZE" in os.environ


def start(arguments: Sequence[str], processes: int) -> NoReturn:
    """Become the launcher that starts `lorafocal` with `arguments` in so many processes of this machine."""
    command = [sys.executable, "-m", "lorafocal.launch", "--standalone", f"--nproc-per-node={processes}"]
    sys.stdout.flush()
    os.execv(sys.executable, [*command, "-m", "lorafocal", *arguments])  # signals are the launcher's


def torchrun(words: Sequence[str]) -> int:
    """Run torchrun with `words`; the exit code of the process that failed first, which is named in one line.

    A process that ended with 2 has said why. torchrun by itself ends with 1 and a traceback of its own.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", STOPPED_WITHIN_S)
    try:
        main(list(words))
    except SignalException as error:  # handed on to all processes, which have ended
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        code = failure.exitcode
        if code < 0:
            how = f"was killed by {failure.signal_name()}, which ended the others: what was saved is kept"
            print(f"lorafocal: rank {number} {how}", file=sys.stderr, flush=True)
            return 128 - code
        if code != 2:
            print(f"lorafocal: rank {number} ended first, with exit code {code}", file=sys.stderr, flush=True)
        return code
    return 0


def visible_gpus() -> int:
    from torch.cuda import device_count

    return device_count()


def engine() -> str:
    """How this launch trains by itself, in the words of `lorafocal.compatibility.ENGINES`, or another engine's."""
    for name, (kind, prefix) in _ENGINES.items():
        if _is_on(name) and kind is None:
            return prefix
        if _is_on(name) and os.environ.get(str(kind)):  # else transformers has set it for an engine of this process
            return f"{prefix}{os.environ[str(kind)]}"
    return "ddp" if world_size() > 1 else "one-process"


def settle_precision(dtype: str) -> None:
    """Take accelerate's mixed precision for granted where it is what `dtype`, the config's, means anyway."""
    if dtype == "bfloat16" and os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() == "bf16":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # transformers would set it so


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() not in ("false", "")


def settled_engine(asked: str | None) -> str:
    """The engine of this launch: what a config asks for, where the launcher does not say another one.

    Raises InputError where they differ, and where processes that share a model were not started by a launcher.
    """
    own = engine()
    if asked is None or asked == own:
        return own
    if own not in ("one-process", "ddp"):
        raise InputError(
            f"engine.kind is {asked}, but accelerate launched for {own}: leave one of the two out, or make them"
            " the same"
        )
    if asked == "ddp":
        return own
    if asked not in ENGINES:
        raise InputError(f"engine is {asked!r}; choose one of {', '.join(ENGINES[1:])}")
    if not launched():
        raise InputError(
            f"{asked} shares a model between processes that a launcher starts: `lorafocal train CONFIG --engine {asked}"
            f" --processes N`, or `{several()}`"
        )
    return asked


def check_launch() -> None:
    """Refuse a launch that starts fewer processes than it was asked for, or asks for what nobody here would honour.

    `accelerate launch --num_processes 2` starts one process where it finds no second GPU or is told `--cpu`; it still
    hands on an address for the processes to meet at. Raises InputError.
    """
    way_out = (
        f"start them by `{several()}`, or by `accelerate launch --multi_gpu --num_processes N -m lorafocal train"
        " CONFIG` (on CPUs as well)"
    )
    if not launched():
        if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ:
            raise InputError(
                "accelerate launch was asked for more than one process and started one, as it does with --cpu, and"
                f" without --multi_gpu where it sees one device: {way_out}"
            )
        for name, launcher in _COUNTS.items():
            if int(os.environ.get(name, "1")) > 1:
                raise InputError(
                    f"{launcher} started {os.environ[name]} processes that do not know of each other ({name} is set,"
                    f" WORLD_SIZE is not); each would train alone, into the same folder: {way_out}"
                )
    if refusal := engine_refusal(engine()):
        raise InputError(f"accelerate's settings: {refusal}")
    asked = [
        what for name, (nothing, what) in _ACCELERATE.items() if os.environ.get(name, "").lower() not in (*nothing, "")
    ]
    if asked:
        raise InputError(
            f"accelerate's settings ask for {' and '.join(asked)}, which lorafocal does not use: leave it out of"
            f" `accelerate config`, or start without accelerate: `{several()}`"
        )


def check_world(joined: int) -> None:
    """Refuse to go on where fewer processes found each other than were launched. Raises InputError."""
    if joined != world_size():
        from torch.cuda import is_available

        if not is_available():
            raise InputError(
                f"{world_size()} processes were launched, but there is no GPU here, so training would run in {joined}:"
                " to train on CPUs say so by `training.use_cpu=true`"
            )
        raise InputError(
            f"{world_size()} processes were launched, but training would run in {joined}: start them by `{several()}`"
        )


def idle_gpus(visible: int) -> str | None:
    """A line for whoever starts one process where several GPUs are visible; None otherwise."""
    if world_size() > 1 or visible < 2:
        return None
    return f"note: one of {visible} visible GPUs is used; all of them: {several(processes=visible)}"


def quiet_unless_main() -> None:
    """Notes and warnings of libraries come from rank 0 alone; errors from every rank."""
    if not is_main():
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")


@contextmanager
def main_process_first() -> Iterator[None]:
    """Rank 0 runs the block, then the others: for work that is found done the second time, such as filling a cache.

    The process group must exist. An error on rank 0 lets the others go on to meet it themselves.
    """
    if not is_main():
        meet()
    try:
        yield
    finally:
        if is_main():
            meet()


def meet() -> None:
    """Wait for the other processes, if there are any."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def shutdown() -> None:
    """Leave the other processes in good order; the caller has let go of the trainer and the wrapped model.

    gloo aborts at random when the interpreter ends with a process group, or with a wrapped model that outlives it.
    """
    if (group := _joined()) is not None:
        gc.collect()
        group.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process after an error that the other ranks may know nothing of.

    NCCL's own farewell waits for what they still compute together, and they for this rank: without it, the launcher
    sees that the process has ended, and ends them.
    """
    if (group := _joined()) is not None and "nccl" in str(group.get_backend_config()):
        logging.shutdown()
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    shutdown()
    sys.exit(code)


def _joined() -> Any:
    """`torch.distributed` where this process is in a group of processes; None where it is not, or has no torch."""
    torch: Any = sys.modules.get("torch")
    there = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed if there else None


def last_words(message: str) -> None:
    """Print why the run ends to stderr, once: what all ranks meet is said by rank 0, what one rank meets by that one.

    The launcher sends SIGTERM to the other ranks when one has ended, so a rank that is not asked to end within
    `FIRST_SPEAKS_S` is alone with its message.
    """
    if is_main():
        print(message, file=sys.stderr, flush=True)
    elif not _asked_to_end(within_s=FIRST_SPEAKS_S):
        print(f"rank {rank()} of {world_size()}: {message}", file=sys.stderr, flush=True)


def _asked_to_end(*, within_s: float) -> bool:
    """Wait for SIGTERM, which no longer ends this process by itself."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    end = time.monotonic() + within_s
    while not asked and time.monotonic() < end:
        time.sleep(0.05)
    return bool(asked)


if __name__ == "__main__":
    sys.exit(torchrun(sys.argv[1:]))
