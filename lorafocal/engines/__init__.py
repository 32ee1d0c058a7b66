"""How processes share a policy and step it: one class an engine, one interface, all that `trainer.py` knows of them.

Names of parameters are those of the unwrapped policy's `named_parameters()`. What is marked collective is called by
every rank, in the same order, with the same arguments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, device, get_num_threads, nn, set_num_threads
from torch.nn import Parameter
from torch.optim import Optimizer

from lorafocal import launch
from lorafocal.engines.whole import Whole
from lorafocal.memory.shards import loads_into_machine

if TYPE_CHECKING:
    from lorafocal.arguments import FocalPOConfig
    from lorafocal.trainer import FocalPOTrainer

State = Mapping[str, Any]  # of one parameter by the optimiser's keys: tensors, and plain numbers


class Engine(Protocol):
    """In the order in which a run calls them."""

    word: str  # of `lorafocal.compatibility.ENGINES`

    def place(self, model: nn.Module, device: device) -> None:
        """Where a whole model, policy or reference, lies until the engine takes it; probes and the store run there."""

    def begin(self, trainer: FocalPOTrainer) -> None:
        """In `train()`, before transformers makes the optimiser: masters in fp32, splitting in place.

        A second `train()` calls it again. Where parameters are exchanged for others of the same names, the trainer
        looks them up again afterwards.
        """

    def hold_reference(self, model: nn.Module) -> nn.Module:
        """A separate reference, after `begin`: as this engine holds it, to be called in its place. Again: as it is."""

    def ready(self, trainer: FocalPOTrainer) -> None:
        """After accelerate has prepared model and optimiser, and before a checkpoint is taken up."""

    def pack(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Around one pack's forward and backward; ranks meet in that of the `last` pack of a step, if they can wait."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Gradients add up over the packs of a step and over ranks: `loss` is the pack's share of the step's mean."""

    def ungraded(self, parameters: Mapping[str, Parameter]) -> list[str]:
        """Collective: names of the parameters that the step's packs gave no gradient."""

    def largest_norm(self, parameters: Mapping[str, Parameter]) -> float:
        """Collective: of the step's gradients of single tensors, over all ranks; infinite where one is not finite.

        Asked before the weights change.
        """

    def step(self) -> None:
        """What Trainer's `optimizer.step()` leaves to the engine: clipping and stepping where those are the engine's.

        Called once a step, after the gradients are found healthy.
        """

    def rest(self) -> None:
        """Before the policy's parameters are asked for by its modules: they are what the engine holds between steps.

        A forward may have left some gathered that are not the engine's own.
        """

    def sample(self, parameter: Parameter) -> Tensor:
        """Some entries of the master weights that this rank holds, always the same ones; a copy, maybe empty."""

    def full(self, parameter: Parameter) -> Tensor:
        """Collective: the whole master weights, in fp32 or wider, on the CPU of every rank; a copy."""

    def full_gradient(self, parameter: Parameter) -> Tensor:
        """Collective: the whole gradient of this step, between its last `backward` and `step`, like `full`."""

    def states(self, parameter: Parameter) -> dict[str, Any]:
        """Collective: the whole state that the optimiser keeps of it, tensors on the CPU; {} before the first step."""

    def restore(
        self, parameters: Mapping[str, Parameter], value: Callable[[str], Tensor], states: Callable[[str], State]
    ) -> None:
        """Collective: set master weights and the optimiser's state of all `parameters`, asked for by name, one by one.

        The settings of the optimiser's groups stay: the caller sets them through `groups` afterwards.
        """

    @property
    def optimizer(self) -> Optimizer:
        """torch's own (or bitsandbytes'), which says its class; its groups may hold other tensors than parameters."""

    def groups(self, parameters: Mapping[str, Parameter]) -> list[tuple[list[str], dict[str, Any]]]:
        """The optimiser's groups: names of their parameters, and their settings, which may be set there."""


def loading_device(args: FocalPOConfig) -> device | None:
    """Where models are loaded; None for this rank's own device."""
    return device("cpu") if args.use_cpu or loads_into_machine(str(args.engine), args.offload, args.reference) else None


def build_engine(args: FocalPOConfig) -> Engine:
    """The engine that `args` names, not yet begun."""
    word = str(args.engine)  # settled by now
    if args.offload != "none" and args.device.type == "cuda":  # torchrun leaves one thread to what a processor steps
        own, all_ranks = (len(os.sched_getaffinity(process)) for process in (0, os.getppid()))
        # A launcher's cores are those of all its processes, but it may bind each to some of them.
        set_num_threads(max(get_num_threads(), min(own, all_ranks // launch.local_world_size())))
    if word.startswith("zero"):
        from lorafocal.engines.zero import Zero

        return Zero(args)
    if word == "fsdp2":
        from lorafocal.engines.fsdp import Sharded

        return Sharded(args)
    return Whole(args)
