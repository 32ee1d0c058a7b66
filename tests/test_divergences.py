"""The reference's rows and the policy against them, through a model's public call: families, heads, layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafocal.data.packing import Pack, pad_sequences, share_prefixes
from lorafocal.errors import InputError
from lorafocal.model.adapters import FROZEN_COPY, AdapterSwitch, add_frozen_copy, attach_lora
from lorafocal.ops.divergences import ComparedTokens
from lorafocal.policy import compared_tokens, plain_attention, prepare_policy, reference_rows, token_logps
from lorafocal.reference import (
    AdapterReference,
    CachedReference,
    DisabledAdapterReference,
    Reference,
    SeparateModelReference,
)
from tests.model.families import text_policy
from tests.tiny import disturb, lora, pairs, relative_difference, tiny_base, tiny_policy

BATCH = pairs(4)


def logits(model: nn.Module) -> list[Tensor]:
    """Log-probs of the whole vocabulary at each token of each answer, in the order of a pack's index."""
    answers = [(pair.prompt_ids, pair.chosen_ids) for pair in BATCH] + [(p.prompt_ids, p.rejected_ids) for p in BATCH]
    with plain_attention(model):
        return [
            model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            for prompt, answer in answers
        ]


def by_hand(policy: list[Tensor], reference: list[Tensor]) -> Tensor:
    pairs_of_rows = zip(policy, reference, strict=True)
    return torch.cat([(before.exp() * (before - now)).sum(-1) for now, before in pairs_of_rows])


def compared(model: nn.Module, reference: Reference, pack: Pack) -> ComparedTokens:
    return compared_tokens(model, pack, reference.rows(pack))


@pytest.mark.row("F11", "21")
@pytest.mark.parametrize("family", ["llama tied", "gemma2", "granite", "cohere2", "gpt2"])
def test_families_hand_through_what_their_head_returns(family: str) -> None:
    """Tied, capped, divided and multiplied logits; divergences, log-probs of both, and their gradients."""
    ours, plain = text_policy(family), text_policy(family)
    prepare_policy(ours)
    pack = share_prefixes(BATCH)
    found = compared(ours, DisabledAdapterReference(ours), pack)
    prepare_policy(plain)  # its own attention, which is exact
    now = logits(plain)
    with torch.no_grad(), AdapterSwitch(plain).off():
        before = logits(plain)
    expected = by_hand(now, before)
    rtol = 1e-5 if family == "gemma2" else 1e-9  # its own attention takes softmax in fp32
    torch.testing.assert_close(found.divergences, expected, rtol=rtol, atol=1e-2 * rtol)
    assert (found.divergences > 0).all()
    torch.testing.assert_close(found.logps, token_logps(ours, pack), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.reference, DisabledAdapterReference(ours).token_logps(pack), rtol=1e-12, atol=0)
    found.divergences.sum().backward()
    expected.sum().backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (ours, plain)]
    assert relative_difference(*gradients) < 1e-6


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_reference_with_a_head_of_its_own(layout: str) -> None:
    """A copy of a trained head, the base's head under it, and a second model: each by its own weights."""
    model = attach_lora(tiny_base(dtype=torch.float64), lora(modules_to_save=["lm_head"]))
    add_frozen_copy(disturb(model))
    heads = model.get_base_model().get_output_embeddings().modules_to_save
    heads["default"].weight.data *= 1.2
    heads[FROZEN_COPY].weight.data *= 0.9
    second = tiny_policy(dtype=torch.float64)
    second.get_output_embeddings().weight.data *= 0.7
    for one in (model, second):
        prepare_policy(one, layout=layout)
    pack = (share_prefixes if layout == "packed" else pad_sequences)(BATCH)
    switch = AdapterSwitch(model)
    with torch.no_grad():
        now, other = logits(model), logits(second)
        with switch.off():
            base = logits(model)
        with switch.to(FROZEN_COPY):
            copied = logits(model)
    for reference, before in (
        (DisabledAdapterReference(model), base),
        (AdapterReference(model, FROZEN_COPY), copied),
        (SeparateModelReference(second), other),
    ):
        model.zero_grad()
        found = compared(model, reference, pack)
        torch.testing.assert_close(found.divergences, by_hand(now, before), rtol=1e-9, atol=1e-11)
        found.divergences.sum().backward()
        assert heads["default"].weight.grad.count_nonzero() > 0
        assert heads[FROZEN_COPY].weight.grad is None
        assert second.get_output_embeddings().weight.grad is None


def test_tokens_that_are_trained_in_a_tied_head() -> None:
    """The reference's head is the base's own tensor, the policy's that with other rows."""
    tied = tiny_base(dtype=torch.float64, tie_word_embeddings=True)
    model = attach_lora(tied, lora(trainable_token_indices=[3, 5, 8]))
    prepare_policy(disturb(model))
    for name, parameter in model.named_parameters():
        if "trainable_tokens" in name and parameter.requires_grad:
            parameter.data += 0.5
    with torch.no_grad():
        now = logits(model)
        with AdapterSwitch(model).off():
            before = logits(model)
    found = compared(model, DisabledAdapterReference(model), share_prefixes(BATCH))
    torch.testing.assert_close(found.divergences, by_hand(now, before), rtol=1e-9, atol=1e-11)


@pytest.mark.row("1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_at_the_start_nothing_diverges_to_the_last_bit(dtype: torch.dtype, saved: Any) -> None:
    model = attach_lora(tiny_base(dtype=dtype), lora(modules_to_save=saved))
    prepare_policy(model)
    found = compared(model, DisabledAdapterReference(model), share_prefixes(BATCH))
    assert found.divergences.dtype == torch.float32
    assert found.divergences.count_nonzero() == 0
    assert torch.equal(found.logps, found.reference)
    assert not found.reference.requires_grad
    found.divergences.sum().backward()
    assert all(p.grad.count_nonzero() == 0 for p in model.parameters() if p.grad is not None)


def test_the_references_pass_multiplies_by_no_head_and_keeps_no_graph() -> None:
    model = tiny_policy()
    prepare_policy(model)
    pack, widest = share_prefixes(BATCH), 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal widest
            out = function(*args, **(kwargs or {}))
            widest = max(widest, *(t.shape[-1] for t in torch.utils._pytree.tree_leaves(out) if t.ndim > 1), 0)
            return out

    with Watch():
        rows = reference_rows(model, pack)
    assert widest < 97
    assert rows.hidden.shape == (len(pack.index.labels), 32)
    assert not rows.hidden.requires_grad
    assert rows.weight is model.get_output_embeddings().weight  # no copy
    assert token_logps(model, pack).shape == (len(pack.index.labels),)  # the head is as it was


def test_stored_log_probs_have_no_rows() -> None:
    with pytest.raises(InputError, match="whole distribution"):
        CachedReference().rows(share_prefixes(BATCH))
