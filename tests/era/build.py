"""Make the golden numbers anew: `python tests/era/build.py [--check]`, minutes, and the package index.

A throwaway environment gets requirements/era.txt beside the torch of requirements/torch.txt; `produce.py` runs in it
and its numbers replace golden.json. `--check` compares instead, and ends with 1 where a number differs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE.parent.parent / "requirements"
GOLDEN = HERE / "golden.json"
RELATIVE = 1e-4  # of floats on another processor; ids are equal


def make_environment(folder: Path) -> Path:
    """An environment with the stack of the era; its python. torch goes first and alone (see torch.txt)."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-q", "--no-compile"]
    subprocess.run([*pip, "-r", str(REQUIREMENTS / "torch.txt")], check=True)
    subprocess.run([*pip, "-c", str(REQUIREMENTS / "torch.txt"), "-r", str(REQUIREMENTS / "era.txt")], check=True)
    return python


def produce(python: Path, target: Path) -> None:
    """Run `produce.py`, offline."""
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([str(python), str(HERE / "produce.py"), str(target)], check=True, env=os.environ | offline)


def same(a: Any, b: Any) -> bool:
    """Equal, floats within RELATIVE."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=RELATIVE, abs_tol=RELATIVE)
    return bool(a == b)


def main() -> None:
    parser = argparse.ArgumentParser(description="golden numbers of TRL 0.11.4")
    parser.add_argument("--check", action="store_true", help="compare with golden.json, write nothing")
    parser.add_argument(
        "--environment", type=Path, help="where the environment is made and kept; else in a temporary folder"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.environment or Path(temporary) / "environment"
        python = folder / "bin" / "python"
        made = Path(temporary) / "golden.json"
        produce(python if python.exists() else make_environment(folder), made)
        if not given.check:
            GOLDEN.write_bytes(made.read_bytes())
        elif not same(json.loads(made.read_text()), json.loads(GOLDEN.read_text())):
            raise SystemExit("the numbers are not those of golden.json")


if __name__ == "__main__":
    main()
