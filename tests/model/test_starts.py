"""Starts from weights and data: where they begin, that the same seed gives the same, and that what is saved loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import EvaConfig, LoftQConfig, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lorafocal.data.packing import PairCollator
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.model import eva
from lorafocal.model.adapters import AdapterSwitch, adapter_parameters, attach_lora
from lorafocal.model.load import load_base
from lorafocal.model.noise import switch_noise_off
from lorafocal.model.quantized import dequantized_weight
from lorafocal.model.save import save_adapter
from lorafocal.model.saved import lora_layers
from lorafocal.model.starts import attaching, initialize
from lorafocal.policy import prepare_policy, sequence_logps
from tests.model.families import random_model
from tests.tiny import lora, pairs, tiny_base

pytestmark = pytest.mark.slow  # many small runs

PAIRS = pairs(40)
PACK = PairCollator("packed", 4096)(pairs(10)).packs[0]
PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}


def config_of(init: str, **more) -> LoraConfig:
    """PEFT's constructor takes "loftq" only with scipy, which our way does not need."""
    config = lora(**more)
    config.init_lora_weights = init
    if init == "eva":
        config = lora(init_lora_weights=init, **more)
    return config


def started(base: PreTrainedModel, init: str, data: list[TokenizedPair] = PAIRS, seed: int = 1, **more) -> PeftModel:
    config = config_of(init, **more)
    torch.manual_seed(seed)
    with attaching(base, config):
        policy = attach_lora(base, config)
    initialize(policy, data, seed=seed)
    return policy


def trained(policy: PeftModel) -> PeftModel:
    """Every adapter tensor moved a little, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(policy).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return policy


@torch.no_grad()
def logps(model: torch.nn.Module) -> Tensor:
    prepare_policy(model)
    return torch.cat(sequence_logps(model, PACK))


def product(policy: PeftModel, name: str) -> Tensor:
    """s B A of a layer."""
    layer = lora_layers(policy)[name]
    return layer.scaling["default"] * layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()


def same_adapter(one: PeftModel, other: PeftModel) -> bool:
    ours, theirs = adapter_parameters(one), adapter_parameters(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- PiSSA and OLoRA ----------------------------------------------------------------------------------------------


@pytest.mark.row("6")
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, PATTERNS, {"use_rslora": True, **PATTERNS}], ids=str)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_what_is_saved_is_the_trained_policy_on_the_original_base(tmp_path, init, more):
    start = started(tiny_base(), init, **more)
    untrained = logps(start)
    policy = trained(start)
    ours = logps(policy)
    save_adapter(policy, tmp_path, None, trained=True)
    assert policy.peft_config["default"].init_lora_weights == init  # what is trained stays what it was
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True
    again = PeftModel.from_pretrained(tiny_base(), tmp_path)
    torch.testing.assert_close(logps(again), ours, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(untrained, logps(tiny_base()), atol=1e-5, rtol=1e-6)
    assert (ours - untrained).abs().max() > 0.1


@pytest.mark.row("6")
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, PATTERNS], ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_saved_tensors_are_those_of_pefts_own_conversion(tmp_path, init, more):
    policy = started(tiny_base(), init, **more)
    config = policy.peft_config["default"]
    config.init_lora_weights = True
    policy.save_pretrained(tmp_path / "start")
    config.init_lora_weights = init
    save_adapter(trained(policy), tmp_path / "ours", None)
    policy.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    settings = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"):
        assert settings[0][key] == settings[1][key]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_bf16_base_keeps_its_dtype_and_loses_only_its_own_rounding(tmp_path, init):
    """The decomposition is in float32; what is left of the weights is rounded to bf16 once."""
    base = tiny_base(dtype=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    policy = started(base, init)
    assert {p.dtype for p in adapter_parameters(policy).values()} == {torch.float32}
    for name, layer in lora_layers(policy).items():
        left, weight = layer.get_base_layer().weight, before[f"{name}.weight"].float()
        assert left.dtype == torch.bfloat16
        assert (left.float() + product(policy, name) - weight).norm() < 0.01 * weight.norm()
    ours = logps(trained(policy))
    save_adapter(policy, tmp_path, None)
    again = PeftModel.from_pretrained(tiny_base(dtype=torch.bfloat16), tmp_path)
    assert (logps(again) - ours).abs().max() < 0.2


def test_the_start_is_a_function_of_the_seed():
    one, same, other = (started(tiny_base(), "pissa_niter_2", seed=seed) for seed in (1, 1, 2))
    assert same_adapter(one, same)
    assert not same_adapter(one, other)
    for ours, theirs in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(ours, theirs)  # what is left of the base too


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_a_rank_above_a_layers_size_is_refused_before_the_base_is_touched(init):
    base = tiny_base()
    with pytest.raises(InputError, match=r"no 20 directions to take from model.*k_proj \(16 x 32\)"):
        started(base, init, r=20)
    torch.testing.assert_close(logps(base), logps(tiny_base()), atol=0, rtol=0)
    smaller = started(tiny_base(), init, r=20, rank_pattern={"k_proj": 16, "v_proj": 16})
    torch.testing.assert_close(logps(smaller), logps(base), atol=2e-5, rtol=1e-6)


def test_transposed_layers_start_by_pissa_and_not_by_olora():
    """PEFT's OLoRA takes them for upright ones: of a square layer it would silently make another model."""
    base = random_model("gpt2", torch.float32)
    with pytest.raises(InputError, match="c_attn keeps its weights transposed"):
        started(base, "olora")
    before = logps(base)
    torch.testing.assert_close(
        logps(started(random_model("gpt2", torch.float32), "pissa")), before, atol=1e-5, rtol=1e-6
    )


# ---- LoftQ --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_base().save_pretrained(folder / "whole")
    tiny_base().save_pretrained(folder / "shards", max_shard_size="20KB")
    return folder


@pytest.mark.parametrize(
    ("files", "quantization", "more"),
    [
        ("whole", "nf4", {}),
        ("shards", "nf4-double", {"use_rslora": True}),
        ("whole", "fp4", {"use_rslora": True, **PATTERNS}),
    ],
)
def test_loftq_makes_good_the_most_that_its_rank_allows(saved_base, files, quantization, more):
    """The closed form: of W - Q, what is left are the singular values beyond the rank, whatever alpha is."""
    base = load_base(str(saved_base / files), dtype="float32", quantization=quantization)
    held = {name: m.weight.data.clone() for name, m in base.named_modules() if hasattr(m, "quant_state")}
    policy = started(base, "loftq", **more)
    originals = dict(tiny_base().named_parameters())
    for name, layer in lora_layers(policy).items():
        lost = originals[f"{name}.weight"] - dequantized_weight(layer)
        left = (lost - product(policy, name)).norm()
        beyond = torch.linalg.svdvals(lost)[layer.r["default"] :].norm()
        assert left < 0.95 * lost.norm()
        assert left == pytest.approx(float(beyond), rel=1e-4)
        assert torch.equal(layer.get_base_layer().weight.data, held[name])
    assert {p.dtype for p in adapter_parameters(policy).values()} == {torch.float32}
    again = started(load_base(str(saved_base / files), dtype="float32", quantization=quantization), "loftq", **more)
    assert same_adapter(policy, again)


def test_loftq_with_dora_starts_where_loftq_does(saved_base):
    """The magnitudes are those of Q + s B A, so the factor of every row is 1."""
    bases = (load_base(str(saved_base / "whole"), dtype="float32", quantization="nf4") for _ in range(2))
    torch.testing.assert_close(
        logps(started(next(bases), "loftq", use_dora=True)), logps(started(next(bases), "loftq"))
    )


def test_loftq_brings_a_bf16_policy_nearer_to_the_float_model_and_loads_with_plain_peft(saved_base, tmp_path):
    whole = str(saved_base / "whole")
    target = logps(load_base(whole))
    plain = (logps(load_base(whole, quantization="nf4")) - target).abs().mean()
    policy = started(load_base(whole, quantization="nf4"), "loftq", r=12)
    assert (logps(policy) - target).abs().mean() < 0.8 * plain
    ours = logps(trained(policy))
    save_adapter(policy, tmp_path, None)
    again = PeftModel.from_pretrained(load_base(whole, quantization="nf4"), tmp_path)
    torch.testing.assert_close(logps(again), ours, atol=0.05, rtol=0)


def test_loftq_without_the_float_weights_is_refused_with_the_reason(saved_base, tmp_path):
    def refused(folder: Path, match: str) -> None:
        with pytest.raises(InputError, match=match):
            started(load_base(str(folder), dtype="float32", quantization="nf4"), "loftq")

    def base() -> PreTrainedModel:
        return load_base(str(tmp_path / "moved"), dtype="float32", quantization="nf4")

    tiny_base().save_pretrained(tmp_path / "moved")
    nowhere, gone = base(), base()
    nowhere.config._name_or_path = ""
    with pytest.raises(InputError, match="loaded from nowhere"):
        started(nowhere, "loftq")
    file = tmp_path / "moved" / "model.safetensors"
    tensors = load_file(file)
    save_file({name: torch.randn_like(tensor) for name, tensor in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(InputError, match="not what the base was quantised from"):
        started(base_of_tiny(saved_base, file.parent), "loftq")
    save_file({name: t for name, t in tensors.items() if "k_proj" not in name}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"no weight 'model\.layers\.0\.self_attn\.k_proj\.weight'"):
        started(base_of_tiny(saved_base, file.parent), "loftq")
    file.unlink()
    with pytest.raises(InputError, match="moved has no safetensors weights"):
        started(gone, "loftq")
    with pytest.raises(InputError, match="no layer is held in 4 bits"):
        started(tiny_base(), "loftq")
    base_of_tiny(saved_base, None).save_pretrained(tmp_path / "quantised")
    stored = load_base(str(tmp_path / "quantised"), dtype="float32")
    with pytest.raises(InputError, match=r"holds 'model\.layers\.0\.self_attn\.q_proj\.weight' as torch\.uint8"):
        started(stored, "loftq")


def base_of_tiny(saved_base: Path, says: Path | None) -> PreTrainedModel:
    """The quantised base, which says that it comes from `says`."""
    base = load_base(str(saved_base / "whole"), dtype="float32", quantization="nf4")
    if says is not None:
        base.config._name_or_path = str(says)
    return base


# ---- EVA ----------------------------------------------------------------------------------------------------------


def inputs_of(base: PreTrainedModel, name: str, data: list[TokenizedPair]) -> Tensor:
    """What a layer reads at the tokens of the chosen answers, one sequence at a time, unpadded."""
    seen: list[Tensor] = []
    handle = base.get_submodule(name).register_forward_hook(lambda _, given, __: seen.append(given[0][0]))
    with torch.no_grad():
        for pair in data:
            base(input_ids=torch.tensor([[*pair.prompt_ids, *pair.chosen_ids]]))
    handle.remove()
    return torch.cat([rows[len(pair.prompt_ids) :] for rows, pair in zip(seen, data, strict=True)])


def test_eva_starts_at_the_base_with_the_main_directions_of_what_layers_read():
    policy = started(tiny_base(), "eva")
    ranks = {name: layer.r["default"] for name, layer in lora_layers(policy).items()}
    assert len(set(ranks.values())) > 1  # rho shares the ranks out anew
    assert sum(ranks.values()) == 4 * len(ranks)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        rows = inputs_of(tiny_base(), name, PAIRS).double()
        rows -= rows.mean(0)
        a = lora_layers(policy)[name].lora_A["default"].weight.detach().double()
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)).double(), atol=1e-4, rtol=0)
        caught = (rows @ a.T).square().sum() / torch.linalg.svdvals(rows)[: len(a)].square().sum()
        assert 0.9 < caught <= 1.001  # PEFT stops once directions stay, and works by random projections
    assert torch.equal(logps(policy), logps(tiny_base()))
    assert all(p.requires_grad for p in adapter_parameters(policy).values())


@pytest.mark.parametrize("kind", ["bf16", "bf16 dora", "nf4", "gpt2"])
def test_eva_starts_exactly_at_the_base_in_every_dtype(saved_base, kind):
    def base() -> PreTrainedModel:
        if kind == "gpt2":
            return random_model("gpt2", torch.float32)
        return load_base(str(saved_base / "whole"), quantization="nf4" if kind == "nf4" else None)

    policy = started(base(), "eva", use_dora=kind.endswith("dora"))
    switch_noise_off(policy)
    assert {p.dtype for p in adapter_parameters(policy).values()} == {torch.float32}
    start = logps(policy)
    assert torch.equal(start, logps(base()))
    with AdapterSwitch(policy).off():
        assert torch.equal(logps(policy), start)


def test_an_eva_adapter_loads_with_plain_peft_and_no_data(tmp_path):
    policy = trained(started(tiny_base(), "eva", use_rslora=True))
    save_adapter(policy, tmp_path, None)
    again = PeftModel.from_pretrained(tiny_base(), tmp_path)
    torch.testing.assert_close(logps(again), logps(policy), atol=1e-5, rtol=1e-6)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["eva_config"] is None


def test_eva_is_a_function_of_pairs_and_seed():
    one, same, other = (started(tiny_base(), "eva", seed=seed) for seed in (1, 1, 2))
    assert same_adapter(one, same)
    assert not same_adapter(one, other)


def test_eva_looks_at_a_limited_number_of_pairs(monkeypatch):
    monkeypatch.setattr(eva, "PAIRS", 12)
    batches = eva._batches(pairs(90), 16, seed=1)
    assert sum(len(batch["input_ids"]) for batch in batches) == 12


@pytest.mark.parametrize("tokens", [4, 60, 120, 200])
@pytest.mark.parametrize("count", [20, 33, 90])
def test_eva_sees_each_pair_once_in_batches_that_are_large_enough(count, tokens):
    data = [replace(pair, prompt_ids=[place], chosen_ids=[2, 3, 4, 5, 6, 7]) for place, pair in enumerate(pairs(count))]
    batches = eva._batches(data, min(tokens, 6 * count), seed=1)
    assert sorted(row[0] for batch in batches for row in batch["input_ids"].tolist()) == list(range(count))
    assert all(6 * len(batch["input_ids"]) >= min(tokens, 6 * count) for batch in batches)


@pytest.mark.parametrize(
    ("data", "more", "match"),
    [
        (pairs(3), {}, "needs 16 tokens of chosen answers at this rank, .* the 3 training pairs have 9"),
        ([], {}, "the 0 training pairs have 0"),
        (PAIRS, {"r": 9}, "36 directions for rank 9, and .* has 32 inputs"),
        (PAIRS, {"rank_pattern": {"down_proj": 40}}, "160 directions for rank 40, and .*down_proj has 64 inputs"),
    ],
)
def test_too_little_for_eva_is_one_clear_error(data, more, match):
    with pytest.raises(InputError, match=match):
        started(tiny_base(), "eva", data, **more)


def test_directions_that_never_settle_end_in_an_error_instead_of_a_loop(monkeypatch):
    monkeypatch.setattr(eva, "_LONGEST_SEARCH", 30)
    config = config_of("eva")
    config.eva_config.tau = 1.0
    policy = attach_lora(tiny_base(), config)
    with pytest.raises(InputError, match="no directions that stay, in 30 batches"):
        initialize(policy, PAIRS, seed=1)


def test_plain_starts_are_left_as_they_are():
    policy = attach_lora(tiny_base(), lora())
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    initialize(policy, [], seed=1)
    assert all(torch.equal(before[name], p) for name, p in policy.named_parameters())


@pytest.mark.parametrize(
    ("init", "settings", "named"),
    [
        ("loftq", {"loftq_config": {"loftq_bits": 4, "loftq_iter": 5}}, "loftq_iter"),
        ("loftq", {"loftq_config": LoftQConfig(loftq_bits=2)}, "loftq_bits"),
        ("eva", {"eva_config": EvaConfig(label_mask_value=0)}, "label_mask_value"),
    ],
)
def test_settings_of_pefts_own_starts_that_would_be_ignored_are_refused(init, settings, named):
    config = lora()
    vars(config).update({"init_lora_weights": init} | settings)  # LoraConfig itself wants scipy for "loftq"
    with pytest.raises(InputError, match=named), attaching(tiny_base(), config):
        raise AssertionError
