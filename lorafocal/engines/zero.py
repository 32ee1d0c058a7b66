"""DeepSpeed's ZeRO: optimiser states (stage 1), gradients (2) and weights (3) are split over processes.

DeepSpeed keeps the fp32 masters of a bf16 model, adds up and reduces gradients in fp32, clips and steps. Its own
checkpoints are pickles and are neither written nor read: values go in and out by parameter name.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.state import GradientState
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.training_args import OptimizerNames

from lorafocal.engines.whole import SAMPLE, norm_of
from lorafocal.engines.zero_parts import Part, link_states, own_entries, parts_of, refresh_weights, set_entries
from lorafocal.errors import InputError
from lorafocal.memory.shards import BUCKET_ENTRIES
from lorafocal.model.adapters import adapter_layers
from lorafocal.model.compiled import decoder_layers
from lorafocal.model.master import arithmetic_of, check_one_width
from lorafocal.model.quantized import to_device
from lorafocal.together import greatest

if TYPE_CHECKING:
    from lorafocal.arguments import FocalPOConfig
    from lorafocal.trainer import FocalPOTrainer

OLDEST = Version("0.19.8")  # 0.18 does not split stage 1 of a bf16 model, or ends in an assertion

# Weights of so many entries, as norms have, stay whole on every rank under stage 3: to fetch them would cost more.
PERSISTENT_ENTRIES = 100_000

# Their state is one number for each entry, so that it may be split anywhere.
_OPTIMISERS = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED, OptimizerNames.SGD)

_LAUNCHED_FOR_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"  # accelerate's own: set by its launcher, and by its plugin


def deepspeed_config(args: FocalPOConfig) -> dict[str, Any]:
    """What `TrainingArguments.deepspeed` is given; the precision is added when the model is known.

    Raises InputError where DeepSpeed is not installed, and for an optimiser whose state it cannot split.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            f"engine {args.engine} is DeepSpeed's, which is not installed: pip install 'lorafocal[deepspeed]'"
        )
    if Version(found := version("deepspeed")) < OLDEST:
        raise InputError(
            f"engine {args.engine}: DeepSpeed {found} is installed, and {OLDEST} is the oldest that trains right here:"
            " pip install --upgrade 'lorafocal[deepspeed]'"
        )
    if OptimizerNames(args.optim) not in _OPTIMISERS:
        raise InputError(
            f"optim is {args.optim}: {args.engine} splits the optimiser's state over processes by entries, and"
            f" bitsandbytes keeps it in blocks. Choose {' or '.join(name.value for name in _OPTIMISERS)}"
        )
    _prepare_process(on_cpu=args.use_cpu or not torch.cuda.is_available())
    zero: dict[str, Any] = {"stage": int(str(args.engine)[-1]), "reduce_bucket_size": BUCKET_ENTRIES}
    kept = {"device": "cpu", "pin_memory": not args.use_cpu and torch.cuda.is_available()}
    if args.offload != "none":
        zero["offload_optimizer"] = kept
    if zero["stage"] == 3:
        zero["stage3_prefetch_bucket_size"] = BUCKET_ENTRIES
        zero["stage3_param_persistence_threshold"] = PERSISTENT_ENTRIES
        if args.offload == "all":
            zero["offload_param"] = kept
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": float(args.max_grad_norm),
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # that one is compiled where it runs; torch's fused AdamW is not
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def _prepare_process(*, on_cpu: bool) -> None:
    """DeepSpeed chooses its device by what is installed, and on a CPU compiles an operator that nothing here calls."""
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed import ops

    # of torch 2.13, about the collectives that DeepSpeed calls
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def load_whole() -> None:
    """Have transformers load models whole from here on: while it knows of ZeRO-3 it splits them before they are read.

    The engine splits them itself, when probes and the stored reference have seen them.
    """
    unset_hf_deepspeed_config()


class Zero:
    """The engine of the words zero1, zero2 and zero3; one training per trainer."""

    def __init__(self, args: FocalPOConfig) -> None:
        self.word = str(args.engine)
        self._stage = int(self.word[-1])
        self._device = args.device
        self._world = args.world_size
        self._on_host = args.offload == "all"
        self._launched = os.environ.get(_LAUNCHED_FOR_DEEPSPEED)
        self._engine: Any = None
        self._graded: set[int] = set()
        self._linked = False

    def place(self, model: nn.Module, device: torch.device) -> None:
        check_one_width(model, self.word)
        load_whole()
        _set_environment(_LAUNCHED_FOR_DEEPSPEED, self._launched)  # accelerate leaves its own there
        if not self._on_host:
            to_device(model, device)

    def begin(self, trainer: FocalPOTrainer) -> None:
        if self._engine is not None:
            raise InputError(
                f"under {self.word} a trainer trains once: its optimiser belongs to the engine. Build another trainer,"
                " and let it go on from a checkpoint (`resume_from_checkpoint`)"
            )
        if trainer.optimizer is not None or trainer.lr_scheduler is not None:
            raise InputError(
                f"`optimizers` brings an optimiser or a schedule of whole parameters, and {self.word} steps split ones:"
                " leave it out, and name them by `optim` and `lr_scheduler_type`"
            )
        config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
        precision = _precision(trainer.model, trainer.trained)
        config |= precision
        zero = {key: value for key, value in config["zero_optimization"].items() if key != "offload_optimizer"}
        self._config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **precision}
        if self._stage == 1:
            _silence()
        if self._stage == 3:
            self._split(trainer.model)

    def _split(self, model: nn.Module) -> None:
        """Split all weights over the processes, one after the other: no device needs room for all of them."""
        import deepspeed

        deepspeed.zero.Init(module=model, config_dict_or_path=self._config)
        for module in _gathered_whole(model):
            for parameter in module.parameters():
                deepspeed.zero.register_external_parameter(module, parameter)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self._device)

    def hold_reference(self, model: nn.Module) -> nn.Module:
        if self._stage < 3 or hasattr(model, "module"):
            return model
        import deepspeed

        self._split(model)
        held: nn.Module = deepspeed.initialize(model=model, config=self._config)[0]
        held.eval()
        return held

    def ready(self, trainer: FocalPOTrainer) -> None:
        self._engine = trainer.model_wrapped
        self._parts = parts_of(self._engine.optimizer)
        self._places = {id(parameter): part for part in self._parts for parameter in part.parameters}
        for parameter in trainer.trained.values():
            parameter.register_post_accumulate_grad_hook(lambda graded: self._graded.add(id(graded)))

    @contextmanager
    def pack(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        GradientState()._set_sync_gradients(last)
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.backward(loss * self._world, scale_wrt_gas=False)  # DeepSpeed averages over ranks

    def ungraded(self, parameters: Mapping[str, Parameter]) -> list[str]:
        flags = torch.tensor([id(parameter) in self._graded for parameter in parameters.values()], device=self._device)
        graded = flags.int()
        dist.all_reduce(graded, op=dist.ReduceOp.MAX)
        return [name for name, found in zip(parameters, graded.tolist(), strict=True) if not found]

    def largest_norm(self, parameters: Mapping[str, Parameter]) -> float:
        return greatest(norm_of([gradient for part in self._parts for gradient in part.gradients()]), self._device)

    def step(self) -> None:
        """DeepSpeed clips, steps, and lets its gradients go."""
        self._graded.clear()
        self._engine.step()
        if not self._linked:  # DeepSpeed does it after the first group's first step, when the others have no state yet
            link_states(self._engine.optimizer)
            self._linked = True

    def rest(self) -> None:
        """DeepSpeed keeps what it gathered, up to a thousand million entries, until the next step ends."""
        if self._stage == 3 and self._engine is not None:
            self._engine.empty_partition_cache()

    def sample(self, parameter: Parameter) -> Tensor:
        own = own_entries(parameter)
        return own[:: 1 + own.numel() // SAMPLE].clone()

    def full(self, parameter: Parameter) -> Tensor:
        from deepspeed import zero
        from deepspeed.utils import safe_get_full_fp32_param

        if id(parameter) not in self._places:  # frozen: it has no masters
            with zero.GatheredParameters([parameter]):
                return parameter.detach().to("cpu", copy=True)
        return safe_get_full_fp32_param(parameter).to("cpu", copy=True)

    def full_gradient(self, parameter: Parameter) -> Tensor:
        held: Any = parameter  # DeepSpeed's own function takes a gradient that is not reduced where it finds one
        whole = held._z3_optimizer.get_fp32_grad_for_param(held) if self._stage == 3 else held.get_full_hp_grad()
        return whole.to("cpu", copy=True)

    def states(self, parameter: Parameter) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        masters = self._part_of(parameter).masters
        found = {}
        for key, entry in self.optimizer.state.get(masters, {}).items():
            if isinstance(entry, Tensor):
                of_entries = entry.shape == masters.shape
                found[key] = (safe_get_full_optimizer_state(parameter, key) if of_entries else entry).to(
                    "cpu", copy=True
                )
            else:
                found[key] = entry
        return found

    def restore(
        self,
        parameters: Mapping[str, Parameter],
        value: Callable[[str], Tensor],
        states: Callable[[str], Mapping[str, Any]],
    ) -> None:
        self.optimizer.state.clear()
        for part in self._parts:
            name, parameter = next(item for item in parameters.items() if self._part_of(item[1]) is part)
            if saved := states(name):
                self.optimizer.state[part.masters] = self._made_for(part, parameter, saved)
        link_states(self._engine.optimizer)
        for name, parameter in parameters.items():
            set_entries(parameter, value(name).to(self._device))
            for key, entry in states(name).items():
                if _is_of_entries(entry, parameter):
                    set_entries(parameter, entry.to(self._device), key)
        refresh_weights(self._engine.optimizer)

    def _made_for(self, part: Part, parameter: Parameter, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a part as the optimiser makes it: zeros for its entries, and what counts for all of them."""
        group = self.optimizer.param_groups[part.group]
        # torch keeps AdamW's step counts on the CPU unless its kernel reads them on the device
        device = part.masters.device if group.get("capturable") or group.get("fused") else torch.device("cpu")
        made: dict[str, Any] = {}
        for key, entry in saved.items():
            if _is_of_entries(entry, parameter):
                made[key] = torch.zeros_like(part.masters)
            else:
                made[key] = entry.to(device, copy=True) if isinstance(entry, Tensor) else entry
        return made

    def _part_of(self, parameter: Parameter) -> Part:
        return self._places[id(parameter)]

    @property
    def optimizer(self) -> Optimizer:
        return self._engine.basic_optimizer

    def groups(self, parameters: Mapping[str, Parameter]) -> list[tuple[list[str], dict[str, Any]]]:
        return [
            ([name for name, parameter in parameters.items() if self._part_of(parameter).group == number], group)
            for number, group in enumerate(self.optimizer.param_groups)
        ]


def _gathered_whole(model: nn.Module) -> list[nn.Module]:
    """Modules whose weights are all there while one of them computes: something may read those of another in it.

    Fused functions and DoRA do so within a decoder layer, PEFT's trained modules and tokens beside them.
    """
    layers = decoder_layers(model)
    within = {id(module) for layer in layers for module in layer.modules()}
    return layers + [module for module in adapter_layers(model) if id(module) not in within]


def _is_of_entries(entry: Any, parameter: Any) -> bool:
    """Whether a state holds a number for each entry of its parameter, and not one for all."""
    return isinstance(entry, Tensor) and entry.shape == getattr(parameter, "ds_shape", parameter.shape)


def _precision(policy: nn.Module, trained: Mapping[str, Parameter]) -> dict[str, Any]:
    """bf16 weights that are trained get masters; fp32 ones on a bf16 base (adapters) are computed with by autocast.

    DeepSpeed switches any other autocast off within its forward.
    """
    if any(parameter.dtype == torch.bfloat16 for parameter in trained.values()):
        return {"bf16": {"enabled": True}}
    if arithmetic_of(policy) == torch.bfloat16:
        autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}  # reduces in fp32
        return {"torch_autocast": autocast}
    return {}


def _silence() -> None:
    """Stage 1 of a bf16 model has another optimiser, which prints the memory it uses, whether it is asked to or not."""
    from deepspeed.runtime import bf16_optimizer

    bf16_optimizer.see_memory_usage = lambda *message, **options: None


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
