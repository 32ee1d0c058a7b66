"""The kinds of reference, and the identity probe."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from lorafocal.data.packing import PairCollator, share_prefixes
from lorafocal.errors import InputError
from lorafocal.model.adapters import FROZEN_COPY, add_frozen_copy, check_trainable
from lorafocal.objectives import PairLogps
from lorafocal.policy import prepare_policy, sequence_logps
from lorafocal.reference import (
    REFERENCES,
    AdapterReference,
    CachedReference,
    DisabledAdapterReference,
    build_reference,
    check_identity,
    check_ref_model,
    check_same_reference,
)
from tests.tiny import disturb, pairs, tiny_base, tiny_policy


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
@pytest.mark.parametrize(
    ("kind", "remedies"),
    [("disabled_adapter", ("reference.kind: frozen_copy", "lorafocal merge")), ("separate_model", ("same dtype",))],
)
def test_the_probe_names_the_pair_and_the_remedies(kind, remedies, gap):
    reference = PairLogps(torch.zeros(3), torch.zeros(3))
    policy = PairLogps(torch.zeros(3), torch.tensor([0.0, gap, 0.0]))
    with pytest.raises(InputError, match="'b'") as refusal:
        check_identity(policy, reference, ("a", "b", "c"), kind=kind)
    for remedy in (*remedies, "identity_probe: false"):
        assert remedy in str(refusal.value)
    assert REFERENCES["frozen_copy"].starts_as_policy


@pytest.mark.row("1")
@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_frozen_copy_is_the_adapter_as_it_was_to_the_last_bit(kind, dtype):
    model = tiny_policy(kind, dtype)
    add_frozen_copy(model)
    prepare_policy(model)
    pack = share_prefixes(pairs(6))
    reference = AdapterReference(model, FROZEN_COPY)
    at_start = sequence_logps(model, pack)
    check_identity(at_start, reference.logps(pack), pack.pair_ids, kind="frozen_copy")
    disturb(model, scale=0.3)
    assert not torch.equal(sequence_logps(model, pack).chosen, at_start.chosen)
    assert all(torch.equal(p, r) for p, r in zip(at_start, reference.logps(pack), strict=True))
    base = DisabledAdapterReference(model).logps(pack)
    assert not torch.equal(base.chosen, at_start.chosen)


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.row("F17", "3")
def test_a_call_of_the_reference_leaves_what_is_trained_and_what_is_active_alone():
    model = tiny_policy()
    before = trainable(model)
    add_frozen_copy(model)
    prepare_policy(model)
    pack = share_prefixes(pairs(6))
    frozen = {name.replace(".default.", ".reference.") for name in before}
    assert trainable(model) == before == set(check_trainable(model))
    assert frozen <= dict(model.named_parameters()).keys() - before
    for reference in (AdapterReference(model, FROZEN_COPY), DisabledAdapterReference(model)):
        for _ in range(3):
            assert not reference.logps(pack).chosen.requires_grad
            assert trainable(model) == before
    assert model.active_adapter == "default"
    sequence_logps(model, pack).chosen.sum().backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == before


def test_a_parameter_that_somebody_froze_stays_frozen():
    model = tiny_policy()
    name = min(trainable(model))
    model.get_parameter(name).requires_grad_(False)
    before = trainable(model)
    add_frozen_copy(model)
    assert trainable(model) == before


def test_our_switch_computes_what_pefts_set_adapter_does():
    model = tiny_policy()
    add_frozen_copy(model)
    prepare_policy(model)
    disturb(model, scale=0.3)
    pack = share_prefixes(pairs(6))
    ours = AdapterReference(model, FROZEN_COPY).logps(pack)
    model.set_adapter("reference")
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(ours, sequence_logps(model, pack), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_separate_model_answers_for_itself(dtype):
    model, second = tiny_policy(dtype=dtype), tiny_policy(dtype=dtype)
    prepare_policy(model)
    prepare_policy(second)
    pack = share_prefixes(pairs(6))
    reference = build_reference("separate_model", model, second)
    disturb(model, scale=0.3)
    expected = sequence_logps(second, pack)
    assert all(torch.equal(a, b) for a, b in zip(reference.logps(pack), expected, strict=True))
    assert not reference.logps(pack).chosen.requires_grad


@pytest.mark.row("7")
def test_kinds_and_models_that_do_not_go_together_are_refused_with_the_way_out():
    model = tiny_policy()
    with pytest.raises(InputError, match="disabled_adapter, frozen_copy, separate_model"):
        build_reference("base", model)
    with pytest.raises(InputError, match=r'Set `reference="separate_model"`.*leave `ref_model` out'):
        build_reference("frozen_copy", model, tiny_base())
    with pytest.raises(InputError, match="this objective has no reference: leave `ref_model` out"):
        check_ref_model(None, tiny_base())
    with pytest.raises(InputError, match=r'pass `ref_model`.*"disabled_adapter" or "frozen_copy"'):
        build_reference("separate_model", model)


def test_a_stored_reference_answers_with_what_was_looked_up_and_with_nothing_else():
    of = [replace(pair, reference=(-float(number), -2.0)) for number, pair in enumerate(pairs(3), 1)]
    reference = build_reference("cached", tiny_policy())
    assert isinstance(reference, CachedReference)
    (pack,) = PairCollator()(of).packs
    assert [side.tolist() for side in reference.logps(pack)] == [[-1.0, -2.0, -3.0], [-2.0, -2.0, -2.0]]
    (half,) = PairCollator()([*of[:2], replace(of[2], reference=None)]).packs
    with pytest.raises(InputError, match="without its reference log-probs"):
        reference.logps(half)
    assert isinstance(build_reference("cached", tiny_policy(), tiny_base()), CachedReference)
    check_ref_model("cached", None)


@pytest.mark.row("1")
def test_the_probe_allows_a_stored_reference_its_noise_and_no_more():
    reference = PairLogps(torch.zeros(2), torch.zeros(2))

    def probe(gap: float) -> None:
        policy = PairLogps(torch.tensor([0.0, gap]), torch.zeros(2))
        check_identity(policy, reference, ("a", "b"), kind="cached", tolerance=0.01)

    probe(0.009)
    for gap in (0.02, -0.02, float("nan")):
        with pytest.raises(InputError, match=r"pair 'b'.*at most 0\.01 .its noise.*lorafocal cache-reference"):
            probe(gap)


def test_a_run_goes_on_with_the_stored_reference_of_the_same_weights():
    saved = {"kind": "cached", "sha256": "a"}
    check_same_reference(saved, dict(saved))
    with pytest.raises(InputError, match="stored log-probs are of another reference"):
        check_same_reference(saved, saved | {"sha256": "b"})
    with pytest.raises(InputError, match="trained with reference cached, this run has disabled_adapter"):
        check_same_reference(saved, {"kind": "disabled_adapter", "sha256": None})
