"""The probes at load: which architectures may train packed, found out by trying."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BertConfig,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    GraniteConfig,
    Lfm2Config,
    MixtralConfig,
    MptConfig,
    Qwen3Config,
    RecurrentGemmaConfig,
    StableLmConfig,
)

from lorafocal import probes
from lorafocal.errors import InputError
from lorafocal.model.adapters import attach_lora
from lorafocal.model.head import LogitTransform, causal_lm, install_head
from lorafocal.ops import attention
from lorafocal.ops.attention import PairSpan, Segments
from lorafocal.policy import prepare_policy
from lorafocal.probes import LayoutChoice, check_packing, choose_layout
from tests.model.families import random_model
from tests.tiny import SIZES, enlarged, lora, tiny_base, tiny_policy

pytestmark = pytest.mark.slow

HEADS = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MAMBA = {"mamba_d_state": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}


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


WRONG_IN_PACKS = {
    "falcon": (FalconConfig(**HEADS, alibi=False, multi_query=False), "does not let its attention be exchanged"),
    "bloom": (BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4), "does not let its attention"),
    "mpt": (MptConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4), "does not let its attention"),
    "lfm2": (Lfm2Config(**SIZES, full_attn_idxs=[1]), r"cannot hold apart \(conv\)"),
    "bamba": (BambaConfig(**SIZES, attn_layer_indices=[1], **MAMBA), r"cannot hold apart \(.*(linear|mamba).*\)"),
    "stablelm": (StableLmConfig(**SIZES), "called without `segments`"),
}


def fresh(config, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return enlarged(AutoModelForCausalLM.from_config(config)).to(dtype)


@pytest.mark.row("F12", "20")
@pytest.mark.parametrize("name", WRONG_IN_PACKS)
def test_models_that_packs_would_get_wrong_are_refused_by_name_and_train_padded(name):
    config, why = WRONG_IN_PACKS[name]
    model = fresh(config)
    with pytest.raises(InputError, match=rf"{type(model).__name__[:5]}.*{why}.*packing\.layout: padded"):
        choose_layout(model, "packed")
    choice = choose_layout(model, "auto")
    assert choice.layout == "padded"
    assert re.search(why, choice.reason)
    assert choose_layout(model, "padded") == LayoutChoice("padded", "")


def test_where_packs_are_right_auto_takes_them():
    assert choose_layout(tiny_policy(), "auto") == LayoutChoice("packed", "")
    assert choose_layout(tiny_policy(), "padded") == LayoutChoice("padded", "")


def test_a_model_prepared_for_packs_is_given_its_own_attention_back_for_rows():
    model = tiny_policy()
    choose_layout(model, "packed")
    choose_layout(model, "padded")
    assert causal_lm(model).config._attn_implementation == "sdpa"


@pytest.mark.row("20")
def test_a_model_that_sees_the_future_or_the_padding_is_refused():
    """BERT as it comes: no causal mask, so a token's score would depend on the tokens after it."""
    model = fresh(BertConfig(**SIZES, is_decoder=False))
    with pytest.raises(InputError, match=r"packed: BertLMHeadModel: .* a later token or the padding moved"):
        choose_layout(model, "auto")


@pytest.mark.row("20")
@pytest.mark.parametrize("layout", ["auto", "padded"])
@pytest.mark.parametrize("family", ["bert", "paligemma"])
def test_no_tolerance_hides_a_model_that_sees_the_future_by_itself(family, layout):
    """Layouts are causal, and their scores within bf16's tolerance of these models' own; what moves is exact."""
    model = random_model(family, torch.bfloat16)
    with pytest.raises(InputError, match=r"a later token (moves|or the padding moved) a token's log-prob"):
        choose_layout(model, layout)


def test_shortened_products_are_rounding_where_they_were_asked_for():
    """TF32 multiplies numbers of 11 bits: of a deep model, a pack's log-probs are some 1e-3 nats from those alone."""
    model = fresh(Qwen3Config(**SIZES | {"num_hidden_layers": 24}, head_dim=8))
    model.get_output_embeddings().weight.data *= 8

    def shorten(module, inputs):
        return (((inputs[0].contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32),)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(shorten)
    with pytest.raises(InputError, match="away from the model's own logits"):
        choose_layout(model, "auto")
    usual = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert choose_layout(model, "auto").layout == "packed"
    finally:
        torch.backends.cuda.matmul.fp32_precision = usual


@pytest.mark.row("F11", "21")
def test_a_transform_of_the_logits_that_nobody_knows_is_refused_in_either_layout():
    """RecurrentGemma caps its logits under a name of its own."""
    config = RecurrentGemmaConfig(**SIZES, lru_width=32, block_types=["attention"], attention_window_size=8)
    model = fresh(config)
    model.get_output_embeddings().weight.data *= 500
    with pytest.raises(InputError, match="model's own logits"):
        choose_layout(model, "auto")


@pytest.mark.row("20")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_experts_may_round_otherwise_but_not_drop_tokens(dtype, monkeypatch):
    model = fresh(MixtralConfig(**SIZES, num_local_experts=4), dtype)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")
    assert choose_layout(model, "auto") == LayoutChoice("packed", "")
    assert choose_layout(model, "padded") == LayoutChoice("padded", "")

    def of_limited_capacity(experts, hidden, indices, weights, *rest):
        """Only the first tokens of each expert are served, however many others the batch holds."""
        chosen = torch.nn.functional.one_hot(indices, experts.num_experts)
        place = chosen.flatten(0, 1).cumsum(0).view_as(chosen).mul(chosen).sum(-1)
        return served(experts, hidden, indices, weights * (place <= 20), *rest)

    kind = type(next(m for m in model.modules() if type(m).__name__ == "MixtralExperts"))
    served = kind.forward
    monkeypatch.setattr(kind, "forward", of_limited_capacity)
    for parameter in model.parameters():
        parameter.data *= 3
    with pytest.raises(InputError, match=r"packed: MixtralForCausalLM: .*; padded: .* moved another pair"):
        choose_layout(model, "auto")


def test_half_precision_is_refused():
    with pytest.raises(InputError, match="float16"):
        choose_layout(tiny_base(dtype=torch.float16), "auto")


def test_dropout_that_is_allowed_does_not_disturb_the_probes_and_modes_come_back():
    model = attach_lora(tiny_base(), lora(lora_dropout=0.5)).train()
    model.get_submodule("base_model.model.model.layers.0").eval()
    before = [module.training for module in model.modules()]
    assert choose_layout(model, "auto") == LayoutChoice("packed", "")
    assert [module.training for module in model.modules()] == before


@pytest.mark.row("20")
def test_a_leak_between_neighbours_is_found(monkeypatch):
    """Attention that takes the whole row for one long pair."""

    def leaky(query, key, value, segments, **more):
        first, last = segments.spans[0], segments.spans[-1]
        whole = Segments.of((PairSpan(0, first.prompt, last.answers - first.prompt, last.rejected),))
        return attention.shared_prefix_attention_plain(query, key, value, whole, **more)

    model = tiny_policy()
    prepare_policy(model)
    monkeypatch.setattr(attention, "row_block_attention", leaky)
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
