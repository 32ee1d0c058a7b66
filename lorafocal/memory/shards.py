"""What each GPU holds under an engine that shares a run between several, and what they send each other in a step.

Weights, gradients and states are split evenly; what DeepSpeed and FSDP2 hold beside them, while parameters are whole
for their layer's turn and gradients on their way, is bounded by sizes that they are given or take by default.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from lorafocal.memory.residents import (
    adapter_bytes,
    adapter_parameters,
    gradient_bytes,
    optimizer_bytes,
    reference_bytes,
    trained_tensors,
    weight_bytes,
)
from lorafocal.memory.setup import WHOLE, WIDE, Setup
from lorafocal.memory.shape import Shape

LIVE_PARAMETERS = 10**9  # entries that ZeRO-3 keeps whole at a time: `stage3_max_live_parameters`
BUCKET_ENTRIES = 50_000_000  # that DeepSpeed is told to reduce, or fetch ahead, at a time: 200 MB in fp32


@dataclass(frozen=True, slots=True)
class Sharing:
    """What an engine splits over GPUs, and whether it keeps fp32 masters beside the weights that compute."""

    weights: bool = False
    gradients: bool = False
    states: bool = False
    masters: bool = False


SHARING = {
    "one-process": Sharing(),
    "ddp": Sharing(),
    "zero1": Sharing(states=True, masters=True),
    "zero2": Sharing(states=True, gradients=True, masters=True),
    "zero3": Sharing(states=True, gradients=True, weights=True, masters=True),
    "fsdp2": Sharing(states=True, gradients=True, weights=True),
}


@dataclass(frozen=True, slots=True)
class Residents:
    """Bytes of one GPU, whatever the tokens of a pack; `host` of them are offloaded to the machine's memory."""

    weights: float
    adapter: float
    masters: float
    reference: float
    gradients: float
    states: float
    gathered: float  # parameters that are whole for a while
    exchanged: float  # gradients on their way between GPUs
    host: float = 0

    @property
    def before(self) -> float:
        """What is there before the first step."""
        return self.weights + self.adapter + self.masters + self.reference

    @property
    def in_steps(self) -> float:
        """What steps add to that."""
        return self.gradients + self.states + self.gathered + self.exchanged


class Starting(NamedTuple):
    """Bytes of one process before its engine splits anything."""

    on_gpu: float
    in_machine: float


def residents(shape: Shape, setup: Setup, gpus: int = 1) -> Residents:
    """What a GPU of `gpus` holds of a run, activations aside."""
    sharing = SHARING[setup.engine]
    of_weights, of_gradients, of_states = (
        gpus if split else 1 for split in (sharing.weights, sharing.gradients, sharing.states)
    )
    as_held = replace(setup, dtype=held_dtype(setup))
    trained = WIDE * adapter_parameters(shape, setup)
    gradients = gradient_bytes(shape, setup, gpus if setup.engine == "ddp" else 1) / of_gradients
    if setup.engine == "zero1":
        gradients += trained / gpus  # those of its own states, flat
    whole = Residents(
        weights=weight_bytes(shape, as_held) / of_weights,
        adapter=0 if setup.full else adapter_bytes(shape, setup) / of_weights,
        masters=trained / of_states if sharing.masters else 0,
        reference=reference_bytes(shape, as_held if setup.widened else setup) / of_weights,
        gradients=gradients,
        states=optimizer_bytes(shape, setup, on_gpu=True) / of_states,
        gathered=_gathered_bytes(shape, setup) + _copied_bytes(shape, setup),
        exchanged=_exchanged_bytes(shape, setup),
    )
    return _offloaded(whole, setup)


def held_dtype(setup: Setup) -> str:
    """Float weights as they are held: in float32 where they are trained and no engine keeps masters beside them."""
    wide = setup.full and setup.dtype == "bfloat16" and not SHARING[setup.engine].masters
    return "float32" if wide else setup.dtype


def _offloaded(whole: Residents, setup: Setup) -> Residents:
    """DeepSpeed offloads masters, states and, where they are split, gradients; then weights too, as FSDP2 does."""
    states = ("masters", "states", *(("gradients",) if SHARING[setup.engine].gradients else ()))
    weights = ("weights", "adapter", "reference")
    names = {"none": (), "optimizer": states, "all": states + weights}[setup.offload]
    return replace(whole, host=sum(getattr(whole, name) for name in names), **dict.fromkeys(names, 0))


def layer_parameters(shape: Shape) -> int:
    """Entries of one decoder layer."""
    ends = (2 - shape.tied) * shape.head_parameters + shape.hidden_size
    return (shape.parameters - ends) // shape.layers


def _gathered_bytes(shape: Shape, setup: Setup) -> float:
    """ZeRO-3 lets go of parameters beyond a number of entries; FSDP2 of a layer when the next but one is asked for, and
    of what is in no layer after the pass."""
    if setup.engine == "zero3":
        return setup.width * min(shape.parameters, LIVE_PARAMETERS)
    if setup.engine == "fsdp2":
        layer = layer_parameters(shape)
        return setup.width * (shape.parameters - (shape.layers - 2) * layer)
    return 0


def _copied_bytes(shape: Shape, setup: Setup) -> float:
    """Of weights that are split, divergences copy the reference's head where it is not the policy's, for the pack's
    turn."""
    apart = setup.reference == "separate_model" or (setup.saves("lm_head") and not setup.full)
    copied = setup.divergences and SHARING[setup.engine].weights and apart
    return setup.width * shape.head_parameters if copied else 0


def _exchanged_bytes(shape: Shape, setup: Setup) -> float:
    """Gradients whole, as they are sent in fp32: those of the largest tensor, and DeepSpeed's bucket of small ones."""
    if setup.engine in WHOLE:
        return 0
    bucket = BUCKET_ENTRIES if setup.engine != "fsdp2" else 0
    return WIDE * (max(trained_tensors(shape, setup)) + bucket)


def loads_into_machine(engine: str, offload: str, reference: str | None) -> bool:
    """Whether models are loaded into the machine's memory, so that no GPU has to hold one whole: ZeRO-3 keeps them
    there. Not where a stored reference is looked up, which a live pass of its own device is compared with."""
    return engine == "zero3" and offload == "all" and reference != "cached"


def starting_bytes(shape: Shape, setup: Setup) -> Starting:
    """What every process holds before its engine takes the models: all of them whole."""
    if setup.engine in WHOLE:
        return Starting(0, 0)
    models = weight_bytes(shape, setup) + reference_bytes(shape, setup)
    in_machine = loads_into_machine(setup.engine, setup.offload, setup.reference)
    return Starting(0, models) if in_machine else Starting(models, 0)


# ---- what is sent -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one step: what a GPU sends to others and receives, beside its passes and when they are over; what it
    sends to the machine's memory and back; what a processor reads and writes there, for all GPUs."""

    beside: float
    after: float
    to_host: float = 0
    in_host: float = 0


def traffic(shape: Shape, setup: Setup, gpus: int, packs: int, *, forwards: int = 0) -> Traffic:
    """What a step of `packs` packs a GPU moves; `forwards` more of the policy are made of each. Adapters whose engine
    splits nothing move too little to count.

    A ring gathers or scatters n parts by sending n - 1 of them, and sums whole tensors by doing both. DeepSpeed's
    stages 1 and 2 sum (once a step, once a pack) while nothing is computed, and gather the weights that were stepped;
    weights that are split are gathered for the forward and for the backward, a second model's once.
    """
    if setup.engine in WHOLE and not setup.full:
        return Traffic(0, 0)
    sent = (gpus - 1) / gpus
    trained, weights = WIDE * adapter_parameters(shape, setup), weight_bytes(shape, setup)
    passes = packs * (2 + forwards + (setup.reference == "separate_model"))
    if SHARING[setup.engine].weights:
        beside, after = sent * (passes * weights + packs * trained), 0.0
    elif setup.engine in WHOLE:
        beside, after = 2 * sent * trained, 0.0
    else:
        sums = packs if setup.engine == "zero2" else 1
        beside, after = 0.0, sent * (2 * sums * trained + (weights if setup.full else trained))
    if setup.offload == "none":
        return Traffic(beside, after)
    moved = 2 * packs * trained + (weights if setup.full else trained)  # gradients are added up there
    moved += passes * weights if setup.offload == "all" else 0
    return Traffic(beside, after, moved / gpus, _ADAM_TOUCHES * trained)


_ADAM_TOUCHES = 7  # a step reads gradient, weight and two moments, and writes the last three
