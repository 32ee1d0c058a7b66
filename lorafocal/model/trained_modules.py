"""What an adapter trains beside its low-rank layers: whole modules (`modules_to_save`) and single tokens.

Both are PEFT's. Their weights are fp32, and they compute with those weights rounded to the base's dtype: exactly as
the base does at the start, and as the merged model will in the end.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.func import functional_call
from transformers.modeling_layers import GradientCheckpointingLayer

from lorafocal.errors import InputError


class TrainedModule(ModulesToSaveWrapper):
    """PEFT's wrapper around a module that is trained in full, by exchange of its class."""

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        copy = self.modules_to_save[self.active_adapters[0]]
        of_the_base = dict(self.original_module.named_parameters())
        weights = {name: weight.to(of_the_base[name].dtype) for name, weight in copy.named_parameters()}
        return functional_call(copy, weights, args, kwargs)


class TrainedTokens(TrainableTokensWrapper):
    """PEFT's wrapper around embeddings (or a head tied to them) of which some rows are trained.

    PEFT looks the ids up by itself; here the base's own module does, be it scaled embeddings or a log-prob head.
    """

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        weight = self.token_adapter.get_merged_weights(self.active_adapters)
        return functional_call(self.token_adapter.base_layer, {"weight": weight}, args, kwargs)

    def _forward_wrapped_passthrough(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT would look the rows of an active adapter up that trains no tokens."""
        return self.token_adapter.base_layer(*args, **kwargs)


_OURS: dict[type[nn.Module], type[nn.Module]] = {
    ModulesToSaveWrapper: TrainedModule,
    TrainableTokensWrapper: TrainedTokens,
}


def compute_as_base(model: nn.Module) -> None:
    """Let every trained module and token compute in the dtype of the base's own."""
    for module in model.modules():
        if type(module) in _OURS:
            module.__class__ = _OURS[type(module)]


def wrap_once(model: nn.Module, adapter: str) -> None:
    """Of a tied head whose wrapper was wrapped again for a second `adapter`, take the inner wrapper out.

    PEFT 0.18 does so with transformers 5, and finds a log-prob head no more. Nothing to do after newer releases.
    """
    for wrapper in [module for module in model.modules() if isinstance(module, TrainableTokensWrapper)]:
        tokens = wrapper.token_adapter
        if isinstance(inner := tokens.base_layer, TrainableTokensWrapper):
            tokens.base_layer = inner.token_adapter.base_layer
            wrapper.update(adapter, tied_adapter=tokens.tied_adapter)  # rows are the embeddings' own


def plain_modules(module: nn.Module) -> list[nn.Module]:
    """The base's own module under PEFT's wrappers, and after it the copies of it that are trained in full."""
    if isinstance(module, TrainableTokensWrapper):
        return [module.token_adapter.base_layer]
    if isinstance(module, ModulesToSaveWrapper):
        return [module.original_module, *module.modules_to_save.values()]
    return [module]


def is_quantized(weight: Tensor) -> bool:
    """Whether these are bitsandbytes' codes, whatever dtype they are stored in."""
    return type(weight).__name__ in ("Params4bit", "Int8Params")


def embeddings_of(model: nn.Module) -> nn.Embedding:
    """The input embeddings of a transformers model, without what an adapter wraps around them."""
    return plain_modules(model.get_input_embeddings())[0]  # type: ignore[operator, return-value]


def is_tied(model: nn.Module) -> bool:
    """Whether the output head is the embeddings' own tensor."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return head is not None and plain_modules(head)[0].weight is embeddings_of(model).weight


def resolve_modules(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Modules of the text part (`norm`, `embed_tokens`, `layers.0.mlp`) by endings of their names, sorted.

    Full names where PEFT would take other modules too: it compares endings anywhere in a name.
    Raises InputError for what cannot be trained in full, and for a name that no module has, with the nearest.
    """
    inside = set(model.get_decoder().modules()) | {model.get_output_embeddings()}  # type: ignore[operator]
    every = dict(model.named_modules())
    text = {name: module for name, module in every.items() if name and module in inside}
    resolved: set[str] = set()
    for name in names:
        found = {full for full in text if full == name or full.endswith(f".{name}")}
        if not found:
            raise InputError(f"adapter.modules_to_save: no module is named {name!r}{_nearest(name, text)}")
        for full in found:
            _check_trainable_in_full(model, full, text[full])
        resolved |= {name} if found == {full for full in every if full.endswith(name)} else found
    _check_apart(model, resolved)
    return sorted(resolved)


def _nearest(name: str, modules: Iterable[str]) -> str:
    endings = {".".join(full.split(".")[-parts:]) for full in modules for parts in (1, 2)}
    return f" (nearest: {', '.join(difflib.get_close_matches(name, sorted(endings), 3, 0))})"


def check_ties(model: nn.Module) -> None:
    """Refuse a model of which tied embeddings or head already have a trained copy: an adapter that was brought."""
    ends = {"embeddings": model.get_input_embeddings(), "output head": model.get_output_embeddings()}  # type: ignore[operator]
    for name, module in ends.items():
        if isinstance(module, ModulesToSaveWrapper) and is_tied(model):
            _refuse_tied(f"the {name}")


def _refuse_tied(name: str) -> NoReturn:
    raise InputError(
        f"adapter.modules_to_save: {name} is tied: embeddings and output head are one tensor, and a copy of one of them"
        " would part from the other. Train single tokens (`adapter.trainable_tokens`: the head follows), or untie the"
        " base first"
    )


def _check_trainable_in_full(model: nn.Module, name: str, module: nn.Module) -> None:
    weights = list(module.parameters())
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}  # type: ignore[operator]
    if is_tied(model) and ends & {*module.modules()}:
        _refuse_tied(name)
    if not weights or isinstance(module, nn.ModuleList | nn.ModuleDict):
        raise InputError(f"adapter.modules_to_save: {name} is {type(module).__name__}, which has nothing to train")
    if any(isinstance(part, GradientCheckpointingLayer) for part in module.modules()):
        raise InputError(
            f"adapter.modules_to_save: {name} is or holds a whole layer of the decoder, which activation"
            " checkpointing would compute again from weights that are not rounded as in the forward: name parts of"
            " layers (`layers.0.mlp`, `layers.0.self_attn`)"
        )
    if any(map(is_quantized, weights)):
        raise InputError(
            f"adapter.modules_to_save: {name} is quantised, so it cannot be trained in full: give it an adapter"
            " (`adapter.targets`), or load the base without quantisation"
        )


def _check_apart(model: nn.Module, names: Iterable[str]) -> None:
    """A module inside another that is trained in full would be trained twice."""
    found = [full for full, _ in model.named_modules() if any(full == n or full.endswith(f".{n}") for n in names)]
    for inner in found:
        for outer in found:
            if inner.startswith(f"{outer}."):
                raise InputError(f"adapter.modules_to_save: {inner} is a part of {outer}: name one of the two")


def resolve_tokens(
    model: nn.Module, tokens: Sequence[int] | Mapping[str, Sequence[int]] | None
) -> dict[str, list[int]] | None:
    """Token ids, for the embeddings or by place, to sorted ids by the place's full name.

    Raises InputError for ids that the base has no row for (it is never resized here), and for a place that is neither
    its embeddings nor a head of its own.
    """
    if not tokens:
        return None
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    places = {name: m for name, m in model.named_modules() if m is embeddings or (m is head and not is_tied(model))}
    if not isinstance(tokens, Mapping):
        tokens = {name: tokens for name, module in places.items() if module is embeddings}
    resolved = {}
    for place, ids in tokens.items():
        named = [name for name in places if name == place or name.endswith(f".{place}")]
        if len(named) != 1:
            raise InputError(
                f"trainable_token_indices: {place!r} is no place where this model's tokens are trained; there is"
                f" {', '.join(places)}{', which the head follows' if is_tied(model) else ''}"
            )
        rows = places[named[0]].weight.shape[0]
        if wrong := [i for i in ids if not isinstance(i, int) or not 0 <= i < rows]:
            raise InputError(
                f"trainable_token_indices: {named[0]} has {rows} rows, none for {wrong[0]!r}: resize the base first"
                " (`resize_token_embeddings`), save it, and train on that base"
            )
        resolved[named[0]] = sorted(set(ids))
    return resolved


def check_tokens_apart(places: Iterable[str], modules: Iterable[str]) -> None:
    """Refuse tokens of a module (by full name) that is trained in full, by itself or as a part of another."""
    for place in places:
        for name in modules:
            if f".{name}." in f".{place}.":
                raise InputError(
                    f"adapter.trainable_tokens: these are rows of {place}, all of which `adapter.modules_to_save:"
                    f" [{name}]` trains already: leave one of the two out"
                )


def check_tokens_follow(model: nn.Module, *, tied: bool) -> None:
    """In a model with tied embeddings, the head must have the trained rows too."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if not tied or not isinstance(embeddings, TrainableTokensWrapper):
        return
    shared = isinstance(head, TrainableTokensWrapper) and head.token_adapter.tied_adapter is embeddings.token_adapter
    if not shared:
        raise InputError(
            f"{type(model).__name__} ties its head to its embeddings, but PEFT trains tokens of the embeddings alone"
            " there: leave `adapter.trainable_tokens` out"
        )
