"""Finished adapters beside the policy's: what they compute is what they compute alone, and the policy stays itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from lorafocal.data.packing import share_prefixes
from lorafocal.errors import InputError
from lorafocal.lineage import BaseIdentity, Lineage
from lorafocal.model.adapters import attach_lora, check_trainable
from lorafocal.model.beside import GUIDE, add_finished, add_guide, add_strategy, in_words
from lorafocal.model.fused import fuse
from lorafocal.objectives import PairLogps
from lorafocal.policy import prepare_policy, sequence_logps
from lorafocal.reference import build_guide, build_reference
from lorafocal.references.combined import geometric
from lorafocal.references.strategy import Strategy
from tests.tiny import disturb, lora, pairs, tiny_base, tiny_policy

PACK = share_prefixes(pairs(6))
KINDS = {
    "of another rank, on other layers": {"r": 6, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "a module": {"modules_to_save": ["norm"]},
    "tokens": {"trainable_token_indices": [3, 7]},
}


def finished(folder: Path, *, scale: float = 0.1, **more) -> Path:
    policy = disturb(attach_lora(tiny_base(), lora(**more)), scale)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                parameter.add_(0.1)
    policy.save_pretrained(folder)
    return folder


def alone(folder: Path) -> PairLogps:
    model = PeftModel.from_pretrained(tiny_base(), folder)
    prepare_policy(model)
    with torch.no_grad():
        return sequence_logps(model, PACK)


@pytest.mark.parametrize("policys", [{}, {"target_modules": ["k_proj"], "modules_to_save": ["norm"]}])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [False, True])
def test_a_finished_adapter_computes_beside_the_policys_what_it_does_alone(tmp_path, kind, policys, fused):
    folder = finished(tmp_path / "guide", **KINDS[kind])
    policy = disturb(attach_lora(tiny_base(), lora(**policys)))
    prepare_policy(policy)
    before = sequence_logps(policy, PACK)
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    added = add_finished(policy, folder, GUIDE)
    if fused:
        fuse(policy)
    assert set(check_trainable(policy)) == trained
    assert not any(parameter.requires_grad for parameter in added.values())
    assert {parameter.dtype for parameter in added.values()} == {torch.float32}
    close(build_guide(policy).logps(PACK), alone(folder))
    close(sequence_logps(policy, PACK), before)
    sequence_logps(policy, PACK).chosen.sum().backward()
    assert {name for name, p in policy.named_parameters() if p.grad is not None} == trained


def close(found: PairLogps, expected: PairLogps) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_several_references_are_their_members_combined(tmp_path):
    folders = [str(finished(tmp_path / name, scale=scale)) for name, scale in (("a", 0.1), ("b", 0.3))]
    policy = tiny_policy()
    prepare_policy(policy)
    strategy = Strategy(
        kind="several", members=[folders[0], "base", folders[1]], combine="geometric", weights=[0.2, 0.3, 0.5]
    )
    added = add_strategy(policy, strategy)
    assert len(added) == 2 * len(check_trainable(policy))
    found = build_reference("several", policy, strategy=strategy)
    parts = [alone(Path(folders[0])), build_reference("disabled_adapter", policy).logps(PACK), alone(Path(folders[1]))]
    expected = PairLogps(*(geometric(torch.stack(sides), [0.2, 0.3, 0.5]) for sides in zip(*parts, strict=True)))
    close(found.logps(PACK), expected)
    tokens = found.token_logps(PACK)
    assert tokens.shape == PACK.index.labels.shape
    harmonic = build_reference(
        "several", policy, strategy=Strategy(kind="several", members=strategy.members, weights="adaptive", clip=0.1)
    )
    assert bool(torch.stack(harmonic.logps(PACK)).isfinite().all())
    with pytest.raises(InputError, match="combine: geometric"):
        harmonic.token_logps(PACK)


@pytest.mark.row("S13")
def test_an_adapter_that_does_not_fit_is_refused_by_name(tmp_path):
    folder = finished(tmp_path / "a")
    with pytest.raises(InputError, match="there is no such folder"):
        add_finished(tiny_policy(), tmp_path / "none", GUIDE)
    Lineage.untrained(BaseIdentity("other", None, "0" * 64)).write(folder)
    with pytest.raises(InputError, match="names the base it was trained on"):
        add_finished(tiny_policy(), folder, GUIDE)
    (folder / "lorafocal.json").unlink()
    started = attach_lora(tiny_base(), lora(init_lora_weights="olora"))
    with pytest.raises(InputError, match=r"reference.guide: with OLoRA.*another base"):
        add_guide(started, str(folder))


def test_words_for_a_card_hold_no_path(tmp_path):
    folder = finished(tmp_path / "earlier" / "adapter")
    words = in_words(Strategy(kind="adapter", adapter=str(folder)))
    assert words is not None
    assert words.startswith("adapter: 'earlier' (sha256 ")
    assert str(tmp_path) not in words
    assert in_words(Strategy(kind="moving", every=512, mixing=0.5)) == "moving: every 512, mixing 0.5"
    assert in_words(Strategy(kind="frozen_copy")) == "frozen_copy"
    assert in_words(Strategy(kind=None)) is None
