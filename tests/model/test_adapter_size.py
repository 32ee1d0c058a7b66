"""A saved adapter is as large as its low-rank factors: no embedding, no head, no base weight rides along."""

from __future__ import annotations

import pytest
from torch import nn

from lorafocal.model.adapters import attach_lora, linear_names
from lorafocal.model.load import load_base
from lorafocal.model.save import save_adapter
from tests.tiny import lora, tiny_base


def header_bytes(path) -> int:
    """A safetensors file is 8 bytes of length, a header of that length, and the tensors."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.row("46")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rank", [1, 8])
def test_an_adapter_takes_four_bytes_a_parameter_and_a_header(tmp_path, tied, rank):
    base = tiny_base(tie_word_embeddings=tied)
    head = base.get_output_embeddings()
    layers = [m for m in base.modules() if isinstance(m, nn.Linear) and m is not head]
    predicted = sum(rank * (layer.in_features + layer.out_features) * 4 for layer in layers)
    policy = attach_lora(base, lora(r=rank))
    save_adapter(policy, tmp_path, None)
    weights = tmp_path / "adapter_model.safetensors"
    assert weights.stat().st_size == predicted + header_bytes(weights)


@pytest.mark.row("46")
@pytest.mark.parametrize("quantization", ["nf4", "nf4-double", "int8"])
def test_on_a_quantised_base_it_takes_the_same(tmp_path, quantization):
    """No codes, scales or tables of the base ride along."""
    tiny_base().save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"), quantization=quantization)
    layers = [base.get_submodule(name) for name in linear_names(base)]
    predicted = sum(8 * (layer.in_features + layer.out_features) * 4 for layer in layers)
    policy = attach_lora(base, lora(r=8))
    save_adapter(policy, tmp_path / "adapter", None)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    assert weights.stat().st_size == predicted + header_bytes(weights)
