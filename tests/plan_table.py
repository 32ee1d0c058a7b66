"""Writes what the paper's trainings hold on each GPU, by part, into docs/memory.md. Run it after a change of the plan:

python -m tests.plan_table
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lorafocal.config import load_config
from lorafocal.hardware import parse
from lorafocal.memory import SHARING
from lorafocal.plan.machine import OnMachine, on_machine
from lorafocal.plan.work import work_of
from tests.made_parts import made_anew

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "memory.md"

MODELS = ("mistral-7b", "llama3-8b")  # the objective changes nothing here
MACHINES = ("8xA100-40", "8xA100-80")
ENGINES = ("zero2", "zero3", "fsdp2")
REFERENCES = {
    "stored": (),
    "live": ("reference.kind=separate_model", "reference.model=the/base", "reference.identity_probe=null"),
}
HEAD = (
    "run", "engine", "reference", "weights", "masters", "gradients", "moments", "second model", "gathered, sent",
    "pack", "driver, slack", "all", "token rows", "tier", "a step",
)  # fmt: skip


def page(text: str) -> str:
    """docs/memory.md with its table written again."""
    return made_anew(text, plan_table=table().splitlines())


def table() -> str:
    """A line for each model, machine, engine and reference."""
    lines = [HEAD, ["---"] * 3 + ["--:"] * 10 + ["---", "--:"], *_lines()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _lines() -> Iterator[Sequence[str]]:
    for model in MODELS:
        file = ROOT / "configs" / "paper" / f"{model}-focalpo.yaml"
        for engine in ENGINES:
            for reference, overrides in REFERENCES.items():
                work = work_of(load_config(file, [f"engine.kind={engine}", *overrides]))
                for gpus in MACHINES:
                    yield [f"{model}, {gpus}", engine, reference, *_cells(on_machine(work, parse(gpus)))]


def _cells(found: OnMachine) -> Iterator[str]:
    """GiB by part and in all, and the packs that follow; of a run that does not fit what it would need."""
    sizes = {part.name.partition(",")[0]: part.bytes / 2**30 for part in found.parts}
    yield f"{sizes['weights']:.1f}"
    yield f"{sizes['master weights']:.1f}" if SHARING[found.engine].masters else "-"
    yield from (f"{sizes[name]:.1f}" for name in ("gradients", "optimiser"))
    yield f"{sizes['reference']:.1f}" if "reference" in sizes else "-"
    yield f"{sizes.get('gathered weights', 0) + sizes['exchange']:.1f}"
    yield f"{sizes['activations'] + sizes['head and workspaces']:.1f}"
    yield f"{sizes['driver and slack']:.1f}"
    yield f"{found.used / 2**30:.1f}"
    if found.fits and found.speed is not None:
        yield from (f"{found.choice.tokens:,}", found.choice.tier, f"{found.speed.step_s:.1f} s")
    else:
        yield from ("does not fit", "", "")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
