"""The trainer: what one step computes, what a run refuses, and what it leaves behind."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import FalconConfig, FalconForCausalLM, Trainer, TrainerCallback

from lorafocal import assembly
from lorafocal.arguments import FocalPOConfig
from lorafocal.data.packing import PairCollator
from lorafocal.data.tokens import TokenizedData
from lorafocal.errors import InputError, UnhealthyRun
from lorafocal.model import load
from lorafocal.model.head import causal_lm
from lorafocal.objectives.focal import identity_loss
from lorafocal.trainer import FocalPOTrainer
from tests.tiny import disturb, lora, pairs, relative_difference, tiny_base, tiny_policy, trainer

pytestmark = pytest.mark.slow


class Gradients(TrainerCallback):
    """Keeps each step's gradients and the pairs that made it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def gradients_of(folder, data, **settings) -> tuple[list[dict[str, torch.Tensor]], FocalPOTrainer]:
    run = trainer(folder, data, max_grad_norm=0.0, **settings)
    seen = Gradients()
    run.add_callback(seen)
    run.train()
    return seen.steps, run


@pytest.mark.row("2", "64")
@pytest.mark.parametrize(("objective", "loss"), [("focalpo", identity_loss(0.05)), ("dpo", math.log(2))])
def test_the_first_logged_loss_is_the_identity_loss_and_every_pair_a_tie(tmp_path, objective, loss):
    run = trainer(tmp_path, pairs(12), objective=objective, max_steps=2)
    run.train()
    first, second, *_ = run.state.log_history
    assert first["loss"] == pytest.approx(loss, abs=1e-6)
    assert first["rewards/ties"] == 1.0
    assert first["rewards/accuracies"] == 0.0
    assert second["loss"] != first["loss"]
    assert second["rewards/ties"] == 0.0


@pytest.mark.slow
@pytest.mark.row("15")
def test_the_budget_of_a_pack_changes_no_gradient_and_no_metric(tmp_path):
    """Ten pairs, six a step: the second step is a short one of four."""
    runs = {
        budget: gradients_of(tmp_path / str(budget), pairs(10), pairs_per_step=6, tokens_per_pack=budget)
        for budget in (1, 50, 10_000)
    }
    whole, reference = runs[10_000]
    for budget, (steps, run) in runs.items():
        for ours, theirs in zip(steps, whole, strict=True):
            assert relative_difference(ours, theirs) < 1e-6, budget
        for ours, theirs in zip(run.state.log_history[:-1], reference.state.log_history[:-1], strict=True):
            for key in ("loss", "rewards/accuracies", "logps/chosen", "pairs_seen"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (budget, key)
            # a difference of four log-probs, each rounded to 1e-6 of itself, times beta
            rounding = 4 * 0.1 * 1e-6 * abs(theirs["logps/chosen"])
            assert ours["rewards/margins"] == pytest.approx(theirs["rewards/margins"], rel=0, abs=rounding), budget


@pytest.mark.slow
@pytest.mark.row("15")
def test_a_short_last_step_is_divided_by_its_own_pairs(tmp_path):
    """The mean over its pairs: doubling the data of the step changes nothing."""
    data = pairs(4)
    once, _ = gradients_of(tmp_path / "a", data, pairs_per_step=16, max_steps=1)
    doubled = data + [replace(pair, id=f"{pair.id}-again") for pair in data]
    twice, _ = gradients_of(tmp_path / "b", doubled, pairs_per_step=16, max_steps=1)
    assert relative_difference(once[0], twice[0]) < 1e-6


@pytest.mark.row("1")
def test_an_adapter_away_from_its_start_is_refused_with_both_remedies(tmp_path):
    run = trainer(tmp_path, pairs(8), model=tiny_policy(trained=True))
    with pytest.raises(InputError, match="not the policy's starting point") as refusal:
        run.train()
    assert "lorafocal merge" in str(refusal.value)
    assert "reference.kind: frozen_copy" in str(refusal.value)


def test_it_trains_where_the_other_reference_is_deliberate(tmp_path):
    run = trainer(tmp_path, pairs(8), model=tiny_policy(trained=True), identity_probe=False, max_steps=1)
    run.train()
    assert run.state.log_history[0]["rewards/ties"] == 0.0


@pytest.mark.row("2", "3")
def test_a_frozen_adapter_is_refused(tmp_path):
    policy = tiny_policy(trained=False)
    for parameter in policy.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(InputError, match="is_trainable=True"):
        trainer(tmp_path, pairs(4), model=policy)


@pytest.mark.row("3")
def test_a_base_that_would_train_is_refused_and_a_run_leaves_it_alone(tmp_path):
    policy = tiny_policy(trained=False)
    policy.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        trainer(tmp_path, pairs(4), model=policy)
    run = trainer(tmp_path, pairs(8))
    names = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert names == {name for name in run.model.state_dict() if "lora_" in name} == set(run.trained)
    before = {n: p.clone() for n, p in run.model.named_parameters() if n not in names}
    run.train()
    assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters() if n in before)
    assert all(parameter.any() for name, parameter in run.trained.items() if "lora_B" in name)


@pytest.mark.row("4")
def test_stacking_a_second_adapter_is_refused_with_both_ways_out(tmp_path):
    with pytest.raises(InputError, match="stacked") as refusal:
        trainer(tmp_path, pairs(4), model=tiny_policy(), peft_config=lora())
    assert "lorafocal merge" in str(refusal.value)
    assert "leave `peft_config` out" in str(refusal.value)
    assert "`model.unload()`" in str(refusal.value)


@pytest.mark.row("6")
@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"bias": "all"}, 'trained biases.*bias="none"'),
        ({"init_lora_weights": "pissa"}, "PiSSA.*frozen_copy|changed the base"),
        ({"init_lora_weights": False}, "random.*frozen_copy"),
    ],
)
@pytest.mark.parametrize("attached", [False, True])
def test_an_adapter_that_changes_more_than_it_can_switch_off_is_refused(tmp_path, setting, named, attached):
    model = get_peft_model(tiny_base(), lora(**setting)) if attached else tiny_base()
    with pytest.raises(InputError, match=named):
        trainer(tmp_path, pairs(4), model=model, peft_config=None if attached else lora(**setting))


@pytest.mark.row("F12", "20")
def test_a_model_that_packs_would_get_wrong_trains_padded_or_is_refused_before_the_first_step(tmp_path, caplog):
    """Falcon never calls the attention interface."""

    def falcon():
        sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        return FalconForCausalLM(FalconConfig(**sizes, alibi=False)).requires_grad_(False)

    with pytest.raises(InputError, match=r"FalconForCausalLM.*packing\.layout: padded"):
        trainer(tmp_path, pairs(4), model=falcon(), peft_config=lora(), layout="packed")
    run = trainer(tmp_path, pairs(4), model=falcon(), peft_config=lora(), max_steps=1)
    assert run.data_collator.layout == "padded"
    assert "training padded, each prompt twice: FalconForCausalLM" in caplog.text
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(identity_loss(0.05), abs=1e-6)


@pytest.mark.row("7")
def test_one_model_is_loaded_and_a_second_one_that_would_be_ignored_is_refused(tmp_path, monkeypatch):
    tiny_base().save_pretrained(tmp_path / "base")
    loads = []
    original = load.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        load.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: loads.append(a) or original(*a, **k)
    )
    base = load.load_base(str(tmp_path / "base"), dtype="float32")
    trainer(tmp_path / "run", pairs(8), model=base, peft_config=lora(), max_steps=1).train()
    assert len(loads) == 1
    with pytest.raises(InputError, match='reference="separate_model"'):
        FocalPOTrainer(tiny_base(), ref_model=tiny_base())


@pytest.mark.row("8", "52")
def test_exactly_the_adapters_files_are_saved(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    base = load.load_base(str(tmp_path / "base"), dtype="float32")
    run = trainer(tmp_path / "run", pairs(8), model=base, peft_config=lora(), max_steps=1, save_strategy="steps")
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    expected = {"adapter_config.json", "adapter_model.safetensors", "lorafocal.json", "README.md"}
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == expected
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert {file.name for file in (checkpoint / "adapter").iterdir()} == expected
    state = {"optimizer.safetensors", "parameters.safetensors", "state.json", "trainer_state.json"}
    assert {file.name for file in checkpoint.iterdir()} == {"adapter", "complete.json"} | state


@pytest.mark.row("51")
def test_no_path_of_this_machine_is_in_a_saved_adapter(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    base = load.load_base(str(tmp_path / "base"), dtype="float32")
    run = trainer(tmp_path / "run", pairs(8), model=base, peft_config=lora(), max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    for file in (tmp_path / "adapter").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
    lineage = json.loads((tmp_path / "adapter" / "lorafocal.json").read_text())
    assert lineage["base"]["name"] == "base"
    assert len(lineage["base"]["sha256"]) == 64


@pytest.mark.parametrize(("kernels", "rounding"), [("peft", 0.0), ("auto", 1e-6)])
def test_a_saved_adapter_loads_with_peft_and_scores_the_same(tmp_path, kernels, rounding):
    run = trainer(tmp_path / "run", pairs(8), max_steps=2, adapter_kernels=kernels)
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny_base(), tmp_path / "adapter")
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        run.model.get_base_model().set_attn_implementation("sdpa")
        assert (loaded(ids).logits - run.model(ids).logits).abs().max() <= rounding


@pytest.mark.row("12")
def test_a_non_finite_loss_stops_the_run_names_the_pair_and_overwrites_nothing(tmp_path):
    data = pairs(16)
    run = trainer(tmp_path, data, max_steps=6, save_strategy="steps", save_steps=1, pairs_per_step=8)
    embedding = run.model.get_base_model().model.embed_tokens
    poisoned = data[5]

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                embedding.weight.data[poisoned.prompt_ids[0]] = math.inf

    run.add_callback(Poison())
    with pytest.raises(UnhealthyRun, match="not finite") as stopped:
        run.train()
    assert poisoned.id in str(stopped.value)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    replay = [json.loads(line) for line in (tmp_path / "nonfinite-step-3.jsonl").read_text().splitlines()]
    assert poisoned.id in {pair["id"] for pair in replay}
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.row("12", "F6")
def test_a_non_finite_gradient_stops_the_run_before_the_weights_change(tmp_path):
    run = trainer(tmp_path, pairs(8))
    name, parameter = next((n, p) for n, p in run.trained.items() if "lora_B" in n)
    parameter.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(UnhealthyRun, match="gradient is not finite"):
        run.train()
    assert not parameter.any(), name


@pytest.mark.row("14")
def test_dropout_is_switched_off_everywhere(tmp_path):
    policy = tiny_policy(trained=False, attention_dropout=0.3)
    policy.peft_config["default"].lora_dropout = 0.05
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    layer = next(m for m in policy.modules() if hasattr(m, "lora_dropout"))
    layer.lora_dropout["default"] = torch.nn.Dropout(0.5)
    run = trainer(tmp_path, pairs(8), model=policy)
    run.model.train()
    disturb(run.model)
    from lorafocal.policy import sequence_logps

    [pack] = PairCollator(tokens_per_pack=10_000)(pairs(6)).packs
    once, again = sequence_logps(run.model, pack), sequence_logps(run.model, pack)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    run.save_model(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_dropout"] == 0


class Wrapper(torch.nn.Module):
    """As DDP's: new, so it says that it trains, whatever the model within does."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *arguments, **options):
        return self.module(*arguments, **options)


@pytest.mark.parametrize("wrap", [Wrapper, lambda policy: policy], ids=["wrapped", "bare"])
def test_a_step_trains_every_module_of_a_model_in_a_new_wrapper(tmp_path, wrap):
    """Modules that are left evaluating would keep every activation: none is computed again."""
    run = trainer(tmp_path, pairs(8))
    assert not any(module.training for module in run.model.modules())
    batch = run.data_collator(run.train_dataset)
    model = wrap(run.model)
    run.training_step(model, batch)
    assert all(module.training for module in model.modules())
    causal_lm(run.model).base_model.eval()  # a caller's, deep within
    run.training_step(model, batch)
    assert all(module.training for module in model.modules())


@pytest.mark.slow
@pytest.mark.row("13")
def test_adapters_and_moments_are_fp32_on_a_bf16_base_and_small_steps_move_every_entry(tmp_path):
    run = trainer(
        tmp_path, pairs(8), model=tiny_base(dtype=torch.bfloat16), peft_config=lora(), learning_rate=5e-6, max_steps=20
    )
    before = {n: p.detach().clone() for n, p in run.trained.items() if "lora_A" in n}
    run.train()
    state = run.optimizer.state if not hasattr(run.optimizer, "optimizer") else run.optimizer.optimizer.state
    assert {p.dtype for p in run.trained.values()} == {torch.float32}
    assert {moments["exp_avg"].dtype for moments in state.values()} == {torch.float32}
    moved = torch.cat([(run.trained[n] != p).flatten() for n, p in before.items()])
    assert moved.double().mean() > 0.99
    base = {p.dtype for n, p in run.model.named_parameters() if n not in run.trained}
    assert base == {torch.bfloat16}


@pytest.mark.row("20", "F5")
@pytest.mark.parametrize("per_step", [3, 5, 11])
def test_evaluation_is_a_mean_over_pairs_however_they_are_batched(tmp_path, per_step):
    held_out = pairs(11, seed=5)
    results = []
    for size in (per_step, 100):
        run = trainer(
            tmp_path / str(size), pairs(4), held_out, model=tiny_policy(), identity_probe=False, pairs_per_step=size
        )
        results.append(run.evaluate())
    ours, whole = results
    for key in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_logps/rejected"):
        assert ours[key] == pytest.approx(whole[key], rel=1e-6)


@pytest.mark.slow
def test_packed_and_padded_runs_learn_the_same(tmp_path):
    packed, _ = gradients_of(tmp_path / "a", pairs(10), max_steps=3)
    padded, _ = gradients_of(tmp_path / "b", pairs(10), max_steps=3, layout="padded")
    for ours, theirs in zip(packed, padded, strict=True):
        assert relative_difference(ours, theirs) < 1e-4


@pytest.mark.slow
@pytest.mark.row("39")
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_trains_every_adapter_tensor_alike(tmp_path, reentrant):
    from lorafocal.training_fields import installed_fields

    prefix = "activation" if "activation_checkpointing" in installed_fields() else "gradient"
    settings = {
        f"{prefix}_checkpointing": True,
        f"{prefix}_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    steps, run = gradients_of(tmp_path / "a", pairs(10), max_steps=2, **settings)
    plain, _ = gradients_of(tmp_path / "b", pairs(10), max_steps=2)
    assert steps[0].keys() == set(run.trained)
    for ours, theirs in zip(steps, plain, strict=True):
        assert relative_difference(ours, theirs) < 1e-6


@pytest.mark.row("39", "2")
def test_missing_gradients_stop_the_first_step(tmp_path):
    run = trainer(tmp_path, pairs(8))
    name = next(iter(run.trained))
    run.trained[name].requires_grad_(False)
    with pytest.raises(UnhealthyRun, match="received no gradient"):
        run.train()


@pytest.mark.row("2")
def test_a_run_in_which_nothing_moves_is_stopped(tmp_path):
    run = trainer(tmp_path, pairs(8))
    run.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)  # holds none of the adapter
    with pytest.raises(UnhealthyRun, match="no trained weight moved"):
        run.train()


def test_a_warm_up_step_at_rate_zero_is_no_alarm(tmp_path):
    run = trainer(tmp_path, pairs(8), warmup_steps=2, max_steps=4)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert run.health.moved


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match=r"reference disabled_adapter is one of adapters.*`reference.kind: cached`"):
        FocalPOTrainer(tiny_base(), train_dataset=pairs(3))
    run = trainer(tmp_path, None)
    with pytest.raises(InputError, match="train_dataset"):
        run.train()


def test_rows_need_a_tokenizer(tmp_path):
    with pytest.raises(InputError, match="processing_class"):
        trainer(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}])


def test_every_setting_of_tokenisation_reaches_the_rows(tmp_path, monkeypatch):
    seen = {}

    def note(rows, tokenizer, **settings):
        seen.update(settings)
        return TokenizedData()

    monkeypatch.setattr(assembly, "tokenize_preferences", note)
    settings = {"max_length": 20, "truncation": "recipe", "max_prompt_length": 8, "chat_template_kwargs": {"think": 1}}
    args = FocalPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    assembly.tokenized([{"prompt": "a", "chosen": "b", "rejected": "c"}], "train_dataset", object(), args)
    assert seen == settings | {"others": False}


@pytest.mark.parametrize(
    "name",
    [
        "_get_num_items_in_batch",
        "_load_from_checkpoint",
        "_load_rng_state",
        "_load_scaler",
        "_prepare_for_training",
        "_save_checkpoint",
    ],
)
def test_what_is_overridden_is_transformers_own(name):
    """Under another name transformers would go on with its own, without a word."""
    theirs, ours = (inspect.signature(getattr(which, name)).parameters for which in (Trainer, FocalPOTrainer))
    assert list(ours) == list(theirs)


def test_resuming_where_there_is_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="no complete checkpoint"):
        trainer(tmp_path, pairs(4)).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(InputError, match="cannot be resumed"):
        trainer(tmp_path, pairs(4)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
