"""What is done to a fused policy between, before and after its calls never gets it to hand out something else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from lorafocal.errors import InputError
from lorafocal.model.adapters import AdapterSwitch, add_frozen_copy, attach_lora
from lorafocal.model.fused import forget, fuse, unfuse
from lorafocal.model.load import load_base
from lorafocal.model.stand_ins import FusedLinear, SharedInput, StandIn
from tests.tiny import VOCABULARY, adapter_gradients, disturb, lora, relative_difference, tiny_base, tiny_policy

pytestmark = pytest.mark.slow

IDS = torch.randint(2, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))


def shared_inputs(policy: nn.Module) -> list[SharedInput]:
    stand_ins = [StandIn.of(module) for module in policy.modules()]
    return list({one.shared: None for one in stand_ins if isinstance(one, FusedLinear)})


def gradients(policy: nn.Module, **how: Any) -> dict[str, Tensor]:
    policy.zero_grad()
    logits = policy(input_ids=IDS, use_cache=False).logits
    logits.double().log_softmax(-1)[..., 5].sum().backward(**how)
    return {name: gradient.double() for name, gradient in adapter_gradients(policy).items()}


# ---- what a probe must see


def clamped_from(limit: float) -> Callable[[Any, Tensor], Tensor]:
    """As DeepSeek V4 and gpt-oss do."""

    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x).clamp(max=limit), self.up_proj(x).clamp(-limit, limit)
        return self.down_proj(self.act_fn(gate) * up)

    return forward


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_gated_mlp_that_clamps_large_values_is_not_taken_for_one_that_does_not(tmp_path, monkeypatch, quantization):
    tiny_base().save_pretrained(tmp_path)
    policy = attach_lora(load_base(str(tmp_path), quantization=quantization, dtype="float32"), lora())
    assert fuse(policy).mlps == 2
    monkeypatch.setattr(LlamaMLP, "forward", clamped_from(10.0))
    assert fuse(policy).mlps == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_with_its_eps_elsewhere_is_not_taken_for_an_rms_norm(monkeypatch, dtype):
    def forward(self: Any, x: Tensor) -> Tensor:
        wide = x.float()
        rms = wide.pow(2).mean(-1, keepdim=True).clamp(min=self.variance_epsilon).sqrt()
        return self.weight * (wide / rms).to(x.dtype)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    policy = attach_lora(tiny_base(dtype=dtype), lora())
    report = fuse(policy)
    assert report.norms == 0
    assert report.fallbacks["LlamaRMSNorm, which rounds or computes otherwise"] == 5


def test_a_bias_that_is_trained_keeps_its_gradient():
    policy = attach_lora(tiny_base(attention_bias=True), lora(bias="none"))
    policy.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer().bias.requires_grad_(True)
    expected = gradients(policy)
    fuse(policy)
    assert gradients(policy).keys() == expected.keys()


# ---- hooks


def test_hooks_of_a_user_are_called_and_keep_their_effect():
    """On a whole layer the fused functions stay; on its parts, and on the activation, PEFT's forward comes back."""
    called: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.append(name)

    def tripled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return 3 * output

    policy = tiny_policy(dtype=torch.float64)
    fuse(policy)
    twin = unfused(policy)
    for model in (policy, twin):
        layers = model.get_base_model().model.layers
        layers[0].self_attn.q_proj.register_forward_hook(tripled)
        layers[0].self_attn.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        layers[1].mlp.act_fn.register_forward_hook(tripled)
        layers[1].self_attn.v_proj.lora_A["default"].register_full_backward_pre_hook(note("A"))
        layers[0].mlp.register_forward_pre_hook(note("mlp"))
    assert relative_difference(gradients(policy), gradients(twin)) < 1e-12
    assert sorted(called) == ["A", "A", "mlp", "mlp"]


def unfused(policy: PeftModel) -> PeftModel:
    twin = copy.deepcopy(policy)
    unfuse(twin)
    return twin


# ---- results that wait


def test_after_a_write_into_an_adapter_nothing_waits_for_its_layers():
    policy = tiny_policy()
    fuse(policy)
    attention = policy.get_base_model().model.layers[0].self_attn
    x = torch.randn(1, 4, 32)
    with torch.no_grad():
        attention.q_proj(x)
        attention.k_proj.lora_B["default"].weight.mul_(2)
        torch.testing.assert_close(attention.k_proj(x), type(attention.k_proj).forward(attention.k_proj, x))


@torch.inference_mode()
def test_in_inference_mode_which_counts_no_writes_each_layer_computes_for_itself():
    policy = tiny_policy()
    fuse(policy)
    attention = policy.get_base_model().model.layers[0].self_attn
    x = torch.randn(1, 4, 32)
    attention.q_proj(x)
    x.mul_(2)
    torch.testing.assert_close(attention.k_proj(x), type(attention.k_proj).forward(attention.k_proj, x))


def test_what_a_broken_pass_leaves_can_be_forgotten_and_sharing_goes_on():
    policy = tiny_policy()
    fuse(policy)
    [first, *_] = policy.get_base_model().model.layers

    def broken(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = first.self_attn.k_proj.register_forward_pre_hook(broken)
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError):
            gradients(policy)
        assert any(shared._waiting for shared in shared_inputs(policy))
        forget(policy)
        assert not any(shared._waiting for shared in shared_inputs(policy))
    handle.remove()
    x = torch.randn(1, 4, 32)
    first.self_attn.q_proj(x)
    [shared] = [shared for shared in shared_inputs(policy) if first.self_attn.q_proj in shared.layers]
    assert len(shared._waiting) == 2


# ---- switching adapters


def test_adapters_that_are_exchanged_between_steps_are_the_ones_that_compute():
    policy = tiny_policy(dtype=torch.float64)
    add_frozen_copy(policy)
    policy.add_adapter("second", lora(r=2, lora_alpha=8))
    policy.add_adapter("dora", lora(use_dora=True))
    for parameter in policy.parameters():
        parameter.data = parameter.data.double()
    disturb(policy, 0.3)
    twin = copy.deepcopy(policy)
    assert fuse(policy).mlps == 2
    switches = AdapterSwitch(policy), AdapterSwitch(twin)
    for name in ("default", "second", "dora", "default", "second"):
        policy.set_adapter(name)
        twin.set_adapter(name)
        assert relative_difference(gradients(policy), gradients(twin)) < 1e-12
        with torch.no_grad(), switches[0].to("reference"), switches[1].to("reference"):
            ours, theirs = (model(input_ids=IDS).logits for model in (policy, twin))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("modules", [["lm_head"], ["gate_proj"], ["embed_tokens", "norm"], ["mlp"]])
def test_modules_that_are_trained_in_full_stand_beside_fused_ones(modules):
    targets = [name for name in ("q_proj", "v_proj", "up_proj", "down_proj") if not {"mlp", "gate_proj"} & {*modules}]
    config = lora(modules_to_save=modules, target_modules=targets or ["q_proj", "k_proj", "o_proj"])
    policy = attach_lora(tiny_base(dtype=torch.float64), config)
    disturb(policy)
    expected = gradients(policy)
    report = fuse(policy)
    assert report.shared
    found = gradients(policy)
    assert any("modules_to_save" in name for name in found)
    assert relative_difference(found, expected) < 1e-9
    with torch.no_grad(), AdapterSwitch(policy).off():
        base = policy(input_ids=IDS).logits
    torch.testing.assert_close(base, tiny_base(dtype=torch.float64)(input_ids=IDS).logits, rtol=1e-9, atol=1e-9)


# ---- differentiation


@pytest.mark.parametrize("recompute", ["none", "mlp"])
def test_a_graph_that_is_kept_gives_the_same_gradients_twice(recompute):
    policy = tiny_policy()
    fuse(policy, recompute=recompute)
    policy.zero_grad()
    loss = policy(input_ids=IDS).logits.double().log_softmax(-1)[..., 5].sum()
    loss.backward(retain_graph=True)
    once = adapter_gradients(policy)
    loss.backward()
    for name, gradient in adapter_gradients(policy).items():
        assert torch.equal(gradient, 2 * once[name])


@pytest.mark.parametrize("power", [1, 2])
def test_a_second_derivative_is_refused(power):
    """Also of a linear loss, whose incoming gradient has no graph: terms would be missing without a word."""
    policy = tiny_policy(dtype=torch.float64)
    fuse(policy)
    loss = (policy(input_ids=IDS).logits ** power).sum()
    adapter = [parameter for name, parameter in policy.named_parameters() if "lora_" in name]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, adapter, create_graph=True)


def test_a_step_between_forward_and_backward_is_noticed():
    policy = tiny_policy()
    fuse(policy)
    loss = policy(input_ids=IDS).logits.sum()
    with torch.no_grad():
        policy.get_base_model().model.layers[0].mlp.up_proj.lora_B["default"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- arithmetic and inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [True, False])
def test_with_and_without_autocast_it_computes_in_what_peft_computes_in(dtype, cast):
    policy = tiny_policy(dtype=dtype)
    twin = copy.deepcopy(policy)
    assert fuse(policy).mlps == 2
    found = []
    for model in (policy, twin):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            found.append((model(input_ids=IDS, use_cache=False).logits, gradients(model)))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert ours.dtype == theirs.dtype
    narrow = cast or dtype == torch.bfloat16
    assert (ours - theirs).norm() <= (0.03 if narrow else 1e-6) * theirs.norm()
    assert relative_difference(our_gradients, their_gradients) < (0.05 if narrow else 1e-5)


def test_inputs_of_any_shape_and_layout():
    policy = tiny_policy(dtype=torch.float64)
    fuse(policy)
    layer = policy.get_base_model().model.layers[0]
    wide = torch.randn(6, 64, 5, dtype=torch.float64)
    inputs = [
        wide.transpose(1, 2)[..., ::2],  # strided
        wide[0].T[:, :32],
        wide[:, :32, 0],
        wide[0, :32, 0],
        wide.transpose(1, 2)[:, None, :, :32],
        wide[:0, :32, 0],
        wide[:1, :32, 0].expand(4, 32),
    ]
    for x in inputs:
        for module in (layer.self_attn.q_proj, layer.mlp, layer.input_layernorm):
            found, expected = module(x), type(module).forward(module, x)
            assert found.shape == expected.shape
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)  # the norm's own is rounded to fp32


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double"])
def test_a_fresh_adapter_on_a_base_in_4_bits_and_bfloat16_is_the_switched_off_one_to_the_last_bit(
    tmp_path, quantization
):
    tiny_base().save_pretrained(tmp_path)
    policy = attach_lora(load_base(str(tmp_path), quantization=quantization, dtype="bfloat16"), lora())
    assert fuse(policy, recompute="mlp").mlps == 2
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fresh = policy(input_ids=IDS).logits
        with AdapterSwitch(policy).off():
            assert torch.equal(policy(input_ids=IDS).logits, fresh)


# ---- afterwards


def test_after_fusing_a_policy_merges_and_generates_as_one_that_never_was(tmp_path):
    policy = tiny_policy()
    twin = copy.deepcopy(policy)
    fuse(policy)
    gradients(policy)
    ours, theirs = (model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False) for model in (policy, twin))
    assert torch.equal(ours, theirs)
    unfuse(policy)
    merged = policy.merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    expected = twin.merge_and_unload().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())


def test_a_policy_that_is_merged_while_fused_loses_nothing():
    policy = tiny_policy()
    expected = copy.deepcopy(policy).merge_and_unload().state_dict()
    fuse(policy)
    merged = policy.merge_and_unload()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())
    logits = merged(input_ids=IDS).logits
    unfuse(merged)
    torch.testing.assert_close(merged(input_ids=IDS).logits, logits)


def test_elementwise_functions_that_are_unknown_are_refused():
    with pytest.raises(InputError, match=r"kernels\.elementwise"):
        fuse(tiny_policy(), elementwise="cuda")
