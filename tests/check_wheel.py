"""Look inside an installed wheel: every module imports, the configs are there, the command answers.

Run by `make wheel-check` with the Python of a clean environment, away from the source tree.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.resources
import importlib.util
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

import lorafocal
from lorafocal import recipes
from lorafocal.config import layers
from lorafocal.endpoints import Endpoint
from lorafocal.endpoints.client import Client
from lorafocal.errors import InputError
from lorafocal.evaluate import bradley_terry
from lorafocal.evaluate.alpaca_package import alpaca_eval
from lorafocal.evaluate.harness import find_tasks
from lorafocal.report.paper import paper_tables


def main() -> None:
    """Raise at the first thing that is missing; print what was found."""
    location = Path(lorafocal.__file__).resolve()
    if not location.is_relative_to(Path(sys.prefix).resolve()):
        raise SystemExit(f"imported the source tree instead of the wheel: {location}")

    names = [module.name for module in pkgutil.walk_packages(lorafocal.__path__, "lorafocal.")]
    if importlib.util.find_spec("triton") is None:  # only builds of torch for GPUs bring it
        names = [name for name in names if not name.startswith("lorafocal.ops.triton")]
    for name in names:
        if name != "lorafocal.__main__":
            importlib.import_module(name)

    configs = sorted(Path(str(importlib.resources.files("lorafocal") / "configs")).rglob("*.yaml"))
    if not configs or not all(isinstance(yaml.safe_load(path.read_text("utf-8")), dict) for path in configs):
        raise SystemExit(f"the wheel's configs are missing or broken: {[path.name for path in configs]}")

    for name in recipes.names():
        layers(recipes.path_of(name))  # the files that it extends; some name optimisers of an extra
    if not recipes.names() or not recipes.released():
        raise SystemExit(f"the wheel's recipes are missing from {recipes.folder()}")

    if not paper_tables(()).tables or not (importlib.resources.files("lorafocal") / "report/answers.js").is_file():
        raise SystemExit("the wheel's pages lack the paper's numbers or the script of answers")
    check_doors()

    command = [str(Path(sys.prefix) / "bin" / "lorafocal"), "--help"]
    help_text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    missing = [verb for verb in ("train", "score", "merge") if verb not in help_text]
    if missing:
        raise SystemExit(f"`lorafocal --help` does not name {missing}")
    version = importlib.metadata.version("lorafocal")
    print(f"wheel {version}: {len(names)} modules import, {len(configs)} configs, `lorafocal --help` answers")


def check_doors() -> None:
    """Each package of the extra `eval` is asked for behind one door, whose refusal says what to install."""
    doors: dict[str, Callable[[], object]] = {
        "alpaca_eval": lambda: alpaca_eval().__enter__(),
        "lm_eval": lambda: find_tasks(["gsm8k"], None, ()),
        "openai": lambda: Client(Endpoint("judge", "http://127.0.0.1:9/v1")),
        "sklearn": bradley_terry.library,
    }
    for package, door in doors.items():
        if importlib.util.find_spec(package) is not None:
            raise SystemExit(f"{package} is of the extra eval, and the core brings it")
        try:
            door()
        except InputError as error:
            if "pip install 'lorafocal[eval]'" in str(error):
                continue
        raise SystemExit(f"without {package}, nothing says what to install")


if __name__ == "__main__":
    main()
