"""Turns a causal model's output head into a log-prob head for one call, and back.

Some models scale or cap their logits after the head. The head then applies that transform itself, and the model's own
is neutralised for the call: otherwise log-probs would be scaled (tens of nats wrong, silently).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafocal.errors import InputError
from lorafocal.model.trained_modules import plain_modules
from lorafocal.ops.logps import LogitTransform, LogProbHead, OfRows


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside engine wrappers (`.module`) and PEFT."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def install_head(model: nn.Module) -> LogProbHead:
    """Exchange the class of the model's output head for `LogProbHead`; weights, ties and saved files stay.

    Of a head that is trained, each copy too; returns the base's own.
    Raises InputError where the head is not a plain linear layer (an adapter on it, a quantised one).
    """
    base = causal_lm(model)
    wrapper = base.get_output_embeddings()
    for head in (heads := plain_modules(wrapper)):
        if type(head) not in (nn.Linear, LogProbHead):
            raise InputError(
                f"the output head of {type(base).__name__} is {type(head).__name__}, not a plain linear layer:"
                " log-probs could not be computed from it exactly. Leave the output head out of the adapter's targets"
            )
    transform = logit_transform(base)
    for head in heads:
        if not isinstance(head, LogProbHead):
            head.__class__ = LogProbHead
            head.labels = head.rows = None  # type: ignore[assignment]
            head.transform = transform  # type: ignore[assignment]
    return heads[0]  # type: ignore[return-value]


# What architectures call their transform of the logits after the head, and the value at which it does nothing.
_NEUTRAL: dict[str, float | None] = {
    "logit_scale": 1.0,  # Cohere: a factor
    "lm_head_multiplier": 1.0,  # Falcon-H1: a factor
    "logits_scaling": 1.0,  # Granite: a divisor
    "final_logit_softcapping": None,  # Gemma
}


def _transforms(base: PreTrainedModel) -> dict[str, object]:
    """The names of `_NEUTRAL` that `base` has a value for, and the object it reads each from."""
    config = base.config.get_text_config()
    owners = {"logit_scale": base, "lm_head_multiplier": base.base_model}
    found = {name: owners.get(name, config) for name in _NEUTRAL}
    return {name: owner for name, owner in found.items() if getattr(owner, name, None) is not None}


def logit_transform(base: PreTrainedModel) -> LogitTransform:
    """What `base` does to its logits after the head, as far as is known; `probes.check_scores` verifies it."""
    value = {name: float(getattr(owner, name)) for name, owner in _transforms(base).items()}
    scale = value.get("logit_scale", 1.0) * value.get("lm_head_multiplier", 1.0) / value.get("logits_scaling", 1.0)
    return LogitTransform(scale, value.get("final_logit_softcapping"))


@contextmanager
def scoring(
    model: nn.Module,
    labels: Tensor,
    rows: Tensor | None = None,
    collisions: Tensor | None = None,
    by: OfRows | None = None,
) -> Iterator[None]:
    """Within, the model's `logits` are (1, N) log-probs of `labels`; `rows` picks hidden rows where the model can't.

    `collisions`, (N,), is filled in beside them. With `by` they are what it makes of the rows, (1, N, ...).
    """
    base = causal_lm(model)
    neutral = [(owner, name, _NEUTRAL[name]) for name, owner in _transforms(base).items()]
    given = (("labels", labels), ("rows", rows), ("collisions", collisions), ("by", by))
    asked = [(head, name, value) for head in plain_modules(base.get_output_embeddings()) for name, value in given]
    with ExitStack() as restore:
        for owner, name, value in (*neutral, *asked):
            restore.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield
