"""The recipes, value by value, against lists copied from their sources; what a run does otherwise than its recipe."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest

from lorafocal import recipes
from lorafocal.config import Config, check_config, layers, load_config
from lorafocal.errors import InputError
from lorafocal.manifest import EXACT, against_recipe

FAMILIES = ("mistral-7b", "llama3-8b")
COMMITS = {"llama3-8b": "9d189bae5856a823f3708d2c2bc4dbb43c90eb11"}  # of the data set, as public runs on it record
OBJECTIVES = ("focalpo", "dpo", "odpo", "focal-hard", "kto", "orpo", "simpo")
KINDS = ("", "lora/", "qlora/")
NAMES = [f"{kind}{family}-{objective}" for kind in KINDS for family in FAMILIES for objective in OBJECTIVES]

# ---- the sources, in their own words -----------------------------------------------------------------------

# Liu et al., ACL 2025 (arXiv 2501.06645): experiments and Appendix C.
PAPER = {
    "mistral-7b": {
        "model": "HuggingFaceH4/mistral-7b-sft-beta",
        "data": "trl-lib/ultrafeedback_binarized",
        "learning rate": 5e-7,
        "beta": 0.01,
        "gamma": 0.05,
        "batch size": 128,
        "epochs": 1,
        "DeepSpeed": "ZeRO-3",
    },
    "llama3-8b": {
        "model": "meta-llama/Meta-Llama-3-8B-Instruct",
        "data": "princeton-nlp/llama3-ultrafeedback-armorm",
        "learning rate": 6e-7,
        "gamma": 0.05,
        "batch size": 128,
        "epochs": 1,
        "DeepSpeed": "ZeRO-3",
    },
}
GRID = (3e-7, 5e-7, 6e-7, 1e-6)  # of learning rates that the paper searched for each method
# alignment-handbook, recipes/zephyr-7b-beta/dpo/config_full.yaml, 95dc472 to 5a7ba95.
ZEPHYR = {
    "bf16": True, "beta": 0.01, "learning_rate": 5.0e-7, "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2, "max_length": 1024, "max_prompt_length": 512, "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1, "num_train_epochs": 1, "optim": "adamw_torch", "eval_strategy": "steps", "eval_steps": 100,
    "logging_steps": 10, "save_strategy": "steps", "save_steps": 100, "save_total_limit": 1, "seed": 42,
}  # fmt: skip
ZEPHYR_GPUS = 8
# The same place, config_qlora.yaml.
ZEPHYR_QLORA = {
    "load_in_4bit": True, "lora_r": 128, "lora_alpha": 128, "lora_dropout": 0.05, "learning_rate": 5.0e-6,
    "beta": 0.01, "optim": "paged_adamw_32bit",
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}  # fmt: skip
# princeton-nlp/SimPO 1b3e8f3, training_configs/llama-3-8b-instruct-simpo-v2.yaml.
SIMPO = {
    "bf16": True, "beta": 10, "gamma_beta_ratio": 0.3, "learning_rate": 1e-6, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 16, "max_length": 2048, "max_prompt_length": 1800, "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1, "num_train_epochs": 1, "optim": "adamw_torch", "evaluation_strategy": "steps",
    "eval_steps": 400, "logging_steps": 5, "save_strategy": "steps", "save_steps": 1_000_000, "seed": 42,
}  # fmt: skip
SIMPO_GPUS = 4
SIMPO_MISTRAL = {"beta": 2.0, "gamma_beta_ratio": 0.8, "learning_rate": 3e-7}  # mistral-7b-base-simpo.yaml
SIMPO_README_DPO = {"beta": 0.01, "learning_rate": 3e-7}  # its best DPO on Llama3-Instruct v0.2, this data
# What transformers 4.4x does where a recipe says nothing.
DEFAULTS = {
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0,
}  # fmt: skip
ODPO_ALPHA = 1.0  # rycolab/odpo, default of its code
ORPO = {"lambda": 0.1, "learning_rate": 5e-6}  # its paper
KTO = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}  # defaults of TRL and HALOs

# Their words here, where it is not `training.` before the same word.
OURS = {
    "max_length": "data.max_length", "max_prompt_length": "data.max_prompt_length",
    "evaluation_strategy": "training.eval_strategy",
}  # fmt: skip
ELSEWHERE = {
    "beta", "gamma_beta_ratio", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "bf16",
    "num_train_epochs",
}  # fmt: skip  # said by the paper, or by other keys of ours

# ---- what that makes of each recipe ------------------------------------------------------------------------

Expected = dict[str, tuple[Any, str]]  # by dotted key: the value, and paper, inherited or chosen


def taken_over(source: dict[str, Any], *, but: set[str] = frozenset()) -> Expected:  # type: ignore[assignment]
    kept = {key: value for key, value in source.items() if key not in ELSEWHERE | but}
    return {OURS.get(key, f"training.{key}"): (value, "inherited") for key, value in kept.items()}


def focalpo(family: str) -> Expected:
    paper, upstream = PAPER[family], ZEPHYR if family == "mistral-7b" else SIMPO
    splits = {
        part: [{"path": paper["data"], "weight": 1.0, "form": None, "columns": {}, "revision": None, "split": split}]
        for part, split in (("train", "train"), ("eval", "test"))
    }
    saving = {"training.save_steps": (100, "chosen"), "training.save_total_limit": (1, "chosen")}
    return {
        "name": (f"{family}-focalpo", "chosen"),
        "recipe": (f"{family}-focalpo", "paper"),
        "model.name": (paper["model"], "paper"),
        "model.revision": (None, "chosen"),
        "model.dtype": ("bfloat16", "inherited"),
        "data.train": (splits["train"], "paper"),
        "data.eval": (splits["eval"], "inherited"),
        "data.revision": (COMMITS.get(family), "chosen"),
        "data.truncation": ("recipe", "inherited"),
        "objective.name": ("focalpo", "paper"),
        "objective.beta": (0.01, "paper" if "beta" in paper else "inherited"),
        "objective.gamma": (paper["gamma"], "paper"),
        "reference.kind": ("cached", "chosen"),
        "training.pairs_per_step": (paper["batch size"], "paper"),
        "training.num_train_epochs": (paper["epochs"], "paper"),
        "training.learning_rate": (paper["learning rate"], "paper"),
        "training.activation_checkpointing": ("auto", "chosen"),
        "training.data_seed": (upstream["seed"], "inherited"),
        "packing.layout": ("packed", "chosen"),
        "packing.tokens": ("auto", "chosen"),
        "engine.kind": ("zero3", "paper"),
        "engine.offload": ("none", "inherited"),
        **taken_over(DEFAULTS),
        **(taken_over(ZEPHYR) if family == "mistral-7b" else taken_over(SIMPO, but={"save_steps"}) | saving),
    }


def other_objective(family: str, objective: str) -> Expected:
    """What the file of another objective says otherwise than its family's focalpo."""
    mistral = family == "mistral-7b"
    control = ZEPHYR["learning_rate"] if mistral else SIMPO_README_DPO["learning_rate"]
    simpo = SIMPO_MISTRAL if mistral else SIMPO
    changes: dict[str, Expected] = {
        "dpo": {
            "recipe": (f"{family}-dpo", "paper"),
            "objective.name": ("dpo", "paper"),
            "objective.gamma": (None, "chosen"),
            "training.learning_rate": (control, "inherited"),
        },
        "odpo": {
            "objective.beta": (0.01, "chosen"),
            "objective.alpha": (ODPO_ALPHA, "chosen"),
            "objective.gamma": (None, "chosen"),
            "training.learning_rate": (control, "chosen"),
        },
        "focal-hard": {
            "recipe": (f"{family}-focal-hard", "paper"),
            "objective.name": ("focal-hard", "paper"),
            "objective.gamma": (1.0, "paper"),
        },
        "kto": {
            **{f"objective.{key}": (value, "chosen") for key, value in KTO.items()},
            "objective.gamma": (None, "chosen"),
            "training.learning_rate": (5e-7, "chosen"),
        },
        "orpo": {
            "objective.lambda": (ORPO["lambda"], "chosen"),
            "objective.beta": (None, "chosen"),
            "objective.gamma": (None, "chosen"),
            "reference": (None, "chosen"),
            "training.learning_rate": (ORPO["learning_rate"], "chosen"),
        },
        "simpo": {
            "objective.beta": (float(simpo["beta"]), "chosen"),
            "objective.gamma_beta_ratio": (simpo["gamma_beta_ratio"], "chosen"),
            "objective.gamma": (None, "chosen"),
            "reference": (None, "chosen"),
            "training.learning_rate": (simpo["learning_rate"], "chosen"),
        },
    }
    name = f"{family}-{objective}"
    own: Expected = {
        "name": (name, "chosen"), "recipe": (name, "chosen"), "objective.name": (objective, "chosen"),
    }  # fmt: skip
    return own | changes[objective]


def adapters(kind: str, family: str, objective: str, whole: Expected) -> Expected:
    """What the counterpart on adapters says otherwise."""
    name = f"{family}-{objective}"
    changes: Expected = {
        "name": (f"{name}-{kind}", "chosen"),
        "recipe": (f"{kind}/{name}", "chosen"),
        "adapter.r": (ZEPHYR_QLORA["lora_r"], "inherited"),
        "adapter.alpha": (ZEPHYR_QLORA["lora_alpha"], "inherited"),
        "adapter.targets": ("all-linear", "inherited"),
        "adapter.dropout": (0.0, "chosen"),
        "reference.kind": ("disabled_adapter", "chosen"),
        "training.learning_rate": (ZEPHYR_QLORA["learning_rate"], "inherited"),
        "engine": (None, "chosen"),
    }
    if objective in ("orpo", "simpo"):
        del changes["reference.kind"]
        changes["training.learning_rate"] = (whole["training.learning_rate"][0] * 10, "chosen")
    if kind == "qlora":
        changes["model.quantization"] = ("nf4", "inherited")
        changes["training.optim"] = (ZEPHYR_QLORA["optim"], "inherited")
    return changes


def expected(name: str) -> Expected:
    kind, _, own = name.rpartition("/")
    family = next(family for family in FAMILIES if own.startswith(family))
    objective = own.removeprefix(f"{family}-")
    values = focalpo(family)
    if objective != "focalpo":
        values |= other_objective(family, objective)
    if kind:
        values |= adapters(kind, family, objective, values)
    for section in [key for key, (value, _) in values.items() if value is None and "." not in key]:
        values = {key: value for key, value in values.items() if not key.startswith(f"{section}.")}
    return values


# ---- the files ---------------------------------------------------------------------------------------------


@cache
def loaded(name: str) -> tuple[Config, dict[str, recipes.Mark]]:
    path = recipes.path_of(name)
    return load_config(path), recipes.marks([file for file, _ in layers(path)])


def at(config: Config, key: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        value = None if value is None else value.get(part)
    return value


def test_two_families_seven_objectives_and_their_counterparts_on_adapters() -> None:
    assert recipes.names() == sorted(NAMES)


@pytest.mark.row("58")
@pytest.mark.parametrize("name", NAMES)
def test_every_value_is_its_sources(name: str) -> None:
    config, marks = loaded(name)
    table = expected(name)
    found = {key: (at(config, key), mark.kind) for key, mark in marks.items() if key in table}
    assert found == {
        key: (pytest.approx(value) if key.endswith("rate") else value, kind) for key, (value, kind) in table.items()
    }


@pytest.mark.row("58")
@pytest.mark.parametrize("name", NAMES)
def test_no_value_stands_there_without_a_source(name: str) -> None:
    """What a recipe sets is in the table above, is of the model's shape, or belongs to what a later file took away."""
    _, marks = loaded(name)
    table = expected(name)
    gone = tuple(f"{key}." for key, (value, _) in table.items() if value is None)
    stated = {key for _, own in layers(recipes.path_of(name)) for key in leaves(own)}
    assert stated <= marks.keys()
    rest = {key for key in stated - table.keys() if not key.startswith(("model.shape.", *gone))}
    assert rest <= {"data.train.path", "data.train.split", "data.eval.path", "data.eval.split"}


def leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return found


def test_batches_of_the_sources_are_the_papers() -> None:
    for source, gpus in ((ZEPHYR, ZEPHYR_GPUS), (SIMPO, SIMPO_GPUS)):
        size = source["per_device_train_batch_size"] * source["gradient_accumulation_steps"] * gpus  # type: ignore[operator]
        assert size == PAPER["mistral-7b"]["batch size"] == PAPER["llama3-8b"]["batch size"]


def test_learning_rates_of_the_papers_rows_are_in_its_grid() -> None:
    for family in FAMILIES:
        for objective in ("focalpo", "dpo", "focal-hard"):
            assert at(loaded(f"{family}-{objective}")[0], "training.learning_rate") in GRID


def test_a_source_is_named_by_more_than_a_word() -> None:
    for name in NAMES:
        assert [key for key, mark in loaded(name)[1].items() if len(mark.source) < 5] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_is_that_of_the_lora_config_which_is_built_and_counted(family: str) -> None:
    shipped = load_config(recipes.folder().parent / "lora" / f"{family}.yaml")
    assert loaded(f"{family}-focalpo")[0].model.shape == shipped.model.shape


def test_comments_say_what_a_value_is_before_they_say_where_it_is_from() -> None:
    for file in recipes.folder().rglob("*.yaml"):
        marked = [
            line for line in file.read_text().splitlines() if re.search(r": .*\[(paper|inherited|chosen): ", line)
        ]
        said = [line.partition("  # ")[2].rpartition(" [")[0] for line in marked if not line.startswith("#")]
        assert said
        assert min(map(len, said)) > 5, file


def test_the_papers_own_trainings_need_no_adapter_and_hold_no_second_model() -> None:
    for family in FAMILIES:
        config, _ = loaded(f"{family}-focalpo")
        assert (config.adapter, config.reference.kind, config.engine.kind) == (None, "cached", "zero3")


# ---- what others published ---------------------------------------------------------------------------------


def test_the_released_models_are_the_six_rows_and_the_authors_two() -> None:
    found = recipes.released()
    rows = sorted((entry.family, entry.row) for entry in found)
    assert rows == sorted((family, row) for family in FAMILIES for row in ("FocalPO", "KTO", "ORPO", "SimPO"))
    own = {entry.model: entry.mark.kind for entry in found if entry.row == "FocalPO"}
    assert own == {
        "tongliuphysics/Mistral-7B-Base-SFT-FocalPO": "paper",
        "tongliuphysics/Llama-3-8B-Instruct-FocalPO": "paper",
    }
    for entry in found:
        if entry.row == "FocalPO":
            assert entry.trained_from == PAPER[entry.family]["model"]


# ---- what a run does otherwise -----------------------------------------------------------------------------


@pytest.mark.row("58")
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_repeats_itself(name: str) -> None:
    config, _ = loaded(name)
    assert config.recipe == name
    assert against_recipe(config) == {"name": name, "sha256": config.sha(), "deviations": EXACT}


@pytest.mark.row("58")
def test_what_is_done_otherwise_is_listed_with_where_the_recipes_value_is_from() -> None:
    path = recipes.path_of("mistral-7b-focalpo")
    free = ["name=mine", "training.logging_steps=1", "packing.tokens=4096", "reference.store=elsewhere"]
    free += ["training.activation_checkpointing=none", "training.use_cpu=true"]  # as a run's manifest repeats it
    config = load_config(path, ["training.learning_rate=1e-6", "engine=null", "objective.gamma=0.1", *free])
    found = against_recipe(config)
    assert found is not None
    assert [(entry["key"], entry["recipe"], entry["here"], entry["mark"]) for entry in found["deviations"]] == [
        ("engine.kind", "zero3", None, "paper: experiments"),
        (
            "engine.offload",
            "none",
            None,
            "inherited: SimPO, accelerate_configs/deepspeed_zero3.yaml",
        ),
        ("objective.gamma", 0.05, 0.1, "paper: Appendix C"),
        ("training.learning_rate", 5e-7, 1e-6, "paper: Appendix C"),
    ]


@pytest.mark.row("58")
def test_another_commit_than_the_recipes_is_a_deviation_and_one_that_it_leaves_open_is_none() -> None:
    commit = "c" * 40
    for name, pinned in (("llama3-8b-focalpo", True), ("mistral-7b-focalpo", False)):
        config = load_config(recipes.path_of(name), [f"data.revision={commit}", f"model.revision={commit}"])
        found = against_recipe(config)
        assert found is not None
        keys = EXACT if found["deviations"] == EXACT else [entry["key"] for entry in found["deviations"]]
        assert keys == (["data.revision"] if pinned else EXACT)


def test_a_section_that_the_recipe_lacks_is_a_deviation_key_by_key() -> None:
    config = load_config(
        recipes.path_of("mistral-7b-focalpo"), ["adapter={r: 8, alpha: 16}", "reference.kind=disabled_adapter"]
    )
    found = against_recipe(config)
    assert found is not None
    keys = {entry["key"]: entry["here"] for entry in found["deviations"]}
    assert (keys["adapter.r"], keys["adapter.alpha"], keys["reference.kind"]) == (8, 16, "disabled_adapter")


def test_a_run_without_a_recipe_is_measured_against_none() -> None:
    config, _ = loaded("mistral-7b-dpo")
    assert against_recipe(config.model_copy(update={"recipe": None})) is None


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    values = loaded("mistral-7b-dpo")[0].model_dump(mode="json") | {"recipe": "../released"}
    with pytest.raises(InputError, match=r"recipe: found '../released'; known: llama3-8b-dpo, "):
        check_config(values)
    with pytest.raises(InputError, match="no recipe 'zephyr'; known: llama3-8b-dpo, "):
        recipes.path_of("zephyr")
    with pytest.raises(InputError, match=r"no recipe 'mistral-7b-focal'; did you mean mistral-7b-focalpo or .*\?$"):
        recipes.path_of("mistral-7b-focal")
