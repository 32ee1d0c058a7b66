"""How many token rows a pack may have on this device: settled before the first step, halved where it was too many."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers.training_args import OptimizerNames

from lorafocal import launch, memory
from lorafocal.arguments import FocalPOConfig
from lorafocal.data.packing import PairCollator, StepBatch
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError, ran_out
from lorafocal.memory import Lengths, Setup, Shape
from lorafocal.memory.setup import attention_on_a_gpu, count_of
from lorafocal.model.head import causal_lm
from lorafocal.model.master import arithmetic_of
from lorafocal.model.quantized import quantization_of
from lorafocal.objectives import OBJECTIVES
from lorafocal.ops.attention_kernels import choose
from lorafocal.tensor_files import dtype_word
from lorafocal.together import anywhere, least

logger = logging.getLogger(__name__)

AS_STATED = "as stated"  # why a budget is what the arguments say
CPU_TOKENS = 2048  # more are no faster there
SMALLER = (
    "recompute more (`training.activation_checkpointing: mlp` or `full`), hold less (`model.quantization` under an"
    " adapter, `--engine zero3` without one) or lower `data.max_length`"
)

T = TypeVar("T")


# ---- before the first step ----------------------------------------------------------------------------------------


def settle_budget(
    policy: nn.Module,
    args: FocalPOConfig,
    device: torch.device,
    pairs: Sequence[TokenizedPair],
    *,
    fused: bool = True,
) -> memory.Choice:
    """Token rows of a pack, the tier of activations and the head's chunk for `policy`, which its engine has placed and
    not yet begun.

    What `args` states wins; the rest is what `memory.choose` finds for the device's free memory and the lengths of
    `pairs`. The least memory of all ranks counts, whole and free: where weights are split, one that recomputed alone
    would wait for the others. Without CUDA, and for models that the arithmetic does not know, packs of 2048 that keep
    everything. `fused`: the MLP blocks run through the fused functions, which save less and alone have the tier "mlp".
    """
    stated = args.tokens_per_pack
    tier = "none" if args.recompute == "auto" else args.recompute
    longest = longest_alone(args, pairs)
    if device.type != "cuda":
        reason = AS_STATED if stated else f"on {device.type}"
        return memory.Choice(stated or max(CPU_TOKENS, longest), tier, reason)
    try:
        shape = Shape.of(causal_lm(policy).config.to_dict())
        setup = setup_of(policy, args, pairs, fused=fused)
    except InputError as problem:
        reason = AS_STATED if stated and args.recompute != "auto" else str(problem)
        return memory.Choice(stated or max(CPU_TOKENS, longest), tier, reason)
    rows = memory.head_rows(shape, setup, least(whole_bytes(device), device))
    setup = replace(setup, head_rows=rows, attention=_attention_on(device, shape, setup))
    if stated is not None and args.recompute != "auto":
        return memory.Choice(stated, tier, AS_STATED, head_rows=setup.head_rows)
    tiers = memory.TIERS if args.recompute == "auto" else (args.recompute,)
    held = memory.residents(shape, setup, args.world_size)
    room = free_bytes(device)
    if setup.full or setup.engine not in memory.WHOLE:  # what is here now is widened, or split, when training begins
        copies = 2 if setup.reference == "separate_model" else 1
        room += copies * _bytes_on(device, policy) - held.before
    free = least(memory.room_for_packs(room, held), device)
    choice = memory.choose(shape, setup, free, max(longest, stated or 0), tiers)
    if not choice.fits:
        logger.warning("packs may not fit into the device's memory: %s. If they do not, %s", choice.reason, SMALLER)
    return choice if stated is None else replace(choice, tokens=stated)


def longest_alone(args: FocalPOConfig, pairs: Sequence[TokenizedPair]) -> int:
    """Token rows of the longest pair in a pack by itself, which is never split."""
    layout, rejected = "padded" if args.layout == "padded" else "packed", OBJECTIVES[args.objective].rejected
    return max(map(PairCollator(layout, rejected=rejected, others=True).rows_alone, pairs), default=1)


def setup_of(policy: nn.Module, args: FocalPOConfig, pairs: Sequence[TokenizedPair], *, fused: bool) -> Setup:
    """What the arithmetic asks of a run on a GPU, read from the policy itself and the mean lengths of `pairs`."""
    dtype = dtype_word(arithmetic_of(policy))
    sides = [(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    means = [sum(side) / len(sides) for side in zip(*sides, strict=True)]
    if means and not OBJECTIVES[args.objective].rejected:
        means[2] = 0
    return Setup(
        dtype=dtype,
        quantization=quantization_of(policy),
        **(_adapter_of(policy, args) if isinstance(policy, PeftModel) else {"full": True}),
        optim=OptimizerNames(args.optim).value,
        reference=args.strategy.word,
        members=tuple(args.strategy.members or ()),
        guide=args.strategy.guide is not None,
        divergences=OBJECTIVES[args.objective].divergences,
        engine=str(args.engine),
        offload=args.offload,
        adapter_kernels="fused" if fused else "peft",
        attention=attention_on_a_gpu(dtype),
        lengths=Lengths(*means) if means else Lengths(),
    )


def _attention_on(device: torch.device, shape: Shape, setup: Setup) -> str:
    """Collective: as `setup` has it, but where no variable-length kernel works: then keys are repeated, all at worst.

    Where one rank has none, all count so: their tiers must be the same.
    """
    if setup.attention != "flash":
        return setup.attention
    dtype: torch.dtype = getattr(torch, setup.dtype)
    found = choose(device, dtype, window=shape.sliding_window, head_dim=shape.head_dim)
    return "repeated" if anywhere(found.function is None, device) else "flash"


def _adapter_of(policy: PeftModel, args: FocalPOConfig) -> dict[str, Any]:
    adapter = next(iter(policy.peft_config.values()))
    named = not isinstance(adapter.target_modules, str)  # else by an expression, of which the most is assumed
    return {
        "r": adapter.r,
        "targets": sorted(adapter.target_modules or ()) if named else "all-linear",
        "rank_pattern": adapter.rank_pattern,
        "use_dora": adapter.use_dora,
        "dropout": adapter.lora_dropout if args.allow_dropout else 0.0,
        "modules_to_save": adapter.modules_to_save or (),
        "trainable_tokens": count_of(adapter.trainable_token_indices or ()),
    }


def _bytes_on(device: torch.device, model: nn.Module) -> int:
    """What the parameters of `model` take of the device."""
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.device.type == device.type)


def free_bytes(device: torch.device) -> float:
    """Bytes of the device that nothing holds by now, or that this process may still take."""
    free, _ = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    free = min(free, whole_bytes(device) - reserved)
    return free + reserved - torch.cuda.memory_allocated(device)


def whole_bytes(device: torch.device) -> int:
    """Bytes of the device that this process may hold."""
    _, whole = torch.cuda.mem_get_info(device)
    return int(torch.cuda.get_per_process_memory_fraction(device) * whole)


# ---- in a step ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Retry:
    """Runs the work of a step; where CUDA runs out of memory, packs its pairs smaller and runs it again.

    `collator` is the one of later steps too; `engine`, in the words of `compatibility.ENGINES`, is the run's.
    """

    collator: PairCollator
    device: torch.device
    engine: str
    shrunk: bool = False

    def run(self, batch: StepBatch, work: Callable[[StepBatch], T], *, undo: Callable[[], None] = lambda: None) -> T:
        """`work(batch)`; `undo` takes back what a broken attempt has left.

        Raises InputError where no smaller packs exist, and beyond one process, where the others wait for this one.
        """
        if self.shrunk:  # a loader goes on with the packs of its own collator
            batch = self.collator(batch.pairs)
        while True:
            try:
                return work(batch)
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                self._shrink(batch, error)
            # Here, not while the exception is handled: until then its frames keep the step's tensors.
            undo()
            self._give_back()
            batch = self.collator(batch.pairs)

    def _shrink(self, batch: StepBatch, error: RuntimeError) -> None:
        rows = max((pack.num_rows for pack in batch.packs), default=1)
        longest = max(map(self.collator.rows_alone, batch.pairs), default=1)
        smaller = max(rows // 2, longest)
        found = f"the device ran out of memory with packs of up to {rows} token rows"
        if smaller >= rows:
            raise InputError(f"{found}, which the longest pair needs by itself: {SMALLER}") from error
        if self.engine != "one-process":
            raise InputError(
                f"process {launch.rank()} ({self.engine}): {found}. The other processes are inside the step and cannot"
                f" do it again, so the run ends here: start it with `packing.tokens: {smaller}` (or go on: --resume"
                f" packing.tokens={smaller}), or {SMALLER}"
            ) from error
        self.collator, self.shrunk = replace(self.collator, tokens_per_pack=smaller), True
        logger.warning("%s: the step is computed again with packs of %d, and so are later ones", found, smaller)

    def _give_back(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
