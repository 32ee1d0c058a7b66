"""Loading bases: what is accepted, what is refused by name, and what identifies one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM, T5Config, T5ForConditionalGeneration

from lorafocal.data.packing import share_prefixes
from lorafocal.errors import InputError
from lorafocal.model import load as load_module
from lorafocal.model.load import base_fingerprint, check_length, check_vocabulary, load_base, load_tokenizer
from lorafocal.policy import prepare_policy, sequence_logps
from lorafocal.probes import LayoutChoice, choose_layout
from tests.model.families import random_model
from tests.tiny import SIZES, enlarged, pairs, tiny_base


@pytest.fixture
def saved(tmp_path):
    tiny_base().save_pretrained(tmp_path / "tiny-base")
    return tmp_path / "tiny-base"


def test_a_base_is_frozen_and_in_the_dtype_that_was_asked_for(saved):
    for dtype in ("float32", "bfloat16"):
        model = load_base(str(saved), dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
        assert not any(p.requires_grad for p in model.parameters())
        assert model.training


@pytest.mark.row("12")
def test_half_precision_is_refused_with_the_reason(saved):
    with pytest.raises(InputError, match="overflows"):
        load_base(str(saved), dtype="float16")


def test_a_shape_that_does_not_match_is_refused_by_key(saved):
    load_base(str(saved), dtype="float32", shape={"model_type": "llama", "hidden_size": SIZES["hidden_size"]})
    with pytest.raises(InputError, match="hidden_size"):
        load_base(str(saved), dtype="float32", shape={"model_type": "llama", "hidden_size": 4096})


def test_a_missing_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="no-such-model"):
        load_base(str(tmp_path / "no-such-model"))


@pytest.mark.newest  # transformers 5.5 makes up a Llama tokenizer of eight special tokens
def test_a_folder_without_tokenizer_is_refused(saved):
    with pytest.raises(InputError, match="tokenizer"):
        load_tokenizer(str(saved))


@pytest.mark.row("F15")
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "gemma3", "llava"])
def test_bases_without_sdpa_and_image_text_bases_load(family, tmp_path):
    random_model(family, torch.float32).save_pretrained(tmp_path / "base")
    model = load_base(str(tmp_path / "base"), dtype="float32")
    assert choose_layout(model, "auto") == LayoutChoice("packed", "")


def test_a_model_that_does_not_continue_text_is_refused_by_type(tmp_path):
    config = T5Config(vocab_size=97, d_model=32, d_ff=64, num_layers=1, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(InputError, match=r"'t5'.*causal language model"):
        load_base(str(tmp_path / "t5"))


def test_pickled_weights_are_not_read(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        load_base(str(saved))


def test_the_fingerprint_is_a_name_without_a_path_and_changes_with_one_byte(saved):
    before = base_fingerprint(str(saved))
    assert before["name"] == "tiny-base"
    assert before["revision"] is None
    assert base_fingerprint(f"{saved}/")["sha256"] == before["sha256"]
    weights = bytearray((saved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (saved / "model.safetensors").write_bytes(weights)
    assert base_fingerprint(str(saved))["sha256"] != before["sha256"]


def test_shards_are_part_of_the_fingerprint_and_may_not_lie_outside(tmp_path):
    tiny_base().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 1
    before = base_fingerprint(str(tmp_path / "sharded"))
    assert before != base_fingerprint(str(_single(tmp_path)))
    index = tmp_path / "sharded" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = "../../evil.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match="outside its folder"):
        base_fingerprint(str(tmp_path / "sharded"))


def _single(folder):
    tiny_base().save_pretrained(folder / "single")
    return folder / "single"


@pytest.mark.row("46")
def test_a_tokenizer_larger_than_the_vocabulary_is_refused():
    class Long(list):
        pass

    check_vocabulary(tiny_base(), Long(range(97)))
    with pytest.raises(InputError, match=r"98 tokens.* Resize and train the base's embeddings before"):
        check_vocabulary(tiny_base(), Long(range(98)))


def longrope(limit):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [9.0] * 4, "rope_theta": 10000.0}
    lengths = {"original_max_position_embeddings": limit, "max_position_embeddings": 64}
    torch.manual_seed(0)
    return enlarged(Phi3ForCausalLM(Phi3Config(**SIZES, **lengths, rope_parameters=rope | lengths))).eval()


@pytest.mark.row("20")
def test_lengths_at_which_a_pair_would_move_its_neighbours_are_refused():
    """Phi-3's long rotations begin for a whole batch with its longest sequence."""
    model = longrope(16)
    choose_layout(longrope(64), "packed")
    prepare_policy(model)
    short, long = pairs(3, longest=5)[1], replace(pairs(3)[2], prompt_ids=[7] * 20)
    alone, beside = (sequence_logps(model, share_prefixes(batch)).rejected[0] for batch in ([short], [short, long]))
    assert (alone - beside).abs() > 1e-3
    check_length(model, 16)
    with pytest.raises(InputError, match=r"17 tokens.*beyond 16 the model's longrope"):
        check_length(model, 17)


def test_lengths_without_positions_are_refused():
    model = random_model("gpt2", torch.float32)
    check_length(model, 64)
    with pytest.raises(InputError, match=r"65 tokens.*positions for 64.*data\.max_length"):
        check_length(model, 65)
    check_length(tiny_base(max_position_embeddings=16), 17)  # plain rotations reach on


@pytest.mark.parametrize("name", ["./no/such", "/nowhere/base", "runs/wrong/adapter", "~/base"])
def test_a_place_that_is_none_is_said_without_asking_a_hub(name, monkeypatch):
    monkeypatch.setattr(load_module.AutoConfig, "from_pretrained", lambda *a, **k: pytest.fail("asked"))
    monkeypatch.setattr(load_module.AutoTokenizer, "from_pretrained", lambda *a, **k: pytest.fail("asked"))
    for load in (load_base, load_tokenizer):
        with pytest.raises(InputError, match="no such folder"):
            load(name)
