"""What an adapter changes, from its files alone, against PEFT's own merge in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lorafocal.errors import InputError
from lorafocal.model.saved import SavedAdapter
from lorafocal.release.deltas import LowRank, Whole, changes
from tests.model.families import random_model
from tests.tiny import lora, tiny_base


def planted(family: str = "llama", **settings: object) -> PeftModel:
    """An adapter of PEFT's with values of its own everywhere, on a tiny float64 base."""
    base = tiny_base() if family == "llama" else random_model(family, torch.float32)
    policy = get_peft_model(base, lora(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
                if "magnitude" in name:
                    parameter.abs_()
    return policy


def saved(policy: PeftModel, folder: Path) -> SavedAdapter:
    policy.save_pretrained(folder, save_embedding_layers=False)
    config = LoraConfig.from_pretrained(folder)
    return SavedAdapter(folder, config, "base", None, "float32", None, None, {}, None, ())


def applied(adapter: SavedAdapter, base: dict[str, Tensor], transposed: set[str]) -> dict[str, Tensor]:
    """The base with every change, in float64."""
    weights = {name: tensor.double() for name, tensor in base.items()}
    for name, change in changes(adapter, transposed).items():
        if change.rows is None:
            weights[name] = change.apply(weights[name])
        else:
            weights[name][change.rows] = change.apply(weights[name][change.rows])
    return weights


ADAPTERS: dict[str, dict[str, object]] = {
    "plain": {},
    "rslora and patterns": {
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
        "alpha_pattern": {"q_proj": 3, "layers.0.mlp.up_proj": 5},
    },
    "dora": {"use_dora": True},
    "modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "layers.1.mlp", "input_layernorm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 2, 40]},
    "tokens by place": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [7], "lm_head": [1, 0]},
    },
}


@pytest.mark.row("6")
@pytest.mark.parametrize(
    ("family", "kind"), [*(("llama", kind) for kind in ADAPTERS), ("gpt2", "plain"), ("gpt2", "dora")]
)
def test_changes_are_peft_s_own_merge(tmp_path: Path, family: str, kind: str) -> None:
    of_gpt2: dict[str, object] = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    settings = ADAPTERS[kind] | (of_gpt2 if family == "gpt2" else {})
    policy = planted(family, **settings)
    before = {name: tensor.clone() for name, tensor in policy.get_base_model().state_dict().items()}
    of_peft = {"base_layer", "original_module", "token_adapter"}
    plain = {".".join(part for part in name.split(".") if part not in of_peft): t for name, t in before.items()}
    adapter = saved(policy, tmp_path)
    turned = {
        f"{name.removesuffix('.base_layer')}.weight"
        for name, module in policy.get_base_model().named_modules()
        if isinstance(module, Conv1D)
    }
    assert bool(turned) == (family == "gpt2")
    merged = policy.double().merge_and_unload().state_dict()
    ours = applied(adapter, {name: plain[name] for name in merged}, turned)
    learned = changes(adapter, turned)
    for name, tensor in merged.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-12, atol=1e-12)
        assert (name in learned) == (not torch.equal(tensor, plain[name].double())), name
    for name, change in learned.items():
        part = plain[name].double() if change.rows is None else plain[name].double()[change.rows]
        torch.testing.assert_close(change.apply(part) - part, change.delta(part), rtol=1e-9, atol=1e-12)
        assert change.shape == tuple(part.shape)


def test_a_small_change_of_dora_is_not_lost_in_its_difference() -> None:
    """W' - W computed as such in float32 would be mostly rounding."""
    torch.manual_seed(0)
    weight, a, b = torch.randn(8, 16), torch.randn(2, 16), 1e-6 * torch.randn(8, 2)
    change = LowRank(a, b, 1.0, magnitude=torch.linalg.norm(weight + b @ a, dim=1))
    exact = (weight.double() + b.double() @ a.double()) - weight.double()
    assert (change.delta(weight).double() - exact).norm() < 0.1 * exact.norm()


def edited(folder: Path, change: object) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, file)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
EMBEDDINGS = "base_model.model.model.embed_tokens"


@pytest.mark.row("45", "53")
def test_what_is_no_change_of_a_weight_is_refused_by_name(tmp_path: Path) -> None:
    adapter = saved(planted(target_modules=["q_proj"]), tmp_path)
    whole = load_file(tmp_path / "adapter_model.safetensors")
    cases = [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "layers.0.self_attn.q_proj lacks a half"),
        (lambda t: t.pop(f"{Q}.lora_A.weight"), r"q_proj\.lora_B\.weight is no change"),
        (lambda t: t.update({f"{Q}.lora_B.weight": t[f"{Q}.lora_B.weight"] * float("nan")}), "not finite"),
        (lambda t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"][:2].contiguous()}), "a rank of 4"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(32)}), "configuration does not know"),
        (lambda t: t.update({f"{Q}.bias": torch.ones(32)}), "q_proj.bias is no change"),
        (lambda t: t.update({f"{EMBEDDINGS}.lora_embedding_A": torch.ones(4, 97)}), "embed_tokens"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(97, 32)}), "lm_head.weight is no change"),
        (
            lambda t: t.update({"base_model.model.e.token_adapter.trainable_tokens_delta": torch.ones(2, 32)}),
            "the configuration names 0",
        ),
    ]  # fmt: skip
    for change, message in cases:
        edited(tmp_path, change)
        with pytest.raises(InputError, match=message):
            changes(adapter)
        save_file(whole, tmp_path / "adapter_model.safetensors")


def test_values_take_the_place_of_a_weight_exactly() -> None:
    """Not as a sum of the weight and a difference, which rounds once more."""
    weight, values = torch.tensor([[1e8]]), torch.tensor([[0.1]])
    assert torch.equal(Whole(values).apply(weight), values)
