"""What DeepSpeed's three optimisers hold of a policy on one rank, read and written as one: its parts.

Stages 1 and 2, stage 3, and stage 1 of a bf16 model each have a class of their own, with names of their own. A part is
a flat fp32 tensor, the masters of a rank's share of some parameters, which torch's optimiser steps in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True, slots=True)
class Part:
    """A rank's share of some parameters."""

    masters: Tensor  # flat, fp32
    group: int  # of the optimiser
    parameters: Sequence[Parameter]  # the same ones on every rank, whether a rank has a share in each or not
    gradients: Callable[[], Sequence[Tensor]]  # after the last backward of a step, reduced over ranks


def parts_of(zero: Any) -> list[Part]:
    """The parts of a DeepSpeed optimiser, which lists them by names that depend on its class."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3

        def of_stage_3(number: int, flat: Any) -> Callable[[], Sequence[Tensor]]:
            return lambda: _gradient(flat) if zero.offload_optimizer else zero.averaged_gradients[number]

        return [
            Part(flat, zero.sub_group_to_group_id[number], zero.fp16_groups[number], of_stage_3(number, flat))
            for number, flat in enumerate(zero.fp32_partitioned_groups_flat)
        ]
    if hasattr(zero, "fp32_groups_flat_partition"):  # stage 1 of a bf16 model

        def of_bf16(number: int) -> Callable[[], Sequence[Tensor]]:
            return lambda: [zero.fp32_groups_gradient_flat_partition[number]]

        return [
            Part(flat, number, zero.bf16_groups[number], of_bf16(number))
            for number, flat in enumerate(zero.fp32_groups_flat_partition)
        ]

    def of_stages_1_and_2(number: int, flat: Any) -> Callable[[], Sequence[Tensor]]:
        return lambda: _gradient(flat) if zero.cpu_offload else zero.averaged_gradients[number]

    return [
        Part(flat, number, zero.bit16_groups[number], of_stages_1_and_2(number, flat))
        for number, flat in enumerate(zero.single_partition_of_fp32_groups)
    ]


def _gradient(masters: Tensor) -> list[Tensor]:
    return [] if masters.grad is None else [masters.grad]


def link_states(zero: Any) -> None:
    """Have parameters find their share of the optimiser's state, as the first step does; stage 3 looks it up itself."""
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def own_entries(parameter: Any) -> Tensor:
    """This rank's entries of a parameter's masters, maybe none: a view."""
    if hasattr(parameter, "ds_id"):
        return parameter._z3_optimizer.get_local_fp32_param(parameter)
    mapping = parameter._hp_mapping
    return parameter.new_empty(0, dtype=torch.float32) if mapping is None else mapping.get_hp_fragment()


def set_entries(parameter: Any, value: Tensor, key: str | None = None) -> None:
    """Set this rank's share of a parameter's masters, or of their state `key`, from the whole `value`.

    DeepSpeed's own function for that reads past the end where ranks do not divide a parameter evenly.
    """
    if not hasattr(parameter, "ds_id"):
        parameter.set_full_hp_param(value, key)
        return
    entries, rank = parameter.ds_tensor.ds_numel, torch.distributed.get_rank()
    own = value.flatten()[rank * entries : (rank + 1) * entries]
    padded = torch.nn.functional.pad(own, (0, entries - own.numel()))
    parameter._z3_optimizer.set_local_hp_param(padded, parameter, key)


def refresh_weights(zero: Any) -> None:
    """Collective: the weights that the model computes with, from masters that were set."""
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    for number in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(number)
    if zero.persistent_parameters:  # small ones that every rank keeps whole
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
