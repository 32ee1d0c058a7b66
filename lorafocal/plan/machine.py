"""A run on a machine: memory by part, the pack and tier that fit, and how long it takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lorafocal import memory
from lorafocal.compatibility import TITLES
from lorafocal.hardware import Machine
from lorafocal.plan.work import Work

SHARE_OF_PEAK = 0.45  # of a card's bf16 peak: LoRA runs reported elsewhere reach 0.4 to 0.5 of it on H100 and A100
SHARE_OF_BANDWIDTH = 0.7
HOST_LINK_GB_S = 32  # from a GPU to the machine's memory: 16 lanes of PCIe 4
HOST_MEMORY_GB_S = 200  # that all processors of the machine read and write
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
    sent_s: float  # of a step, to and from other GPUs and the machine's memory
    waits_s: float  # of that, what no products hide
    reference_h: float  # the stored reference's one pass
    hours: float  # all of it, evaluations included
    gpu_hours: float
    cost: float | None


@dataclass(frozen=True, slots=True)
class OnMachine:
    """A run on one machine."""

    machine: Machine
    engine: str
    parts: tuple[Part, ...]
    choice: memory.Choice
    budgets: Mapping[str, int]  # token rows that fit, by tier
    packs: int  # of a step, a GPU
    host_bytes: float  # offloaded to the machine's memory, by all GPUs
    loading_bytes: float  # there before the first step, the models of all processes
    sent_bytes: float  # by a GPU in a step
    speed: Speed | None

    @property
    def used(self) -> float:
        return sum(part.bytes for part in self.parts)

    @property
    def fits(self) -> bool:
        return self.choice.fits


def on_machine(work: Work, machine: Machine, tflops: float | None = None, price: float | None = None) -> OnMachine:
    """Memory, choice and speed of `work` on `machine`, each GPU with its share of the pairs."""
    work = placed(work, machine)
    shape, setup = work.shape, work.setup
    held = memory.residents(shape, setup, machine.count)
    room = _room(machine, held)
    free = memory.room_for_packs(room, held)
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
    start = memory.starting_bytes(shape, setup)
    if (on_gpu := start.on_gpu + DRIVER_BYTES) > machine.gpu.memory_bytes:
        reason = f"before the first step every GPU holds the whole of it, {on_gpu / 2**30:.2f} GiB"
        choice = replace(choice, fits=False, reason=reason)
    budgets = {tier: max(0, memory.tokens_that_fit(shape, setup, free, tier, least)) for tier in tiers}
    tokens = max(min(choice.tokens, rows), min(choice.tokens, work.longest))
    packs = min(pairs, math.ceil(rows / choice.tokens))  # a pair is never split
    parts = (*_residents(work, held, machine.count), *_of_a_pack(work, room, choice.tier, tokens))
    traffic = memory.traffic(shape, setup, machine.count, packs, forwards=work.first_passes)
    rate = tflops or (machine.gpu.bf16_tflops if setup.dtype == "bfloat16" else None)
    if rate is not None and tflops is None:
        rate *= SHARE_OF_PEAK
    speed = None if rate is None else _speed(work, machine, choice, packs, traffic, rate, price)
    return OnMachine(
        machine,
        setup.engine,
        parts,
        choice,
        budgets,
        packs,
        held.host * machine.count,
        start.in_machine * machine.count,
        traffic.beside + traffic.after,
        speed,
    )


def placed(work: Work, machine: Machine) -> Work:
    """The run as `machine` trains it: its head's chunk; several GPUs, where no engine is named, each with the model."""
    engine = "ddp" if machine.count > 1 and work.setup.engine == "one-process" else work.setup.engine
    rows = memory.head_rows(work.shape, work.setup, machine.gpu.memory_bytes)
    return replace(work, setup=replace(work.setup, engine=engine, head_rows=rows))


def _residents(work: Work, held: memory.Residents, gpus: int) -> Iterator[Part]:
    shape, setup = work.shape, work.setup
    splits, trained = memory.SHARING[setup.engine], memory.adapter_parameters(shape, setup)
    share = {split: f", 1/{gpus} of them" if split and gpus > 1 else "" for split in (True, False)}
    yield Part(
        f"{'weights' if setup.full else 'base'}, {setup.quantization or memory.held_dtype(setup)}",
        held.weights,
        f"{shape.parameters:,} parameters{share[splits.weights]}",
    )
    if not setup.full:
        yield Part("adapter", held.adapter, f"{trained:,} parameters in float32{share[splits.weights]}")
    if splits.masters:
        yield Part("master weights", held.masters, f"of what is trained, in float32{share[splits.states]}")
    if held.reference:
        guide = " and a guide" if setup.guide else ""
        named = TITLES.get(setup.reference, setup.reference)
        yield Part("reference", held.reference, f"{named}{guide}{share[splits.weights]}")
    copies = ", and once more in the buckets that GPUs exchange" if setup.engine == "ddp" and gpus > 1 else ""
    yield Part("gradients", held.gradients, f"float32{share[splits.gradients]}{copies}")
    states = memory.optimizer_bytes(shape, setup)
    paged = states - memory.optimizer_bytes(shape, setup, on_gpu=True)
    moved = f", {paged / 2**30:.2f} GiB paged to the machine's memory" if paged else ""
    yield Part("optimiser", held.states, f"{setup.optim}{share[splits.states]}{moved}")
    if held.gathered:
        yield Part("gathered weights", held.gathered, f"{setup.width} bytes of each that is whole for its layer's turn")
    if held.exchanged:
        yield Part("exchange", held.exchanged, "float32 gradients as they are sent: the largest tensor's")


def _of_a_pack(work: Work, room: float, tier: str, tokens: float) -> Iterator[Part]:
    shape, setup = work.shape, work.setup
    per_token = memory.activation_bytes_per_token(shape, setup, tier)
    casts = memory.cast_bytes(shape, setup, tier) if setup.full else 0
    rest = memory.pack_bytes(shape, setup, tier, tokens) - tokens * per_token - casts
    yield Part("activations", tokens * per_token, f"{per_token / 2**20:.2f} MiB a token row, tier {tier}")
    if casts:
        yield Part("bfloat16 weights", casts, "of the matrices, cast for a pack's products")
    yield Part("head and workspaces", rest, f"logits of {setup.head_rows} rows, then one layer's backward")
    slack = memory.SLACK * max(0.0, room)
    yield Part("driver and slack", DRIVER_BYTES + slack, f"1 GiB, and {memory.SLACK:.0%} of what is left")


def _room(machine: Machine, held: memory.Residents) -> float:
    """What a GPU has beside all that is there before the first step."""
    return machine.gpu.memory_bytes - DRIVER_BYTES - held.before


def free_bytes(work: Work, machine: Machine) -> float:
    """What a GPU has for packs, as a run finds it: without residents, driver and slack."""
    work = placed(work, machine)
    held = memory.residents(work.shape, work.setup, machine.count)
    return memory.room_for_packs(_room(machine, held), held)


def _speed(
    work: Work,
    machine: Machine,
    choice: memory.Choice,
    packs: int,
    traffic: memory.Traffic,
    tflops: float,
    price: float | None,
) -> Speed:
    """Products at `tflops`, matrices de-quantised once a pass at the memory's bandwidth, and what is sent.

    What GPUs send beside their passes costs time as far as it takes longer than these; the rest comes on top.
    """
    shape, setup = work.shape, work.setup
    rate = tflops * 1e12 * machine.count
    forward = forward_flops(work)
    live = setup.reference_passes
    share = math.ceil(work.pairs_per_step / machine.count)  # of the GPU that the others wait for
    products_s = share * step_flops(work, choice.tier) / (tflops * 1e12)
    if setup.quantization is not None and machine.gpu.bandwidth_gb_s is not None:
        passes = 2 + live + (choice.tier == "full")
        dequantised = 2.5 * shape.linear_parameters  # bytes: half a byte read, two written
        products_s += packs * passes * dequantised / (SHARE_OF_BANDWIDTH * machine.gpu.bandwidth_gb_s * 1e9)
    beside_s, after_s = _sent_s(traffic, machine)
    waits_s = max(0.0, beside_s - products_s) + after_s
    step_s = products_s + waits_s
    stored = (work.pairs + work.held_out) * forward / rate / 3600 if setup.reference == "cached" else 0.0
    evaluated = work.evaluations * work.held_out * forward * (1 + live) / rate / 3600
    hours = work.steps * step_s / 3600 + stored + evaluated
    gpu_hours = hours * machine.count
    cost = None if price is None else gpu_hours * price
    return Speed(tflops, step_s, beside_s + after_s, waits_s, stored, hours, gpu_hours, cost)


def _sent_s(traffic: memory.Traffic, machine: Machine) -> tuple[float, float]:
    """Seconds of a step's traffic beside its passes, and after them."""
    link = SHARE_OF_BANDWIDTH * (machine.link_gb_s or math.inf) * 1e9
    bus, host = (SHARE_OF_BANDWIDTH * gb_s * 1e9 for gb_s in (HOST_LINK_GB_S, HOST_MEMORY_GB_S))
    return traffic.beside / link, traffic.after / link + traffic.to_host / bus + traffic.in_host / host


def step_flops(work: Work, tier: str) -> float:
    """Operations of one pair's share of a training step."""
    step = memory.flops_per_pair(work.shape, work.setup, tier=tier, shared=work.shared)
    return step + work.first_passes * forward_flops(work)


def forward_flops(work: Work) -> float:
    """Operations of one pair's forward."""
    with_reference, without = (
        memory.flops_per_pair(work.shape, work.setup, live_reference=live, shared=work.shared) for live in (True, False)
    )
    return with_reference - without
