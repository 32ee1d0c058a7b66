"""Every architecture of docs/architectures.md: its layout, and its scores and gradients one sequence at a time."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from lorafocal.data.packing import pad_sequences, share_prefixes
from lorafocal.policy import plain_attention, prepare_policy, sequence_logps, token_logps
from lorafocal.probes import LayoutChoice, choose_layout
from tests.model.architecture_table import PAGE, REFUSED, Row, one_at_a_time, row_of
from tests.model.families import IMAGE_TEXT, MUST_TRAIN_PACKED, known_families, random_model, text_policy
from tests.tiny import SIZES, adapter_gradients, pairs, relative_difference

pytestmark = pytest.mark.slow

# They keep a softmax, a state, a router or their logits in fp32, whatever their dtype.
ROUND_TO_FP32 = set(
    "bloom codegen deepseek_v3 falcon_mamba glm4_moe gpt_neo gptj granitemoehybrid mamba mamba2 mpt".split()
)
PACKED = sorted({*MUST_TRAIN_PACKED, *IMAGE_TEXT, "vaultgemma", "gpt_oss", "mixtral", "phi"} - {"paligemma"})


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [row_of(family) for family in known_families()]


@pytest.mark.slow
@pytest.mark.row("F11", "F12")
def test_every_family_that_is_not_refused_is_exact(rows):
    for row in rows:
        if row.layout != REFUSED:
            assert row.error <= (1e-5 if row.family in ROUND_TO_FP32 else 1e-11), row
    assert {row.layout for row in rows if row.family in MUST_TRAIN_PACKED} == {"packed"}


@pytest.mark.slow
@pytest.mark.newest  # older versions of a model may keep its attention to themselves
def test_the_page_says_what_is_found(rows):
    printed = re.findall(r"^\| `([^`]+)` \| \w+ \| (\w+) \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert dict(printed) == {row.family: row.layout for row in rows}


@pytest.mark.row("19", "F11", "F15")
@pytest.mark.parametrize("family", [name for name in PACKED if name in known_families()])
def test_packed_scores_and_gradients_equal_one_sequence_at_a_time_in_float64(family):
    """LoRA on all linear layers of the text part; every token weighs differently.

    Gradients pass through norms that most models compute in fp32.
    """
    batch = pairs(5)
    plain = text_policy(family)
    ours = copy.deepcopy(plain)
    assert choose_layout(ours, "auto") == LayoutChoice("packed", "")
    prepare_policy(plain)  # scored one at a time, in transformers' own attention wherever that is exact
    wanted = one_at_a_time(plain, batch)
    scores = token_logps(ours, share_prefixes(batch))
    assert (scores - wanted).abs().max() < 1e-11
    weights = torch.randn(len(scores), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (scores * weights).sum().backward()
    (wanted * weights).sum().backward()
    assert relative_difference(adapter_gradients(ours), adapter_gradients(plain)) < (
        1e-10 if family == "gpt2" else 1e-6
    )


@pytest.mark.row("F15")
@pytest.mark.parametrize("family", ["gemma2", "vaultgemma", "gpt_oss"])
def test_caps_and_sinks_are_not_dropped_in_either_layout_or_outside(family):
    """SDPA would ignore them; eager, which rounds its softmax to fp32, is the model's own."""
    batch = pairs(5)
    model = random_model(family, torch.float32)
    model.set_attn_implementation("eager")
    for name, sinks in model.named_parameters():
        if name.endswith("sinks"):
            sinks.data += 2
    wanted = sequence_logps(_prepared(model, "padded"), pad_sequences(batch))
    packed = _prepared(model, "packed")
    found = [sequence_logps(packed, share_prefixes(batch))]
    with plain_attention(packed):
        found.append(sequence_logps(packed, pad_sequences(batch)))
    for ours in found:
        torch.testing.assert_close(ours.chosen, wanted.chosen, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.rejected, wanted.rejected, rtol=0, atol=1e-4)


def _prepared(model, layout):
    model = copy.deepcopy(model)
    prepare_policy(model, layout=layout)
    return model


@pytest.mark.row("F14")
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "gemma3"])
def test_generation_is_the_models_own(family):
    model = random_model(family, torch.float32)
    prompt = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    wanted = model.generate(prompt, **options)
    prepare_policy(model)
    with plain_attention(model):
        assert torch.equal(model.generate(prompt, **options), wanted)


@pytest.mark.row("27")
@pytest.mark.parametrize("family", ["bert", "falcon", "mpt", "opt"])
def test_rows_are_called_with_the_mask_of_their_padding(family):
    """BERT shows it: without a causal mask, padding is kept out by the padding's mask alone."""
    model = random_model(family)
    prepare_policy(model, layout="padded")
    batch = pairs(5)
    with torch.no_grad():
        assert (token_logps(model, pad_sequences(batch)) - one_at_a_time(model, batch)).abs().max() < 1e-6


def test_the_auxiliary_loss_of_experts_does_not_enter():
    torch.manual_seed(0)
    sizes = SIZES | {"num_local_experts": 4, "router_aux_loss_coef": 5.0}
    plain = MixtralForCausalLM(MixtralConfig(**sizes)).eval()
    with_loss = copy.deepcopy(plain)
    with_loss.config.output_router_logits = True
    gradients = []
    for model in (plain, with_loss):
        prepare_policy(model)
        scores = sequence_logps(model, share_prefixes(pairs(4)))
        (scores.chosen - scores.rejected).sum().backward()
        gradients.append(model.model.layers[0].mlp.gate.weight.grad)
    assert torch.equal(*gradients)
