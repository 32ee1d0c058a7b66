"""The probes at load: which architectures may train packed, found out by trying."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GraniteConfig,
    Lfm2Config,
    MptConfig,
    Qwen3Config,
)

from lorafocal import probes
from lorafocal.errors import InputError
from lorafocal.model.head import LogitTransform, install_head
from lorafocal.ops import attention
from lorafocal.ops.attention import PairSpan, Segments
from lorafocal.policy import prepare_policy
from lorafocal.probes import LayoutChoice, check_packing, choose_layout
from tests.tiny import SIZES, tiny_base, tiny_policy

HEADS = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def ready(config, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    prepare_policy(model)
    return model


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_supported_models_pass(kind, dtype):
    model = tiny_policy(kind, dtype)
    prepare_policy(model)
    check_packing(model)


@pytest.mark.parametrize(
    "config", [GraniteConfig(**SIZES, logits_scaling=8.0), CohereConfig(**SIZES), Qwen3Config(**SIZES, head_dim=8)]
)
def test_others_that_call_the_interface_pass_too(config):
    check_packing(ready(config))


@pytest.mark.row("F12", "20")
@pytest.mark.parametrize(
    "config",
    [
        FalconConfig(**HEADS, alibi=False, new_decoder_architecture=False, multi_query=False),
        BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
        MptConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4),
        Lfm2Config(**SIZES, full_attn_idxs=[1]),
        Gemma2Config(**SIZES, head_dim=8),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_packs_would_get_wrong_are_refused_by_name(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(InputError, match=r"packing\.layout: padded"):
        choose_layout(model, "packed")


@pytest.mark.row("F12", "20")
def test_auto_falls_back_to_padded_rows_with_the_reason():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Lfm2Config(**SIZES, full_attn_idxs=[1])).eval()
    choice = choose_layout(model, "auto")
    assert choice.layout == "padded"
    assert "conv" in choice.reason
    assert choose_layout(tiny_policy(), "auto") == LayoutChoice("packed", "")
    assert choose_layout(tiny_policy(), "padded") == LayoutChoice("padded", "")


@pytest.mark.row("20")
def test_a_leak_between_neighbours_is_found(monkeypatch):
    """Attention that takes the whole row for one long pair."""

    def leaky(query, key, value, segments, **more):
        first, last = segments.spans[0], segments.spans[-1]
        whole = Segments.of((PairSpan(0, first.prompt, last.answers - first.prompt, last.rejected),))
        return attention.shared_prefix_attention_plain(query, key, value, whole, **more)

    model = tiny_policy()
    prepare_policy(model)
    monkeypatch.setattr(attention, "sdpa_shared_prefix_attention", leaky)
    with pytest.raises(InputError, match="moved another pair"):
        check_packing(model)


@pytest.mark.row("F11", "21")
def test_a_head_that_misses_the_models_transform_is_found():
    model = ready(GraniteConfig(**SIZES, logits_scaling=8.0))
    install_head(model).transform = LogitTransform()
    model.get_output_embeddings().weight.data *= 50
    with pytest.raises(InputError, match="model's own logits"):
        check_packing(model)


def test_the_probe_leaves_the_attention_registered_as_it_was():
    model = tiny_base()
    prepare_policy(model)
    before = probes.ALL_ATTENTION_FUNCTIONS[probes.SHARED_PREFIX_ATTENTION]
    check_packing(model)
    assert probes.ALL_ATTENTION_FUNCTIONS[probes.SHARED_PREFIX_ATTENTION] is before
