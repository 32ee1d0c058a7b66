"""Which functions fused blocks compute with: the set that was asked for, once it is known to compute the same."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as interleaved
from transformers.models.llama import modeling_llama

from lorafocal.errors import InputError
from lorafocal.model.fused import _Door, fuse, unfuse
from lorafocal.model.stand_ins import FusedLinear, FusedRotary
from lorafocal.ops.elementwise import TORCH, Elementwise
from lorafocal.ops.kernel_check import rope_results
from lorafocal.ops.logps import Fold
from tests.model.families import text_policy
from tests.model.test_fused import assert_same_step, logits, step, trainable
from tests.no_memory import lacking, whoever_says_it
from tests.tiny import disturb, relative_difference, tiny_policy

pytestmark = pytest.mark.slow


def counting(counts: Counter[str], name: str) -> Callable[..., Tensor]:
    own = getattr(TORCH, name)

    def function(*given: Tensor) -> Tensor:
        counts[name] += 1
        return own(*given)

    return function


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_queries_and_keys_are_turned_by_the_set_s_own_rope_and_by_nothing_else(family):
    policy = disturb(trainable(text_policy(family)))
    layers = policy.config.num_hidden_layers
    expected = step(policy)
    assert fuse(policy).rotary == layers
    counts: Counter[str] = Counter()
    functions = replace(TORCH, **{name: counting(counts, name) for name in ("rope", "rope_backward")})
    for module in policy.modules():
        if isinstance(getattr(vars(module).get("forward"), "__self__", None), FusedRotary):
            FusedRotary(module, functions).install()
    found = step(policy)
    assert counts == {"rope": 2 * layers, "rope_backward": 2 * layers}
    assert relative_difference(found[1], expected[1]) < 1e-12
    other = text_policy(family)
    assert torch.equal(logits(other), logits(copy.deepcopy(other)))
    assert counts["rope"] == 2 * layers  # other models of the family go on as they were


@pytest.mark.skipif(not hasattr(PreTrainedConfig, "is_heterogeneous"), reason="layers are alike in older transformers")
def test_where_layers_differ_in_their_heads_rope_is_checked_for_each_number_of_them(monkeypatch):
    """As in Step 3.7, where layers with a window have more heads."""
    checked = set()

    def check(_, module, results, x, *more):
        if results is rope_results:
            checked.add(x.shape[1])

    monkeypatch.setattr(_Door, "_check_kernels", check)
    policy = tiny_policy()
    policy.config.per_layer_config = {1: {"num_attention_heads": 8}}
    assert fuse(policy).rotary == 2
    assert checked == {2, 4, 8}


@whoever_says_it
def test_a_device_without_memory_is_no_fault_of_a_block(monkeypatch, error):
    monkeypatch.setattr(FusedLinear, "fused", lacking(error))
    with pytest.raises(type(error)) as raised:
        fuse(tiny_policy())
    assert raised.value is error


@pytest.mark.row("35")
def test_a_rotary_embedding_of_another_formula_stays_and_is_told_by_name(monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", interleaved)
    policy = disturb(tiny_policy(dtype=torch.float64))
    report = assert_same_step(policy)
    assert (report.rotary, report.mlps) == (0, 2)
    assert report.fallbacks["a rotary embedding (LlamaAttention) of another formula"] == 2


@pytest.mark.row("35")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("rms_norm", "LlamaRMSNorm"),
        ("rms_norm_backward", "LlamaRMSNorm"),
        ("swiglu", "LlamaMLP"),
        ("swiglu_backward_", "LlamaMLP"),
        ("rope", "LlamaAttention"),
        ("rope_backward", "LlamaAttention"),
        ("head_fold_", "Linear"),
    ],
)
def test_kernels_that_compute_something_else_on_this_device_are_refused(name, where, dtype):
    def off(x: Tensor, *given: Any) -> Any:
        return getattr(TORCH, name)(1.5 * x + 1.0, *given)

    def failing(*given: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    policy = tiny_policy(dtype=dtype)

    def nothing(*given: Any) -> Any:
        found = getattr(TORCH, name)(*given)
        wrong = found if isinstance(found, Tensor) else found[-1] if isinstance(found[-1], Tensor) else found[0]
        wrong.fill_(float("nan"))
        return found

    other = rf"something else than torch does.*\({where}, "
    for function, said in ((off, other), (nothing, other + "off by nan"), (failing, rf"{where}.*kernel image")):
        with pytest.raises(InputError, match=said):
            opened(policy, replace(TORCH, **{name: function}))


@pytest.mark.row("35")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_that_round_otherwise_are_taken(dtype):
    """Each computes in float64, and rounds once: no probe asks for what cancels."""
    assert opened(tiny_policy(dtype=dtype), replace(TORCH, **{name: wider(name) for name in FUNCTIONS}))["mlps"] == 2


FUNCTIONS = ("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward_", "rope", "rope_backward", "head_fold_")


def wider(name: str) -> Callable[..., Any]:
    function = getattr(TORCH, name)

    def widened(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    def call(*given: Any) -> Any:
        expected = function(given[0].clone(), *given[1:])  # all that may be written over; collisions are filled in
        if name == "head_fold_":
            fold = function(*map(widened, given[:4]), None)  # as Triton's: all of the factor is in the error
            error = None if fold.error is None else (fold.error * fold.factor).to(expected.error.dtype)
            return Fold(fold.logps.to(expected.logps), error, 1.0)
        found = function(*map(widened, given))
        if isinstance(found, Tensor):
            return found.to(expected.dtype)
        return tuple(one.to(other.dtype) for one, other in zip(found, expected, strict=True))

    return call


def opened(policy: PeftModel, functions: Elementwise) -> Counter[str]:
    unfuse(policy)
    door = _Door(policy, TORCH, recompute=False)
    door.functions = functions  # on a CPU
    door.open()
    return door.fused
