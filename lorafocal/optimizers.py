"""The optimiser of a run and its schedule: what both need, LoRA+'s two rates, moments that bitsandbytes keeps small.

bitsandbytes quantises moments in blocks of 256; tensors below 4096 entries keep 32 bits, and paging begins at 100,000.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Parameter
from torch.optim import SGD, Optimizer
from transformers import SchedulerType, get_scheduler

from lorafocal.errors import InputError, first_line
from lorafocal.resume import changes

if TYPE_CHECKING:
    from lorafocal.arguments import FocalPOConfig

logger = logging.getLogger(__name__)

# What gives the same result without paging.
UNPAGED = {"paged_adamw_32bit": "adamw_torch", "paged_adamw_8bit": "adamw_8bit"}


def check_device(optim: str, device: torch.device) -> None:
    """Raise InputError for an optimiser that `device` would silently make another one, with the one to name instead."""
    if optim in UNPAGED and device.type != "cuda":
        raise InputError(
            f"optim: {optim} moves moments between a GPU's memory and the machine's, and there is no CUDA device here"
            f" (bitsandbytes would go on without paging): use {UNPAGED[optim]}, which gives the same result"
        )


def check_schedule(name: str, settings: Mapping[str, Any], learning_rate: float) -> None:
    """Raise InputError for `lr_scheduler_kwargs` of which transformers makes no schedule, or none of finite rates.

    It says so only at the first step, when the model is loaded.
    """
    warmup, steps = 10, 100  # any run's
    try:
        one = SGD([Parameter(torch.zeros(1))], lr=learning_rate)
        schedule = get_scheduler(name, one, warmup, steps, scheduler_specific_kwargs=dict(settings))
        factors = [schedule.lr_lambdas[0](step) for step in range(steps + 1)]
        wrong = next((f"a rate of {factor:g} times" for factor in factors if not 0 <= factor < math.inf), "")
    except (TypeError, ValueError, ArithmeticError) as error:
        wrong = first_line(error)
    if wrong:
        raise InputError(f"lr_scheduler_kwargs: {name} cannot be computed with {dict(settings)} ({wrong}): correct it")


def schedule_of(args: FocalPOConfig, pairs: int) -> dict[str, Any]:
    """How many steps a run on so many pairs makes and, beside the optimiser's own settings, what decides their size.

    As JSON reads it back.
    """
    epochs = math.ceil(args.num_train_epochs * math.ceil(pairs / args.pairs_per_step))
    steps = args.max_steps if args.max_steps > 0 else epochs
    return {
        "steps": steps,
        "warmup_steps": args.get_warmup_steps(steps),
        "lr_scheduler_type": SchedulerType(args.lr_scheduler_type).value,
        "lr_scheduler_kwargs": json.loads(json.dumps(args.lr_scheduler_kwargs or None, default=str)),
        "max_grad_norm": args.max_grad_norm,
    }


def tell_another_schedule(saved: Mapping[str, Any], now: Mapping[str, Any], step: int) -> None:
    """A run may be made longer than its checkpoint's was, but not unsaid: it ends as no uninterrupted run would.

    `step` is the checkpoint's; a run that has no more of them is as it was saved.
    """
    differ = changes(saved, now, ())
    if step > now["steps"]:
        logger.warning("the checkpoint is of step %d, and this run has %d: nothing is trained", step, now["steps"])
    elif differ and step < now["steps"]:
        logger.warning(
            "from here on the steps are not those that the checkpoint's run would have made (then -> now): %s",
            "; ".join(differ),
        )


def check_given(optimizer: Optimizer | None, loraplus_lr_ratio: float | None) -> None:
    """Raise InputError for a ratio beside an optimiser that the caller made."""
    if loraplus_lr_ratio is not None and optimizer is not None:
        raise InputError(
            f"loraplus_lr_ratio is {loraplus_lr_ratio:g}, but `optimizers` brings an optimiser whose groups have their"
            " rates already, so it would be ignored: leave one of the two out"
        )


def settle(optimizer: Optimizer, parameters: Mapping[str, Parameter], loraplus_lr_ratio: float | None) -> None:
    """What transformers leaves open of an optimiser made for `parameters`, before the schedule and the first step."""
    if loraplus_lr_ratio is not None:
        separate_rates(optimizer, parameters, loraplus_lr_ratio)
    # transformers makes one for biases and norms, which adapters are none of, and DeepSpeed leaves empty ones out
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    if of_bitsandbytes(optimizer):
        _settle_bits(optimizer, parameters)


def separate_rates(optimizer: Optimizer, parameters: Mapping[str, Parameter], ratio: float) -> None:
    """LoRA+ (Hayou et al., 2024): matrices B learn at `ratio` times the rate, with all other settings of their group.

    The paper speaks of A and B: magnitudes of DoRA, rows of tokens and whole modules keep the plain rate. PEFT's own
    function decides otherwise for those and takes no account of the weight decay; on plain LoRA they are twins.
    """
    fast = {id(parameter) for name, parameter in parameters.items() if ".lora_B." in name}
    groups = []
    for group in optimizer.param_groups:
        rest = [parameter for parameter in group["params"] if id(parameter) not in fast]
        own = [parameter for parameter in group["params"] if id(parameter) in fast]
        groups += [group | {"params": rest}, group | {"params": own, "lr": group["lr"] * ratio}]
    optimizer.param_groups[:] = groups


def of_bitsandbytes(optimizer: Optimizer) -> bool:
    return any(base.__module__.partition(".")[0] == "bitsandbytes" for base in type(optimizer).__mro__)


def kind_of(optimizer: Optimizer) -> str:
    """What a checkpoint calls the optimiser: bitsandbytes' AdamW in its versions is not torch's of the same name."""
    name = type(optimizer).__name__
    if not of_bitsandbytes(optimizer):
        return name
    settings: Any = optimizer
    return f"{name} of bitsandbytes in {settings.args.optim_bits} bits{', paged' if settings.is_paged else ''}"


def states_of_bitsandbytes(optimizer: Optimizer) -> dict[Parameter, dict[str, Any]] | None:
    """The state that bitsandbytes makes for each parameter before its first step, paged where it pages.

    The optimiser keeps the state it has. None for torch's optimisers, which make theirs within the step.
    """
    if not of_bitsandbytes(optimizer):
        return None
    its: Any = optimizer
    held, its.state = its.state, defaultdict(dict)
    try:
        its.check_overrides()
        for index, group in enumerate(its.param_groups):
            for place, parameter in enumerate(group["params"]):
                its.init_state(group, parameter, index, place)
        return dict(its.state)
    finally:
        its.state = held


def _settle_bits(optimizer: Optimizer, parameters: Mapping[str, Parameter]) -> None:
    """Moments of single tokens' rows stay in 32 bits, as transformers has it for whole embeddings; other overrides go.

    A block is rounded by its largest entry, and some tokens come a thousand times as often as others: beside such a
    row, one with gradients of 1e-4 of its size learns at less than a hundredth of its rate.
    """
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for index, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):  # kept for the whole process: those of an earlier run
            manager.pid2config.pop(id(parameter), None)
            manager.index2config.pop((index, place), None)
    rows = [parameter for name, parameter in parameters.items() if "trainable_tokens" in name]
    manager.override_config(rows, "optim_bits", 32)
