"""A tiny model of a given architecture: fewer, narrower layers and a small vocabulary, the rest as it was.

Which layers there are, how heads are grouped, what is tied, windowed, capped, routed or rotated is what decides
whether a run works, and it is kept. Sizes are found by the names that transformers gives them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from lorafocal.errors import InputError, first_line
from lorafocal.model.base_config import of_layers

BLOCK = 64  # widths are its multiples: 4-bit layers are quantised by blocks of 64 weights
HEAD_DIM = 16  # even in halves and quarters, which some rotations take
LAYERS = 2
WINDOW = 8  # tokens; shorter than a made-up pair, so that it counts
MOST_PARAMETERS = 100_000_000

_WIDTHS = {
    "word_embed_proj_dim", "lru_width", "attention_hidden_size", "hidden_size_per_layer_input",
    "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "intermediate_size_mlp", "moe_intermediate_size",
    "shared_expert_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size", "dense_intermediate_size",
    "q_lora_rank", "kv_lora_rank",
}  # fmt: skip
_OF_A_HEAD = {
    "head_dim", "global_head_dim", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "qk_head_dim", "rotary_dim",
    "linear_key_head_dim", "linear_value_head_dim", "query_pre_attn_scalar",
}  # fmt: skip
_AT_MOST = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "attention_chunk_size"), WINDOW),
}
_EVERY_SO_MANY = ("decoder_sparse_step", "attn_layer_period", "expert_layer_period", "interleave_moe_layer_step")
_SHARING = "num_kv_shared_layers"  # the last ones, which read the keys and values of layers of their kind before them
_OF_EACH_LAYER = {"layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "block_types"}


def shrunk(config: PreTrainedConfig, *, tokens: int, eos: int, all_layers: bool = False) -> PreTrainedConfig:
    """The architecture of `config` with widths of a few hundred, a layer of each kind (at least two) and a vocabulary
    of `tokens` rounded up to a multiple of 64. `all_layers` keeps their number: names with a layer's number stay right.

    Raises InputError where no such model can be described.
    """
    text = config.get_text_config()
    values = config.to_dict()
    try:
        if text is config:
            return _rebuilt(config, _shrunk_values(config, tokens, eos, all_layers))
        small = shrunk(text, tokens=tokens, eos=eos, all_layers=all_layers)
        for name in config.sub_configs:
            if getattr(config, name, None) is text:
                values[name] = small.to_dict()
            elif isinstance(values.get(name), dict):
                values[name] = _one_layer(values[name], text.hidden_size, small.hidden_size)
        if "projection_dim" in values:
            values["projection_dim"] = small.hidden_size
        return _rebuilt(config, values)
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise InputError(f"no tiny {config.model_type} could be described: {first_line(error)}") from error


def build(config: PreTrainedConfig, *, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """A model of this config with random weights; the caller's random state is left as it was.

    Raises InputError where it would be no tiny one: some size of the architecture goes by a name not known here.
    """
    door = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    try:
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in door.from_config(config).parameters())
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"no tiny {config.model_type} could be built: {first_line(error)}") from error
    if count > MOST_PARAMETERS:
        raise InputError(
            f"the tiny {config.model_type} would still have {count:,} parameters: its config has sizes whose names are"
            " not known here. Rehearse on a small model of this architecture by giving its values as model.shape"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: PreTrainedModel = door.from_config(config, dtype=dtype)
    return model


def _rebuilt(config: PreTrainedConfig, values: Mapping[str, Any]) -> PreTrainedConfig:
    known = {name: value for name, value in values.items() if name not in ("model_type", "transformers_version")}
    rebuilt: PreTrainedConfig = AutoConfig.for_model(config.model_type, **known)
    return rebuilt


def _shrunk_values(config: PreTrainedConfig, tokens: int, eos: int, all_layers: bool) -> dict[str, Any]:
    """All values of a text model's config, the sizes among them changed."""
    values = config.to_dict()
    own_name = {common: own for common, own in config.attribute_map.items() if own in values}
    first = of_layers(config)[0]
    heads, groups = first.num_attention_heads, getattr(first, "num_key_value_heads", None)
    head_dim = values.get("head_dim") or config.hidden_size // heads
    sizes = _heads_and_width(config.hidden_size, heads, groups, head_dim, free="head_dim" in values)
    width, of_a_head = sizes["hidden_size"] / config.hidden_size, sizes["head_dim"] / head_dim
    layers = _kept_layers(config, values, all_layers)
    sizes["num_hidden_layers"] = len(layers)

    small = {name: _smaller(name, value, width, of_a_head) for name, value in values.items()}
    for name, value in values.items():
        if isinstance(value, bool) or value is None:
            continue
        if name in _OF_EACH_LAYER and len(value) == config.num_hidden_layers:
            small[name] = [value[layer] for layer in layers]
        elif name.startswith("vocab_size"):
            small[name] = _blocks(tokens)
        elif name == "max_window_layers":
            small[name] = min(value, 1) if value < config.num_hidden_layers else len(layers)
        elif name == _SHARING:
            small[name] = sum(layer >= config.num_hidden_layers - value for layer in layers)
    small |= {own_name.get(name, name): value for name, value in sizes.items() if own_name.get(name, name) in values}
    small |= {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": eos}
    if isinstance(rope := values.get("rope_parameters"), dict):
        small["rope_parameters"] = _rotations(rope, of_a_head)
    if differing := values.get("per_layer_config"):
        of_heads = {"num_attention_heads": heads, "num_key_value_heads": groups}
        shares = {name: sizes[name] / count for name, count in of_heads.items() if count}

        def smaller(name: str, value: Any) -> Any:
            return max(1, int(value * shares[name])) if name in shares else _smaller(name, value, width, of_a_head)

        small["per_layer_config"] = {
            layers.index(int(layer)): {name: smaller(name, value) for name, value in own.items()}
            for layer, own in differing.items()
            if int(layer) in layers
        }
    return small


def _smaller(name: str, value: Any, width: float, of_a_head: float) -> Any:
    """A setting of the tiny model, or of one of its layers, by the shares of its width and heads."""
    if isinstance(value, bool) or value is None:
        return value
    if name in _WIDTHS and isinstance(value, int):
        return _blocks(value * width)
    if name in _OF_A_HEAD:
        return max(8, 8 * round(value * of_a_head / 8))
    if name in _AT_MOST and isinstance(value, int):
        return min(value, _AT_MOST[name])
    return value


def _heads_and_width(width: int, heads: int, groups: int | None, head_dim: int, *, free: bool) -> dict[str, int]:
    """Few heads, grouped as they were; the width follows them, as wide beside them as it was where that is `free`."""
    groups = heads if groups is None else groups
    if groups in (1, heads):
        small_groups, small_heads = (1, min(heads, 4)) if groups == 1 else (min(heads, 4),) * 2
    else:
        small_groups, small_heads = 2, 2 * (heads // groups)
    small_dim = max(HEAD_DIM, BLOCK // math.gcd(BLOCK, small_heads))
    share = width / (heads * head_dim) if free else 1.0
    while small_heads * small_dim * share < BLOCK:
        small_dim *= 2
    return {
        "hidden_size": _blocks(small_heads * small_dim * share),
        "num_attention_heads": small_heads,
        "num_key_value_heads": small_groups,
        "head_dim": small_dim,
    }


def _kept_layers(config: PreTrainedConfig, values: Mapping[str, Any], all_layers: bool) -> list[int]:
    """The first layer of each kind, and enough of the next ones to be two, or a whole period of what recurs."""
    count = config.num_hidden_layers
    if all_layers:
        return list(range(count))
    lists = [value for name, value in values.items() if name in _OF_EACH_LAYER and _has_length(value, count)]
    sharing = count - (values.get(_SHARING) or 0)  # from this layer on
    kinds: dict[tuple[str, ...], int] = {}
    for layer in range(count):
        kinds.setdefault((*(str(entries[layer]) for entries in lists), str(layer >= sharing)), layer)
    periods = [values[name] for name in _EVERY_SO_MANY if isinstance(values.get(name), int)]
    if max(periods, default=1) > 1 or values.get("first_k_dense_replace"):
        return list(range(min(count, max([LAYERS, *periods]))))
    first = sorted(kinds.values())
    rest = (layer for layer in range(count) if layer not in first)
    return sorted([*first, *(layer for layer, _ in zip(rest, range(LAYERS - len(first)), strict=False))])


def _has_length(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _rotations(rope: Mapping[str, Any], of_a_head: float) -> dict[str, Any]:
    """Rope parameters whose lists, one number a frequency or a section of them, fit the smaller heads."""
    small: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, Mapping):
            small[name] = _rotations(value, of_a_head)
        elif name == "mrope_section":
            small[name] = _sections(value, round(sum(value) * of_a_head))
        elif isinstance(value, list):
            count = max(1, round(len(value) * of_a_head))
            small[name] = [value[place * len(value) // count] for place in range(count)]
        else:
            small[name] = value
    return small


def _sections(parts: Iterable[int], total: int) -> list[int]:
    """Whole numbers of the sum `total`, in the proportions of `parts`."""
    parts = list(parts)
    ends = [round(total * sum(parts[: place + 1]) / sum(parts)) for place in range(len(parts))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _one_layer(values: Mapping[str, Any], text_width: int, small_text_width: int) -> dict[str, Any]:
    """What sees images, which takes no part in training: one layer, and an end as wide as the small text part."""
    small = dict(values)
    for name in ("num_hidden_layers", "depth", "num_layers"):
        if isinstance(small.get(name), int):
            small[name] = 1
    for name in ("out_hidden_size", "projection_dim", "hidden_size"):
        if small.get(name) == text_width:
            small[name] = small_text_width
    if "deepstack_visual_indexes" in small:
        small["deepstack_visual_indexes"] = [0]
    return small


def _blocks(size: float) -> int:
    return BLOCK * max(1, round(size / BLOCK))
