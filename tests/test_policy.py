"""Packs against one sequence at a time on plain transformers: values, gradients, neighbours, splits."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lorafocal import policy
from lorafocal.data.packing import PairCollator, pad_sequences, share_prefixes
from lorafocal.model.head import causal_lm
from lorafocal.objectives import build_objective, mean_loss
from lorafocal.ops import logps
from lorafocal.policy import plain_attention, prepare_policy, sequence_logps, token_logps
from lorafocal.reference import DisabledAdapterReference
from tests.model.families import MUST_TRAIN_PACKED, text_policy
from tests.tiny import adapter_gradients, pairs, relative_difference, tiny_policy

pytestmark = pytest.mark.slow

KINDS = ["llama", "mistral"]
OBJECTIVE = build_objective("focalpo", beta=0.5, gamma=0.05)


def alone(model, prompt_ids, completion_ids):
    """Summed log-prob of one completion from the model's own logits, one row, no mask, no padding."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    logits = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt_ids) :, None]).sum()


def twin_step(model, batch, reference):
    """The loss of a step, one sequence at a time."""
    chosen = torch.stack([alone(model, p.prompt_ids, p.chosen_ids) for p in batch])
    rejected = torch.stack([alone(model, p.prompt_ids, p.rejected_ids) for p in batch])
    return OBJECTIVE(type(reference)(chosen, rejected), reference).losses.sum() / len(batch), chosen, rejected


def packed_step(model, batch, budget, layout="packed"):
    """Gradients of one step, split into packs of `budget` rows; the loss."""
    model.zero_grad()
    reference = DisabledAdapterReference(model)
    total = 0.0
    for pack in PairCollator(layout, budget)(batch).packs:
        loss = mean_loss(OBJECTIVE(sequence_logps(model, pack), reference.logps(pack)).losses, len(batch))
        loss.backward()
        total += float(loss.detach())
    return total, adapter_gradients(model)


@pytest.mark.row("19", "20")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_scores_and_gradients_equal_one_sequence_at_a_time_in_float64(kind, layout):
    batch = pairs(7)
    plain = tiny_policy(kind, torch.float64)
    ours = copy.deepcopy(plain)
    prepare_policy(ours, layout=layout)
    pack = share_prefixes(batch) if layout == "packed" else pad_sequences(batch)
    reference = DisabledAdapterReference(ours).logps(pack)
    with torch.no_grad(), plain.disable_adapter():
        _, *sums = twin_step(plain, batch, reference)
    for got, wanted in zip(reference, sums, strict=True):
        assert (got - wanted).abs().max() < 1e-9
    loss, chosen, rejected = twin_step(plain, batch, reference)
    loss.backward()
    policy = sequence_logps(ours, pack)
    assert (policy.chosen - chosen).abs().max() < 1e-9
    assert (policy.rejected - rejected).abs().max() < 1e-9
    _, gradients = packed_step(ours, batch, 10_000, layout)
    assert relative_difference(gradients, adapter_gradients(plain)) < 1e-6


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_missing_rejected_answer_scores_nothing_and_leaves_the_rest_as_it_is(family, layout):
    """As in a plain SFT step: no row, no segment, no gradient, for a window, a cap and sinks alike."""
    whole = pairs(5)
    some = [replace(pair, rejected_ids=[]) if number % 2 else pair for number, pair in enumerate(whole)]
    build = share_prefixes if layout == "packed" else pad_sequences
    gradients, scores = [], []
    for batch in (whole, some):
        model = text_policy(family, torch.float32)
        prepare_policy(model, layout=layout)
        scores.append(sequence_logps(model, build(batch)))
        (scores[-1].chosen.sum() + scores[-1].rejected[::2].sum()).backward()
        gradients.append(adapter_gradients(model))
    torch.testing.assert_close(scores[1].chosen, scores[0].chosen)
    torch.testing.assert_close(scores[1].rejected[::2], scores[0].rejected[::2])
    assert (scores[1].rejected[1::2] == 0).all()
    assert relative_difference(gradients[1], gradients[0]) < 1e-5


@pytest.mark.row("20")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_changed_neighbour_moves_the_others_by_exactly_nothing(kind, dtype):
    model = tiny_policy(kind, dtype)
    prepare_policy(model)
    pack = share_prefixes(pairs(5))
    span = pack.segments.spans[2]
    ids = pack.input_ids.clone()
    ids[0, span.start : span.stop] = (ids[0, span.start : span.stop] + 11) % 97
    before, after = sequence_logps(model, pack), sequence_logps(model, replace(pack, input_ids=ids))
    for b, a in zip(before, after, strict=True):
        moved = (b - a).abs()
        assert moved[2] > 0
        assert (moved[torch.tensor([0, 1, 3, 4])] == 0).all()


@pytest.mark.row("15")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_any_split_of_a_step_into_packs_gives_the_same_gradients(dtype, tolerance, layout):
    batch = pairs(13)
    model = tiny_policy(dtype=dtype)
    prepare_policy(model, layout=layout)
    loss, whole = packed_step(model, batch, 100_000, layout)
    for budget in (1, 40, 111):
        split_loss, split = packed_step(model, batch, budget, layout)
        assert relative_difference(split, whole) < tolerance
        assert split_loss == pytest.approx(loss, rel=tolerance)


@pytest.mark.row("19")
def test_a_long_answers_sum_is_rounded_once(monkeypatch):
    """Two thousand tokens of a few nats: added up in fp32, the sum would be off by hundreds of its last bits."""
    [pair] = pairs(1)
    pair = replace(pair, chosen_ids=[5] * 2000, rejected_ids=[7] * 1500)
    of_tokens = -8 * torch.rand(3500, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(policy, "token_logps", lambda model, pack: of_tokens)
    sums = sequence_logps(torch.nn.Identity(), share_prefixes([pair]))
    exact = torch.stack([part.double().sum() for part in of_tokens.split([2000, 1500])])
    assert torch.equal(torch.cat((sums.chosen, sums.rejected)), exact.float())
    assert not torch.equal(torch.segment_reduce(of_tokens, "sum", lengths=torch.tensor([2000, 1500])), exact.float())


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_padded_agree_in_fp32(kind):
    model = tiny_policy(kind)
    prepare_policy(model)
    batch = pairs(7)
    packed = sequence_logps(model, share_prefixes(batch))
    with plain_attention(model):
        padded = sequence_logps(model, pad_sequences(batch))
    for a, b in zip(packed, padded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


@pytest.mark.row("19")
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_learned_positions_are_counted_from_the_start_of_each_sequence(layout):
    """GPT-2 adds an embedding of the position, so a shifted one changes everything, unlike with rotations."""
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    plain.transformer.wpe.weight.data *= 30
    ours = copy.deepcopy(plain)
    prepare_policy(ours, layout=layout)
    batch = pairs(9)
    with torch.no_grad():
        chosen = torch.stack([alone(plain, p.prompt_ids, p.chosen_ids) for p in batch])
        rejected = torch.stack([alone(plain, p.prompt_ids, p.rejected_ids) for p in batch])
        for mix in ([*range(9)], [8, 1], [4], [0, 3, 6]):
            pack = (share_prefixes if layout == "packed" else pad_sequences)([batch[i] for i in mix])
            scores = sequence_logps(ours, pack)
            torch.testing.assert_close(scores.chosen, chosen[mix], rtol=0, atol=1e-4)
            torch.testing.assert_close(scores.rejected, rejected[mix], rtol=0, atol=1e-4)


@pytest.mark.row("27")
def test_the_pad_token_changes_no_bit_of_loss_or_gradient():
    """The EOS as pad token too, which every answer ends with and earlier turns of a prompt hold."""
    eos, results = 1, []
    batch = [
        replace(
            p, prompt_ids=[5, eos, *p.prompt_ids], chosen_ids=[*p.chosen_ids, eos], rejected_ids=[*p.rejected_ids, eos]
        )
        for p in pairs(5)
    ]
    for pad in (0, eos, 42):
        model = tiny_policy()
        prepare_policy(model, layout="padded")
        pack = pad_sequences(batch, pad_token_id=pad)
        assert (pack.index.labels == eos).sum() == 2 * len(batch)
        scores = sequence_logps(model, pack)
        (scores.chosen - scores.rejected).sum().backward()
        results.append([*scores, *adapter_gradients(model).values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.row("36")
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("tiles", [True, False])
def test_the_head_sees_completions_only_and_a_chunk_at_a_time(layout, tiles, monkeypatch):
    """A scored and differentiated pack makes no tensor of more vocabulary rows than one chunk holds."""
    model, rows = tiny_policy(), 40
    prepare_policy(model, layout=layout)
    batch = [replace(p, prompt_ids=p.prompt_ids * 9) for p in pairs(13)]
    pack = share_prefixes(batch) if layout == "packed" else pad_sequences(batch)
    assert len(pack.index.labels) > 2 * rows
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", 97 * rows)
    if not tiles:
        monkeypatch.setattr(logps, "takes_tiles", lambda *_: False)  # as on a GPU
    largest, scored = 0, 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest, scored
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (97,):
                    largest = max(largest, tensor.numel() // 97)
            if function in (torch.ops.aten.mm.default, torch.ops.aten.mm.out) and out.shape[1] == 97:
                scored += out.shape[0]
            return out

    with Watch():
        scores = sequence_logps(model, pack)
        (scores.chosen - scores.rejected).sum().backward()
    assert 0 < largest <= rows
    assert scored == len(pack.index.labels)


def test_a_bf16_base_computes_under_autocast_with_fp32_log_probs_and_adapters():
    model = tiny_policy(dtype=torch.bfloat16)
    prepare_policy(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    exact = copy.deepcopy(model).double()
    batch = pairs(5)
    ours = token_logps(model, share_prefixes(batch))
    assert ours.dtype == torch.float32
    assert (ours - token_logps(exact, share_prefixes(batch))).abs().max() < 0.25
    assert not (ours == ours.bfloat16().float()).all()


@pytest.mark.row("F14")
def test_generation_works_inside_plain_attention_and_scoring_works_again_after_it():
    model = tiny_policy()
    fresh = copy.deepcopy(model)
    prepare_policy(model)
    prompt = torch.tensor([[5, 6, 7]])
    before = sequence_logps(model, share_prefixes(pairs(3)))
    with plain_attention(model):
        ours = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=1)
    assert torch.equal(ours, fresh.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=1))
    after = sequence_logps(model, share_prefixes(pairs(3)))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    model.set_attn_implementation("sdpa")  # for good, as the README says
    assert torch.equal(ours, model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=1))


def test_the_attention_comes_back_even_when_something_fails_inside():
    model = tiny_policy()
    prepare_policy(model)
    name = causal_lm(model).config._attn_implementation
    with pytest.raises(RuntimeError), plain_attention(model):
        raise RuntimeError
    assert causal_lm(model).config._attn_implementation == name


@pytest.mark.row("39")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(kind, reentrant):
    batch = pairs(5)
    model = tiny_policy(kind)
    prepare_policy(model)
    model.train()
    _, plain = packed_step(model, batch, 10_000)
    model.enable_input_require_grads()
    causal_lm(model).gradient_checkpointing_enable({"use_reentrant": reentrant})
    _, checkpointed = packed_step(model, batch, 10_000)
    assert relative_difference(checkpointed, plain) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_packs_score_like_one_sequence_at_a_time(kind, dtype):
    """In bf16, packs may be as far from float64 as the padded twin in the same dtype, times 3."""
    batch = pairs(9, longest=40)
    cuda = torch.device("cuda")
    model = tiny_policy(kind, dtype).to(cuda)
    exact = copy.deepcopy(model).double()
    prepare_policy(exact, layout="padded")
    prepare_policy(model)
    wanted = sequence_logps(exact, pad_sequences(batch).to(cuda))
    packed = sequence_logps(model, share_prefixes(batch).to(cuda))
    with plain_attention(model):
        padded = sequence_logps(model, pad_sequences(batch).to(cuda))
    for ours, twin, truth in zip(packed, padded, wanted, strict=True):
        assert (ours - truth).abs().max() <= 3 * (twin - truth).abs().max() + 1e-3
    reference = DisabledAdapterReference(model)
    again = reference.logps(share_prefixes(batch).to(cuda))
    assert all(torch.equal(a, b) for a, b in zip(again, reference.logps(share_prefixes(batch).to(cuda)), strict=True))


@pytest.mark.parametrize("family", MUST_TRAIN_PACKED)
def test_no_forward_of_a_pack_has_the_host_look_at_positions(monkeypatch, family):
    """transformers looks for packed sequences where it builds masks: on a GPU the host would wait for the device."""

    def looked(*_: object) -> None:
        raise AssertionError("the positions were looked at")

    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", looked)
    model = text_policy(family)
    prepare_policy(model)
    with torch.no_grad():
        assert sequence_logps(model, share_prefixes(pairs(3))).chosen.isfinite().all()
