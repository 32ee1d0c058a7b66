"""What a trainer is given, by kind: wrong objects are refused by name, TRL's ways of saying nothing understood."""

from __future__ import annotations

from typing import Any

import pandas
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForSequenceClassification, TrainerCallback, TrainingArguments
from trl import DPOConfig

from lorafocal.arguments import FocalPOConfig
from lorafocal.data.toy import toy_preferences, toy_tokenizer
from lorafocal.errors import InputError
from lorafocal.trainer import FocalPOTrainer
from tests.saved_run import save_base
from tests.tiny import CONFIGS, lora, pairs, tiny_base, trainer

pytestmark = pytest.mark.slow


class Processor:
    """As an image-text model's: a tokenizer and more."""

    tokenizer = toy_tokenizer()


def headless(kind: type) -> Any:
    return kind.from_config(CONFIGS["llama"](num_labels=1)).requires_grad_(False)


WRONG: dict[str, tuple[str, Any, str]] = {
    "trl's config": (
        "args",
        DPOConfig("out", use_cpu=True, bf16=False),
        r"args .*DPOConfig.*compat\.trl\.focalpo_conf",
    ),
    "transformers' config": ("args", TrainingArguments("out", use_cpu=True), "args is of the type TrainingArguments"),
    "settings": ("args", {"beta": 0.1}, "args is of the type dict: give a FocalPOConfig"),
    "no model": ("model", None, r"model is None: give a causal language model .*or a name or folder"),
    "a config for a model": ("model", CONFIGS["llama"](), "model is of the type LlamaConfig"),
    "a model without its head": ("model", headless(AutoModel), "LlamaModel, which has no language modelling head"),
    "a classifier": (
        "model",
        headless(AutoModelForSequenceClassification),
        "LlamaForSequenceClassification, which has no",
    ),
    "a plain module": ("model", torch.nn.Linear(2, 2), "Linear, which has no language modelling head"),
    "a tokenizer's folder": ("processing_class", "folder", r"processing_class is 'folder'.*AutoTokenizer\.from_pretr"),
    "a processor": ("processing_class", Processor(), r"of the type Processor: give a tokenizer, its `\.tokenizer`"),
    "settings of an adapter": ("peft_config", {"r": 4}, r"peft_config is of the type dict: give `peft\.LoraConfig"),
    "an adapter's class": ("peft_config", LoraConfig, "peft_config is of the type type"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_object_is_refused_by_name(tmp_path, what):
    name, wrong, says = WRONG[what]
    given = {"model": tiny_base(), "args": FocalPOConfig(str(tmp_path), use_cpu=True), "peft_config": lora()}
    with pytest.raises(InputError, match=says):
        FocalPOTrainer(**given | {"train_dataset": pairs(3), name: wrong})


def test_a_reference_that_cannot_score_is_refused_too(tmp_path):
    for ref_model, says in (
        (3, "ref_model is of the type int"),
        (headless(AutoModelForSequenceClassification), "ref_model is LlamaForSeq"),
    ):
        with pytest.raises(InputError, match=says):
            trainer(tmp_path, pairs(3), ref_model=ref_model, reference="separate_model")


def test_an_output_that_can_be_no_folder_is_refused(tmp_path):
    (tmp_path / "notes").write_text("mine")
    for output in ("notes", "notes/run", "notes/a/b"):
        with pytest.raises(InputError, match=r"output_dir is .*, but .*notes is a file"):
            trainer(tmp_path / output, pairs(3))
    trainer(tmp_path / "new" / "run", pairs(3))


def test_trls_ways_of_giving_nothing_and_a_path_are_understood(tmp_path):
    base = save_base(tmp_path / "base", dtype=torch.float32)
    args = FocalPOConfig(str(tmp_path / "run"), use_cpu=True, reference="separate_model")
    nothing: dict[str, Any] = {"callbacks": None, "optimizers": None}
    run = FocalPOTrainer(base, base, args, toy_preferences(4), peft_config=lora(), **nothing)
    assert run.model.get_base_model().config._name_or_path == str(base)
    assert run.optimizer is None


def test_one_dataset_is_rows_and_several_are_evaluated(tmp_path):
    parts = {"a": pairs(3), "b": pairs(4)}
    with pytest.raises(InputError, match=r"eval_dataset is of the type dict \('a', 'b'\).*`trainer\.evaluate\(\{'a'"):
        trainer(tmp_path, pairs(3), parts)
    with pytest.raises(InputError, match=r"train_dataset is of the type dict \('a', 'b'\): give the rows of one part$"):
        trainer(tmp_path, parts)
    with pytest.raises(InputError, match=r"train_dataset is 'rows\.jsonl', and no dataset: give the rows themselves"):
        trainer(tmp_path, "rows.jsonl")
    run = trainer(tmp_path, pairs(3), pairs(3))
    assert {"eval_a_loss", "eval_b_loss"} <= run.evaluate(parts).keys()
    with pytest.raises(InputError, match=r"eval_dataset is 'typo', and no dataset.*`trainer\.evaluate\(\)` without it"):
        run.evaluate("typo")


def test_a_subclass_whose_loss_nobody_would_call_is_refused():
    for name in ("compute_loss", "prediction_step", "get_batch_loss_metrics"):
        with pytest.raises(InputError, match=rf"Mine defines {name}, which nothing calls here.*an objective"):
            type("Mine", (FocalPOTrainer,), {name: lambda self, *args: None})
    mixin = type("Weighted", (), {"compute_loss": lambda self, *args: None})
    with pytest.raises(InputError, match="Mine defines compute_loss"):
        type("Mine", (mixin, FocalPOTrainer), {})
    type("Mine", (FocalPOTrainer,), {"log": lambda self, *args: None})


def test_a_loader_may_wrap_the_trainers_and_no_other(tmp_path):
    run = trainer(tmp_path, pairs(3))
    own = run.get_train_dataloader
    run.get_train_dataloader = lambda: torch.utils.data.DataLoader(run.train_dataset, batch_size=2)
    with pytest.raises(InputError, match=r"get_train_dataloader gave a DataLoader .* train_dataset, .* keep_order"):
        run.train()
    asked = []
    run.get_train_dataloader = lambda: asked.append(run) or own()
    run.train()
    assert asked
    assert run.state.global_step == run.state.max_steps


def test_a_run_is_not_uploaded_as_it_stands(tmp_path):
    with pytest.raises(InputError, match=r"push_to_hub: a run never uploads.*`lorafocal export"):
        trainer(tmp_path, pairs(3)).push_to_hub("done")


def test_a_search_is_a_sweep(tmp_path):
    with pytest.raises(InputError, match=r"hyperparameter_search: .*`lorafocal sweep CONFIG --grid"):
        trainer(tmp_path, pairs(3)).hyperparameter_search(n_trials=2)


def test_what_is_called_from_outside_a_step_works_or_says_what_to_call(tmp_path):
    run = trainer(tmp_path, pairs(3))
    (batch,) = run.get_test_dataloader(pairs(4))
    assert sum(len(pack.pair_ids) for pack in batch.packs) == 4
    with pytest.raises(InputError, match=r"compute_loss: .*`evaluate\(rows\)` gives the loss"):
        run.compute_loss(run.model, batch)
    with pytest.raises(InputError, match=r"predict: pairs have none; `evaluate\(rows\)`"):
        run.prediction_step(run.model, batch, True)


def test_planned_evaluations_need_something_to_evaluate(tmp_path):
    with pytest.raises(InputError, match=r"eval_strategy is 'steps', but eval_dataset is missing: give eval_dataset"):
        trainer(tmp_path, pairs(3), eval_strategy="steps", eval_steps=1)


def test_a_table_of_pandas_and_what_holds_no_rows_are_refused_by_kind(tmp_path):
    table = pandas.DataFrame(toy_preferences(3))
    with pytest.raises(InputError, match=r"train_dataset is of the type DataFrame: give `datasets\.Dataset\.from_pand"):
        trainer(tmp_path, table)
    with pytest.raises(InputError, match=r"eval_dataset is of the type bool, and no dataset: give a `datasets\.Dat"):
        trainer(tmp_path, pairs(3), False)
    assert trainer(tmp_path, pandas.Series(pairs(3))).train_dataset == pairs(3)  # one row after the other


def test_callbacks_are_a_list_of_callbacks(tmp_path):
    given: dict[str, Any] = {"args": FocalPOConfig(str(tmp_path), use_cpu=True), "train_dataset": pairs(3)}
    for wrong, says in (
        (TrainerCallback(), r"callbacks is of the type TrainerCallback: give a list, \[TrainerCallback"),
        ([print], r"a callback is of the type builtin_function_or_method: give a transformers\.TrainerCallback"),
    ):
        with pytest.raises(InputError, match=says):
            FocalPOTrainer(tiny_base(), peft_config=lora(), callbacks=wrong, **given)


def test_a_compiled_model_whose_adapter_nobody_would_find_is_refused(tmp_path):
    compiled = torch.compile(tiny_base(), backend="eager")
    for model, settings in (
        (compiled, {"peft_config": lora()}),
        (get_peft_model(compiled, lora()), {}),
        (torch.compile(get_peft_model(tiny_base(), lora()), backend="eager"), {}),
    ):
        with pytest.raises(InputError, match=r"model went through torch\.compile.*compile_layers=True"):
            trainer(tmp_path, pairs(3), model=model, **settings)


def test_so_is_one_of_which_a_part_is_compiled(tmp_path):
    decoder, layer = tiny_base(), tiny_base()
    decoder.model = torch.compile(decoder.model, backend="eager")
    layer.model.layers[1] = torch.compile(layer.model.layers[1], backend="eager")
    for model in (decoder, layer):
        with pytest.raises(InputError, match=r"model went through torch\.compile"):
            trainer(tmp_path, pairs(3), model=model, peft_config=lora())


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset", "data_collator", "compute_metrics"])
def test_a_part_replaced_in_a_finished_trainer_is_refused(tmp_path, name):
    run = trainer(tmp_path, pairs(8), pairs(4), max_steps=1)
    before = getattr(run, name)
    setattr(run, name, [])
    for begin in (run.train, run.evaluate):
        with pytest.raises(InputError, match=f"^{name} was changed after the trainer was made.*Make a new trainer"):
            begin()
    setattr(run, name, before)
    assert run.train().global_step == 1
