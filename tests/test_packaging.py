"""What the package promises to installers and readers: bounds, pins, and a README whose examples exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def pins(name: str) -> dict[str, Version]:
    """Package -> exact version, of a file of pins."""
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(len(r.specifier) == 1 and str(r.specifier).startswith("==") for r in requirements)
    return {canonicalize_name(r.name): Version(str(r.specifier)[2:]) for r in requirements}


def core_and_dev() -> list[Requirement]:
    return [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]


@pytest.mark.parametrize("requirement", core_and_dev(), ids=lambda requirement: requirement.name)
def test_the_tested_versions_lie_within_the_bounds(requirement: Requirement) -> None:
    tested = pins("torch.txt") | pins("locked.txt")
    assert requirement.specifier.contains(tested[canonicalize_name(requirement.name)])


def test_the_lowest_versions_are_the_bounds() -> None:
    bounds = {canonicalize_name(r.name): r.specifier for r in core_and_dev()}
    for name, version in pins("lowest.txt").items():
        assert bounds[name].contains(version)
        lower = Version(str(bounds[name]).removeprefix(">="))
        assert version.release[: len(lower.release)] == lower.release


def test_torch_is_pinned_apart_and_no_build_requirement() -> None:
    assert set(pins("torch.txt")) == {"torch"}
    assert "torch" not in pins("locked.txt")
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    assert [Requirement(text).name for text in build["requires"]] == ["hatchling"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_readme_has_examples() -> None:
    assert blocks("python")
    assert blocks("bash")


@pytest.mark.parametrize("source", blocks("python"))
def test_the_names_in_the_readme_exist(source: str) -> None:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names)


def command_lines(program: str) -> list[list[str]]:
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True)) and words[0] == program]


def in_the_docs() -> list[list[str]]:
    """Calls of `lorafocal` in the blocks of docs/*.md, fenced or indented."""
    pages = [page.read_text(encoding="utf-8").replace("\\\n", " ") for page in sorted((ROOT / "docs").glob("*.md"))]
    return [
        shlex.split(line, comments=True) for line in re.findall(r"^ *(lorafocal .*)", "\n".join(pages), re.MULTILINE)
    ]


def test_the_verbs_and_options_that_are_shown_exist() -> None:
    from typer.main import get_command

    from lorafocal.cli import app

    tree = get_command(app)
    for words in [*command_lines("lorafocal"), *in_the_docs()]:
        verb, rest = tree, words[1:]
        while hasattr(verb, "commands"):
            assert rest[0] in verb.commands, words
            verb = verb.commands[rest.pop(0)]
        options = {option for parameter in verb.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= options, words


@pytest.mark.parametrize("words", command_lines("make"), ids=" ".join)
def test_the_make_targets_in_the_readme_exist(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{re.escape(words[1])}:", makefile, flags=re.MULTILINE)


def test_the_readme_links_to_files_that_exist() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_ci_script_is_executable_bash() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True)
