"""Both streams are the answers that transformers' `generate` gives, and neither knows of the other."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig

from lorafocal.chat.partner import meet
from lorafocal.chat.streams import TokenStream, in_turn
from lorafocal.model.adapters import AdapterSwitch, adapter_layers
from lorafocal.model.saved import open_adapter, read_adapter
from tests.saved_run import save_run
from tests.spoken import PROMPT, QUESTION, both, drawing, generated
from tests.tiny import enlarged, tiny_base, tiny_policy

pytestmark = pytest.mark.slow


@pytest.mark.row("6")
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_both_streams_are_the_answers_of_generate(kind: str) -> None:
    """Mistral's window is shorter than its prompt, so that its cache forgets while the other stream goes on."""
    policy, base = tiny_policy(kind).eval(), tiny_base(kind).eval()
    before = torch.random.get_rng_state()
    for how in (drawing(), drawing(0.7), drawing(1.0, seed=4)):
        assert both(policy, how) == (generated(policy, how), generated(base, how))
    assert len(set(map(tuple, both(policy, drawing())))) == 2
    torch.random.set_rng_state(before)
    both(policy, drawing(0.7))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_between_two_tokens_the_adapter_is_on_and_an_answer_may_be_left_anywhere() -> None:
    policy = tiny_policy().eval()
    layers, how = adapter_layers(policy), drawing(ends=set())
    streams = [TokenStream(policy, PROMPT, how) for _ in range(2)]
    turns = in_turn([(streams[0], nullcontext), (streams[1], AdapterSwitch(policy).off)])
    for _ in range(5):
        next(turns)
        assert not any(layer.disable_adapters for layer in layers)
    assert [len(stream.ids) for stream in streams] == [3, 2]
    del turns
    assert both(policy, drawing()) == both(policy, drawing())


def test_a_stream_that_ends_early_leaves_the_other_alone() -> None:
    policy = tiny_policy().eval()
    on, off = both(policy, drawing(tokens=24))
    assert off[-1] == 1
    assert len(off) < len(on) == 24


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_on_quantised_bases_too(tmp_path: Path, quantization: str) -> None:
    saved = save_run(tmp_path, std=0.3, quantization=quantization, base_dtype=torch.float32, dtype="float32")
    partner = meet(saved.folder)
    ids, how = partner.speech.prompt_ids(QUESTION), drawing(0.7, tokens=12)
    fresh = open_adapter(read_adapter(saved.adapter), dtype="float32")
    on = generated(fresh, how, ids)
    off = generated(fresh.unload(), how, ids)
    assert both(partner.model, how, ids) == (on, off)
    assert on != off
    assert quantization in partner.voices[1].title


def test_a_model_without_such_a_cache_reads_the_whole_sequence() -> None:
    config = MambaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=1, pad_token_id=0, bos_token_id=0
    )
    torch.manual_seed(0)
    model = enlarged(AutoModelForCausalLM.from_config(config)).eval()
    streams = [TokenStream(model, prompt, drawing(0.7, tokens=8)) for prompt in (PROMPT, PROMPT[:3])]
    for _ in in_turn([(stream, nullcontext) for stream in streams]):
        pass
    for stream, prompt in zip(streams, (PROMPT, PROMPT[:3]), strict=True):
        assert stream.ids == generated(model, drawing(0.7, tokens=8), prompt)
