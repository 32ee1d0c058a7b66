"""What to change in a config: so that a run fits that does not, or so that one that fits takes less time."""

from __future__ import annotations

from collections.abc import Iterator

from lorafocal import memory
from lorafocal.compatibility import OFFLOADS
from lorafocal.config import Config, changed
from lorafocal.errors import InputError
from lorafocal.hardware import GPUS, IN_ONE_MACHINE, Machine
from lorafocal.plan.machine import OnMachine, forward_flops, free_bytes, on_machine, placed, step_flops
from lorafocal.plan.work import Work, trained_otherwise
from lorafocal.schema import Data

Planned = tuple[Config, Work]


def advice(config: Config, work: Work, found: OnMachine) -> Iterator[str]:
    """What makes a run fit that does not, each line enough by itself; or what makes one that fits faster.

    Only what leaves a run that trains is advised: each change is tried on the config first.
    """
    planned = config, work
    if found.fits:
        yield from _faster(planned, found)
        return
    changes = [(words, then) for words, then in _changes(planned, found.machine) if _fits(then, found.machine)]
    yield from (words for words, _ in changes)
    if not changes and (several := _all_changes(planned, found.machine)):
        yield several
    larger = sorted(GPUS.values(), key=lambda gpu: gpu.memory_mib)
    enough = [gpu.name for gpu in larger if _fits(planned, Machine(found.machine.count, gpu))]
    if enough:
        yield f"--gpus {found.machine.count}x{enough[0]}: the smallest card of the table that holds it as it is"
    if work.setup.full:
        yield from _enough_cards(planned, found.machine)


_SPLIT = "engine.kind=zero3"
_OFFLOADED = {
    "optimizer": "gradients and moments lie in the machine's memory",
    "all": "all that is split lies in the machine's memory",
}


def _enough_cards(planned: Planned, machine: Machine) -> Iterator[str]:
    """The smallest number of cards in one machine that hold the run between them, where that is more than now."""
    split, words = (planned, "") if planned[1].setup.engine == "zero3" else (_with(planned, _SPLIT), f" {_SPLIT}")
    for count in (2, 4, IN_ONE_MACHINE):
        if count > machine.count and split is not None and _fits(split, Machine(count, machine.gpu)):
            yield f"--gpus {count}x{machine.gpu.name}{words}: each holds a part of the weights"
            return


def _with(planned: Planned, overrides: str) -> Planned | None:
    """The run with `section.key=value`, one or several; None where no such run trains, or they change nothing."""
    config, work = planned
    try:
        config = changed(config, overrides.split())
    except InputError:
        return None
    then = trained_otherwise(work, config)
    return None if then == work else (config, then)


def _fits(planned: Planned, machine: Machine) -> bool:
    return on_machine(planned[1], machine).fits


def _changes(planned: Planned, machine: Machine) -> Iterator[tuple[str, Planned]]:
    """Single changes that leave a run that trains, each with its words."""
    for override, why in _candidates(*planned, machine):
        if then := _with(planned, override):
            yield f"{override}: {why}", then


def _candidates(config: Config, work: Work, machine: Machine) -> Iterator[tuple[str, str]]:
    """Overrides that take less memory, and why, the least intrusive first."""
    setup = work.setup
    yield "packing.tokens=auto", "as many as fit"
    yield "training.activation_checkpointing=auto", "recompute what must be"
    if setup.reference == "separate_model":
        yield _STORED, "the second model leaves the GPU"
    if setup.engine in memory.WHOLE and not setup.optim.startswith("paged"):
        yield "training.optim=paged_adamw_8bit", "moments in 8 bits, paged"
    if setup.quantization is None:
        yield _IN_4_BITS, "the base in 4 bits"
    if setup.r > 16:
        yield "adapter.r=16", "a smaller adapter"
    if machine.count > 1 and setup.quantization is None:
        yield _SPLIT, "each GPU holds a part of the weights"
    for offload in OFFLOADS.get(setup.engine, ()):
        yield f"engine.offload={offload}", _OFFLOADED[offload]
    if shorter := _max_length(work, machine):
        yield _shortened(config.data, shorter), _SHORTENED[config.data.truncation]


def _shortened(data: Data, length: int) -> str:
    """Prompts that are cut keep their share of the room."""
    room = data.max_prompt_length
    prompts = "" if room is None else f" data.max_prompt_length={room * length // data.max_length}"
    return f"data.max_length={length}{prompts}"


_SHORTENED = {
    "drop": "longer pairs are dropped",
    "keep_start": "longer answers lose their ends",
    "cut_prompt_left": "longer prompts lose their beginnings",
    "recipe": "longer pairs are cut",
}
_STORED = "reference.kind=cached"
_IN_4_BITS = "model.quantization=nf4"


def _max_length(work: Work, machine: Machine) -> int | None:
    """The largest max_length, in steps of 64, whose longest pair fits; none that the mean pair is longer than."""
    free, work = free_bytes(work, machine), placed(work, machine)
    fit = max(
        memory.tokens_that_fit(work.shape, work.setup, free, tier, work.longest)
        for tier in memory.tiers_of(work.shape, work.setup)
    )
    shorter = fit * work.max_length // work.longest // 64 * 64
    lengths = work.setup.lengths
    mean = lengths.prompt + max(lengths.chosen, lengths.rejected)
    return shorter if max(128, mean) <= shorter < work.max_length else None


def _all_changes(planned: Planned, machine: Machine) -> str | None:
    """Changes taken together, one after the other until the run fits."""
    taken: dict[str, str] = {}  # by key: of two ways to offload the second takes the first one's place
    tried: set[str] = set()
    while True:
        following = ((words.partition(":")[0], then) for words, then in _changes(planned, machine))
        override, planned = next((each for each in following if each[0] not in tried), ("", planned))
        if not override:
            return None
        tried.add(override)
        taken[override.partition("=")[0]] = override
        if _fits(planned, machine):
            return f"together: {' '.join(taken.values())}"


def _faster(planned: Planned, found: OnMachine) -> Iterator[str]:
    _, work = planned
    if work.setup.reference in _ONE_START and _with(planned, _STORED):
        saved = forward_flops(work) / step_flops(work, found.choice.tier)
        yield (
            f"{_STORED}: {saved:.0%} less work a step, for one pass over the pairs before the first, which"
            " later runs on these pairs share"
        )
    held = work.setup.quantization is None and work.setup.dtype == "bfloat16"
    if found.choice.tier != "none" and held and (smaller := _with(planned, _IN_4_BITS)):
        if on_machine(smaller[1], found.machine).choice.tier == "none":
            yield f"{_IN_4_BITS}: leaves room to keep all activations"


# References that log-probs stored before the first step stand for; the others move, or are several.
_ONE_START = ("disabled_adapter", "frozen_copy", "separate_model")
