"""Which line of defence each test stands for: the guards, and how to take one away.

A guard is the code that keeps a known trap shut (a row of the pitfalls or feasibility tables). `make guards`
takes the guards away one by one and sees the named test fail; a test that still passes proves nothing.

To add one, append a line to `GUARDS`:

    Guard("11", "lorafocal.objectives.focal:focalpo", lambda original: naive, "tests/test_x.py::test_y"),

- rows: the rows it belongs to, separated by spaces; the test carries the same rows in its `row` marker.
- target: `module:attribute`, the attribute may be dotted (`Class.method`).
- replacement: gets the original, returns what stands in its place: what a careless author would have written.
- test: a pytest node id, without parameters if any failing case will do.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT_KEY = "LORAFOCAL_TEST_GUARD_OFF"

# The rows this project answers for so far. P0: wrong results, silently.
P0_ROWS = (
    "F1 F2 F3 F6 F11 F12 F13 F18 1 2 3 4 6 11 12 13 14 15 19 20 21 23 24 25 27 36 39 41 43 45 47 53 54 55 56 64"
).split()
OTHER_ROWS = "F9 F14 F19 7 8 10 22 32 51 52 57 63".split()


@dataclass(frozen=True, slots=True)
class Guard:
    rows: str
    target: str
    replacement: Callable[[Any], Any]
    test: str

    @property
    def name(self) -> str:
        """What `--guard-off` takes: the rows and the attribute, for example `11:focalpo`."""
        return f"{self.rows.replace(' ', '+')}:{self.target.partition(':')[2]}"


# fmt: off
GUARDS: list[Guard] = [
]
# fmt: on


def switch_off(name: str) -> None:
    """Replace the guard's target, also under the names other modules of the package have imported it by."""
    [guard] = [guard for guard in GUARDS if guard.name == name]
    module_name, _, path = guard.target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, attribute = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, attribute)
    replacement = guard.replacement(original)
    setattr(owner, attribute, replacement)
    if callable(original):  # constants such as True are shared by identity with everything else
        for loaded, module in list(sys.modules.items()):
            if loaded.partition(".")[0] == "lorafocal":
                for key in [key for key, value in vars(module).items() if value is original]:
                    setattr(module, key, replacement)


def switch_off_here_and_in_children(name: str) -> None:
    """`switch_off`, here and in every Python process started from here (guard_site/sitecustomize.py)."""
    tests = Path(__file__).resolve().parent
    search_path = [str(tests / "guard_site"), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, search_path))
    os.environ[ENVIRONMENT_KEY] = name
    switch_off(name)
