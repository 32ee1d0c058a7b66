"""Starts commands in several processes, with a time limit that counts as failing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Together:
    """What two processes left: their exit code, what they said, and their folder."""

    code: int
    output: str
    folder: Path

    @property
    def ranks(self) -> list[dict[str, Any]]:
        """What each process wrote into `rank-N.json`; a launch that ended badly fails here, in the test that asks."""
        assert self.code == 0, self.output
        return [json.loads(file.read_text()) for file in sorted(self.folder.glob("rank-*.json"))]
