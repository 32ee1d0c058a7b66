"""One process, or DDP: every process holds the whole policy, its fp32 weights and all of the optimiser's state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lorafocal.errors import InputError
from lorafocal.model.master import hold_alike, hold_masters
from lorafocal.model.quantized import to_device
from lorafocal.optimizers import states_of_bitsandbytes

if TYPE_CHECKING:
    from lorafocal.arguments import FocalPOConfig
    from lorafocal.trainer import FocalPOTrainer

SAMPLE = 4096  # entries of a tensor that are looked at to see whether it has moved


def norm_of(gradients: list[Tensor]) -> float:
    """The largest norm of them; 0 of none, infinite where one is not finite."""
    if not gradients:
        return 0.0
    largest = float(torch.stack(torch._foreach_norm(gradients)).max())
    return largest if math.isfinite(largest) else math.inf


class Whole:
    """The ordinary engine, by accelerate's DDP where there are several processes."""

    def __init__(self, args: FocalPOConfig) -> None:
        self.word = str(args.engine)
        self._world = args.world_size

    def place(self, model: nn.Module, device: torch.device) -> None:
        to_device(model, device)

    def begin(self, trainer: FocalPOTrainer) -> None:
        self._policy = trainer.model
        hold_masters(trainer.model, trainer.trained)

    def hold_reference(self, model: nn.Module) -> nn.Module:
        return hold_alike(model, self._policy)

    def ready(self, trainer: FocalPOTrainer) -> None:
        prepared: Any = trainer.optimizer
        self.optimizer: Optimizer = getattr(prepared, "optimizer", prepared)  # without accelerate's wrapper

    @contextmanager
    def pack(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        GradientState()._set_sync_gradients(last)
        with nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync():
            yield

    def backward(self, loss: Tensor, *, last: bool) -> None:
        (loss * self._world).backward()  # DDP averages over ranks

    def ungraded(self, parameters: Mapping[str, Parameter]) -> list[str]:
        return [name for name, parameter in parameters.items() if parameter.grad is None]

    def largest_norm(self, parameters: Mapping[str, Parameter]) -> float:
        return norm_of([p.grad for p in parameters.values() if p.grad is not None])  # DDP made them equal on all ranks

    def step(self) -> None:
        """Trainer clips and steps."""

    def rest(self) -> None:
        """Nothing is gathered."""

    def sample(self, parameter: Parameter) -> Tensor:
        flat = parameter.detach().reshape(-1)
        return flat[:: 1 + flat.numel() // SAMPLE].clone()

    def full(self, parameter: Parameter) -> Tensor:
        return parameter.detach().to("cpu", copy=True)

    def full_gradient(self, parameter: Parameter) -> Tensor:
        gradient: Any = parameter.grad  # `ungraded` says where there is none
        return gradient.detach().to("cpu", copy=True)

    def states(self, parameter: Parameter) -> dict[str, Any]:
        state = self.optimizer.state.get(parameter, {})
        return {k: v.detach().to("cpu", copy=True) if isinstance(v, Tensor) else v for k, v in state.items()}

    def restore(
        self,
        parameters: Mapping[str, Parameter],
        value: Callable[[str], Tensor],
        states: Callable[[str], Mapping[str, Any]],
    ) -> None:
        made = states_of_bitsandbytes(self.optimizer)
        self.optimizer.state.clear()
        group_of = {id(parameter): group for group in self.optimizer.param_groups for parameter in group["params"]}
        for name, parameter in parameters.items():
            with torch.no_grad():
                parameter.copy_(value(name))
            saved, group = states(name), group_of[id(parameter)]
            if saved and made is not None:
                self.optimizer.state[parameter] = _filled(made[parameter], saved)
            elif saved:
                # torch keeps AdamW's step counts on the CPU unless its kernel reads them on the device
                on_device = group.get("capturable") or group.get("fused")
                devices = {} if on_device else {"step": torch.device("cpu")}
                self.optimizer.state[parameter] = {
                    key: entry.to(devices.get(key, parameter.device)) if isinstance(entry, Tensor) else entry
                    for key, entry in saved.items()
                }

    def groups(self, parameters: Mapping[str, Parameter]) -> list[tuple[list[str], dict[str, Any]]]:
        names = {id(parameter): name for name, parameter in parameters.items()}
        for index, group in enumerate(self.optimizer.param_groups):
            if unknown := [tuple(p.shape) for p in group["params"] if id(p) not in names]:
                raise InputError(f"optimizer group {index} holds parameters not among the trainable: {unknown}")
        return [([names[id(p)] for p in group["params"]], group) for group in self.optimizer.param_groups]


def _filled(made: dict[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's own buffers with what was saved: paged ones stay paged, shared tables stay shared."""
    for key, value in saved.items():
        if isinstance(value, Tensor):
            made[key].copy_(value)
        else:
            made[key] = value
    return made
