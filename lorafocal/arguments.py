"""`FocalPOConfig`: TRL's way of configuring a trainer, on transformers' `TrainingArguments`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from lorafocal.errors import InputError
from lorafocal.objectives import Objective, build_objective
from lorafocal.reference import KINDS
from lorafocal.training_fields import check_training_fields, classify, forced_values


@dataclass
class FocalPOConfig(TrainingArguments):
    """Arguments of `FocalPOTrainer`: ours below, beside those of `TrainingArguments`.

    objective ("focalpo" or "dpo"), beta, gamma; pairs_per_step, the one batch size, over all processes; max_length and
    truncation; layout and tokens_per_pack, which change memory and speed and never the result; reference and
    identity_probe; allow_dropout.

    Each inherited field is supported, set by us, or refused with its reason (`lorafocal.training_fields`).
    Raises InputError listing every field that cannot be honoured.
    """

    objective: str = field(default="focalpo", metadata={"help": "focalpo (Eq. 4 of the paper) or dpo"})
    beta: float = field(default=0.1, metadata={"help": "scale of the rewards, per nat; the paper trains with 0.01"})
    gamma: float = field(default=0.05, metadata={"help": "FocalPO's exponent; 0 is DPO"})
    pairs_per_step: int = field(default=64, metadata={"help": "pairs of one optimiser step, over all processes"})
    max_length: int = field(default=1024, metadata={"help": "tokens of prompt and one completion"})
    truncation: str = field(default="drop", metadata={"help": "what happens to a pair over max_length"})
    layout: str = field(default="packed", metadata={"help": "packed (prompts shared, no padding) or padded"})
    tokens_per_pack: int = field(default=2048, metadata={"help": "token rows of one forward: memory, not results"})
    reference: str = field(default="disabled_adapter", metadata={"help": "which model is the reference"})
    identity_probe: bool = field(default=True, metadata={"help": "refuse a reference that is not the starting policy"})
    allow_dropout: bool = field(default=False, metadata={"help": "keep dropout on; log-probs become noisy"})

    learning_rate: float = field(default=5e-6, metadata={"help": "AdamW's; Zephyr's recipe for LoRA"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "the paper trains one"})
    logging_steps: float = field(default=10, metadata={"help": "optimiser steps between log lines"})

    def __post_init__(self) -> None:
        errors = check_training_fields(self._given())
        if errors:
            raise InputError("FocalPOConfig: " + "\n".join(errors))
        for name, value in forced_values().items():
            setattr(self, name, value)
        if self.pairs_per_step < 1:
            raise InputError(f"pairs_per_step is {self.pairs_per_step}; a step needs at least one pair")
        if self.reference not in KINDS:
            raise InputError(f"reference is {self.reference!r}; choose one of {', '.join(KINDS)}")
        self.build_objective()
        try:
            super().__post_init__()
        except ValueError as error:  # what this machine or these values cannot do, in transformers' words
            raise InputError(f"FocalPOConfig: {error}") from error
        _ = self.device  # decides the number of GPUs, which transformers would otherwise join by DataParallel
        self._n_gpu = min(self.n_gpu, 1)

    def build_objective(self) -> Objective:
        """The objective with its checked parameters."""
        return build_objective(self.objective, beta=self.beta, gamma=self.gamma)

    def _given(self) -> dict[str, Any]:
        """Inherited fields away from their default: what somebody chose."""
        ours = set(FocalPOConfig.__annotations__)
        given = {}
        for spec in fields(TrainingArguments):
            default = spec.default if spec.default_factory is MISSING else spec.default_factory()
            if spec.name not in ours and spec.init and getattr(self, spec.name) != default:
                given[spec.name] = getattr(self, spec.name)
        forced = forced_values()
        return {name: value for name, value in given.items() if not _is(name, value, forced)}


def _is(name: str, value: Any, forced: dict[str, Any]) -> bool:
    """Whether `value` is what we would set anyway."""
    return classify(name).kind == "set" and name in forced and forced[name] == value
