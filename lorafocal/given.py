"""What a trainer's caller gives, by kind: what TRL's trainers take too is understood, any other object refused by name.

Without this, a wrong object would end in the middle of something else, with a traceback.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from lorafocal.arguments import READ_ONCE, FocalPOConfig
from lorafocal.errors import InputError
from lorafocal.model.head import causal_lm
from lorafocal.model.load import check_tokenizer
from lorafocal.model.loose import check_not_loose
from lorafocal.publish import file_in_the_way


class Given(NamedTuple):
    """The arguments that may be said in several ways, in one."""

    model: str | PreTrainedModel | PeftModel
    ref_model: str | PreTrainedModel | PeftModel | None
    optimizers: tuple[torch.optim.Optimizer | None, Any]


class AsMade:
    """What a trainer has read of its arguments and parts: changed behind it, it would be ignored, or break."""

    _PARTS = ("train_dataset", "eval_dataset", "data_collator", "compute_metrics")

    def __init__(self, trainer: Trainer) -> None:
        self._arguments = {name: copy(getattr(trainer.args, name)) for name in READ_ONCE}
        self._parts = {name: getattr(trainer, name) for name in self._PARTS}

    def check(self, trainer: Trainer) -> None:
        """Raises InputError naming what was changed."""
        late = [f"args.{name}" for name, value in self._arguments.items() if getattr(trainer.args, name) != value]
        late += [name for name, part in self._parts.items() if getattr(trainer, name) is not part]
        if late:
            raise InputError(
                f"{late[0]} was changed after the trainer was made, which has read it: in training it would be ignored."
                " Make a new trainer with it; other rows are evaluated by `evaluate(rows)`"
            )


def as_given(
    model: Any, ref_model: Any, args: FocalPOConfig, processing_class: object, peft_config: object, optimizers: Any
) -> Given:
    """Folders as strings, no optimisers as two of None; the rest is checked for its kind. Raises InputError."""
    if not isinstance(args, FocalPOConfig):
        raise InputError(
            f"args is {_kind(args)}: give a FocalPOConfig; `lorafocal.compat.trl.focalpo_config` makes one of trl's"
            " DPOConfig"
        )
    if file := file_in_the_way(output := Path(str(args.output_dir))):
        raise InputError(f"output_dir is {output}, but {file} is a file: give a folder's name that is free")
    if processing_class is not None and not isinstance(processing_class, PreTrainedTokenizerBase):
        inner = hasattr(processing_class, "tokenizer")
        raise InputError(
            f"processing_class is {_kind(processing_class)}: give a tokenizer,"
            f" {'its `.tokenizer`' if inner else '`AutoTokenizer.from_pretrained(folder)`'}"
        )
    if processing_class is not None:
        check_tokenizer(processing_class, "processing_class")
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise InputError(f"peft_config is {_kind(peft_config)}: give `peft.LoraConfig(r=16, lora_alpha=32, ...)`")
    named = [str(one) if isinstance(one, Path) else one for one in (model, ref_model)]
    check_model(named[0], "model")
    if ref_model is not None:
        check_model(named[1], "ref_model", policy=named[0])
    return Given(named[0], named[1], optimizers or (None, None))


def check_model(model: object, argument: str, policy: object = None) -> None:
    """Refuse what is no causal language model, nor a name, and one that holds an adapter which no `PeftModel` knows.

    Of a reference that is the base of `policy`, its adapter is known. Raises InputError.
    """
    if isinstance(model, str):
        return
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{argument} is {_kind(model)}: give a causal language model (`lorafocal.load_base(name)`), a PeftModel, or"
            " a name or folder"
        )
    if any("_orig_mod" in module._modules for module in model.modules()):  # of it, or of one of its layers
        raise InputError(
            f"{argument} went through torch.compile, which renames its weights: an adapter would be saved under names"
            " that PEFT does not find. Give the model as it was before (its `_orig_mod`);"
            " FocalPOConfig(compile_layers=True) compiles its layers"
        )
    if not (isinstance(policy, PeftModel) and causal_lm(policy) is model):
        check_not_loose(model, argument)
    base = causal_lm(model)
    if getattr(base, "get_output_embeddings", lambda: None)() is None:
        raise InputError(
            f"{argument} is {type(base).__name__}, which has no language modelling head, so it gives no tokens a"
            " probability: load it by `lorafocal.load_base(name)` or `AutoModelForCausalLM.from_pretrained(name)`"
        )


def _kind(value: object) -> str:
    """What an object is, for a message; None, a string and a path as they stand."""
    if value is None or isinstance(value, str | Path):
        return repr(value)
    return f"of the type {type(value).__name__}"


def check_beside(args: FocalPOConfig, eval_dataset: object, callbacks: object) -> None:
    """Refuse evaluations planned with nothing to evaluate, and one callback for a list of them. Raises InputError."""
    if eval_dataset is None and args.eval_strategy != "no":
        raise InputError(
            f"eval_strategy is {str(getattr(args.eval_strategy, 'value', args.eval_strategy))!r}, but eval_dataset is"
            ' missing: give eval_dataset, or eval_strategy="no"'
        )
    if callbacks is not None and not isinstance(callbacks, Iterable):
        raise InputError(f"callbacks is {_kind(callbacks)}: give a list, [{type(callbacks).__name__}(...)]")


def check_rows(rows: object, name: str) -> None:
    """Refuse a name in place of rows, and several parts in place of one. Raises InputError."""
    if isinstance(rows, str | Path):
        way_out = "give the rows themselves (`datasets.load_dataset`), or train by a config, which reads files"
        if name == "eval_dataset":
            way_out += "; `trainer.evaluate()` without it takes the constructor's, which has no name of its own"
        raise InputError(f"{name} is {_kind(rows)}, and no dataset: {way_out}")
    if hasattr(rows, "itertuples"):  # a table of pandas, which gives the names of its columns one by one
        raise InputError(f"{name} is {_kind(rows)}: give `datasets.Dataset.from_pandas({name})`")
    if isinstance(rows, Mapping):
        parts = ", ".join(map(repr, rows))
        several = "; `trainer.evaluate({'a': rows, 'b': rows})` takes several" if name == "eval_dataset" else ""
        raise InputError(f"{name} is of the type {type(rows).__name__} ({parts}): give the rows of one part{several}")
    if not isinstance(rows, Iterable) and not hasattr(rows, "__getitem__"):
        raise InputError(
            f"{name} is {_kind(rows)}, and no dataset: give a `datasets.Dataset` or a list of rows with prompt, chosen"
            " and rejected"
        )
