"""Runs on bases in 4 and 8 bits: exact at the start, blind to evaluations, resumable, and the base never moves."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TrainerCallback

from lorafocal.errors import InputError
from lorafocal.model.adapters import attach_lora
from lorafocal.model.continued import continue_adapter
from lorafocal.model.load import load_base
from lorafocal.model.quantized import describe, quantization_of, word_of
from lorafocal.trainer import FocalPOTrainer
from tests.repacking import repacking_cpu
from tests.tiny import SIZES, disturb, lora, pairs, tiny_base, trainer

pytestmark = pytest.mark.slow  # many small runs

FIRST_LOSS = 0.669536  # 0.5 ** 0.05 * ln 2
EACH = [  # word, dtype and reference at least once; tests/test_compatible_cells.py has the products
    ("nf4", "bfloat16", "frozen_copy"),
    ("nf4-double", "bfloat16", "disabled_adapter"),
    ("fp4", "float32", "frozen_copy"),
    ("int8", "bfloat16", "frozen_copy"),
    ("int8", "float32", "disabled_adapter"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    tiny_base().save_pretrained(folder)
    return str(folder)


def run_on(folder: Path, base: str, word: str | None, *, dtype: str = "float32", **settings: Any) -> FocalPOTrainer:
    """A trainer on the base in `word`, four ragged steps and a few held-out pairs unless `settings` differ."""
    model = load_base(base, dtype=dtype, quantization=word)
    return trainer(folder, pairs(12), pairs(4, seed=2), **({"model": model, "peft_config": lora()} | settings))


def weights(run: FocalPOTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.trained.items()}


def sha_of_base(model: torch.nn.Module) -> str:
    """Of every tensor of the base, the scales of quantised weights among them; adapters left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "lora_" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            digest.update(f"{plain} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.row("1", "9")
@pytest.mark.parametrize(("word", "dtype", "reference"), EACH)
def test_the_first_loss_is_the_identity_loss_and_packs_are_trained(tmp_path, base, word, dtype, reference):
    run = run_on(tmp_path, base, word, dtype=dtype, reference=reference, max_steps=2)
    assert run.layout.layout == "packed"
    run.train()
    first, second, *_ = run.state.log_history
    assert first["loss"] == pytest.approx(FIRST_LOSS, abs=5e-7)
    assert (first["rewards/ties"], second["rewards/ties"]) == (1.0, 0.0)
    assert quantization_of(run.model) == word
    assert {parameter.dtype for parameter in run.trained.values()} == {torch.float32}


@pytest.mark.row("9")
@pytest.mark.parametrize(("word", "dtype"), [("nf4", "bfloat16"), ("nf4-double", "float32"), ("int8", "bfloat16")])
def test_a_run_with_evaluations_ends_with_the_bits_of_one_without(tmp_path, base, word, dtype, monkeypatch):
    repacking_cpu(monkeypatch)
    settings = {"dtype": dtype, "max_steps": 3}
    plain = run_on(tmp_path / "plain", base, word, **settings)
    plain.train()
    evaluated = run_on(tmp_path / "evaluated", base, word, eval_strategy="steps", eval_steps=1, **settings)
    evaluated.evaluate()
    evaluated.train()
    assert len([line for line in evaluated.state.log_history if "eval_loss" in line]) == 3
    ours, theirs = weights(evaluated), weights(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.row("44", "3")
@pytest.mark.parametrize("word", ["nf4", "int8"])
def test_two_stages_share_one_quantised_base_that_never_moves(tmp_path, base, word):
    """No merge and no second quantisation between the stages: the first stage's adapter is continued."""
    untouched = sha_of_base(load_base(base, quantization=word))
    first = run_on(tmp_path / "first", base, word, dtype="bfloat16", objective="sft", reference=None)
    first.train()
    first.save_model(str(tmp_path / "first" / "adapter"))
    assert sha_of_base(first.model) == untouched
    policy = continue_adapter(load_base(base, quantization=word), tmp_path / "first" / "adapter")
    second = run_on(tmp_path / "second", base, word, model=policy, peft_config=None, reference="frozen_copy")
    start = weights(second)
    second.train()
    assert second.state.log_history[0]["loss"] == pytest.approx(FIRST_LOSS, abs=5e-7)
    assert not any(torch.equal(start[name], now) for name, now in weights(second).items())
    assert sha_of_base(second.model) == untouched


@pytest.mark.row("54", "55")
@pytest.mark.parametrize("word", ["nf4-double", "int8"])
def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path, base, word):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "pairs_per_step": 5, "tokens_per_pack": 40}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "dtype": "bfloat16"}
    whole = run_on(tmp_path / "whole", base, word, **settings)
    whole.train()

    class Killed(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            cut = run_on(tmp_path / "cut", base, word, **settings)
            cut.add_callback(Killed())
            cut.train()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    resumed = run_on(tmp_path / "cut", base, word, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    ours, theirs = weights(resumed), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sha_of_base(resumed.model) == sha_of_base(whole.model)


# --- a base that the user loaded himself --------------------------------------------------------------------


def own_model(base: str, **config: Any) -> PreTrainedModel:
    """As a user writes it: transformers alone, and nothing of this library."""
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**config)
    )


@pytest.mark.row("9")
@pytest.mark.parametrize(
    ("word", "config"),
    [
        ("nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float16"}),
        ("fp4-double", {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}),
        ("int8", {"load_in_8bit": True}),
    ],
)
def test_a_users_own_model_trains_to_the_bits_of_one_loaded_here(tmp_path, base, word, config, monkeypatch):
    """Whatever compute dtype and threshold it was loaded with."""
    repacking_cpu(monkeypatch)
    evaluations = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    ours = run_on(tmp_path / "ours", base, word, dtype="bfloat16", max_steps=2)
    theirs = run_on(tmp_path / "theirs", base, word, model=own_model(base, **config), **evaluations)
    for run in (ours, theirs):
        run.train()
    assert all(torch.equal(tensor, weights(theirs)[name]) for name, tensor in weights(ours).items())


@pytest.mark.row("9")
@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_users_model_whose_weights_were_repacked_is_refused(tmp_path, base, with_adapter):
    """What an evaluation leaves behind on a CPU with avx512_bf16."""
    model = own_model(base, load_in_4bit=True)
    model.model.layers[0].mlp.gate_proj.weight.quant_state.packing_format_for_cpu = True
    given = disturb(attach_lora(model, lora())) if with_adapter else model
    with pytest.raises(InputError, match=r"gate_proj.*repacked.*load the model again.*before any forward"):
        run_on(tmp_path, base, None, model=given, peft_config=None if with_adapter else lora())


def test_a_separate_reference_may_be_quantised_as_the_policy_is(tmp_path, base):
    for word in ("nf4", "int8"):
        twin = load_base(base, dtype="float32", quantization=word)
        run = run_on(tmp_path / word, base, word, ref_model=twin, reference="separate_model", max_steps=1)
        run.train()
        assert run.state.log_history[0]["loss"] == pytest.approx(FIRST_LOSS, abs=5e-7)


def test_a_quantised_base_learns_as_its_dequantised_weights_do(tmp_path, base):
    """NF4 in fp32 and a float model holding the de-quantised weights: the same run to rounding."""
    from tests.peft_twin import as_float

    quantised = run_on(tmp_path / "nf4", base, "nf4")
    twin = as_float(load_base(base, dtype="float32", quantization="nf4"), torch.float32)
    twin.config._name_or_path = ""  # its weights are nobody's files
    plain = run_on(tmp_path / "float", base, None, model=twin)
    for run in (quantised, plain):
        run.train()
    for ours, theirs in zip(quantised.state.log_history[:4], plain.state.log_history[:4], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base whose layers are as wide as the blocks of 4-bit kernels (64) and more."""
    from transformers import LlamaConfig

    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 512}
    folder = tmp_path_factory.mktemp("wider") / "base"
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(folder)
    return str(folder)


@pytest.mark.gpu
@pytest.mark.row("9", "44", "60")
@pytest.mark.parametrize("word", ["nf4", "nf4-double", "fp4", "int8"])
@pytest.mark.parametrize("reference", ["disabled_adapter", "frozen_copy"])
def test_on_a_gpu_a_run_starts_at_the_identity_loss_and_leaves_its_base_alone(tmp_path, wider, word, reference):
    untouched = load_base(wider, quantization=word)
    assert describe(untouched).norms == "bfloat16"
    settings = {"use_cpu": False, "dtype": "bfloat16", "reference": reference, "max_steps": 6}
    run = run_on(tmp_path, wider, word, eval_strategy="steps", eval_steps=2, **settings)
    assert {parameter.device.type for parameter in run.model.parameters()} == {"cuda"}
    start = weights(run)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(FIRST_LOSS, abs=5e-7)
    assert not any(torch.equal(start[name], now) for name, now in weights(run).items())
    assert sha_of_base(run.model) == sha_of_base(untouched)
    assert {word_of(layer) for layer in run.model.modules()} == {None, word}


@pytest.mark.gpu
@pytest.mark.row("9")
@pytest.mark.parametrize("word", ["nf4", "int8"])
def test_on_a_gpu_evaluations_do_not_change_a_run(tmp_path, wider, word):
    settings = {"use_cpu": False, "dtype": "bfloat16", "max_steps": 6}
    plain = run_on(tmp_path / "plain", wider, word, **settings)
    evaluated = run_on(tmp_path / "evaluated", wider, word, eval_strategy="steps", eval_steps=1, **settings)
    for run in (plain, evaluated):
        run.train()
    ours, theirs = weights(evaluated), weights(plain)
    for name, tensor in theirs.items():  # kernels may add in another order from run to run
        torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.row("9")
@pytest.mark.parametrize("word", ["nf4", "int8"])
@pytest.mark.parametrize("use_dora", [False, True])  # DoRA's start asks the layers for their values before they move
@pytest.mark.parametrize(("loaded", "trained"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_base_that_was_loaded_elsewhere_moves_to_the_runs_device(tmp_path, base, word, use_dora, loaded, trained):
    model = load_base(base, dtype="float32", quantization=word, device=torch.device(loaded))
    adapter, use_cpu = lora(use_dora=use_dora), trained == "cpu"
    run = trainer(tmp_path, pairs(4), model=model, peft_config=adapter, max_steps=1, use_cpu=use_cpu)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(FIRST_LOSS, abs=5e-7)
    assert {parameter.device.type for parameter in run.model.parameters()} == {trained}
