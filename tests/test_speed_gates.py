"""What a step must not do more of than it needs: operations, bytes, padding, waits, reference forwards, logits.

Counted operator by operator, so the numbers are the same on every machine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from lorafocal import memory
from lorafocal.data.packing import PairCollator
from lorafocal.data.tokens import TokenizedPair
from lorafocal.memory import Lengths, Setup, Shape
from lorafocal.model.adapters import attach_lora
from lorafocal.model.fused import fuse
from lorafocal.model.head import causal_lm
from lorafocal.ops import attention, logps
from lorafocal.policy import sequence_logps
from lorafocal.probes import choose_layout
from lorafocal.trainer import FocalPOTrainer
from tests import tiny
from tests.counting import Counter

VOCABULARY, HIDDEN = 1009, 128
R = 8

# Tokens of prompts and answers: medians and spreads of the logarithm.
ULTRAFEEDBACK = ((150, 0.8), (240, 0.7), (240, 0.7))
JUDGED = ((25, 0.86), (530, 0.93), (140, 1.16))


def lengths(
    kind: Sequence[tuple[float, float]], count: int, *, scale: float = 1.0, longest: int = 1024
) -> list[Lengths]:
    generator = random.Random(0)

    def draw(median: float, spread: float) -> int:
        return min(max(1, round(scale * median * math.exp(generator.gauss(0, spread)))), longest)

    return [Lengths(*(draw(*of) for of in kind)) for _ in range(count)]


def pairs_of(all_lengths: Sequence[Lengths]) -> list[TokenizedPair]:
    generator = random.Random(1)

    def tokens(length: float) -> list[int]:
        return [generator.randrange(VOCABULARY) for _ in range(int(length))]

    return [
        TokenizedPair(f"pair-{n}", tokens(of.prompt), tokens(of.chosen), tokens(of.rejected))
        for n, of in enumerate(all_lengths)
    ]


def base(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False)


LENGTHS = lengths(ULTRAFEEDBACK, 12, scale=0.2)
PAIRS = pairs_of(LENGTHS)
SHAPE = Shape.of(base().config.to_dict())
SETUP = Setup(dtype="float32", r=R, attention="sdpa", reference="cached")


def run_of(folder: Any, *, cached: bool = True, **settings: Any) -> FocalPOTrainer:
    reference = {"reference": "cached", "reference_store": str(folder / "store")} if cached else {}
    defaults = {"model": base(), "peft_config": tiny.lora(r=R), "tokens_per_pack": 600, "pairs_per_step": len(PAIRS)}
    run = tiny.trainer(folder / "run", PAIRS, **(defaults | reference | settings))
    if cached:
        run.cache_reference()
        run.look_up_reference()
    run.create_optimizer_and_scheduler(1)
    return run


def step(run: FocalPOTrainer) -> None:
    run.training_step(run.model, next(iter(run.get_train_dataloader())))


# ---- the counter --------------------------------------------------------------------------------------------------


def test_the_counter_agrees_with_torchs_own_where_that_sees_everything() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(7, 6, requires_grad=True)
    with FlopCounterMode(display=False) as theirs:
        (layer(x) @ torch.randn(5, 3)).sum().backward()
    with Counter() as ours:
        (layer(x) @ torch.randn(5, 3)).sum().backward()
    assert ours.flops == theirs.get_total_flops() > 0


def test_the_counter_sees_products_into_memory_that_is_there() -> None:
    x, y, out = torch.randn(4, 5), torch.randn(5, 6), torch.zeros(4, 6)
    batched = torch.randn(2, 4, 5), torch.randn(2, 5, 6), torch.zeros(2, 4, 6)
    with Counter() as counter:
        out.addmm_(x, y)
        torch.mm(x, y, out=out)
        batched[2].baddbmm_(batched[0], batched[1])
    assert counter.flops == 2 * 4 * 5 * 6 * 4


def test_the_counter_sees_attention_and_its_backward() -> None:
    q, k, v = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    with Counter() as counter:
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        forward = counter.flops
        out.sum().backward()
    assert forward == 2 * 2 * 2 * 8 * (6 * 7 // 2)
    assert counter.flops == 3.5 * forward


# ---- gates --------------------------------------------------------------------------------------------------------


def a_call_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as on a GPU, where its kernel passes over what is masked."""
    monkeypatch.setattr(attention, "ROW_BLOCKS", None)


@pytest.mark.parametrize("saved", [(), ("lm_head",)])
@pytest.mark.parametrize("blocks", [False, True])
def test_operations_a_pair_are_the_least_that_the_exact_result_needs(tmp_path, monkeypatch, saved, blocks) -> None:
    """Prompts once, no padding, nothing again, no reference forward, no gradients of weights that are not trained.

    Blocks of rows compute what their mask hides, of pairs as short as these more than of others.
    """
    if not blocks:
        a_call_a_segment(monkeypatch)
    run = run_of(tmp_path, peft_config=tiny.lora(r=R, modules_to_save=list(saved)))
    with Counter() as counter:
        step(run)
    setup = replace(SETUP, modules_to_save=saved)
    least = sum(memory.minimum_flops_per_pair(SHAPE, setup, of) for of in LENGTHS)
    assert 0.9 < counter.flops / least <= (1.05 if blocks else 1.03)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ULTRAFEEDBACK, JUDGED])
@pytest.mark.parametrize("bucket", [1, 256])
def test_at_8k_tokens_hardly_a_row_is_empty(kind, bucket) -> None:
    """Neither filler rows, nor packs that are far from full: steps of 128 pairs."""
    collator = PairCollator(tokens_per_pack=8192, bucket=bucket)
    sizes = lengths(kind, 12 * 128, longest=2048)
    pairs = [TokenizedPair("", *([0] * int(n) for n in (of.prompt, of.chosen, of.rejected))) for of in sizes]
    packs = [pack for at in range(0, len(pairs), 128) for pack in collator(pairs[at : at + 128]).packs]
    needed, rows = sum(pair.shared_length for pair in pairs), sum(pack.num_rows for pack in packs)
    assert max(pack.num_rows for pack in packs) <= 8192
    assert (rows - needed) / rows <= (0.05 if bucket > 1 else 0.0)
    assert needed / (8192 * len(packs)) >= 0.95


@contextmanager
def forwards(model: nn.Module) -> Iterator[list[bool]]:
    """Whether each forward of the base records gradients."""
    seen: list[bool] = []
    body = causal_lm(model).base_model  # PEFT 0.18 calls its base past hooks
    handle = body.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    yield seen
    handle.remove()


@pytest.mark.row("34")
@pytest.mark.parametrize("cached", [True, False])
def test_with_a_store_no_reference_forward_is_run_and_one_a_pack_without(tmp_path, cached) -> None:
    run = run_of(tmp_path, cached=cached)
    packs = len(run.data_collator(PAIRS).packs)
    with forwards(run.model) as seen:
        step(run)
    assert packs > 2
    assert (seen.count(True), seen.count(False)) == (packs, 0 if cached else packs)


@pytest.mark.parametrize("keys", ["sdpa", "repeated", "blocks"])
@pytest.mark.parametrize("tier", ["none", "mlp"])
def test_a_pack_keeps_no_more_bytes_than_the_planner_says(tier, keys, monkeypatch) -> None:
    """Blocks of rows keep less than a call a segment: no outputs, sums of scores or prompts beside rejected answers."""
    monkeypatch.setattr(attention, "_takes_groups", lambda *given: keys == "sdpa")
    if keys != "blocks":
        a_call_a_segment(monkeypatch)
    policy = attach_lora(base(), tiny.lora(r=R))
    fuse(policy, recompute=tier)
    choose_layout(policy, "packed")
    pack = PairCollator(tokens_per_pack=10**6)(PAIRS).packs[0]
    policy.train()
    with Counter() as counter:
        kept = sequence_logps(policy, pack)
        live = counter.live_bytes
    mean = Lengths(
        *(sum(getattr(of, side) for of in LENGTHS) / len(LENGTHS) for side in ("prompt", "chosen", "rejected"))
    )
    word = "sdpa" if keys == "blocks" else keys
    planned = memory.activation_bytes_per_token(SHAPE, Setup(dtype="float32", r=R, attention=word, lengths=mean), tier)
    assert kept.chosen.requires_grad
    least, most = (0.75, 0.9) if keys == "blocks" else (0.9, 1.0)
    left_out = 48  # ids, positions and sums of tokens
    assert live / pack.num_rows <= planned * most + left_out
    assert live / pack.num_rows >= planned * least


def test_nothing_from_the_first_layer_on_waits_for_the_device(tmp_path) -> None:
    """Before the layers transformers itself looks once at the positions."""
    run = run_of(tmp_path)
    pack = run.data_collator(PAIRS).packs[0]
    with Counter() as counter:
        before: list[int] = []
        causal_lm(run.model).base_model.layers[0].register_forward_pre_hook(
            lambda *_: before.append(len(counter.waits))
        )
        scored = sequence_logps(run.model, pack)
        scored.chosen.sum().backward()
    assert before == [len(counter.waits)]
    assert before[0] <= 1
    with Counter() as counter:
        scored.chosen.detach().sum().item()
    assert counter.waits  # it would be seen


@pytest.mark.row("36")
@pytest.mark.parametrize(("tiles", "blocks"), [(True, True), (True, False), (False, False)])
def test_logits_are_never_there_beyond_a_chunk(tmp_path, monkeypatch, tiles, blocks) -> None:
    """Neither forward nor backward, and in tiles none as wide as the vocabulary; the head's weight, whose other side is
    the hidden size, was there before."""
    run = run_of(tmp_path)
    if not blocks:
        a_call_a_segment(monkeypatch)
    if not tiles:
        monkeypatch.setattr(logps, "takes_tiles", lambda *_: False)  # as on a GPU
    answers = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in PAIRS)
    monkeypatch.setattr(logps, "CHUNK_ELEMENTS", 64 * VOCABULARY)
    with Counter() as counter:
        step(run)
    tile = max(shape[0] for shape in counter.shapes if len(shape) == 1)  # its memory has no other form
    most = counter.largest(VOCABULARY)
    assert (most == 0) is tiles
    if not blocks:  # whose scores have memory of that form as well
        assert 32 * VOCABULARY < (tile if tiles else most) <= 64 * VOCABULARY < answers * VOCABULARY / 10
