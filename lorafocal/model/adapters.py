"""LoRA adapters through PEFT: where they go, what is trainable, a frozen copy, and our own switch.

PEFT's `disable_adapter()` costs 50 ms a use at 224 layers and un-freezes parameters that the user froze, and its
`set_adapter()` freezes one adapter and un-freezes the other; ours flips one attribute on a list made once. PEFT's stay
the twins in the tests.
"""

from __future__ import annotations

import copy
import difflib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lorafocal.compatibility import adapter_words
from lorafocal.errors import InputError, first_line, ran_out
from lorafocal.model.dora import exact_dora, reset_magnitudes
from lorafocal.model.head import causal_lm
from lorafocal.model.trained_modules import (
    check_ties,
    check_tokens_apart,
    check_tokens_follow,
    compute_as_base,
    is_tied,
    resolve_modules,
    resolve_tokens,
    wrap_once,
)

ALL_LINEAR = "all-linear"
FROZEN_COPY = "reference"  # the adapter beside the policy's own that is never trained and never saved

LINEAR = (nn.Linear, Conv1D)  # GPT-2 writes its linear layers as Conv1D, their weights transposed


def linear_names(model: nn.Module) -> list[str]:
    """Every linear layer of the text part but its output head, by full name: an image encoder takes no adapter."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    text = set(model.get_decoder().modules())  # type: ignore[operator]
    linear = ((name, m) for name, m in model.named_modules() if isinstance(m, LINEAR) and m is not head and m in text)
    return [name for name, layer in linear if _gives_its_product(layer)]


def _gives_its_product(layer: nn.Module) -> bool:
    """Not what some routers of experts do that are linear layers: they give their choices, and PEFT's give a tensor."""
    own = type(layer).forward is not nn.Linear.forward and type(layer).__module__.startswith("transformers.models.")
    if not own:
        return True
    weight: Any = layer.weight
    still = copy.copy(layer).eval()  # in training some draw at random, before the adapter's start is drawn
    try:
        with torch.no_grad():
            return isinstance(still(weight.new_zeros(1, weight.shape[1])), torch.Tensor)
    except RuntimeError as error:
        if ran_out(error):
            raise
        return False  # one of other rows than its weight says


def resolve_targets(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Layer-name endings (`q_proj`, `mlp.down_proj`) or "all-linear" to the endings in use, sorted.

    Full names where an ending is also that of a layer outside the text part. Never the output head or embeddings.
    Raises InputError for an ending that names no linear layer, with the nearest that do, and for one that PEFT takes
    for experts; all-linear goes without those.
    """
    names = linear_names(model)
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    wanted = endings if targets == ALL_LINEAR else [targets] if isinstance(targets, str) else list(targets)
    unknown = [target for target in wanted if not _named_by(target, names)]
    if unknown or not wanted:
        hints = [
            f"{t!r} (nearest: {', '.join(difflib.get_close_matches(t, endings, 3, 0) or endings)})" for t in unknown
        ]
        raise InputError(
            f"adapter.targets: no linear layer is named {', '.join(hints) or 'by an empty list'};"
            f" this model has {', '.join(endings)} (its output head and embeddings take no adapter)"
        )
    if experts := _taken_for_experts(model, wanted):
        wanted = [target for target in wanted if target not in experts]
        if targets != ALL_LINEAR or not wanted:
            raise InputError(
                f"adapter.targets: in {type(model).__name__} PEFT takes {', '.join(sorted(experts))} for the experts,"
                " which are one tensor and no linear layers, also where a dense layer has that name: leave them out"
                " (all-linear does)"
            )
    outside = [name for name, _ in model.named_modules() if name not in names]
    if any(_named_by(target, outside) for target in wanted):
        return sorted({name for target in wanted for name in _named_by(target, names)})
    return sorted(set(wanted))


def _taken_for_experts(model: nn.Module, targets: Sequence[str]) -> set[str]:
    """The targets that PEFT rewrites to `target_parameters`: names that experts had before they became one tensor."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # a PEFT that takes every target for what it names
        return set()
    trial = LoraConfig(target_modules=list(targets))
    try:
        convert_peft_config_for_transformers(trial, model, None)
    except ValueError as error:  # some of the names that make one tensor without the others
        raise InputError(f"adapter.targets: {error} Name attention layers only, or all-linear") from error
    return set(targets) - set(trial.target_modules) if trial.target_parameters else set()


def _named_by(target: str, names: Sequence[str]) -> list[str]:
    """The layers that PEFT would take for this target."""
    return [name for name in names if name == target or name.endswith(f".{target}")]


# Settings that the table has words for, or that only say where the adapter goes, how large it is, what it is called.
_KNOWN_FIELDS = (
    "use_rslora use_dora rank_pattern alpha_pattern modules_to_save trainable_token_indices init_lora_weights bias"
    " r lora_alpha lora_dropout target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out"
    " task_type peft_type inference_mode base_model_name_or_path revision auto_mapping peft_version megatron_core"
).split()


def features(config: LoraConfig) -> frozenset[str]:
    """The compatibility table's words for an adapter.

    A setting away from its default that the table has no word for becomes "other:<field>", which it refuses.
    """
    words, usual = adapter_words(vars(config)), LoraConfig()
    of_the_start = {f"{word}_config" for word in words}  # eva_config belongs to eva
    others = vars(usual).keys() - {*_KNOWN_FIELDS} - of_the_start
    return words | {f"other:{name}" for name in others if _differ(getattr(config, name), getattr(usual, name))}


def _differ(value: object, usual: object) -> bool:
    """None, False and an empty list all mean that a setting is not used."""
    return value != usual and bool(value or usual)


def trainable_token_ids(tokens: Sequence[str | int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens by text or by id to sorted ids, for `LoraConfig.trainable_token_indices`.

    Raises InputError for what is not exactly one token of the tokenizer, with the way out.
    """
    vocabulary = tokenizer.get_vocab()
    return sorted({_token_id(token, tokenizer, vocabulary) for token in tokens})


def _token_id(token: str | int, tokenizer: PreTrainedTokenizerBase, vocabulary: Mapping[str, int]) -> int:
    if isinstance(token, int):
        ids = [token] if token in vocabulary.values() else []
    elif token in vocabulary:
        ids = [vocabulary[token]]
    else:
        ids = list(tokenizer.encode(token, add_special_tokens=False))
        if ids == [tokenizer.unk_token_id]:
            ids = []
    if len(ids) == 1:
        return ids[0]
    if isinstance(token, int):
        what = f"no id of the tokenizer, whose last is {max(vocabulary.values())}"
    else:
        what = f"{len(ids)} tokens ({', '.join(map(repr, tokenizer.convert_ids_to_tokens(ids)))}), not one"
        if nearest := difflib.get_close_matches(token, vocabulary, 3, 0.5):
            what += f" (nearest: {', '.join(map(repr, nearest))})"
    raise InputError(
        f"adapter.trainable_tokens: {token!r} is {what}. Name a token that the tokenizer has; a new one is added to it"
        " and to the base first (`add_tokens`, `resize_token_embeddings`), and both are saved and trained on"
    )


def attach_lora(model: nn.Module, config: LoraConfig) -> PeftModel:
    """A PEFT model with fp32 adapters on `model`; names in `config` are resolved against the model, and checked.

    Raises InputError where the model already has adapters (two would be stacked), and where a target, a pattern, a
    module to save or a token of `config` names nothing, or what cannot be trained.
    """
    if isinstance(model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise InputError(
            "the model already carries an adapter and a new one was asked for: they would be stacked. Either continue"
            " the adapter it has (leave `peft_config` out), or give the base without it (`model.unload()`), or merge it"
            " into its base first (`lorafocal merge`)"
        )
    targets = ALL_LINEAR if config.target_modules is None else config.target_modules
    config.target_modules = set(resolve_targets(model, targets))
    config.modules_to_save = resolve_modules(model, config.modules_to_save or []) or None
    config.trainable_token_indices = resolve_tokens(model, config.trainable_token_indices)
    check_tokens_apart(config.trainable_token_indices or {}, config.modules_to_save or [])
    config.task_type = "CAUSAL_LM"
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    layers = [name for name in linear_names(model) if check_target_module_exists(config, name)]
    check_targets(config, [] if targets == ALL_LINEAR else config.target_modules, layers)
    check_ranks(config, layers)
    tied = is_tied(model)
    try:
        policy = widen_adapters(wrap(model, config))
    except ValueError as error:  # of Mamba's own layers, which kernels read past an adapter
        for name, layer in [*model.named_modules()]:
            if isinstance(layer, BaseTunerLayer):  # those that PEFT has come to before
                model.set_submodule(name, layer.get_base_layer())
        raise InputError(f"adapter: {first_line(error)}") from error
    check_tokens_follow(model, tied=tied)
    reset_magnitudes(policy)
    return policy


def check_targets(config: LoraConfig, names: Iterable[str], layers: Sequence[str]) -> None:
    """Refuse targets that other settings of `config` contradict, of which PEFT says nothing; `layers` are adapted."""
    if config.layers_to_transform is not None and (full := sorted({*config.target_modules} & {*layers})):
        raise InputError(
            f"adapter.targets: {full[0]} is a layer's full name, for which PEFT does not look at"
            " `layers_to_transform`: name the layers that are meant, and leave that setting out"
        )
    for name in names:
        if not _named_by(name, layers):
            raise InputError(
                f"adapter.targets: no layer of {name!r} is left for an adapter: all of them are trained in full"
                " (`modules_to_save`) or excluded (`exclude_modules`, `layers_to_transform`). Leave it out"
            )


def check_ranks(config: LoraConfig, layers: Sequence[str]) -> None:
    """Check `rank_pattern` and `alpha_pattern` against the names of the adapted `layers`.

    PEFT passes over a key that no layer has, and over one whose layers earlier keys have taken.
    """
    for setting in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, setting) or {}
        _check_expressions(setting, pattern)
        for unused in pattern.keys() - {get_pattern_key(list(pattern), name) for name in layers}:
            endings = sorted({name.rsplit(".", 1)[-1] for name in layers})
            raise InputError(
                f"adapter.{setting}: {unused!r} is the key of no layer with an adapter, or earlier keys have taken all"
                f" of its layers (nearest: {', '.join(difflib.get_close_matches(unused, endings, 3, 0))}; a key is a"
                " layer's name or its ending, as a regular expression)"
            )
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    even = config.init_lora_weights == "orthogonal"
    if wrong := [rank for rank in ranks if rank < 1 or (even and rank % 2)]:
        raise InputError(f"adapter: a rank of {wrong[0]}; it must be {'an even' if even else 'a'} number above 0")


def _check_expressions(setting: str, pattern: Iterable[str]) -> None:
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise InputError(
                f"adapter.{setting}: {key!r} is no regular expression ({error}); a key is a layer's name or its ending,"
                " such as q_proj"
            ) from error


def wrap(model: nn.Module, config: LoraConfig) -> PeftModel:
    """PEFT's own `get_peft_model`, without its warning about a name of transformers that is going away."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return get_peft_model(model, config)


def widen_adapters(model: PeftModel) -> PeftModel:
    """Adapter weights to at least fp32: in bf16, steps of 5e-6 round away (12.6 % of the entries move).

    What they compute stays in the base's dtype, but for DoRA's norms.
    """
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    compute_as_base(model)
    exact_dora(model)
    return model


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All that an adapter trains (low-rank layers, magnitudes, whole modules, tokens), by full parameter name.

    Without those of adapters that stand beside the policy's: a frozen copy, finished ones, a guide.
    """
    others = {"base_layer", "original_module"}
    return _of_layers(model, lambda parts: others.isdisjoint(parts) and not any(map(stands_beside, parts)))


def stands_beside(adapter: str) -> bool:
    """Whether an adapter of this name is never trained and never saved: a frozen copy, a finished one, a guide."""
    return adapter == FROZEN_COPY or adapter.startswith(f"{FROZEN_COPY}-")


def of_adapter(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """All parameters of one adapter, by full parameter name."""
    return _of_layers(model, lambda parts: adapter in parts)


def _of_layers(model: nn.Module, belongs: Callable[[list[str]], bool]) -> dict[str, nn.Parameter]:
    """Those of adapter layers whose names there, in their parts, say that they belong; by full parameter name."""
    owned = {
        id(parameter)
        for layer in adapter_layers(model)
        for name, parameter in layer.named_parameters()
        if belongs(name.split("."))
    }
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in owned}


def add_adapter(policy: PeftModel, name: str, config: LoraConfig) -> None:
    """Put one more adapter beside the policy's, in fp32; that stays the active one, and all as trainable as it was."""
    active: Any = [policy.active_adapter]  # as each layer holds it
    before = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
    policy.add_adapter(name, config)
    wrap_once(policy, name)
    for parameter in of_adapter(policy, name).values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    compute_as_base(policy)
    exact_dora(policy)
    for layer in adapter_layers(policy):  # PEFT takes the new adapter for the active one of layers that had none
        layer._active_adapter = active
    for parameter, trainable in before:
        parameter.requires_grad_(trainable)


def add_frozen_copy(policy: PeftModel) -> dict[str, nn.Parameter]:
    """Put a frozen copy of the policy's adapter beside it, on the same base; its tensors by full parameter name.

    The policy's adapter stays the active one and as trainable as it was.
    """
    name = policy.active_adapter
    config = copy.deepcopy(policy.peft_config[name])
    config.inference_mode = False  # PEFT would freeze the active adapter with it
    config.init_lora_weights = True  # PEFT would take PiSSA's part out of the base once more
    add_adapter(policy, FROZEN_COPY, config)
    parameters, copies = dict(policy.named_parameters()), {}
    for path, original in adapter_parameters(policy).items():
        twin = twin_of(path, name)
        copies[twin] = parameters[twin]
        copies[twin].data = original.detach().clone()
    freeze(copies)
    return copies


def twin_of(path: str, adapter: str) -> str:
    """The name of the frozen copy's parameter, by that of `adapter`'s own."""
    before, _, after = path.rpartition(f".{adapter}")
    return f"{before}.{FROZEN_COPY}{after}"


def freeze(parameters: Mapping[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        parameter.requires_grad_(False)


def check_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name: exactly the adapter's tensors, compared both ways.

    Raises InputError for a frozen adapter (loaded without `is_trainable=True`), for a base that would train, and for a
    copy of tied embeddings.
    """
    check_ties(causal_lm(model))
    check_linear(model)
    adapter = adapter_parameters(model)
    frozen = sorted(name for name, parameter in adapter.items() if not parameter.requires_grad)
    stray = sorted(n for n, p in model.named_parameters() if p.requires_grad and n not in adapter)
    if not adapter:
        raise InputError("the model has no adapter to train: pass `peft_config=LoraConfig(...)`")
    if frozen:
        raise InputError(
            f"{len(frozen)} of {len(adapter)} adapter tensors are frozen (first: {frozen[0]}), so nothing would be"
            " learned there: load the adapter with `PeftModel.from_pretrained(..., is_trainable=True)`"
        )
    if stray:
        raise InputError(
            f"{len(stray)} tensors outside the adapter would be trained (first: {stray[0]}); freeze the base with"
            " `requires_grad_(False)`: the switched-off adapter must stay the reference"
        )
    return adapter


def check_linear(model: nn.Module) -> None:
    """Refuse low-rank adapters on anything but linear layers: one that was brought may sit on the embeddings."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and not isinstance(layer.get_base_layer(), LINEAR):
            raise InputError(
                f"the adapter changes {name}, which is {type(layer.get_base_layer()).__name__} and no linear layer:"
                " leave it out of its `target_modules`; single tokens are trained by `trainable_token_indices`"
            )


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that PEFT can switch off."""
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]


class AdapterSwitch:
    """Switches a model's adapters off, or to another one, and back again, and touches nothing else."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = adapter_layers(model)
        if not self._layers:
            raise InputError("the model has no adapter, so there is nothing to switch for a reference")

    def off(self) -> AbstractContextManager[None]:
        """Within, the model computes as its base alone."""
        return self._set("_disable_adapters", True)

    def to(self, adapter: str) -> AbstractContextManager[None]:
        """Within, the model computes with `adapter` in place of the active one."""
        return self._set("_active_adapter", [adapter])

    @contextmanager
    def _set(self, attribute: str, value: object) -> Iterator[None]:
        before = [getattr(layer, attribute) for layer in self._layers]
        for layer in self._layers:
            setattr(layer, attribute, value)
        try:
            yield
        finally:
            for layer, old in zip(self._layers, before, strict=True):
                setattr(layer, attribute, old)
