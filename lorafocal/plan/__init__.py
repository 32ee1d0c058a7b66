"""What a config needs of a GPU, and how long it takes there: from the file alone, without weights, network or torch.

Bytes and operations are `lorafocal.memory`'s. What a config does not say (how fast a card is, how long the pairs are,
how many there are) is assumed, and every assumption is listed with the way to replace it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from lorafocal.config import Config
from lorafocal.errors import InputError
from lorafocal.hardware import GPUS, IN_ONE_MACHINE, NETWORK_GB_S, Machine, parse
from lorafocal.memory import Lengths
from lorafocal.plan.advice import advice
from lorafocal.plan.machine import (
    HOST_LINK_GB_S,
    HOST_MEMORY_GB_S,
    SHARE_OF_BANDWIDTH,
    SHARE_OF_PEAK,
    OnMachine,
    on_machine,
)
from lorafocal.plan.text import cards_text, machine_text
from lorafocal.plan.work import Work, work_of

COMMON = ("RTX4090", "RTX5090", "L40S", "A100-40", "A100-80", "H100", "H200")


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer: a run on the machine that was asked for, or on the common cards; what to change; what was assumed."""

    work: Work
    machines: tuple[OnMachine, ...]
    advice: tuple[str, ...]
    assumed: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        work = {key: value for key, value in asdict(self.work).items() if key != "assumed"}
        machines = [asdict(m) | {"machine": str(m.machine), "fits": m.fits, "used": m.used} for m in self.machines]
        return {"work": work, "machines": machines, "advice": self.advice, "assumed": self.assumed}

    def table(self) -> str:
        """For a person at a terminal."""
        return machine_text(self) if len(self.machines) == 1 else cards_text(self)


def plan(
    config: Config,
    gpus: str | None,
    *,
    tflops: float | None = None,
    pairs: int | None = None,
    lengths: Lengths | None = None,
    price_per_hour: float | None = None,
) -> Plan:
    """What `config` needs on `gpus` ("1xRTX4090"), or on the common cards where that is None: 8 of each for an engine.

    `tflops` is what one GPU was measured to compute, `price_per_hour` that of one GPU; `pairs` and mean `lengths` stand
    for what data would say. Raises InputError for an unknown card or shape, and for numbers that make no sense.
    """
    for name, value in {"--tflops": tflops, "--price": price_per_hour, "pairs": pairs}.items():
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} is {value:g}; it must be above 0")
        if value is not None and gpus is None and name != "pairs":
            raise InputError(f"{name} is that of one kind of GPU: name it too, such as --gpus 1xRTX4090")
    work = work_of(config, pairs=pairs, lengths=lengths)
    if lengths is not None:
        _check_lengths(lengths.prompt + max(lengths.chosen, work.setup.lengths.rejected), work.max_length)
    several = IN_ONE_MACHINE if config.engine is not None else 1  # an engine is named to share a run
    machines = [parse(gpus)] if gpus is not None else [Machine(several, GPUS[name]) for name in COMMON]
    found = tuple(on_machine(work, machine, tflops, price_per_hour) for machine in machines)
    if price_per_hour is not None and found[0].speed is None:
        raise InputError(
            f"--price: a cost needs hours, and what {machines[0].gpu.name} computes in {work.setup.dtype} is not known"
            " here: state it with --tflops"
        )
    assumed = list(work.assumed)
    assumed.append("memory: by arithmetic that was compared with counted bytes on a CPU, and with no GPU yet")
    if tflops is None and any(each.speed for each in found):
        assumed.append(f"speed: {SHARE_OF_PEAK:.0%} of a card's bf16 peak, measured on none; --tflops states yours")
    assumed += _of_exchange(found)
    if gpus is None and not any(each.speed for each in found):
        assumed.append(f"time: not known, for the table has no speeds in {work.setup.dtype}; --gpus with --tflops says")
    to_change = tuple(advice(config, work, found[0])) if len(found) == 1 else ()
    return Plan(work, found, to_change, tuple(assumed))


def _check_lengths(mean: float, longest: int) -> None:
    """Refuse a mean prompt and answer that no pairs of a run have."""
    if mean > longest:
        raise InputError(
            f"--lengths: prompt and answer have {mean:,.6g} tokens on average, and data.max_length lets no pair have"
            f" more than {longest:,}: give what `lorafocal check` counts, or another data.max_length"
        )


def _of_exchange(found: tuple[OnMachine, ...]) -> Iterator[str]:
    """What was taken for granted of what is sent, where something is."""
    if any(each.sent_bytes for each in found):
        yield (
            f"exchange: {SHARE_OF_BANDWIDTH:.0%} of a link's bandwidth; what GPUs send beside their products costs time"
            " only as far as these do not last as long"
        )
    if any(each.sent_bytes and each.machine.count > IN_ONE_MACHINE for each in found):
        yield f"network: machines of {IN_ONE_MACHINE} GPUs, with {NETWORK_GB_S} GB/s a GPU between them"
    if any(each.host_bytes for each in found):
        yield (
            f"offload: {HOST_LINK_GB_S} GB/s between a GPU and the machine's memory, which is read and written at"
            f" {HOST_MEMORY_GB_S} GB/s; {SHARE_OF_BANDWIDTH:.0%} of both, and none of it hidden"
        )
