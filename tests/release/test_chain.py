"""Stages one after another: the shipped model computes what the last policy did, and says all it was made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lorafocal.data.held_out import write_held_out
from lorafocal.errors import InputError
from lorafocal.lineage import CONTINUED, MERGED, Lineage, lineage_of
from lorafocal.model.continued import continue_adapter
from lorafocal.model.load import base_fingerprint, load_base
from lorafocal.objectives.focal import identity_loss
from lorafocal.publish import sha256
from lorafocal.release.merge import merge_adapter
from lorafocal.trainer import FocalPOTrainer
from tests.saved_run import held_out_pairs, logps_of, save_base
from tests.tiny import lora, trainer

pytestmark = pytest.mark.slow  # whole models are written and loaded again

PAIRS = held_out_pairs(16)


def stage(folder: Path, model, **settings) -> FocalPOTrainer:
    """Train and save in `folder`/adapter, held-out pairs beside it."""
    made = trainer(folder, PAIRS, model=model, **({"max_steps": 4, "seed": 3} | settings))
    made.train()
    made.save_model()
    write_held_out(folder / "held_out.jsonl", PAIRS)
    return made


def fresh(base: Path, folder: Path, **settings) -> FocalPOTrainer:
    return stage(folder, load_base(str(base), dtype="float32"), peft_config=lora(), **settings)


def merged(root: Path, adapter: Path, base: Path, name: str) -> Path:
    merge_adapter(adapter, root / name, base=str(base), dtype="float32")
    return root / name


def assert_same(folder: Path, policy) -> None:
    torch.testing.assert_close(
        logps_of(load_base(str(folder), dtype="float32"), PAIRS), logps_of(policy, PAIRS), rtol=1e-5, atol=1e-4
    )


def lineage_in(folder: Path) -> Lineage:
    lineage = lineage_of(folder)
    assert lineage is not None
    return lineage


def told(lineage: Lineage) -> list[tuple[str, str]]:
    return [(parent.objective["name"], parent.how) for parent in lineage.parents if parent.objective]


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, FocalPOTrainer]:
    """A base, an SFT run on it, and its trainer."""
    root = tmp_path_factory.mktemp("chain")
    base = save_base(root / "base", dtype=torch.float32)
    return root, base, fresh(base, root / "sft", objective="sft")


@pytest.mark.row("5", "4", "44")
def test_sft_merged_then_preferences_merged(sft: tuple[Path, Path, FocalPOTrainer]) -> None:
    root, base, first = sft
    middle = merged(root, root / "sft" / "adapter", base, "middle")
    assert_same(middle, first.model)
    assert "preference" not in (middle / "README.md").read_text().lower()
    second = fresh(middle, root / "tuned")
    assert second.state.log_history[0]["loss"] == pytest.approx(identity_loss(0.05), abs=1e-7)
    adapter = root / "tuned" / "adapter"
    lineage = lineage_in(adapter)
    assert (lineage.base.name, lineage.first_base.name) == ("middle", "base")
    assert (told(lineage), lineage.start) == ([("sft", MERGED)], None)
    last = merged(root, adapter, middle, "last")
    assert_same(last, second.model)
    whole = lineage_in(last)
    assert told(whole) == [("sft", MERGED), ("focalpo", MERGED)]
    weights = [root / run / "adapter" / "adapter_model.safetensors" for run in ("sft", "tuned")]
    assert [parent.sha256 for parent in whole.parents] == [sha256(file) for file in weights]
    assert whole.first_base.sha256 == base_fingerprint(str(base))["sha256"]
    with pytest.raises(InputError, match=r"base with the sft adapter 'adapter' .* merged in, but .*lacks the sft"):
        merge_adapter(adapter, root / "wrong", base=str(base), dtype="float32")
    with pytest.raises(InputError, match=r"lacks the sft adapter.*merge that first .*`model\.name` in a config"):
        continue_adapter(load_base(str(base), dtype="float32"), adapter)
    assert not (root / "wrong").exists()


@pytest.mark.row("5", "1", "44")
def test_sft_continued_on_preferences_against_its_frozen_copy_then_merged(
    sft: tuple[Path, Path, FocalPOTrainer], tmp_path: Path
) -> None:
    root, base, first = sft
    start = root / "sft" / "adapter"
    before = base_fingerprint(str(base))
    policy = continue_adapter(load_base(str(base), dtype="float32"), start)
    fused, peft_s = (logps_of(model, PAIRS) for model in (policy, first.model))
    torch.testing.assert_close(fused, peft_s, rtol=1e-5, atol=1e-5)
    second = stage(tmp_path / "tuned", policy, reference="frozen_copy")
    assert second.state.log_history[0]["loss"] == pytest.approx(identity_loss(0.05), abs=1e-7)
    adapter = tmp_path / "tuned" / "adapter"
    lineage = lineage_in(adapter)
    assert lineage.reference == "frozen_copy"
    assert (lineage.base, told(lineage)) == (lineage_in(start).base, [("sft", CONTINUED)])
    assert lineage.start is not None
    assert lineage.start.sha256 == sha256(start / "adapter_model.safetensors")
    record = json.loads((adapter / "lorafocal.json").read_text())
    assert record["start"] == {"adapter": "adapter", "sha256": lineage.start.sha256}
    last = merged(tmp_path, adapter, base, "last")
    assert_same(last, second.model)
    assert told(lineage_in(last)) == [("sft", CONTINUED), ("focalpo", MERGED)]
    assert base_fingerprint(str(base)) == before
    third = fresh(last, tmp_path / "third", objective="dpo", max_steps=1)
    assert told(third.lineage()) == [("sft", CONTINUED), ("focalpo", MERGED)]
    assert third.lineage().start is None


@pytest.mark.row("5")
def test_the_same_stages_in_another_dtype_are_another_base(
    sft: tuple[Path, Path, FocalPOTrainer], tmp_path: Path
) -> None:
    root, base, _ = sft
    middle = merged(tmp_path, root / "sft" / "adapter", base, "middle")
    fresh(middle, tmp_path / "tuned", max_steps=1)
    rounded = load_base(str(middle), dtype="float32").bfloat16()
    rounded.save_pretrained(tmp_path / "rounded")
    (tmp_path / "rounded" / "lorafocal.json").write_bytes((middle / "lorafocal.json").read_bytes())
    with pytest.raises(InputError, match=r"trained on middle .* but .*rounded has sha256"):
        merge_adapter(tmp_path / "tuned" / "adapter", tmp_path / "out", base=str(tmp_path / "rounded"))
