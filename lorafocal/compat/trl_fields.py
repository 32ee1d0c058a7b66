"""Every field of TRL's `DPOConfig`: translated, without effect here, or refused, each with its reason.

Known are TRL 1.0 to 1.16. What `DPOConfig` inherits from `TrainingArguments` follows `lorafocal.training_fields`, but
for the fields named here. A field that a later TRL adds is refused by name once it is set, and fails a test, until
somebody classes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lorafocal.errors import InputError
from lorafocal.references.strategy import misfits
from lorafocal.training_fields import RULES, check_training_fields

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Given:
    """A `DPOConfig` as plain values, and the number of processes that will train."""

    values: Values
    processes: int


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one field.

    `translate` gives arguments of `FocalPOConfig` (None: the same name and value); a refused field passes with one of
    its `neutral` values, which ask for nothing.
    """

    kind: Literal["translated", "no_effect", "refused"]
    reason: str = ""
    translate: Callable[[Given], dict[str, Any]] | None = None
    neutral: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Translation:
    """Arguments of `FocalPOConfig`, and one message for each field that cannot be honoured."""

    arguments: dict[str, Any]
    problems: list[str]


def _translated(translate: Callable[[Given], dict[str, Any]], reason: str = "") -> Fate:
    return Fate("translated", reason, translate)


def _refused(reason: str, *neutral: Any) -> Fate:
    return Fate("refused", reason, neutral=neutral)


def _no_effect(reason: str) -> Fate:
    return Fate("no_effect", reason)


# ---- translations


def _pairs_per_step(given: Given) -> dict[str, Any]:
    """TRL's three factors are one number here: the pairs of an optimiser step over all processes."""
    factors = [given.values[name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps")]
    if not all(type(factor) is int and factor >= 1 for factor in factors):
        raise InputError("per_device_train_batch_size and gradient_accumulation_steps must be whole numbers above 0")
    return {"pairs_per_step": math.prod(factors) * given.processes}


def _epochs(given: Given) -> dict[str, Any]:
    """`max_steps` decides alone where it is set."""
    decided = given.values.get("max_steps", -1) > 0
    return {} if decided else {"num_train_epochs": given.values["num_train_epochs"]}


def _max_length(given: Given) -> dict[str, Any]:
    if given.values["max_length"] is None:
        raise InputError("found None, which cuts nothing; say how many tokens prompt and answer have at most")
    return {"max_length": given.values["max_length"]}


def _truncation(given: Given) -> dict[str, Any]:
    """The same rule has the same name: answers lose their end, and a prompt that fills the length drops the pair."""
    if given.values["truncation_mode"] != "keep_start":
        raise InputError(
            f"found {given.values['truncation_mode']!r}; keep_end would cut the two prompts of a pair differently:"
            " use keep_start, or lorafocal's cut_prompt_left or recipe"
        )
    return {"truncation": "keep_start"}


def _warmup(given: Given) -> dict[str, Any]:
    """transformers 5.5 and later read `warmup_steps` below 1 as a share of all steps."""
    return {"warmup_steps": given.values["warmup_ratio"]} if given.values["warmup_ratio"] else {}


def checkpointing(values: Values) -> bool:
    """Whether activations are recomputed: the newer name decides where it says anything."""
    newer = values.get("activation_checkpointing")
    return bool(values.get("gradient_checkpointing") if newer is None else newer)


def _checkpointing(given: Given) -> dict[str, Any]:
    """On is for memory, which "auto" looks after; off is said."""
    return {} if checkpointing(given.values) else {"recompute": "none"}


def trains_in_bf16(values: Values) -> bool:
    """TRL's rule: bf16 unless it is switched off or fp16 is on."""
    return bool(not values.get("fp16") if values.get("bf16") is None else values["bf16"])


def _moving(given: Given) -> dict[str, Any]:
    """TRL's reference model becomes alpha * policy + (1 - alpha) * itself every so many steps; adapters do so here."""
    if not given.values["sync_ref_model"]:
        return {}
    moved = {"every": given.values["ref_model_sync_steps"], "mixing": given.values["ref_model_mixup_alpha"]}
    if wrong := dict(misfits({"kind": "moving", **moved})):
        raise InputError("; ".join(f"{key} {why}" for key, why in wrong.items()))
    return {"reference": "moving", **{f"reference_{key}": value for key, value in moved.items()}}


# ---- the table

_REFERENCE = (
    "the reference is the same base with its adapter off, computed in each step: the same numbers, no second model"
)
_LOSS = "only loss_type sigmoid is translated (to objective focalpo or dpo), and this changes its value"
_ONLY_OF = "{} alone reads it, which is refused"
_PADDING = "packs hold no padding, and the padded layout pads with any token: results do not change"
_REENTRANT = "checkpointing is not re-entrant here (frozen embeddings would cut the gradient); say use_reentrant False"
_BASE = "it says how a model given by name is loaded; load it yourself and pass the model, or state `model` in a config"

FATES: dict[str, Fate] = {
    # the objective
    "beta": _translated(lambda given: {"beta": given.values["beta"]}),
    "loss_type": _refused(
        "only sigmoid, DPO's loss, is translated, to objective focalpo or dpo. Stated by hand, robust is objective"
        " robust-dpo, sigmoid_norm dpo-norm, and sft sft; hinge and ipo are hinge and ipo, exo_pair"
        " exo, discopop discopop; what TRL has other trainers for (ORPO, KTO, CPO, SimPO, AlphaPO) is orpo, kto, cpo,"
        " simpo or alphapo",
        "sigmoid", ["sigmoid"],
    ),
    "loss_weights": _refused(_LOSS, None, [1.0]),
    "label_smoothing": _refused("of losses that are stated by hand (robust: objective robust-dpo, exo_pair: exo)", 0.0),
    "ld_alpha": _refused(f"{_LOSS}; its loss is objective ld-dpo, with this as alpha", None, 1.0),
    "use_weighting": _refused(f"{_LOSS}; its weighted loss is objective wpo", False),
    "f_divergence_type": _refused(f"{_LOSS}; others are objective f-dpo-forward-kl, -js, -alpha", "reverse_kl"),
    "f_alpha_divergence_coef": _no_effect(_ONLY_OF.format("f_divergence_type alpha_divergence")),
    "discopop_tau": _no_effect(_ONLY_OF.format("loss_type discopop")),
    "router_aux_loss_coef": _refused("no load-balancing loss is added here; give 0.0", None, 0.0),
    "do_train": _no_effect("a run trains"),
    "do_eval": _no_effect("eval_strategy alone decides, and sets it"),
    # the reference
    "precompute_ref_log_probs": _no_effect(_REFERENCE),
    "precompute_ref_batch_size": _no_effect(_REFERENCE),
    "sync_ref_model": _translated(_moving),
    "ref_model_mixup_alpha": _translated(lambda given: {}, "sync_ref_model alone reads it, and is translated with it"),
    "ref_model_sync_steps": _translated(lambda given: {}, "sync_ref_model alone reads it, and is translated with it"),
    # the step
    "per_device_train_batch_size": _translated(_pairs_per_step),
    "gradient_accumulation_steps": _translated(_pairs_per_step),
    "per_device_eval_batch_size": _no_effect("evaluation fills packs by the token budget; its means are over pairs"),
    "num_train_epochs": _translated(_epochs),
    "warmup_ratio": _translated(_warmup),
    "dataloader_drop_last": _refused("the short last step of an epoch is trained; no pair is dropped", False),
    "bf16": _translated(lambda given: {}, "the base's dtype decides here, so this says which one it must be"),
    "gradient_checkpointing": _translated(_checkpointing),
    "activation_checkpointing": _translated(_checkpointing),
    "gradient_checkpointing_kwargs": _refused(_REENTRANT, None, {}, {"use_reentrant": False}),
    "activation_checkpointing_kwargs": _refused(_REENTRANT, None, {}, {"use_reentrant": False}),
    "activation_offloading": _refused("activations stay on the device; lower tokens_per_pack", False),
    "disable_dropout": _translated(lambda given: {"allow_dropout": not given.values["disable_dropout"]}),
    "padding_free": _no_effect("packs hold no padding anyway"),
    "pad_to_multiple_of": _no_effect(_PADDING),
    "pad_token": _no_effect(_PADDING),
    # the data and the model
    "max_length": _translated(_max_length),
    "truncation_mode": _translated(_truncation),
    "dataset_num_proc": _no_effect("rows are tokenised once, by one process"),
    "model_init_kwargs": _refused(_BASE, None, {}),
    "trust_remote_code": _refused("a model's own code is never run; use an architecture of transformers", False),
}  # fmt: skip

# Keys of earlier TRLs that people's files still hold.
FATES |= {
    "max_prompt_length": _refused("TRL 1 has none; lorafocal's truncation: recipe cuts prompts to it", None),
    "max_completion_length": _refused("TRL 1 has none; cut by max_length", None),
    "reference_free": _refused("DPO has a reference here; simpo and cpo are objectives without one", False),
    "rpo_alpha": _refused(_LOSS, None),
    "generate_during_eval": _refused("sample from the finished adapter instead", False),
    "force_use_ref_model": _refused("give the reference's kind instead: reference separate_model", False),
    "ref_adapter_name": _refused("the reference is the base with its adapter off, or reference frozen_copy", None),
    "model_adapter_name": _refused("a policy has one adapter", None),
    "ref_model_init_kwargs": _refused(_BASE, None, {}),
}  # fmt: skip

# Set by us whatever is asked, and nothing that TRL's step reads from them is lost.
_SET_BY_US = (
    "average_tokens_across_devices", "use_cache", "logging_nan_inf_filter", "disable_tqdm", "prediction_loss_only",
    "label_names", "dataloader_pin_memory", "remove_unused_columns", "ddp_find_unused_parameters",
)  # fmt: skip
FATES |= {name: _no_effect(RULES[name].reason) for name in _SET_BY_US}


def fate_of(name: str) -> Fate | None:
    """What becomes of a field; None for one that nobody has classed yet."""
    if name in FATES or name not in RULES:
        return FATES.get(name)
    rule = RULES[name]
    return Fate("translated") if rule.kind == "supported" else Fate("refused", rule.reason)


def translate(given: Given, untouched: Values, theirs: Values, said: Collection[str] = ()) -> Translation:
    """All fields of `given` at once.

    `untouched` holds what `FocalPOConfig` has where nothing is said, `theirs` TRL's defaults: an inherited field
    is passed on if it was `said` or differs from ours; an unclassed one is accepted at its default.
    """
    arguments: dict[str, Any] = {}
    inherited: dict[str, Any] = {}
    problems = []
    for name, value in given.values.items():
        fate = fate_of(name) or _refused(
            "it is not classed yet by this lorafocal, which knows TRL 1.0 to 1.16", theirs[name]
        )
        neutral = fate.neutral or (untouched.get(name),)
        if fate.kind == "refused" and value not in neutral:
            problems.append(f"{name}: found {_shown(name, value)}; {fate.reason}")
        elif fate.translate is not None:
            try:
                arguments |= fate.translate(given)
            except InputError as error:
                problems.append(f"{name}: {error}")
        elif fate.kind == "translated" and (name in said or value != untouched.get(name)):
            inherited[name] = value
    problems += check_training_fields(inherited)
    return Translation(inherited | arguments, problems)


def _shown(name: str, value: Any) -> str:
    return "a value" if name.endswith("token") else repr(getattr(value, "value", value))
