"""`FocalPOConfig`: TRL's way of configuring a trainer, on transformers' `TrainingArguments`."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from difflib import get_close_matches
from inspect import signature
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, SchedulerType, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames

from lorafocal import launch
from lorafocal.compatibility import LAYOUTS, offload_refusal
from lorafocal.data.truncation import check_limits
from lorafocal.errors import InputError
from lorafocal.memory import TIERS
from lorafocal.objectives import OBJECTIVES, PARAMETERS, Entry, Objective, build_objective, entry_of, python_name
from lorafocal.objectives.factor import FORMS
from lorafocal.optimizers import check_device, check_schedule
from lorafocal.reference import REFERENCES
from lorafocal.references.strategy import KEYS, Strategy, misfits, refusals, strategy_of, with_defaults
from lorafocal.training_fields import RULES, accepts, check_training_fields, field_problem, forced_values, object_in

# Fields of the reference's strategy, by what a config calls them in its section `reference`.
_OF_THE_STRATEGY = {
    "reference": "kind",
    **{f"reference_{key}": key for key in (*KEYS, "guide")},
}
_OF_THE_REFERENCE = (*_OF_THE_STRATEGY, "identity_probe", "reference_store")
_OF_THE_OBJECTIVE = (*map(python_name, PARAMETERS), *_OF_THE_REFERENCE)

# What a trainer reads once, when it is made.
READ_ONCE = (
    *("objective", *map(python_name, PARAMETERS), "focal", "guard"),
    *(*_OF_THE_STRATEGY, "reference_store"),
    *("max_length", "max_prompt_length", "truncation", "chat_template_kwargs", "allow_dropout", "engine", "offload"),
    *("layout", "tokens_per_pack", "recompute", "adapter_kernels", "elementwise_kernels", "compile_layers"),
)

# Words that people bring along from TRL's DPOConfig and DPOTrainer, and from earlier versions of transformers.
_CONFIG_WORDS_OF_TRL = {
    "evaluation_strategy": "say eval_strategy",
    "f_divergence_type": "say objective='f-dpo-forward-kl', 'f-dpo-js' or 'f-dpo-alpha'",
    "group_by_length": "leave it out: packs hold no padding, and the order stays random",
    "ld_alpha": "say objective='ld-dpo', alpha",
    "loss_type": f"say objective: {', '.join(OBJECTIVES)}",
    "model_init_kwargs": "load the base yourself: lorafocal.load_base(name, dtype=..., quantization=...)",
    "truncation_mode": "say truncation",
    "disable_dropout": "say allow_dropout",
    "padding_free": "say layout; packed is padding-free",
    "precompute_ref_log_probs": "say reference='cached', and call trainer.cache_reference() before trainer.train()",
    "ref_model_mixup_alpha": "say reference_mixing",
    "ref_model_sync_steps": "say reference_every",
    "rpo_alpha": "say objective='irpo', nll_weight",
    "sync_ref_model": "say reference='moving', reference_every, reference_mixing",
    "use_weighting": "say objective='wpo'",
}
TRAINER_WORDS_OF_TRL = {
    "tokenizer": "say processing_class",
    "model_init": "give the model: each training has a trainer of its own",
    "beta": "say args=FocalPOConfig(beta=...)",
    "loss_type": "say args=FocalPOConfig(objective=...)",
    "max_length": "say args=FocalPOConfig(max_length=...)",
    "max_prompt_length": "say args=FocalPOConfig(truncation=...)",
    "data_collator": "leave it out: pairs are packed here",
    "compute_metrics": "leave it out: evaluation adds up sums over pairs",
    "quantization_config": "load the base yourself: lorafocal.load_base(name, quantization='nf4')",
}


_WORDS = {
    "layout": ("auto", *LAYOUTS),
    "recompute": ("auto", *TIERS),
    "adapter_kernels": ("auto", "peft"),
    "elementwise_kernels": ("torch", "triton"),
}

_MAPPINGS = ("focal", "chat_template_kwargs")  # which may be given as text, one JSON object: scripts' parsers do


class _OfTheEngine(dict[str, Any]):
    """A DeepSpeed config that we made: a copy of its `FocalPOConfig` brings it along, and makes its own."""


def refuse_unknown(owner: str, names: Iterable[str], hints: Mapping[str, str], known: Collection[str] = ()) -> None:
    """Raise InputError for keyword arguments that `owner` does not have, with what to say instead.

    `hints` say it of some names; of others it is the nearest of the `known` ones.
    """
    if lines := [f"{name}: {hints.get(name) or _no_such(name, known)}" for name in sorted(names)]:
        raise InputError("\n  ".join([f"{owner} (lorafocal.compat.trl translates a DPOConfig):", *lines]))


def _no_such(name: str, known: Collection[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return "no such argument" + (f"; did you mean {close[0]}?" if close else "")


_Parameters: Any = make_dataclass(
    "_Parameters",
    [
        (python_name(name), float | None, field(default=None, metadata={"help": text}))
        for name, text in PARAMETERS.items()
    ],
    bases=(TrainingArguments,),
)


@dataclass
class FocalPOConfig(_Parameters):
    """Arguments of `FocalPOTrainer`: ours below, beside those of `TrainingArguments`.

    objective (`lorafocal.objectives.OBJECTIVES`: "focalpo", "dpo", ..., "sft" on the chosen answers) and its
    parameters, as beta and gamma (`lambda` is `lambda_` here); focal, a factor around it, and guard; pairs_per_step,
    the one batch size, over all processes; keep_order; max_length, truncation and what else tokenises rows (pairs that
    are tokenised already are taken as they are); layout, tokens_per_pack and recompute, which change memory and speed
    and never the result, like the kernels (adapter_kernels, elementwise_kernels, compile_layers); engine and offload,
    which say how processes share a model; reference, what belongs to its kind (reference_adapter and further ones,
    `lorafocal.references.strategy`), reference_store and identity_probe; allow_dropout; loraplus_lr_ratio.

    A copy with changes (`dataclasses.replace`) is checked as a new one. What is set on a config that is made, also by
    `set_training` and its like, is checked when a trainer takes it.

    Parameters, reference and identity_probe are None where the objective has none of them, and get the defaults of the
    objective or of the reference where it has. Each inherited field is supported, set by us, or refused with its
    reason (`lorafocal.training_fields`).
    Raises InputError listing every field that cannot be honoured.
    """

    objective: str = field(default="focalpo", metadata={"help": f"one of {', '.join(OBJECTIVES)}"})
    focal: dict[str, Any] | None = field(
        default=None, metadata={"help": f"factor around the loss: form ({', '.join(FORMS)}) and gamma"}
    )
    guard: str | None = field(
        default=None, metadata={"help": "clip: no gradient for pairs that a focal factor would push the wrong way"}
    )
    pairs_per_step: int = field(default=64, metadata={"help": "pairs of one optimiser step, over all processes"})
    keep_order: bool = field(default=False, metadata={"help": "train in the data's order in every epoch, unshuffled"})
    max_length: int = field(default=1024, metadata={"help": "tokens of prompt and one completion"})
    max_prompt_length: int | None = field(default=None, metadata={"help": "tokens; for truncation=recipe alone"})
    truncation: str = field(
        default="drop",
        metadata={"help": "what happens to a pair over max_length: drop, keep_start, cut_prompt_left or recipe"},
    )
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "given to every rendering of a conversation, as enable_thinking"}
    )
    layout: str = field(
        default="auto", metadata={"help": "auto, packed (prompts shared, no padding) or padded, which any model can"}
    )
    tokens_per_pack: int | None = field(
        default=None, metadata={"help": "token rows of one forward; None: as many as the memory holds"}
    )
    recompute: str = field(
        default="auto",
        metadata={"help": "what the backward computes again to save memory: auto, none, mlp (gate and up) or full"},
    )
    adapter_kernels: str = field(
        default="auto", metadata={"help": "auto (fused where that is exact) or peft, which is the definition"}
    )
    elementwise_kernels: str = field(default="torch", metadata={"help": "torch, or triton on a GPU"})
    compile_layers: bool = field(default=False, metadata={"help": "torch.compile of the decoder layers"})
    reference: str | None = field(
        default=None, metadata={"help": f"one of {', '.join(REFERENCES)}; None: disabled_adapter"}
    )
    reference_adapter: str | None = field(
        default=None, metadata={"help": "folder of a finished adapter on the same base, for reference=adapter"}
    )
    reference_every: int | None = field(
        default=None, metadata={"help": "optimiser steps between two moves of reference=moving (512)"}
    )
    reference_mixing: float | None = field(
        default=None, metadata={"help": "the policy's share of a reference=moving that has moved; 1 (a copy)"}
    )
    reference_members: list[str] | None = field(
        default=None, metadata={"help": "of reference=several: base, or folders of adapters; the first is the main one"}
    )
    reference_combine: str | None = field(default=None, metadata={"help": "harmonic (MRPO) or geometric (INPO)"})
    reference_weights: list[float] | str | None = field(
        default=None, metadata={"help": "of reference=several: a number each, or adaptive (harmonic's default)"}
    )
    reference_clip: float | None = field(
        default=None, metadata={"help": "share by which others may differ from the first member (harmonic; 0.1)"}
    )
    reference_guide: str | None = field(
        default=None, metadata={"help": "folder of one more adapter, for objectives that ask for its log-probs"}
    )
    reference_store: str | None = field(
        default=None, metadata={"help": "folder of stored reference log-probs (references), for reference=cached"}
    )
    identity_probe: bool | None = field(
        default=None, metadata={"help": "refuse a reference that is not the starting policy; None: by its kind"}
    )
    allow_dropout: bool = field(default=False, metadata={"help": "keep dropout on; log-probs become noisy"})
    engine: str | None = field(
        default=None,
        metadata={"help": "ddp, zero1, zero2, zero3 or fsdp2; None: one process, or what the launcher says (ddp)"},
    )
    offload: str = field(
        default="none", metadata={"help": "none, optimizer or all: what an engine keeps in the machine's memory"}
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "LoRA+: learning rate of B over that of A, at least 1 (16 in its paper)"}
    )

    learning_rate: float = field(default=5e-6, metadata={"help": "AdamW's; Zephyr's recipe for LoRA"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "the paper trains one"})
    logging_steps: float = field(default=10, metadata={"help": "optimiser steps between log lines"})

    def __new__(cls, *args: Any, **kwargs: Any) -> FocalPOConfig:
        """Words TypeError's case: a keyword that is no field, such as one of TRL's."""
        gone = {name: rule.reason for name, rule in RULES.items() if rule.kind == "refused"} | _CONFIG_WORDS_OF_TRL
        known = {spec.name for spec in fields(cls)}
        refuse_unknown("FocalPOConfig", kwargs.keys() - known, gone, known - gone.keys())
        return super().__new__(cls)

    def __post_init__(self) -> None:
        launch.check_launch()
        for name in _MAPPINGS:
            if isinstance(text := getattr(self, name), str) and (read := object_in(text)) is not None:
                setattr(self, name, read)
        if errors := self._problems(_defaults()):
            raise InputError("FocalPOConfig: " + "\n".join(errors))
        check_limits(self.truncation, self.max_length, self.max_prompt_length)
        for name, value in (forced_values() | {name: RULES[name].value for name in self._written_otherwise()}).items():
            setattr(self, name, value)
        self._settle_objective()
        self.engine = launch.settled_engine(self.engine)
        if refusal := offload_refusal(self.engine, self.offload):
            raise InputError(f"offload: {refusal}")
        if self.engine == "fsdp2":
            from lorafocal.engines.fsdp import backend

            self.ddp_backend = backend(self)
        if self.engine.startswith("zero"):
            from lorafocal.engines.zero import deepspeed_config, load_whole

            self.deepspeed = _OfTheEngine(deepspeed_config(self))
        try:
            super().__post_init__()
        except ValueError as error:  # what this machine or these values cannot do, in transformers' words
            raise InputError(f"FocalPOConfig: {error}") from error
        settings: Any = self.lr_scheduler_kwargs or {}  # a mapping, now that transformers has read it
        check_schedule(SchedulerType(self.lr_scheduler_type).value, settings, self.learning_rate)
        if self.deepspeed:
            load_whole()
        self._settle_recompute()
        _ = self.device  # decides the number of GPUs, which transformers would otherwise join by DataParallel
        self._n_gpu = min(self.n_gpu, 1)
        if self.device.type == "cpu":  # accelerate imports DeepSpeed where it is installed, which tells of its choice
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        check_device(OptimizerNames(self.optim).value, self.device)

    def _settle_recompute(self) -> None:
        """transformers' own word for the tier full is a field of its own."""
        words = [n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(self, n)]
        names = [n for n in words if getattr(self, n)]
        if names and self.recompute not in ("auto", "full"):
            raise InputError(f"{names[0]}=True recomputes everything, but recompute is {self.recompute!r}: keep one")
        if names:
            self.recompute = "full"
        settings = getattr(self, f"{words[0]}_kwargs")  # of the newer word, which has got the older one's by now
        if settings is not None and (wrong := _of_a_recomputation(settings, self.recompute)):
            raise InputError(f"{words[0]}_kwargs is {settings!r}; {wrong}")

    def build_objective(self) -> Objective:
        """The objective with its checked parameters, for a trainer.

        Raises InputError for fields that were set since the config was made, and cannot be honoured.
        """
        if errors := self._problems(_defaults() | forced_values()):
            since = "FocalPOConfig, as it was changed since it was made (what is meant goes into FocalPOConfig(...)):"
            raise InputError("\n  ".join([since, *errors]))
        return self._objective()

    def _objective(self) -> Objective:
        parameters = {name: getattr(self, python_name(name)) for name in PARAMETERS}
        return build_objective(self.objective, focal=self.focal, guard=self.guard, **parameters)

    def _settle_objective(self) -> None:
        """Defaults of what the objective has; refuse what it has not, which would be ignored."""
        entry = entry_of(self.objective)
        has = {*map(python_name, entry.parameters)}
        if entry.reference:
            has |= {*_OF_THE_REFERENCE}
        stray = [name for name in _OF_THE_OBJECTIVE if name not in has and getattr(self, name) is not None]
        if stray:
            raise InputError(f"{self.objective} has no {' and no '.join(stray)}, which would be ignored: leave it out")
        for name, value in self._objective().parameters.items():
            setattr(self, python_name(name), value)
        if entry.reference:
            self.reference = self.reference or "disabled_adapter"
            if self.reference not in REFERENCES:
                raise InputError(f"reference is {self.reference!r}; choose one of {', '.join(REFERENCES)}")
            self._settle_strategy(entry)
            if self.identity_probe is None:
                self.identity_probe = REFERENCES[self.reference].starts_as_policy
            if self.reference_store is not None and self.reference != "cached":
                raise InputError(
                    f"reference_store is for reference='cached'; {self.reference} would ignore it: leave it out"
                )
            if self.reference == "cached":
                self.reference_store = self.reference_store or "references"

    def _settle_strategy(self, entry: Entry) -> None:
        """Defaults of the reference's kind; refuse what belongs to another, and what the objective has no room for."""
        values = with_defaults({key: getattr(self, name) for name, key in _OF_THE_STRATEGY.items()})
        names = {key: name for name, key in _OF_THE_STRATEGY.items()}
        if wrong := [f"{names[key]}: {why}" for key, why in (*misfits(values), *refusals(values, entry))]:
            raise InputError("\n  ".join(["FocalPOConfig:", *wrong]))
        for name, key in _OF_THE_STRATEGY.items():
            setattr(self, name, values[key])

    @property
    def strategy(self) -> Strategy:
        """What the policy is compared with, and by which guide."""
        return strategy_of({key: getattr(self, name) for name, key in _OF_THE_STRATEGY.items()})

    def _problems(self, untouched: Mapping[str, Any]) -> list[str]:
        """What cannot be honoured of the fields that are not as in `untouched`, and of our own."""
        errors = check_training_fields(self._given(untouched))
        if problem := field_problem("num_train_epochs", self.num_train_epochs):
            errors.append(f"num_train_epochs: {problem}")
        return [*errors, *(self._of_another_type() or self._out_of_range())]

    def _given(self, untouched: Mapping[str, Any]) -> dict[str, Any]:
        """Inherited fields with another value than in `untouched`: what somebody chose."""
        given = {name: getattr(self, name) for name in untouched if getattr(self, name) != untouched[name]}
        given.pop("num_train_epochs", None)  # max_steps decides, as transformers says
        if _says_nothing(self.accelerator_config):
            given.pop("accelerator_config", None)
        if self.do_eval and self.eval_strategy != "no":  # transformers sets it then
            given.pop("do_eval")
        if isinstance(self.deepspeed, _OfTheEngine):
            given.pop("deepspeed")
        return given

    def _written_otherwise(self) -> Iterator[str]:
        """Refused fields with their neutral value in another form, or as a config had it of which this is a copy."""
        for name, rule in RULES.items():
            if (value := getattr(self, name, None)) in rule.also or isinstance(value, _OfTheEngine):
                yield name

    def _of_another_type(self) -> list[str]:
        """Our own fields that hold what they do not take."""
        errors = []
        for name in FocalPOConfig.__annotations__.keys() - RULES.keys():
            value, takes = getattr(self, name), FocalPOConfig.__annotations__[name]
            if name in _MAPPINGS and isinstance(value, str):
                errors.append(f"{name} is {value!r}; it takes a mapping, or one JSON object as text")
            elif not accepts(takes, list(value) if isinstance(value, tuple) else value):
                meant = type(self).__dataclass_fields__[name].metadata["help"]
                errors.append(f"{name} is {value!r}; it takes {takes}: {meant}")
        return sorted(errors)

    def _out_of_range(self) -> Iterator[str]:
        """Values of our own fields that their types allow and we do not."""
        if self.pairs_per_step < 1:
            yield f"pairs_per_step is {self.pairs_per_step!r}; a step needs whole pairs, 1 or more"
        if self.loraplus_lr_ratio is not None and self.loraplus_lr_ratio < 1:
            yield f"loraplus_lr_ratio is {self.loraplus_lr_ratio}; LoRA+ gives B a rate of at least A's: 1 to 32"
        for name, words in _WORDS.items():
            if (value := getattr(self, name)) not in words:
                yield f"{name} is {value!r}; choose one of {', '.join(words)}"
        if self.tokens_per_pack is not None and self.tokens_per_pack < 1:
            yield f"tokens_per_pack is {self.tokens_per_pack}; a pack needs tokens (None: chosen for you)"


for _name in _MAPPINGS:  # what HfArgumentParser makes of a text; a made config holds a mapping
    FocalPOConfig.__annotations__[_name] = "dict[str, Any] | str | None"


def _of_a_recomputation(settings: Any, recompute: str) -> str | None:
    """What is wrong with settings of transformers' own recomputation of layers, which fails in the first step."""
    enable = getattr(PreTrainedModel, "activation_checkpointing_enable", PreTrainedModel.gradient_checkpointing_enable)
    known = {*signature(checkpoint).parameters, *signature(enable).parameters, "preserve_rng_state"}
    takes = sorted(name for name in known - {"self", "function", "args"} if not name.endswith("kwargs"))
    if not isinstance(settings, dict) or settings.keys() - takes:
        return f"it takes a mapping, with keys of {', '.join(takes)}"
    if recompute != "full":
        return f"it has no effect under recompute {recompute}: set recompute='full', or leave it out"
    return None


def _says_nothing(loader: Any) -> bool:
    """Whether these settings of accelerate are its defaults, as transformers makes them of None, or writes them."""
    settings = loader.to_dict() if isinstance(loader, AcceleratorConfig) else loader
    return isinstance(settings, dict) and settings.items() <= AcceleratorConfig().to_dict().items()


def _defaults() -> dict[str, Any]:
    """The inherited fields as a config has them of which nothing is said."""
    inherited = {spec.name for spec in fields(TrainingArguments) if spec.init}
    return {
        spec.name: spec.default if spec.default_factory is MISSING else spec.default_factory()
        for spec in fields(FocalPOConfig)
        if spec.name in inherited
    }
