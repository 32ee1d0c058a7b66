"""The closed, frozen schema of a run: which keys a config may have, their types, and what fits together.

Sections are pydantic models; `lorafocal.config` reads files into them and words their mistakes. Imports neither torch
nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from lorafocal import recipes
from lorafocal.bounds import check_dropout
from lorafocal.compatibility import Cell, adapter_words, offload_refusal, verdict
from lorafocal.errors import InputError
from lorafocal.objectives import OBJECTIVES, PARAMETERS, Entry
from lorafocal.training_fields import RULES, check_training_fields, installed_fields
from lorafocal.values import (
    Architecture,
    Dtype,
    HeldOut,
    Place,
    Quantization,
    Revision,
    RunName,
    Start,
    Targets,
    Tier,
    Token,
    TokenBudget,
    listed,
)

_PART_OF_A_CELL = {
    "base": "model.quantization", "adapter": "adapter", "reference": "reference.kind", "engine": "engine.kind"
}  # fmt: skip

# Numbers from 0 to below these, or an optimiser refuses them itself once the model is loaded.
_BELOW = {
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"), math.inf),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), 1.0),
}

WORDED = "worded"
"""Type of a mistake whose message is already what a person reads."""


class Section(BaseModel):
    """What all sections have in common: unknown keys are mistakes, types are strict, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class Model(Section):
    """Which base model, in which precision it computes, and how its inner linear layers are held.

    `quantization` is one word: the 4-bit types nf4 and fp4 (`-double`: the scales are quantised too), or int8.
    `backend` is the library that loads the base; unsloth brings its own kernels, on rows that are padded.
    """

    name: Place
    revision: Revision = None
    dtype: Dtype
    quantization: Quantization = None
    backend: Literal["transformers", "unsloth"] = "transformers"
    shape: Architecture = None


class Adapter(Section):
    """The LoRA adapter that is trained: a fresh one (`r`, `alpha`), or an existing one (`start_from`).

    `init` is how a fresh one starts. `rank_pattern` and `alpha_pattern` give some layers other values, by name.
    `modules_to_save` are trained whole, `trainable_tokens` (as text or ids) train their embeddings only.
    """

    r: Annotated[int | None, Field(ge=1)] = None
    alpha: Annotated[int | None, Field(ge=1)] = None
    targets: Targets = "all-linear"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    allow_dropout: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    init: Start = "default"
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    modules_to_save: list[str] = []
    trainable_tokens: list[Token] = []
    start_from: Place | None = None

    @model_validator(mode="after")
    def _fresh_or_continued(self) -> Adapter:
        given = self.model_fields_set - {"start_from", "allow_dropout"}
        if self.start_from is not None and any(getattr(self, key) != _default(Adapter, key) for key in given):
            raise _mistake("start_from", f"the adapter brings its own {', '.join(sorted(given))}; remove these here")
        missing = [key for key in ("r", "alpha") if getattr(self, key) is None]
        if self.start_from is None and missing:
            raise _mistakes((key, "missing; it has no default (to continue an adapter: start_from)") for key in missing)
        check_dropout(self.dropout, allowed=self.allow_dropout)
        return self


class Engine(Section):
    """How several processes share a run: each the whole model (ddp), or a part of what is trained, or of all of it.

    zero1 to zero3 are DeepSpeed's stages, fsdp2 is torch's. `offload` keeps the optimiser's states, or all that is
    split, in the machine's memory.
    """

    kind: Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]
    offload: Literal["none", "optimizer", "all"] = "none"

    @model_validator(mode="after")
    def _what_can_be_offloaded(self) -> Engine:
        if refusal := offload_refusal(self.kind, self.offload):
            raise _mistake("offload", refusal)
        return self


class Source(Section):
    """One file of preference rows, or one data set of the hub; `weight` 2 takes every pair twice, 0.5 half of them."""

    path: Place
    weight: Annotated[float, Field(gt=0)] = 1.0
    form: str | None = None
    columns: dict[str, str] = {}
    revision: Revision = None
    split: str | None = None


Sources = Annotated[list[Source], BeforeValidator(listed)]


class Data(Section):
    """Where preference rows come from, how they are read, and how long a sequence may be.

    `form`, `columns`, `revision` and `split` hold for every source that does not say its own.
    """

    train: Sources
    eval: Sources | None = None
    held_out: HeldOut = None
    form: str | None = None
    columns: dict[str, str] = {}
    revision: Revision = None
    split: str | None = None
    max_length: Annotated[int, Field(ge=2)] = 1024
    max_prompt_length: Annotated[int | None, Field(ge=1)] = None
    truncation: Literal["drop", "keep_start", "cut_prompt_left", "recipe"] = "drop"
    chat_template_kwargs: dict[str, Any] = {}
    on_bad_row: Literal["drop", "error"] = "drop"
    cache: bool = True

    @model_validator(mode="after")
    def _keys_fit_together(self) -> Data:
        problems = []
        if self.eval is not None and self.held_out is not None:
            problems.append(("held_out", "data.eval names held-out pairs already; remove one of the two"))
        if self.truncation == "recipe" and self.max_prompt_length is None:
            problems.append(("max_prompt_length", "missing; truncation: recipe cuts prompts to it"))
        if self.truncation != "recipe" and self.max_prompt_length is not None:
            problems.append(("max_prompt_length", "only truncation: recipe uses it; set that, or remove this key"))
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            problems.append(("max_prompt_length", f"must leave room for an answer below max_length {self.max_length}"))
        if problems:
            raise _mistakes(problems)
        return self

    def sources(self, name: Literal["train", "eval"]) -> list[Source]:
        """The sources of `train` or `eval`, with the section's own form, columns, revision and split filled in."""
        shared = {key: getattr(self, key) for key in ("form", "columns", "revision", "split") if getattr(self, key)}
        sources: list[Source] = getattr(self, name) or []
        return [
            source.model_copy(update={k: v for k, v in shared.items() if not getattr(source, k)}) for source in sources
        ]


_PARAMETERS: dict[str, Any] = dict.fromkeys(PARAMETERS, (float | None, None))


class Objective(  # type: ignore[misc]  # its keys are those of the registry
    create_model("_Objective", __base__=Section, name=(Literal.__getitem__(tuple(OBJECTIVES)), ...), **_PARAMETERS)
):
    """The loss and its parameters, as `lorafocal.objectives` lists them; another objective's are null."""

    @property
    def entry(self) -> Entry:
        """What the objective needs."""
        return OBJECTIVES[self.name]

    @property
    def parameters(self) -> dict[str, float]:
        """The objective's own parameters."""
        return {key: getattr(self, key) for key in self.entry.parameters}

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, section: Any) -> Any:
        entry = OBJECTIVES.get(str(section.get("name"))) if isinstance(section, dict) else None
        if entry is None:
            return section
        return {key: of.default for key, of in entry.parameters.items() if not of.stated} | section

    @model_validator(mode="after")
    def _values_make_sense(self) -> Objective:
        if problems := list(self._misfits()):
            raise _mistakes(problems)
        return self

    def _misfits(self) -> Iterable[tuple[str, str]]:
        for key in PARAMETERS:
            value, parameter = getattr(self, key), self.entry.parameters.get(key)
            if parameter is None and value is not None:
                yield key, f"{self.name} has none and would ignore it; remove it, or set it null"
            elif parameter is not None and parameter.stated and value is None:
                yield key, "missing; it has no default"
            elif parameter is not None:
                try:
                    parameter.check(value)
                except InputError as error:  # of an explicit null too
                    yield key, str(error)

    @model_serializer(mode="plain")
    def _own_parameters(self) -> dict[str, Any]:
        return {"name": self.name, **self.parameters}


class Reference(Section):
    """What the policy is compared with; no default, because a wrong reference trains without complaint.

    `cached`: log-probs that `lorafocal cache-reference` keeps in the folder `store`, of the policy as it starts, or of
    `model`. `identity_probe` left out means on, except for another model, which may deliberately be another one.
    """

    kind: Literal["disabled_adapter", "frozen_copy", "separate_model", "cached"]
    store: Place = "references"
    model: Place | None = None
    revision: Revision = None
    identity_probe: bool | None = None

    @property
    def must_be_the_base(self) -> bool:
        """Whether the run is refused unless it starts at the bare base."""
        return self.kind == "disabled_adapter" and self.identity_probe is not False

    @model_validator(mode="after")
    def _model_fits_kind(self) -> Reference:
        if self.kind == "separate_model" and self.model is None:
            raise _mistake("model", "missing; kind: separate_model needs the hub id or folder of that model")
        stray = [key for key in ("model", "revision") if getattr(self, key) is not None]
        if self.kind not in ("separate_model", "cached") and stray:
            raise _mistakes((key, f"only kind: separate_model has one; {self.kind} is the base's own") for key in stray)
        if self.revision is not None and self.model is None:
            raise _mistake("revision", "belongs to reference.model, which is not given; the base's is model.revision")
        if self.kind != "cached" and self.store != _default(Reference, "store"):
            raise _mistake("store", f"only kind: cached keeps log-probs; {self.kind} would ignore it; remove it")
        return self


class Training(BaseModel):
    """Our own keys, and beside them the supported fields of `TrainingArguments` under their own names."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    pairs_per_step: Annotated[int, Field(ge=1)]
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    activation_checkpointing: Tier = "auto"
    loraplus_lr_ratio: Annotated[float | None, Field(ge=1)] = None
    seed: Annotated[int, Field(ge=0)] = 42
    data_seed: Annotated[int, Field(ge=0)] = 42

    @model_validator(mode="wrap")
    @classmethod
    def _only_fields_we_honour(cls, section: Any, handler: Any) -> Any:
        own = isinstance(section, dict)
        strange = {key: value for key, value in section.items() if key not in cls.model_fields} if own else {}
        return _all_at_once(cls, section, handler, _training_problems(strange, section) if own else ())

    @property
    def fields(self) -> dict[str, Any]:
        """The `TrainingArguments` fields that were given, beside our own keys."""
        return dict(self.model_extra or {})


class Packing(Section):
    """How pairs are laid out for the model: changes memory and speed, never the result.

    `layout: auto` packs where the model's probes allow it, and says why where they do not; `tokens: auto` is as many as
    the memory holds.
    """

    layout: Literal["auto", "packed", "padded"] = "auto"
    tokens: TokenBudget = "auto"


class Kernels(Section):
    """Which code computes what: changes speed and memory, the result up to rounding.

    `adapters: auto` is fused where that is exact and PEFT's own elsewhere; `compile` is torch.compile of the layers.
    """

    adapters: Literal["auto", "peft"] = "auto"
    elementwise: Literal["torch", "triton"] = "torch"
    compile: bool = False


class Config(Section):
    """One training run; without `adapter`, of every parameter of the model.

    `recipe` names the file of configs/paper that it repeats: the manifest lists what it does otherwise.
    """

    name: RunName
    model: Model
    adapter: Adapter | None = None
    data: Data
    objective: Objective
    reference: Reference | None = None
    training: Training
    packing: Packing = Packing()
    kernels: Kernels = Kernels()
    engine: Engine | None = None
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
        return _all_at_once(cls, values, handler, () if stated or alone else [missing])

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Config:
        if problems := list(self._misfits()):
            raise _mistakes(problems)
        return self

    def _misfits(self) -> Iterable[tuple[str, str]]:
        """What each section allows, but not beside the others."""
        if self.recipe is not None and self.recipe not in recipes.names():
            yield "recipe", f"found {self.recipe!r}; known: {', '.join(recipes.names())}"
        evaluates = self.training.fields.get("eval_strategy", "no") != "no" or self.training.fields.get("eval_on_start")
        if evaluates and self.data.eval is None and self.data.held_out is None:
            yield (
                "training",
                "asks for evaluation, but neither data.eval nor data.held_out gives held-out pairs; add one, or remove"
                " eval_strategy",
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
        if self.adapter is None:
            yield from self._without_adapter()
        for refusal in verdict(self._cell()).refusals:
            yield _PART_OF_A_CELL[refusal.rule.axis], str(refusal)
        started = self.adapter is not None and self.adapter.start_from is not None
        if started and self.reference is not None and self.reference.must_be_the_base:
            yield (
                "reference.kind",
                "disabled_adapter is the base without the adapter, but training starts from adapter.start_from; use"
                " frozen_copy, or merge that adapter first, or set identity_probe: false if the base is meant",
            )

    def _cell(self) -> Cell:
        """Where the run stands in the table of what goes together, as far as a config says."""
        adapter = None if self.adapter is None else self.adapter.model_dump()
        return Cell(
            base=self.model.quantization or self.model.dtype,
            adapter=adapter_words(adapter),
            reference="none" if self.reference is None else self.reference.kind,
            engine="one-process" if self.engine is None else self.engine.kind,
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
        checked = ((key, of.check(getattr(self.objective, key))) for key, of in self.objective.entry.parameters.items())
        return [f"objective.{key}: {risky}" for key, risky in checked if risky]


def _default(section: type[BaseModel], key: str) -> Any:
    return section.model_fields[key].default


def _training_problems(fields: dict[str, Any], section: dict[str, Any]) -> Iterable[Any]:
    """What is wrong with the fields under `training`, as `_line_error` takes it."""
    passed = {}
    for name, value in fields.items():
        rule = RULES.get(name)
        if rule is not None and rule.config_key:
            yield name, f"found {value!r}; in a config this is said by the key {rule.config_key}"
        elif rule is None and name not in installed_fields():
            yield {"type": "extra_forbidden", "loc": (name,), "msg": "unknown key", "input": value}
        else:
            passed[name] = value
    for message in check_training_fields(passed):
        name, _, text = message.partition(": ")
        yield name, text
    for name in passed.keys() & _BELOW.keys():
        value, below = passed[name], _BELOW[name]
        if type(value) in (int, float) and not 0 <= value < below:
            yield name, f"found {value!r}; it must be at least 0 and {'finite' if below == math.inf else 'below 1'}"
    if "warmup_steps" in fields and "warmup_ratio" in section:
        yield "warmup_steps", "warmup_ratio is given too; remove one of the two"


def _all_at_once(section: type[BaseModel], values: Any, handler: Any, more: Iterable[Any]) -> Any:
    """What `handler` makes of `values`, or its mistakes together with `more` of them, as `_line_error` takes them."""
    problems: list[Any] = []
    result = None
    try:
        result = handler(values)
    except ValidationError as error:
        problems += error.errors()
    problems += more
    if problems:
        raise ValidationError.from_exception_data(section.__name__, [_line_error(problem) for problem in problems])
    return result


def _mistake(key: str, message: str) -> ValidationError:
    """One mistake at `key` inside the section whose validator raises it."""
    return _mistakes([(key, message)])


def _mistakes(problems: Iterable[tuple[str, str]]) -> ValidationError:
    return ValidationError.from_exception_data("config", [_line_error(problem) for problem in problems])


def _line_error(problem: Any) -> InitErrorDetails:
    """One line of a pydantic error: either ours, a (key, message), or pydantic's own details passed on."""
    if isinstance(problem, tuple):
        key, message = problem
        worded = PydanticCustomError(WORDED, "{message}", {"message": message})
        return {"type": worded, "loc": (key,), "input": None}
    kept = PydanticCustomError(problem["type"], "{message}", {"message": problem["msg"]})
    return {"type": kept, "loc": problem["loc"], "input": problem["input"]}
