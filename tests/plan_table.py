"""What the paper's configs cost, for docs/reproduction.md, by `lorafocal plan`. Write it after a change of those:

python -m tests.plan_table --write
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from lorafocal.config import load_config
from lorafocal.hardware import parse
from lorafocal.memory import SHARING
from lorafocal.plan.machine import SHARE_OF_PEAK, OnMachine, on_machine
from lorafocal.plan.work import Work, work_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reproduction.md"
CONFIGS = ROOT / "configs" / "paper"
BEGIN, END = "<!-- plan_table: begin, by python -m tests.plan_table --write -->", "<!-- plan_table: end -->"

MACHINES = ("8xA100-40", "8xA100-80")
ENGINES = ("zero2", "zero3", "fsdp2")
LIVE = ("reference.kind=separate_model", "reference.model=the/base", "reference.identity_probe=null")
HEAD = (
    "GPUs", "engine", "reference", "weights", "masters", "gradients", "moments", "second model", "gathered, sent", "packs",
    "all GiB", "token rows", "tier", "a step", "hours", "GPU-hours",
)  # fmt: skip


def table() -> str:
    """One block for configs that cost the same, with a line for each machine, engine and reference."""
    blocks: dict[str, list[str]] = {}
    for file in sorted(CONFIGS.glob("*.yaml")):
        if "\nname: " in file.read_text(encoding="utf-8"):  # released.yaml is no run
            blocks.setdefault("\n".join(_rows(file)), []).append(file.stem)
    return "\n\n".join(f"**{', '.join(names)}**\n\n{rows}" for rows, names in blocks.items()) + "\n"


def _rows(file: Path) -> Iterator[str]:
    compared = load_config(file).reference is not None
    yield _row(HEAD)
    yield _row(["---", "---", "---", *["--:"] * 9, "---", *["--:"] * 3])
    for gpus in MACHINES:
        for engine in ENGINES:
            for words, overrides in (("stored", ()), ("live", LIVE)) if compared else (("none", ()),):
                work = work_of(load_config(file, [f"engine.kind={engine}", *overrides]))
                yield _row([gpus, engine, words, *_cells(work, on_machine(work, parse(gpus)))])


def _cells(work: Work, found: OnMachine) -> Iterator[str]:
    """Bytes by part in GiB, and what follows; a run that does not fit has bytes alone."""
    sizes = {part.name.partition(",")[0]: part.bytes / 2**30 for part in found.parts}
    masters = SHARING[found.engine].masters
    parts = ("weights", "master weights", "gradients", "optimiser", "reference")
    for name in parts:
        yield f"{sizes.get(name, 0):.1f}" if name != "master weights" or masters else "-"
    yield f"{sizes.get('gathered weights', 0) + sizes['exchange']:.1f}"
    yield f"{sizes['activations'] + sizes['head and workspaces']:.1f}"
    yield f"{found.used / 2**30:.1f}"
    if not found.fits or found.speed is None:
        yield from ("does not fit", "", "", "", "")
        return
    yield from (f"{found.choice.tokens:,}", found.choice.tier, f"{found.speed.step_s:.1f} s")
    yield from (f"{found.speed.hours:.2f}", f"{found.speed.gpu_hours:.1f}")


def _row(cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"  # type: ignore[call-overload]


def words() -> str:
    """What the numbers assume."""
    work = work_of(load_config(CONFIGS / "llama3-8b-focalpo.yaml"))
    assumed = "; ".join(line.partition(";")[0] for line in work.assumed)
    return (
        f"GiB of one GPU; {SHARE_OF_PEAK:.0%} of a card's bf16 peak (measured on none); {assumed}. Hours with"
        " evaluations and, where it is stored, the reference's one pass; saving checkpoints is not in them.\n"
    )


def written(page: str) -> str:
    """The page with the table between its marker lines. Raises ValueError where it has none."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"the page lacks the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{words()}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(words())
        print(table(), end="")
