"""FSDP2, by torch's own `fully_shard`: every process holds a part of each weight, of its gradient and of its moments.

A decoder layer is gathered for its forward and again for its backward; embeddings, head and last norm are one more
part. Under bf16 arithmetic the parts are fp32 masters, gathered as bf16; gradients are summed in fp32. accelerate's
FSDP is not used: on a CPU it quietly becomes DDP.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.state import GradientState
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from transformers.training_args import OptimizerNames

from lorafocal.compatibility import FOUR_BIT
from lorafocal.engines.whole import Whole, norm_of
from lorafocal.errors import InputError
from lorafocal.model.compiled import decoder_layers
from lorafocal.model.master import check_one_width, hold_masters, needs_masters, widen
from lorafocal.model.quantized import word_of
from lorafocal.together import greatest

if TYPE_CHECKING:
    from lorafocal.arguments import FocalPOConfig
    from lorafocal.trainer import FocalPOTrainer


def backend(args: FocalPOConfig) -> str | None:
    """What processes talk through: gradients that are kept in the machine's memory are clipped there, by gloo."""
    beside_gpus = args.offload == "all" and torch.cuda.is_available() and not args.use_cpu
    return "cuda:nccl,cpu:gloo" if beside_gpus else args.ddp_backend


class Sharded(Whole):
    """As the ordinary engine, on parameters that are DTensors; a model's forward and backward gather them."""

    def __init__(self, args: FocalPOConfig) -> None:
        super().__init__(args)
        optim = OptimizerNames(args.optim).value
        if not optim.startswith(("adamw_torch", "sgd")):
            raise InputError(
                f"optim: {optim} is bitsandbytes', which cannot step parameters that are split over processes"
                " (fsdp2): use adamw_torch, whose moments are split, or engine.kind: ddp"
            )
        self._device = args.device
        pinned = CPUOffloadPolicy(pin_memory=self._device.type == "cuda")
        self._how: dict[str, Any] = {
            "mesh": init_device_mesh(self._device.type, (self._world,)),
            "offload_policy": pinned if args.offload == "all" else OffloadPolicy(),
        }

    def place(self, model: nn.Module, device: torch.device) -> None:
        if isinstance(model, FSDPModule):
            raise InputError("the model was split over processes (fsdp2) by an earlier trainer: load it again")
        check_one_width(model, self.word)
        super().place(model, device)

    def begin(self, trainer: FocalPOTrainer) -> None:
        policy: Any = trainer.model
        self._policy = policy
        if isinstance(policy, FSDPModule):
            self.rest()
            return
        if trainer.optimizer is not None:
            raise InputError(
                "`optimizers` brings an optimiser of whole parameters, which fsdp2 exchanges for split ones before the"
                " first step: name it by `optim`, or train with engine ddp"
            )
        # Summing the gradients of full-parameter training over packs takes the memory of a whole model on every rank.
        self._reduces_each_pack = not isinstance(policy, PeftModel)
        if needs_masters(policy, trainer.trained):
            mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            split(policy, masters_of=trainer.trained, mp_policy=mixed, **self._how)
        else:
            split(policy, **self._how)
        trainer.accelerator.prepare_model = _as_it_is  # accelerate would wrap it in DDP, or refuse it
        trainer.accelerator.clip_grad_norm_ = _with_whole_norm(trainer.accelerator.clip_grad_norm_)
        # A pack's log-probs are a view, into which nobody writes.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)

    def hold_reference(self, model: nn.Module) -> nn.Module:
        if not isinstance(model, FSDPModule):
            split(model, reshard_after_forward=True, **self._how)
        return model

    @contextmanager
    def pack(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        GradientState()._set_sync_gradients(last)
        self._policy.set_requires_gradient_sync(last or self._reduces_each_pack)
        yield

    def rest(self) -> None:
        self._policy.reshard()  # after an evaluation the module still has what no layer owns as one piece

    def largest_norm(self, parameters: Mapping[str, Parameter]) -> float:
        own = norm_of([_local(p.grad) for p in parameters.values() if p.grad is not None])
        return greatest(own, self._device)

    def sample(self, parameter: Any) -> Tensor:
        return super().sample(_local(parameter))

    def full(self, parameter: Parameter) -> Tensor:
        return self._gathered(parameter)

    def full_gradient(self, parameter: Parameter) -> Tensor:
        return self._gathered(parameter.grad)

    def states(self, parameter: Parameter) -> dict[str, Any]:
        state = self.optimizer.state.get(parameter, {})
        return {key: self._gathered(value) if isinstance(value, Tensor) else value for key, value in state.items()}

    def restore(
        self,
        parameters: Mapping[str, Parameter],
        value: Callable[[str], Tensor],
        states: Callable[[str], Mapping[str, Any]],
    ) -> None:
        self.rest()

        def part(name: str) -> Tensor:
            return self._part(value(name), parameters[name])

        def parts(name: str) -> Mapping[str, Any]:
            like = parameters[name]
            return {key: self._part(entry, like) for key, entry in states(name).items()}

        super().restore(parameters, part, parts)

    def _gathered(self, tensor: Any) -> Tensor:
        """Collective: the whole tensor, a copy on the CPU."""
        whole: Any = tensor.detach()
        if isinstance(tensor, DTensor):
            whole = whole.to(self._device).full_tensor()
        return cast(Tensor, whole.to("cpu", copy=True))

    def _part(self, whole: Any, like: Any) -> Any:
        """This rank's part of a whole tensor that every rank has; anything but a tensor of that shape stays."""
        if not isinstance(whole, Tensor) or whole.shape != like.shape:
            return whole
        mesh, placements = like.device_mesh, like.placements
        return distribute_tensor(whole.to(self._device), mesh, placements, src_data_rank=None).to(like.device)


def split(model: nn.Module, *, masters_of: Mapping[str, Parameter] | None = None, **how: Any) -> None:
    """Split a model's parameters over processes, in place: a decoder layer is one unit, what is left another.

    `how` is what `fully_shard` takes. `masters_of`, the trained parameters, asks for fp32 masters of bf16 weights;
    they are made one unit after the other, so that no process ever holds all of them.
    """
    layers: list[Any] = list(model.modules())
    eight_bit = {layer.weight for layer in layers if word_of(layer) == "int8"}  # whole: bitsandbytes copies their codes
    four_bit = {layer: layer.weight.quant_state for layer in layers if word_of(layer) in FOUR_BIT}
    for unit in (*reversed(decoder_layers(model)), model):
        if masters_of is not None and unit is not model:
            widen(unit)
        elif masters_of is not None:
            hold_masters(model, masters_of)
        before = [parameter for parameter in unit.parameters() if not isinstance(parameter, DTensor)]
        with _CodesNeedNoGradient():
            fully_shard(unit, ignored_params=eight_bit, **how)
        _let_go(before, kept=eight_bit)
    for unit in decoder_layers(model) if four_bit else ():
        _hand_on(unit, four_bit)


class _CodesNeedNoGradient(TorchFunctionMode):
    """`fully_shard` of torch 2.11 makes every part one that needs a gradient, for a moment; integers refuse that."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.requires_grad_ and not args[0].is_floating_point():
            return args[0]
        return func(*args, **(kwargs or {}))


def _let_go(parameters: Iterable[Parameter], *, kept: Container[Parameter]) -> None:
    """Empty parameters that were exchanged for split ones: somebody may still know them."""
    for parameter in parameters:
        if parameter not in kept:
            parameter.data = parameter.data.new_empty(0)


def _hand_on(unit: Any, scales: Mapping[nn.Module, Any]) -> None:
    """Collective: give 4-bit codes their scales back, as parts and gathered: `fully_shard` exchanges the parameters."""
    layers: list[Any] = [layer for layer in unit.modules() if layer in scales]
    for hold in (unit.unshard, unit.reshard):
        hold()
        for layer in layers:
            layer.weight.quant_state = scales[layer]


def _local(tensor: Any) -> Any:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _with_whole_norm(clip: Callable[..., Any]) -> Callable[..., Any]:
    """`clip` gives the norm of all processes' parts: torch 2.9 clips by it, and gives back this process's own."""

    def clipped(*args: Any, **kwargs: Any) -> Any:
        norm = clip(*args, **kwargs)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    return clipped


def _as_it_is(model: nn.Module, **_: Any) -> nn.Module:
    return model
