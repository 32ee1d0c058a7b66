"""A reference that moves is, in Delta W, the float64 recursion of the policies it has followed."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from lorafocal.data.packing import share_prefixes
from lorafocal.errors import InputError
from lorafocal.model.adapters import FROZEN_COPY, add_frozen_copy, attach_lora, check_trainable
from lorafocal.model.fused import fuse
from lorafocal.model.moving import move, reference_state, restore_reference
from lorafocal.policy import prepare_policy, sequence_logps
from lorafocal.reference import build_reference
from tests.tiny import disturb, lora, pairs, tiny_base

PACK = share_prefixes(pairs(6))
ALL = {"modules_to_save": ["norm"], "trainable_token_indices": [3, 7]}


def start(**more) -> PeftModel:
    policy = attach_lora(tiny_base(), lora(**more))
    add_frozen_copy(policy)
    prepare_policy(policy)
    return policy


def trained(policy: PeftModel, step: int) -> None:
    """As if a step had been taken: every trained tensor somewhere else."""
    draw = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in check_trainable(policy).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))


def weights(policy: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Delta W of every layer, and what is trained whole, in float64."""
    found = {
        path: layer.scaling[adapter] * layer.lora_B[adapter].weight.double() @ layer.lora_A[adapter].weight.double()
        for path, layer in policy.named_modules()
        if isinstance(layer, LoraLayer)
    }
    whole = ("modules_to_save", "trainable_tokens_delta")
    for name, parameter in policy.named_parameters():
        if any(f"{kind}.{adapter}" in name for kind in whole):
            found[name.replace(f".{adapter}", "")] = parameter.detach().double()
    return {name: tensor.detach() for name, tensor in found.items()}


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm().clamp(min=1e-12)) for n in expected)


@pytest.mark.row("1")
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, ALL, {"rank_pattern": {"q_proj": 2}}])
@pytest.mark.parametrize("mixing", [0.5, 0.6])
def test_the_reference_is_the_recursion_in_delta_w(more, mixing):
    policy = start(**more)
    expected = weights(policy, FROZEN_COPY)
    for step in range(4):
        trained(policy, step)
        move(policy, mixing)
        own = weights(policy, "default")
        expected = {name: mixing * own[name] + (1 - mixing) * expected[name] for name in expected}
        assert apart(weights(policy, FROZEN_COPY), expected) < 1e-6
    assert not any(p.requires_grad for n, p in policy.named_parameters() if f".{FROZEN_COPY}" in n)


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, ALL])
def test_a_hard_move_copies_bit_for_bit(more):
    policy = start(**more)
    trained(policy, 1)
    move(policy, 1.0)
    own = {name.replace(".default", f".{FROZEN_COPY}"): p for name, p in check_trainable(policy).items()}
    state = reference_state(policy)
    assert state.keys() == own.keys()
    assert all(torch.equal(state[name], p) for name, p in own.items())
    at_once = sequence_logps(policy, PACK)
    assert all(torch.equal(a, b) for a, b in zip(build_reference("moving", policy).logps(PACK), at_once, strict=True))
    trained(policy, 2)
    assert all(torch.equal(state[name], p) for name, p in reference_state(policy).items())


@pytest.mark.parametrize("fused", [False, True])
def test_what_it_computes_is_the_averaged_weight(fused):
    """At another rank than the policy's: in the layers, by PEFT's own forward and by the fused functions."""
    policy = start()
    if fused:
        fuse(policy)
    for step in range(3):
        trained(policy, step)
        move(policy, 0.5)
    ranks = {layer.lora_A[FROZEN_COPY].weight.shape[0] for layer in policy.modules() if isinstance(layer, LoraLayer)}
    assert max(ranks) > 4
    base = tiny_base()
    change = weights(policy, FROZEN_COPY)
    with torch.no_grad():
        for path, layer in base.named_modules():
            if f"base_model.model.{path}" in change:
                layer.weight.add_(change[f"base_model.model.{path}"].float())
    prepare_policy(base)
    for ours, whole in zip(build_reference("moving", policy).logps(PACK), sequence_logps(base, PACK), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-3)


def test_a_saved_reference_comes_back_at_its_rank_and_nothing_else_does():
    policy = start(**ALL)
    for step in range(3):
        trained(policy, step)
        move(policy, 0.6)
    state = reference_state(policy)
    again = start(**ALL)
    restore_reference(again, state)
    assert all(torch.equal(state[name], tensor) for name, tensor in reference_state(again).items())
    trained(policy, 9)
    before = reference_state(again)
    for broken in (dict([*state.items()][1:]), state | {next(iter(state)): torch.zeros(3, 5)}):
        with pytest.raises(InputError, match=r"reference\.safetensors"):
            restore_reference(again, broken)
    assert all(torch.equal(before[name], tensor) for name, tensor in reference_state(again).items())


def test_a_continued_adapters_own_change_counts():
    policy = disturb(attach_lora(tiny_base(), lora()), 0.2)
    add_frozen_copy(policy)
    first = weights(policy, "default")
    trained(policy, 3)
    move(policy, 0.5)
    own = weights(policy, "default")
    expected = {name: 0.5 * own[name] + 0.5 * first[name] for name in own}
    assert apart(weights(policy, FROZEN_COPY), expected) < 1e-6
