"""A reference that follows the policy: the frozen copy beside it, moved towards it in Delta W = B A.

Source: TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656, which moves all weights; on adapters, the change of each
adapted weight moves, and what is trained whole (modules, single tokens) beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from lorafocal.errors import InputError
from lorafocal.model.adapters import FROZEN_COPY, adapter_parameters, of_adapter, twin_of
from lorafocal.references.averaging import LowRank, averaged
from lorafocal.tensor_files import check_keys, differs
from lorafocal.together import grouped

REFERENCE_FILE = "reference.safetensors"  # of a checkpoint


@torch.no_grad()
def move(policy: PeftModel, mixing: float) -> None:
    """The reference becomes `mixing` of the policy and 1 - `mixing` of itself; at 1 a copy, bit for bit.

    Collective where it averages: all processes take the first one's result.
    """
    name = policy.active_adapter
    twins = of_adapter(policy, FROZEN_COPY)
    low_rank: set[str] = set()
    for path, layer in _layers(policy) if mixing < 1 else ():
        low_rank |= {f"{path}.lora_{side}.{name}.weight" for side in "AB"}
        _set(layer, _from_first(averaged(_of(layer, name), _of(layer, FROZEN_COPY), mixing)))
    for path, own in adapter_parameters(policy).items():
        if path not in low_rank:
            twin = twins[twin_of(path, name)]
            moved = own if mixing == 1 else mixing * own.double() + (1 - mixing) * twin.double()
            twin.data = moved.detach().to(twin.dtype, copy=True)


def reference_state(policy: PeftModel) -> dict[str, Tensor]:
    """The reference as it is now, by full parameter name, on the CPU."""
    return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in of_adapter(policy, FROZEN_COPY).items()}


def restore_reference(policy: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Set the reference to what `reference_state` gave; low-rank tensors bring their rank.

    Raises InputError, before anything is changed, for other tensors than the run's.
    """
    parameters = of_adapter(policy, FROZEN_COPY)
    check_keys(state, parameters, REFERENCE_FILE)
    for name, parameter in parameters.items():
        rank = 0 if ".lora_A." in name else 1 if ".lora_B." in name else None
        found, own = (_without(tensor.shape, rank) for tensor in (state[name], parameter))
        if found != own:
            raise InputError(differs(f"{REFERENCE_FILE}: {name!r}", state[name].shape, parameter.shape))
    for name, parameter in parameters.items():
        parameter.data = state[name].to(parameter.device, parameter.dtype)
    for _, layer in _layers(policy):
        _tell_rank(layer)


def _without(shape: torch.Size, axis: int | None) -> tuple[int, ...]:
    return tuple(size for place, size in enumerate(shape) if place != axis)


def _layers(policy: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    for path, layer in policy.named_modules():
        if isinstance(layer, LoraLayer) and FROZEN_COPY in layer.lora_A:
            yield path, layer


def _of(layer: LoraLayer, name: str) -> LowRank:
    return LowRank(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


def _set(layer: LoraLayer, change: LowRank) -> None:
    layer.lora_A[FROZEN_COPY].weight.data = change.a
    layer.lora_B[FROZEN_COPY].weight.data = change.b
    _tell_rank(layer)


def _tell_rank(layer: LoraLayer) -> None:
    a, b = layer.lora_A[FROZEN_COPY], layer.lora_B[FROZEN_COPY]
    layer.r[FROZEN_COPY] = a.out_features = b.in_features = a.weight.shape[0]


def _from_first(change: LowRank) -> LowRank:
    """Collective: the first process's, for rounding may differ between machines."""
    if not grouped() or dist.get_world_size() == 1:
        return change
    rank = torch.tensor([change.a.shape[0]], device=change.a.device)
    dist.broadcast(rank, 0)
    sides = []
    for side, shape in ((change.a, (int(rank), change.a.shape[1])), (change.b, (change.b.shape[0], int(rank)))):
        own = side.contiguous() if side.shape == shape else side.new_empty(shape)
        dist.broadcast(own, 0)
        sides.append(own)
    return LowRank(sides[0], sides[1], change.scale)
