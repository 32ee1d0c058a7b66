"""What a model's config.json says of its computation, and a digest of that: the same weights compute otherwise by
another one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

# What says where a model is from and how it was held, not what it computes.
_NOT_COMPUTED = ("transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "quantization_config")
# The same of what a store's context has always counted: how weights begin, names of classes, what is handed back.
_OF_OTHER_USES = (
    "initializer_range", "initializer_factor", "id2label", "label2id", "num_labels", "problem_type", "return_dict",
    "output_attentions", "output_hidden_states", "attn_implementation", "pretraining_tp",
)  # fmt: skip


def config_sha256(config: PreTrainedConfig) -> str:
    """Hexadecimal sha256 over what `config` has otherwise than the defaults of its class, of what is computed.

    Values that its class does not know, and those that a later transformers adds with a default, do not count: a base
    that was saved again keeps its digest.
    """
    try:
        usual = type(config)().to_dict()
    except Exception:  # noqa: BLE001 a class without defaults, which raises what it likes: then all of it counts
        usual = None
    stated = _otherwise(computed(config.to_dict()), usual)
    content = json.dumps([config.model_type, stated], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def of_layers(config: PreTrainedConfig) -> Sequence[PreTrainedConfig]:
    """`config` as each layer has it, or itself alone: transformers refuses to tell a setting in which layers differ."""
    layers: Sequence[PreTrainedConfig] = [config]
    if getattr(config, "is_heterogeneous", False):
        layers = config.per_layer_config
    return layers


def computed(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of the computation; parts of a composite model alike."""
    return {
        str(key): computed(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not str(key).startswith("_") and not str(key).endswith("_token_id") and key not in _NOT_COMPUTED
    }


def _otherwise(stated: Mapping[str, Any], usual: Mapping[str, Any] | None) -> dict[str, Any]:
    """The values of `stated` that `usual` has, but otherwise; without `usual` all that are of the computation."""
    found = {}
    for key, value in stated.items():
        if key in _OF_OTHER_USES or (usual is not None and (key not in usual or value == usual[key])):
            continue
        if isinstance(value, Mapping) and "model_type" in value:  # a part's own configuration
            part = None if usual is None else usual[key]
            found[key] = _otherwise(value, part if isinstance(part, Mapping) else None) | {"is": value["model_type"]}
        else:
            found[key] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    """Numbers by their value: 10000 is 10000.0."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
