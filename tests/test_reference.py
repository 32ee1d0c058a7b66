"""The disabled-adapter reference and its identity probe."""

from __future__ import annotations

import copy

import pytest
import torch

from lorafocal.data.packing import share_prefixes
from lorafocal.errors import InputError
from lorafocal.objectives import PairLogps
from lorafocal.policy import prepare_policy, sequence_logps
from lorafocal.reference import DisabledAdapterReference, check_identity
from tests.tiny import pairs, tiny_base, tiny_policy


@pytest.mark.row("1")
@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_fresh_adapter_differs_from_its_reference_by_exactly_nothing(kind, dtype):
    model = tiny_policy(kind, dtype, trained=False)
    prepare_policy(model)
    pack = share_prefixes(pairs(6))
    policy, reference = sequence_logps(model, pack), DisabledAdapterReference(model).logps(pack)
    assert all(torch.equal(p, r) for p, r in zip(policy, reference, strict=True))
    check_identity(policy, reference, pack.pair_ids)


def test_the_reference_is_the_base_whatever_the_adapter_learned():
    model = tiny_policy()
    base = copy.deepcopy(tiny_base())
    prepare_policy(model)
    prepare_policy(base)
    pack = share_prefixes(pairs(6))
    reference = DisabledAdapterReference(model).logps(pack)
    assert not reference.chosen.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(reference, sequence_logps(base, pack), strict=True))


@pytest.mark.row("1")
@pytest.mark.parametrize("gap", [1e-7, -3.0, float("nan")])
def test_the_probe_names_the_pair_and_the_remedies(gap):
    reference = PairLogps(torch.zeros(3), torch.zeros(3))
    policy = PairLogps(torch.zeros(3), torch.tensor([0.0, gap, 0.0]))
    with pytest.raises(InputError, match="'b'") as refusal:
        check_identity(policy, reference, ("a", "b", "c"))
    for remedy in ("lorafocal merge", "fresh adapter", "identity_probe: false"):
        assert remedy in str(refusal.value)
