"""Scoring a model that is bigger than memory: its layers stay in their safetensors until the forward comes to them.

accelerate's hooks fetch a module's tensors when it is called and let them go after it; embeddings, final norm and head
stay in memory. The numbers are those of the model in memory; every pack reads the files once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]  # accelerate brings it
import torch
from accelerate import cpu_offload, init_empty_weights
from accelerate.utils import PrefixedDataset, set_module_tensor_to_device
from peft import PeftModel
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

from lorafocal import budget
from lorafocal.model.adapters import features
from lorafocal.model.load import DTYPES, load_base, local_device
from lorafocal.model.saved import WEIGHTS_FILE, SavedAdapter, open_adapter, put_on, read_config
from lorafocal.release.deltas import LOW_RANK
from lorafocal.release.shards import Checkpoint
from lorafocal.release.skeleton import Skeleton, skeleton
from lorafocal.tensor_files import PEFT_PREFIX, read_tensors

_ROOM = 1.2  # memory that scoring takes, in units of the weights'


def open_live(saved: SavedAdapter, dtype: str) -> tuple[PeftModel, tuple[str, ...]]:
    """`open_adapter`, its layers left on disk where they do not fit; and a note where that is so."""
    on_disk = None
    if saved.quantization is None and features(saved.config) <= LOW_RANK:
        on_disk = too_big(saved.base, saved.revision, held_in=saved.dtype, dtype=dtype)
    if on_disk is None:
        return open_adapter(saved, dtype=dtype), ()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*meta parameter in the current model.*")
        policy = put_on(on_disk.model, saved.folder, saved.config)
    on_disk.connect(read_tensors(saved.folder / WEIGHTS_FILE))
    return policy.eval(), (on_disk.note,)


def open_merged(folder: str, dtype: str) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """`load_base` of a float model, its layers left on disk where they do not fit; and a note where that is so."""
    on_disk = too_big(folder, None, held_in=dtype, dtype=dtype)
    if on_disk is None:
        return load_base(folder, dtype=dtype).eval(), ()
    on_disk.connect({})
    return on_disk.model.eval(), (on_disk.note,)


def too_big(name: str, revision: str | None, *, held_in: str, dtype: str) -> OnDisk | None:
    """What to score a model with that does not fit the free memory in `dtype`; None where it does.

    Its weights are rounded to `held_in` first. None, too, where the files do not hold its tensors one by one, or no
    list of layers can be told: then it has to fit.
    """
    checkpoint = Checkpoint.open(name, revision)
    needed = sum(math.prod(stored.shape) for stored in checkpoint.tensors.values()) * DTYPES[dtype].itemsize
    free = free_bytes(local_device())
    config = read_config(name, revision)
    if needed * _ROOM <= free or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    stored_in = skeleton(name, revision, dtype=held_in, quantization=None)
    if stored_in.obstacle(checkpoint) is not None or stored_in.places.keys() - stored_in.parameters:
        return None
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    layers = _layers(model)
    if layers is None:
        return None
    note = (
        f"In {dtype} the model takes about {needed / 2**30:.3g} GiB, and {free / 2**30:.3g} GiB were free: the gate"
        " read its layers from disk as it came to them."
    )
    return OnDisk(model, layers, stored_in, checkpoint, note)


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses, of a GPU or of the host; what torch keeps of a model that was let go of is free."""
    if device.type == "cuda":
        return int(budget.free_bytes(device))
    return int(psutil.virtual_memory().available)


def _layers(model: PreTrainedModel) -> str | None:
    """The name of the list that holds the model's layers."""
    count = model.config.get_text_config().num_hidden_layers
    lists = (
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    )
    return next(lists, None)


@dataclass(frozen=True, slots=True)
class OnDisk:
    """A model without a weight, all of them on the meta device, and the files that have them.

    `layers` is the name of the list of layers, which stay in the files.
    """

    model: PreTrainedModel
    layers: str
    skeleton: Skeleton
    checkpoint: Checkpoint
    note: str

    def connect(self, adapter: Mapping[str, Tensor]) -> None:
        """Load what is no layer, and have each layer fetch its tensors when it is called.

        `adapter` holds PEFT's tensors by the names of its file; a layer's part is fetched with it.
        """
        device, tensors = local_device(), StoredTensors(self.skeleton, self.checkpoint, adapter)
        for name in [name for name, _ in self.model.named_parameters() if not name.startswith(f"{self.layers}.")]:
            set_module_tensor_to_device(self.model, name, device, value=tensors[name])
        self.model.tie_weights()
        for number, layer in enumerate(self.model.get_submodule(self.layers)):
            of_layer = PrefixedDataset(tensors, f"{self.layers}.{number}.")
            cpu_offload(layer, execution_device=device, state_dict=of_layer)
        self.model.requires_grad_(False)
        self.model.config.get_text_config().use_cache = False


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a base and an adapter by the names that modules have them under, each read when asked for."""

    def __init__(self, skeleton: Skeleton, checkpoint: Checkpoint, adapter: Mapping[str, Tensor]) -> None:
        self._skeleton, self._checkpoint, self._adapter = skeleton, checkpoint, adapter
        self._stored = {skeleton.places[name]: name for name in checkpoint.tensors if name in skeleton.places}

    def __getitem__(self, name: str) -> Tensor:
        of_adapter = f"{PEFT_PREFIX}{name.replace('.default.', '.')}"
        if of_adapter in self._adapter:
            return self._adapter[of_adapter]
        stored = self._stored[self._skeleton.places[name.replace(".base_layer.", ".")]]
        return self._skeleton.as_loaded(stored, self._checkpoint.tensor(stored))

    def __iter__(self) -> Iterator[str]:
        return iter(self._skeleton.places)

    def __len__(self) -> int:
        return len(self._skeleton.places)
