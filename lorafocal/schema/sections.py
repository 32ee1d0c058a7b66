"""The sections of a config but `training`: their keys, and what fits together within each."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, create_model, model_serializer, model_validator

from lorafocal.bounds import check_dropout
from lorafocal.compatibility import offload_refusal
from lorafocal.errors import InputError
from lorafocal.objectives import OBJECTIVES, PARAMETERS, Entry
from lorafocal.objectives.factor import DEFAULT_FORM, FORMS, GUARDS, record_of
from lorafocal.objectives.factor import misfits as misfits_of_factor
from lorafocal.references.strategy import Strategy, misfits, strategy_of, with_defaults
from lorafocal.schema.mistakes import Section, default_of, mistake, mistakes
from lorafocal.schema.steps import Step
from lorafocal.schema.steps import misfits as step_misfits
from lorafocal.values import (
    Architecture,
    Dtype,
    HeldOut,
    Place,
    Quantization,
    Revision,
    Start,
    Targets,
    Token,
    TokenBudget,
    listed,
)


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

    @property
    def fetched(self) -> str:
        """What brings the base's config.json into the hub's cache, where this revision of it is looked for."""
        return "hf download MODEL config.json" + (f" --revision {self.revision}" if self.revision else "")


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
        if self.start_from is not None and any(getattr(self, key) != default_of(Adapter, key) for key in given):
            raise mistake("start_from", f"the adapter brings its own {', '.join(sorted(given))}; remove these here")
        missing = [key for key in ("r", "alpha") if getattr(self, key) is None]
        if self.start_from is None and missing:
            raise mistakes((key, "missing; it has no default (to continue an adapter: start_from)") for key in missing)
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
            raise mistake("offload", refusal)
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

    `form`, `columns`, `revision` and `split` hold for every source that does not say its own. `leave_out` is a file of
    ids, one a line: training pairs that the run goes without. `steps` are what is then done to the training pairs.
    """

    train: Sources
    eval: Sources | None = None
    held_out: HeldOut = None
    leave_out: Place | None = None
    steps: Annotated[list[Step], Field(min_length=1)] | None = None
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
        if misfit := step_misfits(self.steps or ()):
            problems.append(("steps", misfit))
        if problems:
            raise mistakes(problems)
        return self

    def sources(self, name: Literal["train", "eval"]) -> list[Source]:
        """The sources of `train` or `eval`, with the section's own form, columns, revision and split filled in."""
        shared = {key: getattr(self, key) for key in ("form", "columns", "revision", "split") if getattr(self, key)}
        sources: list[Source] = getattr(self, name) or []
        return [
            source.model_copy(update={k: v for k, v in shared.items() if not getattr(source, k)}) for source in sources
        ]


_Guard: Any = Literal.__getitem__(GUARDS)


class Focal(Section):
    """A focal factor around a loss with a Bradley-Terry form; `form` is one of `lorafocal.objectives.factor.FORMS`."""

    form: Literal.__getitem__(tuple(FORMS)) = DEFAULT_FORM  # type: ignore[valid-type]  # it is one once it runs
    gamma: float | None = None


_OF_THE_REGISTRY: dict[str, Any] = {
    "name": (Literal.__getitem__(tuple(OBJECTIVES)), ...),
    **dict.fromkeys(PARAMETERS, (float | None, None)),
    "focal": (Focal | None, None),
    "guard": (_Guard | None, None),
}
_Keys: Any = create_model("_Keys", __base__=Section, **_OF_THE_REGISTRY)


class Objective(_Keys):
    """The loss and its parameters, as `lorafocal.objectives` lists them; another objective's are null.

    `focal` puts a factor around it, and `guard: clip` takes the gradient from pairs that a factor would turn round.
    """

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
            raise mistakes(problems)
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
        yield from misfits_of_factor(self.name, self.entry, self.focal and self.focal.model_dump(), self.guard)

    @model_serializer(mode="plain")
    def _as_recorded(self) -> dict[str, Any]:
        return record_of(self.name, self.parameters, self.focal and self.focal.model_dump(), self.guard)


class Reference(Section):
    """What the policy is compared with; no default, because a wrong reference trains without complaint.

    `cached`: log-probs that `lorafocal cache-reference` keeps in the folder `store`, of the policy as it starts, or of
    `model`. `adapter`: a finished one, of the folder `adapter`. `moving`: every so many steps it becomes `mixing` of
    the policy. `several`: `members` (base, or folders of adapters) combined. `guide` is the folder of one more adapter,
    for objectives that ask for it. `identity_probe` left out means on, except for a model that may well be another.
    """

    kind: Literal["disabled_adapter", "frozen_copy", "separate_model", "cached", "adapter", "moving", "several"]
    store: Place = "references"
    model: Place | None = None
    revision: Revision = None
    identity_probe: bool | None = None
    adapter: Place | None = None
    every: int | None = None
    mixing: float | None = None
    members: list[Place] | None = None
    combine: Literal["harmonic", "geometric"] | None = None
    weights: list[float] | Literal["adaptive"] | None = None
    clip: float | None = None
    guide: Place | None = None

    @property
    def must_be_the_base(self) -> bool:
        """Whether the run is refused unless it starts at the bare base."""
        return self.kind == "disabled_adapter" and self.identity_probe is not False

    @property
    def strategy(self) -> Strategy:
        """The same as a plain value."""
        return strategy_of(self.model_dump())

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, section: Any) -> Any:
        return with_defaults(section) if isinstance(section, dict) else section

    @model_validator(mode="after")
    def _settings_fit_kind(self) -> Reference:
        if problems := list(misfits(self.model_dump())):
            raise mistakes(problems)
        return self

    @model_validator(mode="after")
    def _model_fits_kind(self) -> Reference:
        if self.kind == "separate_model" and self.model is None:
            raise mistake("model", "missing; kind: separate_model needs the hub id or folder of that model")
        stray = [key for key in ("model", "revision") if getattr(self, key) is not None]
        if self.kind not in ("separate_model", "cached") and stray:
            raise mistakes((key, f"only kind: separate_model has one; {self.kind} is the base's own") for key in stray)
        if self.revision is not None and self.model is None:
            raise mistake("revision", "belongs to reference.model, which is not given; the base's is model.revision")
        if self.kind != "cached" and self.store != default_of(Reference, "store"):
            raise mistake("store", f"only kind: cached keeps log-probs; {self.kind} would ignore it; remove it")
        return self


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


class Evaluation(Section):
    """Answers written and judged while training goes on: before the first step, every so many, and after the last.

    To the first `count` prompts of the held-out pairs. `rule` says which answers are right, by the pair's chosen one
    (regex: by `pattern`); `reward_model` says which are better than that. Temperature 0 is greedy. Changes nothing of
    what is trained.
    """

    every: Annotated[int, Field(ge=1)]
    count: Annotated[int, Field(ge=1)] = 64
    rule: Literal["exact", "contains", "number", "regex", "json"] | None = None
    pattern: str | None = None
    reward_model: Place | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    temperature: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _one_judge(self) -> Evaluation:
        if self.rule is None and self.reward_model is None:
            raise mistake("rule", "missing; say who judges the answers: a rule such as number, or reward_model")
        if self.rule is not None and self.reward_model is not None:
            raise mistake("rule", "evaluation.reward_model judges the answers already; remove one of the two")
        if (self.rule == "regex") != (self.pattern is not None):
            raise mistake(
                "pattern", "rule: regex needs one, the expression to find in an answer; no other rule has one"
            )
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise mistake("pattern", f"{self.pattern!r} is no regular expression: {error}") from error
        return self
