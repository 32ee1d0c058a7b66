"""What to change in a config: so that a run fits that does not, or so that one that fits takes less time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lorafocal import memory
from lorafocal.compatibility import OFFLOADS
from lorafocal.hardware import GPUS, IN_ONE_MACHINE, Machine
from lorafocal.plan.machine import OnMachine, forward_flops, free_bytes, on_machine, placed, step_flops
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
    if work.setup.full and (count := _enough_cards(work, found.machine)):
        yield f"--gpus {count}x{found.machine.gpu.name} engine.kind=zero3: each holds a part of the weights"


def _enough_cards(work: Work, machine: Machine) -> int | None:
    """The smallest number of cards in one machine that hold the run between them, where that is more than now."""
    split = _with(work, engine="zero3", offload="none")
    counts = (count for count in (2, 4, IN_ONE_MACHINE) if count > machine.count)
    return next((count for count in counts if _fits(split, Machine(count, machine.gpu))), None)


def _fits(work: Work, machine: Machine) -> bool:
    return on_machine(work, machine).fits


def _changes(work: Work, machine: Machine) -> Iterator[tuple[str, Work]]:
    """Single changes to a config, the least intrusive first."""
    setup = work.setup
    if work.tokens is not None:
        yield "packing.tokens=auto: as many as fit", replace(work, tokens=None)
    if work.tiers != memory.TIERS:
        yield "training.activation_checkpointing=auto: recompute what must be", replace(work, tiers=memory.TIERS)
    if setup.reference == "separate_model" and _can_be_stored(setup):
        yield "reference.kind=cached: the second model leaves the GPU", _with(work, reference="cached")
    whole = setup.engine in memory.WHOLE
    if whole and not setup.optim.startswith("paged"):
        yield "training.optim=paged_adamw_8bit: moments in 8 bits, paged", _with(work, optim="paged_adamw_8bit")
    if setup.quantization is None and not setup.full:
        yield "model.quantization=nf4: the base in 4 bits", _with(work, quantization="nf4")
    if setup.r > 16 and not setup.full:
        yield "adapter.r=16: a smaller adapter", _with(work, r=16)
    if machine.count > 1 and setup.engine != "zero3" and setup.quantization is None:
        yield "engine.kind=zero3: each GPU holds a part of the weights", _with(work, engine="zero3", offload="none")
    for offload in OFFLOADS.get(setup.engine, ()):
        if offload != setup.offload:
            yield f"engine.offload={offload}: {_OFFLOADED[offload]}", _with(work, offload=offload)
    if shorter := _max_length(work, machine):
        yield f"data.max_length={shorter}: longer pairs are dropped", replace(work, max_length=shorter)


_OFFLOADED = {
    "optimizer": "gradients and moments lie in the machine's memory",
    "all": "all that is split lies in the machine's memory",
}


def _can_be_stored(setup: memory.Setup) -> bool:
    """Whether `reference.kind=cached` gives the same: log-probs of the answers' tokens are all that is compared."""
    return setup.reference in ("disabled_adapter", "frozen_copy", "separate_model") and not setup.divergences


def _with(work: Work, **changed: Any) -> Work:
    return replace(work, setup=replace(work.setup, **changed))


def _max_length(work: Work, machine: Machine) -> int | None:
    """The largest max_length, in steps of 64, whose longest pair fits."""
    free, work = free_bytes(work, machine), placed(work, machine)
    fit = max(
        memory.tokens_that_fit(work.shape, work.setup, free, tier, work.longest)
        for tier in memory.tiers_of(work.shape, work.setup)
    )
    shorter = fit * work.max_length // work.longest // 64 * 64
    return shorter if 128 <= shorter < work.max_length else None


def _all_changes(work: Work, machine: Machine) -> str | None:
    """Changes taken together, one after the other until the run fits."""
    words: list[str] = []
    while True:
        following = [
            (said, changed) for said, changed in _changes(work, machine) if said.partition(":")[0] not in words
        ]
        if not following:
            return None
        said, work = following[0]
        words.append(said.partition(":")[0])
        if _fits(work, machine):
            return f"together: {' '.join(words)}"


def _faster(work: Work, found: OnMachine) -> Iterator[str]:
    if _can_be_stored(work.setup):
        saved = forward_flops(work) / step_flops(work, found.choice.tier)
        yield (
            f"reference.kind=cached: {saved:.0%} less work a step, for one pass over the pairs before the first, which"
            " later runs on these pairs share"
        )
    held = work.setup.quantization is None and work.setup.dtype == "bfloat16"
    if found.choice.tier != "none" and held and not work.setup.full:
        changed = on_machine(_with(work, quantization="nf4"), found.machine)
        if changed.choice.tier == "none":
            yield "model.quantization=nf4: leaves room to keep all activations"
