"""A plan for a terminal: one machine in detail, or the common cards side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorafocal.compatibility import TITLES
from lorafocal.memory import WHOLE

if TYPE_CHECKING:
    from lorafocal.plan import Plan
    from lorafocal.plan.machine import OnMachine
    from lorafocal.plan.work import Work

WIDTH = 100
KEPT = {"none": "all kept", "mlp": "gate and up computed again", "full": "every layer computed again"}


def machine_text(plan: Plan) -> str:
    """Memory by part, packs, time, and what to change, on the one machine of `plan`."""
    (found,) = plan.machines
    blocks = [
        f"{plan.work.name} on {found.machine}{_shared_by(found)}: {'fits' if found.fits else 'does not fit'}",
        "\n".join(_memory(found)),
        "\n".join([*_packs(plan.work, found), *_time(plan.work, found)]),
        *_listed("to try" if found.fits else "what would make it fit", plan.advice),
        *_listed("assumed", plan.assumed),
    ]
    return "\n\n".join(filter(None, blocks))


def _shared_by(found: OnMachine) -> str:
    return "" if found.engine in WHOLE else f" under {TITLES.get(found.engine, found.engine)}"


def _memory(found: OnMachine) -> Iterator[str]:
    limit = found.machine.gpu.memory_bytes
    yield f"  {'memory of one GPU':<20}{'GiB':>8}"
    for part in found.parts:
        yield f"  {part.name:<20}{part.bytes / 2**30:>8.2f}   {part.words}"
    over = "" if found.fits else f"   {found.choice.reason}"
    yield f"  {'all of it':<20}{found.used / 2**30:>8.2f}   of {limit / 2**30:.2f}{over and ':' + over[2:]}"
    if found.host_bytes:
        yield f"  {'in the machine':<20}{found.host_bytes / 2**30:>8.2f}   of its own memory, what all GPUs offload"
    if found.loading_bytes:
        yield f"  {'':<20}{found.loading_bytes / 2**30:>8.2f}   while models load: whole in every process"


def _packs(work: Work, found: OnMachine) -> Iterator[str]:
    choice = found.choice
    stated = "as stated" if work.tokens is not None else "auto"
    if found.fits:
        pairs = _count(max(1, int(choice.tokens / work.rows_per_pair)), "pair")
        packs = _count(found.packs, "pack")
        yield f"  {'a pack':<20}{choice.tokens:>8,}   token rows ({stated}), about {pairs}; {packs} a step"
        others = ", ".join(f"{tier} {tokens:,}" for tier, tokens in found.budgets.items() if tier != choice.tier)
        beside = f"; token rows that would fit with {others}" if others else ""
        yield f"  {'activations':<20}{choice.tier:>8}   {KEPT[choice.tier]}{beside}"


def _time(work: Work, found: OnMachine) -> Iterator[str]:
    speed = found.speed
    if not found.fits:
        return
    if speed is None:
        yield f"  {'time':<20}{'?':>8}   state what a GPU computes in {work.setup.dtype}: --tflops"
        return
    pairs_s = work.pairs_per_step / speed.step_s
    yield f"  {'a step':<20}{_span(speed.step_s):>8}   {work.pairs_per_step} pairs, {pairs_s:,.1f} a second"
    if speed.sent_s >= 0.1:
        hidden = "all of it beside the products" if not speed.waits_s else f"{_span(speed.waits_s)} of it waited for"
        yield f"  {'exchange':<20}{_span(speed.sent_s):>8}   a step, {found.sent_bytes / 1e9:,.0f} GB a GPU, {hidden}"
    if speed.reference_h:
        yield f"  {'stored reference':<20}{_span(speed.reference_h * 3600):>8}   one pass, before the first step"
    evaluations = f", {_count(work.evaluations, 'evaluation')}" if work.evaluations else ""
    gpu_hours = "" if found.machine.count == 1 else f", {speed.gpu_hours:,.1f} GPU-hours"
    cost = "" if speed.cost is None else f"; costs {speed.cost:,.2f} at the price given"
    yield (
        f"  {'the run':<20}{_span(speed.hours * 3600):>8}   {work.steps:,} steps of {work.pairs:,} pairs{evaluations},"
        f" at {speed.tflops:,.0f} TFLOP/s{gpu_hours}{cost}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{max(1, 1000 * seconds):.0f} ms"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def cards_text(plan: Plan) -> str:
    """One line a card."""
    first = plan.machines[0]
    count = "one GPU" if first.machine.count == 1 else f"{first.machine.count} GPUs"
    lines = [
        f"{plan.work.name}: {count} of these{_shared_by(first)}; --gpus {first.machine} says it in detail",
        "",
        f"  {'GPU':<10}{'GiB':>8}{'needs':>9}{'':>8}{'token rows':>13}{'tier':>7}{'a step':>10}{'the run':>10}",
        *(_card_line(found) for found in plan.machines),
    ]
    return "\n\n".join(["\n".join(lines), *_listed("assumed", plan.assumed)])


def _card_line(found: OnMachine) -> str:
    gpu, choice, speed = found.machine.gpu, found.choice, found.speed
    line = f"  {gpu.name:<10}{gpu.memory_bytes / 2**30:>8.1f}{found.used / 2**30:>9.1f}"
    if not found.fits:
        return f"{line}      no"
    line += f"{'yes':>8}{choice.tokens:>13,}{choice.tier:>7}"
    return line + (
        f"{'?':>10}{'?':>10}" if speed is None else f"{_span(speed.step_s):>10}{_span(speed.hours * 3600):>10}"
    )


def _listed(title: str, lines: tuple[str, ...]) -> list[str]:
    if not lines:
        return []
    wrapped = (textwrap.fill(line, WIDTH, initial_indent="  - ", subsequent_indent="    ") for line in lines)
    return ["\n".join([f"{title}:", *wrapped])]
