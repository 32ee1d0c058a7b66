"""Starts commands in several processes, with a time limit that counts as failing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_S = 600
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def start(command: list[str], **settings: str) -> subprocess.Popen[str]:
    """`command` with this repository's lorafocal, in the folder `cwd`; the rest of `settings` goes to its environment.

    The commands of this environment (torchrun, accelerate, lorafocal) come first on its path.
    """
    folder = settings.pop("cwd", None)
    paths = {
        "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(REPOSITORY)))),
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
    }
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | paths | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and everything it printed; killed and reported as failing where it takes too long."""
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"still running after {LIMIT_S} s:\n{output}") from None
    return process.returncode, output


def run(command: list[str], **settings: str) -> tuple[int, str]:
    """Start, and wait for the end."""
    return ended(start(command, **settings))
