"""Every adapter variant: exactly the reference at the start, a reference that never moves, and the twin's gradients.

LoRA, rsLoRA, DoRA, patterns, starts, whole modules and single tokens, on float and quantised bases, embeddings tied or
not. The twin is PEFT by itself, in float64, one sequence at a time.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, PreTrainedModel

from lorafocal.data.packing import share_prefixes
from lorafocal.errors import InputError
from lorafocal.model.adapters import (
    AdapterSwitch,
    adapter_parameters,
    add_frozen_copy,
    attach_lora,
    check_trainable,
    widen_adapters,
)
from lorafocal.model.load import load_base
from lorafocal.model.noise import switch_noise_off
from lorafocal.model.quantized import settle
from lorafocal.objectives import PairLogps
from lorafocal.objectives.focal import focalpo
from lorafocal.policy import prepare_policy, sequence_logps
from lorafocal.reference import Reference, build_reference, check_identity
from tests.tiny import SIZES, adapter_gradients, enlarged, lora, pairs, relative_difference, tiny_base, trainer

pytestmark = pytest.mark.slow  # many small runs

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rslora, dora": {"use_rslora": True, "use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8}, "alpha_pattern": {"v_proj": 32}},
    "gaussian": {"init_lora_weights": "gaussian"},
    "norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "a whole MLP": {"modules_to_save": ["layers.1.mlp"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [6, 77, 90]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [6, 77], "lm_head": [6, 90]}},
    "all together": {"use_dora": True, "modules_to_save": ["norm"], "trainable_token_indices": [6, 77]},
}
UNTIED_ONLY = {"embeddings", "head", "tokens of both"}
ON_GPT2: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"c_attn": 2}},
    "norms": {"modules_to_save": ["ln_f", "ln_1"]},
    "positions": {"modules_to_save": ["wpe"]},
    "tokens": {"trainable_token_indices": [6, 77, 90]},
}
ON_QUANTIZED = [
    *(("llama", name, "nf4") for name in ("lora", "rslora", "dora", "norms", "head", "tokens")),
    *(("tied llama", name, "nf4") for name in ("dora", "tokens", "all together")),
    *(("llama", name, "int8") for name in ("lora", "dora", "head", "tokens")),
    ("tied llama", "all together", "int8"),
]
CELLS = (
    [("llama", name) for name in VARIANTS]
    + [("tied llama", name) for name in VARIANTS if name not in UNTIED_ONLY]
    + [("gpt2", name) for name in ON_GPT2]
    + [("gemma2", "norms"), ("gemma2", "tokens"), ("gemma2", "all together")]
)
IN_DTYPES = [
    *((kind, name, torch.bfloat16) for kind, name in CELLS if kind != "gpt2"),
    *((kind, name, torch.float32) for kind, name in CELLS if kind in ("llama", "gpt2")),
    ("llama", "all together", torch.float64),
]
COMPARED = [  # every variant with both references, where embeddings are tied or weights transposed with one
    *(("llama", name, kind) for name in VARIANTS if name != "gaussian" for kind in ("disabled_adapter", "frozen_copy")),
    *((kind, name, "frozen_copy") for kind, name in CELLS if kind == "tied llama" and name != "gaussian"),
    *((kind, name, "disabled_adapter") for kind, name in CELLS if kind == "gpt2"),
]
PAIRS = pairs(4)
PACK = share_prefixes(PAIRS)


def float_base(kind: str, dtype: torch.dtype) -> PreTrainedModel:
    if "llama" in kind:
        return tiny_base(dtype=dtype, tie_word_embeddings=kind.startswith("tied"))
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    configs = {
        "gpt2": lambda: GPT2Config(vocab_size=97, eos_token_id=1, **sizes, **still),
        "gemma2": lambda: Gemma2Config(**SIZES, head_dim=8, sliding_window=5, attn_logit_softcapping=None),
    }
    torch.manual_seed(0)
    return enlarged(AutoModelForCausalLM.from_config(configs[kind]())).to(dtype).requires_grad_(False)


@pytest.fixture(scope="module")
def quantized_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for tied in (False, True):
        tiny_base(tie_word_embeddings=tied).save_pretrained(folder / str(tied))

    def load(quantization: str, tied: bool) -> PreTrainedModel:
        model = load_base(str(folder / str(tied)), quantization=quantization, dtype="bfloat16").requires_grad_(False)
        settle(model)
        return model

    return load


def adapted(base: PreTrainedModel, settings: dict[str, Any]) -> PeftModel:
    torch.manual_seed(0)
    policy = attach_lora(base, lora(**settings))
    prepare_policy(policy)
    return policy


def settings_of(kind: str, name: str) -> dict[str, Any]:
    return copy.deepcopy(ON_GPT2[name] if kind == "gpt2" else VARIANTS[name])


def flat(logps: PairLogps) -> Tensor:
    return torch.cat([logps.chosen, logps.rejected]).detach()


def train(policy: PeftModel, reference: Reference, steps: int = 3) -> None:
    """Optimiser steps on everything that the adapter trains."""
    optimizer = torch.optim.AdamW(check_trainable(policy).values(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        focalpo(sequence_logps(policy, PACK), reference.logps(PACK), beta=0.5, gamma=0.05).losses.mean().backward()
        optimizer.step()


def check_references(base: PreTrainedModel, settings: dict[str, Any]) -> None:
    """On, off and copy are one model to the last bit at the start; off and copy still are after three steps."""
    prepare_policy(base)
    with torch.no_grad():
        before = flat(sequence_logps(base, PACK))
    policy = adapted(base, settings)
    add_frozen_copy(policy)
    off, frozen = (build_reference(kind, policy) for kind in ("disabled_adapter", "frozen_copy"))
    start = sequence_logps(policy, PACK)  # with gradients, as a step computes it
    check_identity(start, off.logps(PACK), PACK.pair_ids)
    check_identity(start, frozen.logps(PACK), PACK.pair_ids, kind="frozen_copy")
    trained = {name: tensor.detach().clone() for name, tensor in check_trainable(policy).items()}
    train(policy, off)
    now = check_trainable(policy)
    assert all(not torch.equal(now[name], tensor) for name, tensor in trained.items())
    assert (flat(sequence_logps(policy, PACK)) - before).abs().max() > 0.1
    assert torch.equal(flat(off.logps(PACK)), before)
    assert torch.equal(flat(frozen.logps(PACK)), before)


@pytest.mark.row("6", "1", "13")
@pytest.mark.parametrize(("kind", "name", "dtype"), IN_DTYPES)
def test_on_off_and_copy_are_one_model_at_the_start_and_off_and_copy_stay_it(kind, name, dtype):
    check_references(float_base(kind, dtype), settings_of(kind, name))


@pytest.mark.row("6", "1", "13")
@pytest.mark.parametrize(("kind", "name", "quantization"), ON_QUANTIZED)
def test_on_off_and_copy_are_one_model_on_a_quantised_base(quantized_base, kind, name, quantization):
    check_references(quantized_base(quantization, kind == "tied llama"), settings_of(kind, name))


@pytest.mark.row("6")
@pytest.mark.parametrize(("start", "least", "most"), [("orthogonal", 1e-7, 1e-3), (False, 0.1, 100.0)])
def test_a_start_that_is_not_exactly_the_base_is_told_apart_and_kept_by_a_copy(start, least, most):
    policy = adapted(tiny_base(), {"init_lora_weights": start})
    add_frozen_copy(policy)
    off, frozen = (build_reference(kind, policy) for kind in ("disabled_adapter", "frozen_copy"))
    begun = flat(sequence_logps(policy, PACK))
    assert least < (begun - flat(off.logps(PACK))).abs().max() < most
    assert torch.equal(flat(frozen.logps(PACK)), begun)
    train(policy, frozen)
    assert torch.equal(flat(frozen.logps(PACK)), begun)


# Weights: what is trained, and in which dtype.


@pytest.mark.row("13", "3")
@pytest.mark.parametrize("name", VARIANTS)
def test_everything_trained_is_fp32_on_a_bf16_base_and_nothing_else_is_trained(name):
    policy = adapted(tiny_base(dtype=torch.bfloat16), settings_of("llama", name))
    trained = check_trainable(policy)
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert trained.keys() == {n for n, p in policy.named_parameters() if p.requires_grad}
    copies = add_frozen_copy(policy)
    assert {n.replace(".reference", ".default") for n in copies} == trained.keys() == check_trainable(policy).keys()
    parts = ("base_layer", "original_module")
    assert all(not p.requires_grad for n, p in policy.named_parameters() if n in copies or any(x in n for x in parts))
    assert not any(x in n.split(".") for n in trained for x in parts)


@pytest.mark.row("13")
def test_steps_too_small_for_bf16_reach_every_part():
    """In bf16, steps of 5e-6 would round away."""
    policy = adapted(tiny_base(dtype=torch.bfloat16), settings_of("llama", "all together"))
    trained = {name: tensor for name, tensor in check_trainable(policy).items() if "lora_B" not in name}
    before = {name: tensor.detach().clone() for name, tensor in trained.items()}
    optimizer = torch.optim.AdamW(check_trainable(policy).values(), lr=5e-6, weight_decay=0.0)
    for _ in range(3):
        sum(sequence_logps(policy, PACK)).sum().backward()
        optimizer.step()
    for name, tensor in trained.items():
        assert (tensor != before[name])[tensor.grad != 0].float().mean() > 0.99, name


@pytest.mark.row("6", "13")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_doras_factor_is_exactly_one_at_the_start(dtype):
    """The magnitude as PEFT leaves it, a norm taken in bf16, is off by up to 0.4 %."""
    policy = adapted(tiny_base(dtype=dtype), {"use_dora": True})
    layer = policy.get_base_model().model.layers[0].mlp.down_proj
    norms = torch.linalg.norm(layer.base_layer.weight.float(), dim=1)
    assert torch.equal(layer.lora_magnitude_vector["default"].weight, norms)


@pytest.mark.row("14", "6")
def test_an_adapter_whose_dropout_was_switched_off_is_computed_like_its_copy():
    """PEFT's DoRA behind a dropout, be it 0, multiplies by the base once more while it trains, and rounds otherwise."""
    policy = get_peft_model(tiny_base(), lora(use_dora=True, lora_dropout=0.1)).train()
    widen_adapters(policy)
    shake(policy, 0.05)
    assert switch_noise_off(policy)
    prepare_policy(policy)
    add_frozen_copy(policy)
    start, frozen = sequence_logps(policy, PACK), build_reference("frozen_copy", policy)
    check_identity(start, frozen.logps(PACK), PACK.pair_ids, kind="frozen_copy")


# Gradients against PEFT's own, in float64, one sequence at a time.


def shake(policy: PeftModel, scale: float, seed: int = 7) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(policy).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def peft_alone(kind: str, config: LoraConfig, tensors: dict[str, Tensor]) -> PeftModel:
    """PEFT by itself around a float64 base, with these values."""
    twin = get_peft_model(float_base(kind, torch.float64), copy.deepcopy(config))
    own = dict(twin.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].data = tensor.double()
    return twin


def logps_one_at_a_time(model: PeftModel) -> PairLogps:
    def score(prompt: list[int], completion: list[int]) -> Tensor:
        ids = torch.tensor([[*prompt, *completion]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).sum()

    sides = [[(p.prompt_ids, p.chosen_ids) for p in PAIRS], [(p.prompt_ids, p.rejected_ids) for p in PAIRS]]
    return PairLogps(*(torch.stack([score(*one) for one in side]) for side in sides))


@pytest.mark.row("6", "15")
@pytest.mark.parametrize(("kind", "name", "reference"), COMPARED)
def test_gradients_in_a_pack_are_pefts_in_float64(kind, name, reference):
    policy = adapted(float_base(kind, torch.float32), settings_of(kind, name))
    config = policy.peft_config["default"]
    shake(policy, 0.05)
    start = {n: p.detach().clone() for n, p in adapter_parameters(policy).items()}
    if reference == "frozen_copy":
        add_frozen_copy(policy)
    shake(policy, 0.05, seed=8)
    trained = check_trainable(policy)
    answers = build_reference(reference, policy).logps(PACK)
    focalpo(sequence_logps(policy, PACK), answers, beta=0.1, gamma=0.05).losses.mean().backward()

    twin = peft_alone(kind, config, trained)
    with torch.no_grad():
        if reference == "frozen_copy":
            wanted = logps_one_at_a_time(peft_alone(kind, config, start))
        else:
            with twin.disable_adapter():
                wanted = logps_one_at_a_time(twin)
    twin.requires_grad_(False)
    for n, parameter in twin.named_parameters():
        parameter.requires_grad_(n in trained)
    focalpo(logps_one_at_a_time(twin), wanted, beta=0.1, gamma=0.05).losses.mean().backward()
    torch.testing.assert_close(flat(answers).double(), flat(wanted), rtol=0, atol=1e-3)
    assert relative_difference(adapter_gradients(policy), adapter_gradients(twin)) < 2e-5


# Parts by themselves, and through a file.


def test_a_quantised_layer_is_not_trained_in_full(quantized_base):
    for quantization in ("nf4", "int8"):
        with pytest.raises(InputError, match=r"quantised.*adapter\.targets"):
            attach_lora(quantized_base(quantization, False), lora(modules_to_save=["layers.0.mlp.up_proj"]))


@pytest.mark.row("46")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "tied llama"])
def test_what_peft_reads_back_computes_the_same(tmp_path, kind, dtype):
    policy = adapted(float_base(kind, dtype), settings_of(kind, "all together"))
    shake(policy, 0.05)
    add_frozen_copy(policy)
    policy.save_pretrained(tmp_path, selected_adapters=["default"], save_embedding_layers=False)
    again = widen_adapters(PeftModel.from_pretrained(float_base(kind, dtype), tmp_path, is_trainable=True))
    prepare_policy(again)
    assert check_trainable(again).keys() == check_trainable(policy).keys()
    assert torch.equal(flat(sequence_logps(again, PACK)), flat(sequence_logps(policy, PACK)))


@pytest.mark.parametrize("name", ["embeddings", "head", "tokens of both", "all together"])
def test_the_trainer_trains_it_from_the_loss_of_the_start(tmp_path, name):
    model, peft_config = tiny_base(dtype=torch.bfloat16), lora(**settings_of("llama", name))
    run = trainer(tmp_path, pairs(8), model=model, peft_config=peft_config, max_steps=2, gamma=0.05)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(0.669536, abs=1e-6)
    assert run.state.log_history[1]["loss"] < 0.66


def test_tied_tokens_are_trained_in_the_head_too():
    policy = attach_lora(float_base("tied llama", torch.float32), lora(trainable_token_indices=[3]))
    model, ids = policy.get_base_model(), torch.tensor([[5, 6]])
    [delta] = [p for n, p in check_trainable(policy).items() if "token" in n]
    before = model(input_ids=ids).logits.detach()
    delta.data += 1.0
    after = model(input_ids=ids).logits.detach()
    assert (after != before).nonzero()[:, 2].unique().tolist() == [3]  # the embeddings of 5 and 6 did not change
    with AdapterSwitch(policy).off(), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.row("6", "13")
def test_a_trained_module_computes_in_the_dtype_of_the_base():
    policy = adapted(tiny_base(dtype=torch.bfloat16), {"modules_to_save": ["embed_tokens", "norm", "lm_head"]})
    base = policy.get_base_model()
    hidden = base.model.embed_tokens(torch.tensor([[3, 4]]))
    assert hidden.dtype == base.model.norm(hidden).dtype == base.lm_head(hidden).dtype == torch.bfloat16
    assert base.model.embed_tokens.modules_to_save["default"].weight.dtype == torch.float32
