"""The house: floors, imports, sizes, names, and what may not stand in it. Read from the source with `ast`."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lorafocal"
LIBRARY_FILES = sorted(PACKAGE.rglob("*.py"))
OWN_FILES = sorted(path for room in ("lorafocal", "examples", "benchmarks") for path in (ROOT / room).rglob("*.py"))
ALL_FILES = OWN_FILES + sorted((ROOT / "tests").rglob("*.py"))

MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 80

# What stands directly in the package, and on which floor. A module imports from its floor or from lower ones.
FLOORS = {
    0: "errors config schema values yaml12 training_fields bounds compatibility launch metrics evaluations publish"
    " tensor_files shard_files together memory hardware recipes versions run_folder objectives references ops",
    1: "data model lineage card store",
    2: "policy reference comparison whole_step gathered probes caching",
    3: "arguments assembly budget callbacks engines bare_trainer trainer saving optimizers sampler checkpoint health"
    " interrupt resume progress manifest run given loggers",
    4: "generation endpoints release evaluate report rehearsal plan sweep stages chat provenance",
    5: "cli compat __init__ __main__",
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms.split()}

# These answer before the heavy libraries are loaded: `lorafocal --help`, and a config's errors.
LIGHT_FILES = (
    "errors config schema/__init__ schema/sections schema/steps schema/training schema/mistakes values yaml12"
    " training_fields bounds compatibility launch memory/__init__ hardware recipes versions run_folder __init__"
    " objectives/__init__ objectives/entry objectives/factor objectives/listing"
    " references/__init__ references/strategy"
    " __main__ cli/__init__ cli/options cli/training cli/results cli/evaluation"
    " cli/generation cli/judging cli/servers"
).split() + [f"objectives/registry/{path.stem}" for path in sorted((PACKAGE / "objectives/registry").glob("*.py"))]
HEAVY_LIBRARIES = {
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "accelerate",
    "matplotlib",
    "pandas",
    "bitsandbytes",
    "triton",
    "deepspeed",
    "alpaca_eval",
    "lm_eval",
    "openai",
    "sklearn",
    "vllm",
}

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "joblib", "dill", "cloudpickle", "shelve"}
FORBIDDEN_CALLS = {
    "eval", "exec", "__import__", "torch.load", "torch.save", "os.system", "os.popen",
    "jinja2.Environment", "jinja2.Template", "Environment",
}  # fmt: skip
FORBIDDEN_ARGUMENTS = {"shell", "trust_remote_code", "allow_pickle"}  # with anything but a literal False


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in LIBRARY_FILES}
TREES = {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in ALL_FILES}


def floor_of(module: str) -> int:
    room = module.split(".")[1] if "." in module else "__init__"
    assert room in FLOOR_OF, f"{module}: give `{room}` a floor in FLOORS, and a line in the README's file map"
    return FLOOR_OF[room]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def statements(tree: ast.AST, *, executed_at_import: bool) -> Iterator[ast.AST]:
    """All nodes, or only those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if executed_at_import:
            if is_type_checking(node):
                yield from (inner for branch in node.orelse for inner in ast.walk(branch))
                continue
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
        yield node
        yield from statements(node, executed_at_import=executed_at_import)


def imported_names(path: Path, *, executed_at_import: bool = False) -> set[str]:
    """Absolute names a file imports: both `import a.b` and `from a import b` give a.b."""
    package = list(path.relative_to(ROOT).parent.parts)
    names: set[str] = set()
    for node in statements(TREES[path], executed_at_import=executed_at_import):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{prefix}.{alias.name}" for alias in node.names}
    return names


def own_modules(names: set[str]) -> set[str]:
    """The modules of this package that the names stand for."""
    own = {name for name in names if name.split(".")[0] == "lorafocal"}
    return {name if name in MODULES else name.rpartition(".")[0] or name for name in own}


def test_there_is_something_to_test() -> None:
    assert len(LIBRARY_FILES) > 20


def test_imports_come_from_the_same_floor_or_below() -> None:
    above = [
        f"{module} (floor {floor_of(module)}) imports {other} (floor {floor_of(other)})"
        for module, path in MODULES.items()
        for other in sorted(own_modules(imported_names(path)))
        if floor_of(other) > floor_of(module)
    ]
    assert above == []


def test_no_import_cycles() -> None:
    graph = {
        module: own_modules(imported_names(path, executed_at_import=True)) - {module}
        for module, path in MODULES.items()
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


@pytest.mark.slow
def test_every_module_imports() -> None:
    for module in sorted(set(MODULES) - {"lorafocal.__main__"}):
        importlib.import_module(module)


def test_light_files_name_no_heavy_library() -> None:
    def heavy(path: Path) -> set[str]:
        return {name.split(".")[0] for name in imported_names(path, executed_at_import=True)} & HEAVY_LIBRARIES

    assert faults((PACKAGE / f"{room}.py" for room in LIGHT_FILES), heavy) == {}


DOORS = "lorafocal.cli, lorafocal.config"
READERS = (  # of answers and of what was said of them: seconds, where torch and transformers take half a minute
    "lorafocal.generation, lorafocal.evaluate.by_rule, lorafocal.evaluate.compare, lorafocal.evaluate.alpaca,"
    " lorafocal.evaluate.arena, lorafocal.report.answers_page"
)


@pytest.mark.slow
@pytest.mark.parametrize("modules", [DOORS, READERS])
def test_these_open_without_the_heavy_libraries(modules: str) -> None:
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {name.partition(".")[0] for name in loaded} & HEAVY_LIBRARIES


def faults_of_form(path: Path) -> Iterator[str]:
    """What makes a file hard to find one's way in."""
    source = path.read_text(encoding="utf-8")
    if source.strip() and not ast.get_docstring(TREES[path]):
        yield "no module docstring"
    if len(source.splitlines()) > MAX_FILE_LINES:
        yield f"over {MAX_FILE_LINES} lines"
    if path.stem in {"utils", "util", "common", "helpers", "helper", "misc"}:
        yield "a name that says nothing"
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{node.name} has {lines} lines, over {MAX_FUNCTION_LINES}"


def test_a_file_has_one_purpose_and_says_which() -> None:
    assert faults(ALL_FILES, faults_of_form) == {}


def faults(paths: Iterable[Path], of: Callable[[Path], Iterable[str]]) -> dict[str, list[str]]:
    """The faults of each file that has any."""
    found = {str(path.relative_to(ROOT)): list(of(path)) for path in paths}
    return {path: said for path, said in found.items() if said}


def forbidden_things(tree: ast.AST) -> Iterator[str]:
    """What could run code out of a file, a config or a string (security rules S1, S3, S6, S10, S16)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            roots = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            yield from (f"import {root}" for root in roots if root.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.Call):
            if (called := ast.unparse(node.func)) in FORBIDDEN_CALLS:
                yield f"{called}()"
            for argument in node.keywords:
                is_false = isinstance(argument.value, ast.Constant) and argument.value.value is False
                if argument.arg in FORBIDDEN_ARGUMENTS and not is_false:
                    yield f"{argument.arg}={ast.unparse(argument.value)}"
        elif isinstance(node, ast.List | ast.Tuple):
            words = [getattr(item, "value", None) for item in node.elts]
            if "pip" in words and "install" in words:
                yield "pip install at run time"


def test_nothing_executes_what_it_reads() -> None:
    assert faults(OWN_FILES, lambda path: forbidden_things(TREES[path])) == {}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x')",
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "subprocess.run('ls', shell=True)",
        "f(trust_remote_code=flag)",
        "jinja2.Environment()",
        "subprocess.run(['pip', 'install', 'x'])",
    ],
)
def test_the_forbidden_is_recognised(source: str) -> None:
    assert list(forbidden_things(ast.parse(source)))


# --- the README's file map ----------------------------------------------------------------------------------


def file_map() -> set[str]:
    """The paths named in the README's section "File map"."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## File map")[2].partition("\n## ")[0]
    return {name.rstrip("/") for name in re.findall(r"^\|\s*`([^`]+)`", section, flags=re.MULTILINE)}


def top_level_entries() -> set[str]:
    """What belongs to the project at the top of the tree: git's list, or what .gitignore lets through."""
    if shutil.which("git") and (ROOT / ".git").exists():
        listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return {line.partition("/")[0] for line in listing.splitlines()}
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()]
    names = {path.name for path in ROOT.iterdir()} - {".git"}
    return {name for name in names if not any(fnmatch(name, pattern) for pattern in ignored)}


def test_the_file_map_names_what_there_is() -> None:
    missing = {name for name in file_map() if not (ROOT / name).exists()}
    assert not missing, f"the README's file map names what does not exist: {sorted(missing)}"


def test_the_file_map_is_complete() -> None:
    rooms = {module_name(path).split(".")[1] for path in LIBRARY_FILES if path.parent != PACKAGE}
    files = {path.name for path in LIBRARY_FILES if path.parent == PACKAGE}
    wanted = top_level_entries() | {f"lorafocal/{name}" for name in rooms | files}
    assert not wanted - file_map(), f"not in the README's file map: {sorted(wanted - file_map())}"
