"""A fused policy computes what PEFT does, keeps less, leaves what it does not know, and can be undone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from lorafocal.errors import InputError
from lorafocal.model.adapters import AdapterSwitch, add_frozen_copy, attach_lora
from lorafocal.model.fused import FusedReport, fuse, unfuse
from lorafocal.model.load import load_base
from lorafocal.model.stand_ins import FusedLinear, StandIn
from tests.model.families import MUST_TRAIN_PACKED, text_policy
from tests.tiny import VOCABULARY, adapter_gradients, disturb, lora, relative_difference, tiny_base, tiny_policy

pytestmark = pytest.mark.slow

IDS = torch.randint(2, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
STARTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8}, "alpha_pattern": {"v_proj": 32}},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "attention alone": {"target_modules": ["q_proj", "v_proj"]},
    "down alone": {"target_modules": ["down_proj"]},
}


def logits(policy: nn.Module) -> Tensor:
    device = next(policy.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=policy.dtype == torch.bfloat16):
        return policy(input_ids=IDS.to(device), use_cache=False).logits


def step(policy: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and adapter gradients of one made-up loss."""
    policy.zero_grad()
    output = logits(policy)
    output.double().log_softmax(-1)[..., 5].sum().backward()
    return output.detach(), {name: gradient.double() for name, gradient in adapter_gradients(policy).items()}


def assert_same_step(policy: nn.Module, tolerance: float = 1e-12, **how: str) -> FusedReport:
    """PEFT's step, the fused one, and PEFT's again."""
    before, expected = step(policy)
    report = fuse(policy, **how)
    for _ in range(2):
        output, found = step(policy)
        assert relative_difference(found, expected) < tolerance
        assert (output - before).norm() <= tolerance * before.norm()
    unfuse(policy)
    after, again = step(policy)
    assert (after - before).norm() <= tolerance / 10 * before.norm()
    assert relative_difference(again, expected) <= tolerance / 10
    return report


@pytest.mark.parametrize("family", MUST_TRAIN_PACKED)
def test_gradients_are_peft_s_in_float64(family):
    report = assert_same_step(trainable(text_policy(family)))
    assert report.shared or family in ("phi3", "gpt2")
    assert report.mlps == (0 if family in ("phi3", "gpt2") else 2)


def trainable(policy: PeftModel) -> PeftModel:
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return policy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2"])
def test_rounding_takes_it_no_further_from_float64_than_peft(family, dtype):
    exact = trainable(text_policy(family))
    policy = trainable(text_policy(family, dtype))
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    exact.load_state_dict({name: tensor.double() for name, tensor in policy.state_dict().items()})
    _, truth = step(exact)
    before, theirs = step(policy)
    report = fuse(policy)
    output, ours = step(policy)
    assert (report.mlps, report.shared, report.linears, report.fallbacks) == (2, 2, 2, {})
    assert report.norms
    assert relative_difference(ours, truth) < 1.5 * relative_difference(theirs, truth) + 1e-7
    assert (output - before).norm() < (1e-6 if dtype == torch.float32 else 0.03) * before.norm()


@pytest.mark.parametrize("name", STARTS)
def test_every_start_and_pattern(name):
    starts_away = name in ("pissa", "olora")  # which PEFT computes in fp32 alone
    policy = attach_lora(tiny_base(dtype=torch.float32 if starts_away else torch.float64), lora(**STARTS[name]))
    tolerance = 1e-5 if starts_away else 1e-12
    report = assert_same_step(policy if starts_away else disturb(policy), tolerance)
    assert not {reason for reason in report.fallbacks if "Norm" not in reason}
    assert assert_same_step(policy, tolerance, recompute="mlp").recompute == "mlp"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_at_its_start_it_is_the_base_to_the_last_bit_as_is_the_adapter_switched_off(family, dtype):
    policy = trainable(text_policy(family, dtype))
    with AdapterSwitch(policy).off():
        base = logits(policy).detach()
    report = fuse(policy)
    assert report.linears
    with AdapterSwitch(policy).off(), torch.no_grad():
        assert torch.equal(logits(policy), base)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    assert torch.equal(logits(policy), base)


def test_the_switch_a_frozen_copy_merging_and_several_adapters_work_as_in_peft():
    policy = tiny_policy(dtype=torch.float64)
    add_frozen_copy(policy)
    disturb(policy, 0.2)
    twin = copy.deepcopy(policy)
    fuse(policy)
    switches = AdapterSwitch(policy), AdapterSwitch(twin)

    def same() -> Tensor:
        with torch.no_grad():
            ours, theirs = logits(policy), logits(twin)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        return ours

    seen = [same()]
    with switches[0].off(), switches[1].off():
        seen.append(same())
    with switches[0].to("reference"), switches[1].to("reference"):
        seen.append(same())
    with switches[0]._set("_active_adapter", ["default", "reference"]):
        assert not torch.allclose(logits(policy), seen[0])
    for model in (policy, twin):
        model.merge_adapter(["default"])
    same()
    for model in (policy, twin):
        model.unmerge_adapter()
    seen.append(same())
    assert not torch.allclose(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2])
    torch.testing.assert_close(seen[3], seen[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logits(policy.merge_and_unload()), seen[0], rtol=1e-10, atol=1e-10)


def test_a_deep_copy_computes_with_its_own_adapter_and_names_stay():
    policy = tiny_policy()
    names, before = list(policy.state_dict()), logits(policy).detach()
    fuse(policy)
    twin = copy.deepcopy(policy)
    disturb(twin, 0.5)
    assert list(policy.state_dict()) == names
    torch.testing.assert_close(logits(policy), before)
    changed = logits(twin).detach()
    assert not torch.allclose(changed, before)
    unfuse(twin)
    torch.testing.assert_close(logits(twin), changed)
    unfuse(policy)
    assert not any("forward" in vars(module) for module in policy.modules())


def test_generation_and_saving_are_unchanged(tmp_path):
    policy = tiny_policy().eval()
    expected = policy.generate(input_ids=IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)
    fuse(policy)
    assert torch.equal(policy.generate(input_ids=IDS, max_new_tokens=8, do_sample=False, pad_token_id=0), expected)
    policy.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_base(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(policy))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"lora_dropout": 0.1}, "dropout"),
        ({"use_dora": True}, "another kind of adapter (Dora)"),
        ({"lora_bias": True}, "a bias in the adapter"),
        ({"modules_to_save": ["norm"]}, "norms that are trained"),
    ],
)
def test_what_is_not_fused_is_told_by_name_and_computes_as_ever(how, reason):
    policy = disturb(attach_lora(tiny_base(dtype=torch.float32), lora(**how)))
    report = fuse(policy)
    assert report.fallbacks[reason] == (1 if "modules_to_save" in how else 14)
    assert reason in str(report)
    if "lora_dropout" not in how:
        assert_same_step(policy, 1e-5)


def test_adapters_that_are_switched_to_what_is_not_fused_go_through_peft():
    policy = tiny_policy(dtype=torch.float64)
    add_frozen_copy(policy)
    twin = copy.deepcopy(policy)
    fuse(policy)
    for model in (policy, twin):
        model.base_model.set_adapter(["default", "reference"])
    assert relative_difference(step(policy)[1], step(twin)[1]) == 0


def test_several_active_adapters_are_told_by_name():
    policy = tiny_policy()
    add_frozen_copy(policy)
    policy.base_model.set_adapter(["default", "reference"])
    assert fuse(policy).fallbacks["several active adapters"] == 14


def test_an_mlp_that_gates_by_something_else_is_told_by_name():
    policy = disturb(attach_lora(tiny_base(dtype=torch.float32, hidden_act="relu"), lora()))
    report = fuse(policy)
    assert (report.mlps, report.fallbacks) == (0, {"an MLP (LlamaMLP) with another formula than SwiGLU or GeGLU": 2})
    assert_same_step(policy, 1e-5)


def test_bases_in_int8_half_precision_or_under_training_stay_as_they_are(tmp_path):
    tiny_base().save_pretrained(tmp_path)
    eight = attach_lora(load_base(str(tmp_path), quantization="int8", dtype="float32"), lora())
    assert fuse(eight).fallbacks["a base in int8, which rounds its inputs"] == 14
    assert "a base in float16" in fuse(tiny_policy(dtype=torch.float16)).fallbacks
    assert fuse(tiny_base().requires_grad_(True)).as_dict()["mlps"] == 0


@pytest.mark.parametrize("recompute", ["none", "mlp"])
@pytest.mark.parametrize("quantization", ["nf4", "nf4-double"])
def test_a_base_in_4_bits_is_dequantised_once_a_matrix_a_pass(quantization, recompute, tmp_path, monkeypatch):
    import bitsandbytes

    tiny_base().save_pretrained(tmp_path)
    policy = disturb(attach_lora(load_base(str(tmp_path), quantization=quantization, dtype="float32"), lora()))
    report = assert_same_step(policy, 1e-5, recompute=recompute)
    assert (report.mlps, report.shared, report.linears) == (2, 2, 2)
    calls, original = [], bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(
        bitsandbytes.functional, "dequantize_4bit", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    fuse(policy, recompute=recompute)
    calls.clear()
    output = logits(policy)
    assert len(calls) == 14
    output.sum().backward()
    assert len(calls) == 28 - 3  # nothing is asked for below the first layer's query, key and value


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.count += function.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return function(*arguments, **(named or {}))


def test_query_key_and_value_are_computed_by_the_first_of_them_and_nothing_is_left_behind():
    policy = tiny_policy()
    fuse(policy)
    with Products() as products:
        logits(policy)
    assert products.count == 2 * (7 + 7 + 4) + 1  # base, B, and A once for each of four inputs; the head
    shared = {module.forward.__self__.shared for module in policy.modules() if is_member(module)}
    assert len(shared) == 4
    assert not any(one._waiting for one in shared)


def is_member(module: nn.Module) -> bool:
    return isinstance(getattr(vars(module).get("forward"), "__self__", None), FusedLinear)


def test_layers_that_share_no_input_compute_for_themselves_and_nothing_stale_is_handed_out():
    policy = tiny_policy(dtype=torch.float64)
    fuse(policy)
    attention = policy.get_base_model().model.layers[0].self_attn
    x, other = torch.randn(2, 1, 4, 32, dtype=torch.float64)

    def twin(layer: Any, y: Tensor) -> Tensor:
        return type(layer).forward(layer, y)

    for _ in range(4):
        attention.q_proj(x)  # key and value are left lying
        torch.testing.assert_close(attention.k_proj(other), twin(attention.k_proj, other))
    attention.q_proj(x)
    x.mul_(2)
    torch.testing.assert_close(attention.v_proj(x), twin(attention.v_proj, x))
    attention.q_proj(x)
    with AdapterSwitch(policy).off():
        torch.testing.assert_close(attention.v_proj(x), twin(attention.v_proj, x))
    copy.deepcopy(policy)


def test_a_norm_s_output_that_is_written_into_is_kept_and_not_computed_again():
    policy = tiny_policy()
    layer = policy.get_base_model().model.layers[0]
    x = torch.randn(1, 4, 32)

    def gradient() -> Tensor:
        y = layer.input_layernorm(x).mul_(3)
        policy.zero_grad()
        layer.mlp(y).square().sum().backward()
        return layer.mlp.gate_proj.lora_A["default"].weight.grad.clone()

    expected = gradient()
    assert fuse(policy).norms
    torch.testing.assert_close(gradient(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", ["none", "mlp"])
def test_layers_that_are_computed_again_in_the_backward_may_be_fused(recompute):
    policy = tiny_policy(dtype=torch.float64).train()
    _, expected = step(policy)
    base = policy.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    fuse(policy, recompute=recompute)
    assert relative_difference(step(policy)[1], expected) < 1e-12
    shared = {module.forward.__self__.shared for module in policy.modules() if is_member(module)}
    assert not any(one._waiting for one in shared)


def test_words_that_mean_nothing_are_refused():
    with pytest.raises(InputError, match="choose one of none, mlp"):
        fuse(tiny_policy(), recompute="full")
    gpt2 = trainable(text_policy("gpt2"))
    with pytest.raises(InputError, match="no MLP block can be fused"):
        fuse(gpt2, recompute="mlp")
    assert not any("forward" in vars(module) for module in gpt2.modules())


def test_hooks_on_parts_that_would_not_be_called_keep_peft_s_forward():
    policy = tiny_policy()
    called: list[int] = []
    policy.get_base_model().model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: called.append(1))
    report = fuse(policy)
    logits(policy)
    assert called
    assert report.mlps == 1


def kept_bytes(layer: nn.Module, tokens: int) -> int:
    """Bytes that a layer's backward keeps, each storage once, parameters left out."""
    kept: dict[int, Tensor] = {}
    owned = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.zeros(1, tokens, 4096, dtype=torch.bfloat16).requires_grad_()
    around = torch.zeros(1, tokens, 128, dtype=torch.bfloat16)
    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        layer(x, position_embeddings=(around, around))
    owned.add(around.untyped_storage().data_ptr())
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in owned)


def bytes_a_token(layer: nn.Module) -> float:
    """What grows with the tokens: not PEFT's copies of its weights in bf16."""
    return (kept_bytes(layer, 6) - kept_bytes(layer, 2)) / 4


@pytest.mark.slow
def test_at_llama_3_8b_shapes_a_layer_keeps_what_the_formulas_say_and_half_of_peft_s_bytes():
    hidden, inner, keys, rank = 4096, 14336, 1024, 16
    config = LlamaConfig(
        vocab_size=8, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1, num_key_value_heads=8
    )
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base = base.to_empty(device="cpu").requires_grad_(False)
    for parameter in base.parameters():
        parameter.data.fill_(0.01)
    policy = attach_lora(base, lora(r=rank, lora_alpha=rank))
    layer = policy.get_base_model().model.layers[0]
    theirs = bytes_a_token(layer)
    norms, attention, small = 2 * (2 * hidden + 4), 2 * (2 * hidden + 2 * keys) + 4 * 32, 2 * 7 * rank
    assert fuse(policy).fallbacks == {}
    fused = bytes_a_token(layer)
    assert fused == norms + attention + small + 2 * 2 * inner
    assert fused * 32 <= 3.5 * 2**20
    assert fused < 0.52 * theirs
    fuse(policy, recompute="mlp")
    assert bytes_a_token(layer) == fused - 2 * 2 * inner


@pytest.mark.engine
def test_compiled_layers_trace_fused_functions_without_a_break():
    policy = tiny_policy()
    before = logits(policy).detach()
    fuse(policy)
    for layer in policy.get_base_model().model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(policy), before)


def test_a_fused_policy_can_be_pickled_and_stays_fused():
    policy = tiny_policy()
    report = fuse(policy)
    assert min(report.norms, report.rotary, report.mlps) > 0
    copied = pickle.loads(pickle.dumps(policy))
    assert torch.equal(logits(copied), logits(policy))
    standing = [{name for name, module in of.named_modules() if StandIn.of(module)} for of in (policy, copied)]
    assert standing[0] == standing[1]
    parts = {id(part) for part in copied.modules()}
    assert all(id(StandIn.of(module).module) in parts for module in copied.modules() if StandIn.of(module))
