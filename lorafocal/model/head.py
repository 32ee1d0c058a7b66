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
from lorafocal.ops.logps import LogitTransform, LogProbHead


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside engine wrappers (`.module`) and PEFT."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def install_head(model: nn.Module) -> LogProbHead:
    """Exchange the class of the model's output head for `LogProbHead`; weights, ties and saved files stay.

    Raises InputError where the head is not a plain linear layer (an adapter on it, a quantised one).
    """
    base = causal_lm(model)
    head = base.get_output_embeddings()
    if isinstance(head, LogProbHead):
        return head
    if type(head) is not nn.Linear:
        raise InputError(
            f"the output head of {type(base).__name__} is {type(head).__name__}, not a plain linear layer: log-probs"
            " could not be computed from it exactly. Leave the output head out of the adapter's targets"
        )
    head.__class__ = LogProbHead
    head.labels = head.rows = None  # type: ignore[assignment]
    head.transform = logit_transform(base)  # type: ignore[assignment]
    return head  # type: ignore[return-value]


def logit_transform(base: PreTrainedModel) -> LogitTransform:
    """What `base` does to its logits after the head, as far as its config tells; `probes.check_head` verifies it."""
    config = base.config.get_text_config()
    scale = getattr(base, "logit_scale", None)
    if scale is None:
        scale = 1 / getattr(config, "logits_scaling", 1.0)
    return LogitTransform(float(scale), getattr(config, "final_logit_softcapping", None))


@contextmanager
def scoring(model: nn.Module, labels: Tensor, rows: Tensor | None = None) -> Iterator[None]:
    """Within, the model's `logits` are (1, N) log-probs of `labels`; `rows` picks hidden rows where the model can't."""
    base = causal_lm(model)
    head = base.get_output_embeddings()
    config = base.config.get_text_config()
    with ExitStack() as restore:
        for owner, name, neutral in (
            (base, "logit_scale", 1.0),
            (config, "logits_scaling", 1.0),
            (config, "final_logit_softcapping", None),
            (head, "labels", labels),
            (head, "rows", rows),
        ):
            if hasattr(owner, name):
                restore.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, neutral)
        yield
