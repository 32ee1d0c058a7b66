"""A run on a machine: memory by part, the pack and tier that fit, and how long it takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lorafocal import memory
from lorafocal.hardware import Machine
from lorafocal.plan.work import Work

SHARE_OF_PEAK = 0.45  # of a card's bf16 peak: LoRA runs reported elsewhere reach 0.4 to 0.5 of it on H100 and A100
SHARE_OF_BANDWIDTH = 0.7
DRIVER_BYTES = 2**30  # what driver, CUDA context and libraries take of the memory that a card reports
FILLED = 0.96  # of a pack, by lengths as spread as UltraFeedback's


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one part of a GPU's memory."""

    name: str
    bytes: float
    words: str


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds and hours of a run on one machine, by `tflops` of one GPU."""

    tflops: float
    step_s: float
    reference_h: float  # the stored reference's one pass
    hours: float  # all of it, evaluations included
    cost: float | None


@dataclass(frozen=True, slots=True)
class OnMachine:
    """A run on one machine."""

    machine: Machine
    parts: tuple[Part, ...]
    choice: memory.Choice
    budgets: Mapping[str, int]  # token rows that fit, by tier
    packs: int  # of a step, a GPU
    speed: Speed | None

    @property
    def used(self) -> float:
        return sum(part.bytes for part in self.parts)

    @property
    def fits(self) -> bool:
        return self.choice.fits


def on_machine(work: Work, machine: Machine, tflops: float | None = None, price: float | None = None) -> OnMachine:
    """Memory, choice and speed of `work` on `machine`, each GPU with all weights and its share of the pairs."""
    shape, setup = work.shape, work.setup
    residents = list(_residents(work, machine.count))
    free = free_bytes(work, machine)
    tiers = tuple(tier for tier in work.tiers if tier in memory.tiers_of(shape, setup)) or work.tiers
    pairs = math.ceil(work.pairs_per_step / machine.count)  # of the GPU with the most
    rows = work.rows_per_pair * pairs / FILLED
    filled = min(work.tokens or 0, math.ceil(rows))  # no pack is larger than a step
    least = max(work.longest, filled)
    choice = memory.choose(shape, setup, free, least, tiers)
    if work.tokens is not None:
        choice = replace(choice, tokens=work.tokens)
        if not choice.fits and filled > work.longest:
            choice = replace(choice, reason=f"packing.tokens is {work.tokens}, and fewer fit")
    budgets = {tier: max(0, memory.tokens_that_fit(shape, setup, free, tier, least)) for tier in tiers}
    per_token = memory.activation_bytes_per_token(shape, setup, choice.tier)
    tokens = max(min(choice.tokens, rows), min(choice.tokens, work.longest))
    activations = tokens * per_token
    rest = memory.pack_bytes(shape, setup, choice.tier, tokens) - activations
    packs = min(pairs, math.ceil(rows / choice.tokens))  # a pair is never split
    parts = (
        *residents,
        Part("activations", activations, f"{per_token / 2**20:.2f} MiB a token row, tier {choice.tier}"),
        Part("head and workspaces", rest, "logits of a chunk, one layer's backward"),
        Part(
            "driver and slack", DRIVER_BYTES + _slack(work, machine), f"1 GiB, and {memory.SLACK:.0%} of what is left"
        ),
    )
    rate = tflops or (machine.gpu.bf16_tflops if setup.dtype == "bfloat16" else None)
    if rate is not None and tflops is None:
        rate *= SHARE_OF_PEAK
    speed = None if rate is None else _speed(work, machine, choice, packs, rate, price)
    return OnMachine(machine, parts, choice, budgets, packs, speed)


def _residents(work: Work, gpus: int) -> Iterator[Part]:
    shape, setup = work.shape, work.setup
    held = setup.quantization or setup.dtype
    trained = memory.adapter_parameters(shape, setup)
    yield Part(f"base, {held}", memory.weight_bytes(shape, setup), f"{shape.parameters:,} parameters")
    yield Part("adapter", memory.adapter_bytes(shape, setup), f"{trained:,} parameters in float32")
    if extra := memory.reference_bytes(shape, setup):
        yield Part("reference", extra, setup.reference)
    copies = "" if gpus == 1 else ", and once more in the buckets that GPUs exchange"
    yield Part("gradients", memory.gradient_bytes(shape, setup, gpus), f"float32{copies}")
    states = memory.optimizer_bytes(shape, setup)
    on_gpu = memory.optimizer_bytes(shape, setup, on_gpu=True)
    paged = f", {(states - on_gpu) / 2**30:.2f} GiB paged to the machine's memory" if on_gpu < states else ""
    yield Part("optimiser", on_gpu, f"{setup.optim}{paged}")


def _after_weights(work: Work, machine: Machine) -> float:
    shape, setup = work.shape, work.setup
    held = (memory.weight_bytes, memory.adapter_bytes, memory.reference_bytes)
    return machine.gpu.memory_bytes - DRIVER_BYTES - sum(size(shape, setup) for size in held)


def _slack(work: Work, machine: Machine) -> float:
    return memory.SLACK * max(0.0, _after_weights(work, machine))


def free_bytes(work: Work, machine: Machine) -> float:
    """What a GPU has for packs, as a run finds it: without residents, driver and slack."""
    gradients = memory.gradient_bytes(work.shape, work.setup, machine.count)
    states = memory.optimizer_bytes(work.shape, work.setup, on_gpu=True)
    return _after_weights(work, machine) - _slack(work, machine) - gradients - states


def _speed(
    work: Work, machine: Machine, choice: memory.Choice, packs: int, tflops: float, price: float | None
) -> Speed:
    """Products at `tflops`, and matrices de-quantised once a pass at the memory's bandwidth."""
    shape, setup = work.shape, work.setup
    rate = tflops * 1e12 * machine.count
    forward = forward_flops(work)
    live = setup.reference not in ("none", "cached")
    share = math.ceil(work.pairs_per_step / machine.count)  # of the GPU that the others wait for
    step_s = share * step_flops(work, choice.tier) / (tflops * 1e12)
    if setup.quantization is not None and machine.gpu.bandwidth_gb_s is not None:
        passes = 2 + live + (choice.tier == "full")
        traffic = 2.5 * shape.linear_parameters  # bytes: half a byte read, two written
        step_s += packs * passes * traffic / (SHARE_OF_BANDWIDTH * machine.gpu.bandwidth_gb_s * 1e9)
    stored = (work.pairs + work.held_out) * forward / rate / 3600 if setup.reference == "cached" else 0.0
    evaluated = work.evaluations * work.held_out * forward * (1 + live) / rate / 3600
    hours = work.steps * step_s / 3600 + stored + evaluated
    return Speed(tflops, step_s, stored, hours, None if price is None else hours * machine.count * price)


def step_flops(work: Work, tier: str) -> float:
    """Operations of one pair's share of a training step."""
    return memory.flops_per_pair(work.shape, work.setup, tier=tier, shared=work.shared)


def forward_flops(work: Work) -> float:
    """Operations of one pair's forward."""
    with_reference, without = (
        memory.flops_per_pair(work.shape, work.setup, live_reference=live, shared=work.shared) for live in (True, False)
    )
    return with_reference - without
