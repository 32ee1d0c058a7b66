"""What to change in a config: so that a run fits that does not, or so that one that fits takes less time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lorafocal import memory
from lorafocal.hardware import GPUS, Machine
from lorafocal.plan.machine import OnMachine, forward_flops, free_bytes, on_machine, step_flops
from lorafocal.plan.work import Work


def advice(work: Work, found: OnMachine) -> Iterator[str]:
    """What makes a run fit that does not, each line enough by itself; or what makes one that fits faster."""
    if found.fits:
        yield from _faster(work, found)
        return
    changes = [(words, changed) for words, changed in _changes(work, found.machine) if _fits(changed, found.machine)]
    yield from (words for words, _ in changes)
    if not changes and (both := _all_changes(work, found.machine)):
        yield both
    larger = sorted(GPUS.values(), key=lambda gpu: gpu.memory_mib)
    enough = [gpu.name for gpu in larger if _fits(work, Machine(found.machine.count, gpu))]
    if enough:
        yield f"--gpus {found.machine.count}x{enough[0]}: the smallest card of the table that holds it as it is"


def _fits(work: Work, machine: Machine) -> bool:
    return on_machine(work, machine).fits


def _changes(work: Work, machine: Machine) -> Iterator[tuple[str, Work]]:
    """Single changes to a config, the least intrusive first."""
    setup = work.setup
    if work.tokens is not None:
        yield "packing.tokens=auto: as many as fit", replace(work, tokens=None)
    if work.tiers != memory.TIERS:
        yield "training.activation_checkpointing=auto: recompute what must be", replace(work, tiers=memory.TIERS)
    if setup.reference == "separate_model":
        yield "reference.kind=cached: the second model leaves the GPU", _with(work, reference="cached")
    if not setup.optim.startswith("paged"):
        yield "training.optim=paged_adamw_8bit: moments in 8 bits, paged", _with(work, optim="paged_adamw_8bit")
    if setup.quantization is None:
        yield "model.quantization=nf4: the base in 4 bits", _with(work, quantization="nf4")
    if setup.r > 16:
        yield "adapter.r=16: a smaller adapter", _with(work, r=16)
    if shorter := _max_length(work, machine):
        yield f"data.max_length={shorter}: longer pairs are dropped", replace(work, max_length=shorter)


def _with(work: Work, **changed: Any) -> Work:
    return replace(work, setup=replace(work.setup, **changed))


def _max_length(work: Work, machine: Machine) -> int | None:
    """The largest max_length, in steps of 64, whose longest pair fits."""
    free = free_bytes(work, machine)
    fit = max(
        memory.tokens_that_fit(work.shape, work.setup, free, tier, work.longest)
        for tier in memory.tiers_of(work.shape, work.setup)
    )
    shorter = fit // 2 // 64 * 64
    return shorter if 128 <= shorter < work.max_length else None


def _all_changes(work: Work, machine: Machine) -> str | None:
    """Changes taken together, one after the other until the run fits."""
    words: list[str] = []
    while True:
        following = [
            (said, changed) for said, changed in _changes(work, machine) if said.partition("=")[0] not in words
        ]
        if not following:
            return None
        said, work = following[0]
        words.append(said.partition(":")[0])
        if _fits(work, machine):
            return f"together: {' '.join(words)}"


def _faster(work: Work, found: OnMachine) -> Iterator[str]:
    live = work.setup.reference not in ("none", "cached")
    if live:
        saved = forward_flops(work) / step_flops(work, found.choice.tier)
        yield (
            f"reference.kind=cached: {saved:.0%} less work a step, for one pass over the pairs before the first, which"
            " later runs on these pairs share"
        )
    if found.choice.tier != "none" and work.setup.quantization is None and work.setup.dtype == "bfloat16":
        changed = on_machine(_with(work, quantization="nf4"), found.machine)
        if changed.choice.tier == "none":
            yield "model.quantization=nf4: leaves room to keep all activations"
