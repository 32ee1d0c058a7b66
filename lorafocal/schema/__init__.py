"""The closed, frozen schema of a run: which keys a config may have, their types, and what fits together.

Sections are pydantic models; `lorafocal.config` reads files into them and words their mistakes. Imports neither torch
nor transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field, model_validator

from lorafocal import recipes
from lorafocal.compatibility import SPLIT_WEIGHTS, Cell, adapter_words, guide_refusal, verdict
from lorafocal.objectives import OBJECTIVES
from lorafocal.objectives.factor import FORMS
from lorafocal.references.strategy import refusals
from lorafocal.schema.mistakes import WORDED, Section, all_at_once, mistakes
from lorafocal.schema.sections import (
    Adapter,
    Data,
    Engine,
    Evaluation,
    Kernels,
    Model,
    Objective,
    Packing,
    Reference,
    Source,
)
from lorafocal.schema.training import Training
from lorafocal.values import RunName

__all__ = [
    "WORDED", "Adapter", "Config", "Data", "Engine", "Evaluation", "Kernels", "Model", "Objective", "Packing",
    "Reference", "Section", "Source", "Training",
]  # fmt: skip

_PART_OF_A_CELL = {
    "base": "model.quantization", "adapter": "adapter", "reference": "reference.kind", "engine": "engine.kind"
}  # fmt: skip


NO_ANSWERS = (
    "{engine} splits the weights, and a process cannot write answers with its part alone: use ddp, zero1 or zero2, or"
    " leave this out and evaluate what the run makes by `lorafocal generate`"
)


FIRST_REFERENCES = ("disabled_adapter", "frozen_copy", "separate_model", "moving")
"""Kinds that the first of several stages may have; the later ones have the stage before."""


class Config(Section):
    """One training run; without `adapter`, of every parameter of the model.

    `recipe` names the file of configs/paper that it repeats: the manifest lists what it does otherwise. `stages` trains
    as many chunks of the data one after the other, each from where the one before ended, which is its reference.
    """

    name: RunName
    model: Model
    adapter: Adapter | None = None
    data: Data
    objective: Objective
    reference: Reference | None = None
    training: Training
    stages: Annotated[int, Field(ge=2)] | None = None
    packing: Packing = Packing()
    kernels: Kernels = Kernels()
    engine: Engine | None = None
    evaluation: Evaluation | None = None
    recipe: str | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _reference_is_stated(cls, values: Any, handler: Any) -> Any:
        """Missing beside the other mistakes, not after them: whether it is needed depends on the objective."""
        objective = values.get("objective") if isinstance(values, dict) else None
        entry = OBJECTIVES.get(str(objective.get("name"))) if isinstance(objective, dict) else None
        alone = entry is not None and not entry.reference
        stated = not isinstance(values, dict) or values.get("reference") is not None
        missing = {"type": "missing", "loc": ("reference",), "msg": "missing", "input": None}
        return all_at_once(cls, values, handler, () if stated or alone else [missing])

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Config:
        if problems := list(self._misfits()):
            raise mistakes(problems)
        return self

    def _misfits(self) -> Iterable[tuple[str, str]]:
        """What each section allows, but not beside the others."""
        if self.recipe is not None and self.recipe not in recipes.names():
            yield "recipe", f"found {self.recipe!r}; {recipes.instead(self.recipe)}"
        evaluates = self.training.fields.get("eval_strategy", "no") != "no" or self.training.fields.get("eval_on_start")
        if evaluates and self.data.eval is None and self.data.held_out is None:
            yield (
                "training",
                "asks for evaluation, but neither data.eval nor data.held_out gives held-out pairs; add one, or remove"
                " eval_strategy (set it null where a file that this one extends has it)",
            )
        if not self.objective.entry.reference and self.reference is not None:
            name = self.objective.name
            yield "reference", f"{name} compares with no reference and would ignore it; remove the section"
        if self.training.activation_checkpointing == "mlp" and self.kernels.adapters == "peft":
            yield (
                "training.activation_checkpointing",
                "mlp computes gate and up again, which PEFT's own adapter functions cannot: use none or full, or"
                " kernels.adapters: auto",
            )
        if self.model.backend == "unsloth":
            held = self.model.quantization or self.model.dtype
            if self.model.dtype != "bfloat16" or held == "int8":
                yield "model.backend", f"unsloth computes in bfloat16, on bases in bfloat16 or 4 bits, not {held}"
            if self.packing.layout == "packed":
                yield "packing.layout", "unsloth's attention takes no packs: say padded, or auto"
            if self.engine is not None and self.engine.kind != "ddp":
                yield "engine.kind", f"unsloth's layers are whole in every process, not split by {self.engine.kind}"
        if self.evaluation is not None:
            yield from self._without_generation()
        if self.adapter is None:
            yield from self._without_adapter()
        if self.stages is not None:
            yield from self._in_stages()
        if self.reference is not None:
            for key, why in self._of_the_reference(self.reference):
                yield f"reference.{key}", why
        for refusal in verdict(self._cell()).refusals:
            yield _PART_OF_A_CELL[refusal.rule.axis], str(refusal)
        started = self.adapter is not None and self.adapter.start_from is not None
        if started and self.reference is not None and self.reference.must_be_the_base:
            yield (
                "reference.kind",
                "disabled_adapter is the base without the adapter, but training starts from adapter.start_from; use"
                " frozen_copy, or merge that adapter first, or set identity_probe: false if the base is meant",
            )

    def _of_the_reference(self, reference: Reference) -> Iterable[tuple[str, str]]:
        """What the objective or the adapter leaves no room for; (key, why)."""
        values = reference.model_dump()
        yield from refusals(values, self.objective.entry)
        if reference.guide is not None and (why := guide_refusal(self._cell().adapter)):
            yield "guide", why

    def _cell(self) -> Cell:
        """Where the run stands in the table of what goes together, as far as a config says."""
        adapter = None if self.adapter is None else self.adapter.model_dump()
        return Cell(
            base=self.model.quantization or self.model.dtype,
            adapter=adapter_words(adapter),
            reference="none" if self.reference is None else self.reference.strategy.word,
            engine="one-process" if self.engine is None else self.engine.kind,
        )

    def _in_stages(self) -> Iterable[tuple[str, str]]:
        """What leaves no room for one stage after the other in one process."""
        if any(step.chunk is not None for step in self.data.steps or ()):
            yield "stages", "each stage takes a chunk of the data itself; remove the step chunk, or stages"
        if self.reference is not None and self.reference.kind not in FIRST_REFERENCES:
            yield (
                "stages",
                "from the second stage on the one before is the reference, and reference.kind"
                f" {self.reference.kind} is not replaced by that; use {', '.join(FIRST_REFERENCES)}",
            )
        if self.reference is not None and self.reference.strategy.guide is not None:
            yield "stages", "reference.guide is one adapter for all stages, which was not tried; train them one by one"
        if self.engine is not None and self.engine.kind != "ddp":
            yield (
                "stages",
                f"{self.engine.kind} is set up once a process; train the stages one by one, by data.steps:"
                " [{chunk: {take: 1, of: 2}}] and adapter.start_from or model.name of the stage before",
            )
        if self.model.backend != "transformers":
            yield "stages", f"{self.model.backend} trains one run a process; train chunks one by one, by data.steps"

    def _without_generation(self) -> Iterable[tuple[str, str]]:
        """What leaves no room for answers during training."""
        if self.data.eval is None and self.data.held_out is None:
            yield (
                "evaluation",
                "answers the prompts of held-out pairs, and there are none: give data.eval or data.held_out",
            )
        if self.engine is not None and self.engine.kind in SPLIT_WEIGHTS:
            yield "evaluation", NO_ANSWERS.format(engine=self.engine.kind)
        if self.model.backend == "unsloth":
            yield (
                "evaluation",
                "unsloth exchanges layers to generate, and the run would not be the same: leave this out and"
                " evaluate what the run makes by `lorafocal generate`",
            )

    def _without_adapter(self) -> Iterable[tuple[str, str]]:
        """What belongs to adapters alone, and would be ignored."""
        if self.training.loraplus_lr_ratio is not None:
            yield "training.loraplus_lr_ratio", "LoRA+ is for adapters, and there is none; remove it"
        if self.training.activation_checkpointing == "mlp":
            yield "training.activation_checkpointing", "mlp belongs to the fused adapter functions: use none or full"
        if self.model.backend == "unsloth":
            yield "model.backend", "unsloth trains adapters here: add an adapter section, or use transformers"
        if self.kernels.elementwise == "triton":
            yield "kernels.elementwise", "triton's functions are part of the fused adapter functions; remove it"

    def sha(self) -> str:
        """sha256 (hex) of the resolved values; equal for two files that describe the same run."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def warnings(self) -> list[str]:
        """What is legal here but deserves a word before the run starts."""
        objective = self.objective
        checked = [(key, of.check(getattr(objective, key))) for key, of in objective.entry.parameters.items()]
        if objective.focal is not None:
            checked.append(("focal.gamma", FORMS[objective.focal.form].check(objective.focal.gamma)))
        return [f"objective.{key}: {risky}" for key, risky in checked if risky]
