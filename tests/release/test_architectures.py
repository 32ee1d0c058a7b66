"""Bases that are not a Llama: trained packed, saved, reloaded and merged, they compute what the live policy did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from lorafocal.data.held_out import write_held_out
from lorafocal.data.toy import toy_tokenizer
from lorafocal.errors import InputError
from lorafocal.model.continued import continue_adapter
from lorafocal.model.load import load_base
from lorafocal.release.merge import merge_adapter
from lorafocal.trainer import FocalPOTrainer
from tests.model.families import random_model
from tests.saved_run import held_out_pairs, logps_of
from tests.tiny import lora, trainer

pytestmark = pytest.mark.slow  # whole models are written and loaded again

PAIRS = held_out_pairs(12)
# transformers 5.5 wants `token_type_ids` of Gemma 3's image-text model as soon as it is in training mode.
NEEDS_TYPES = pytest.mark.newest


def save_family(folder: Path, family: str) -> Path:
    random_model(family, torch.float32).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def trained(root: Path, family: str) -> tuple[Path, FocalPOTrainer]:
    """A base in `root/base`, and a run on all its linear layers in `root/run`."""
    base = save_family(root / "base", family)
    run = trainer(root / "run", PAIRS, PAIRS, model=load_base(str(base), dtype="float32"), peft_config=lora())
    run.train()
    run.save_model()
    write_held_out(root / "run" / "held_out.jsonl", PAIRS)
    return base, run


@pytest.mark.row("44", "45")
@pytest.mark.parametrize("family", ["gpt2", "qwen2_vl", pytest.param("gemma3", marks=NEEDS_TYPES)])
def test_live_continued_and_merged_are_one(tmp_path: Path, family: str) -> None:
    """GPT-2 keeps its weights transposed and its head tied; of image-text models the text part is trained."""
    base, run = trained(tmp_path, family)
    assert run.data_collator.layout == "packed"
    adapter, merged = tmp_path / "run" / "adapter", tmp_path / "merged"
    live = logps_of(run.model, PAIRS)
    start = logps_of(load_base(str(base), dtype="float32"), PAIRS)
    assert (live - start).abs().max() > 0.1
    reloaded = logps_of(continue_adapter(load_base(str(base), dtype="float32"), adapter), PAIRS)
    torch.testing.assert_close(reloaded, live, rtol=1e-6, atol=1e-5)
    report = merge_adapter(adapter, merged, base=str(base), dtype="float32")
    assert report.gate.lost < 1e-4
    torch.testing.assert_close(logps_of(load_base(str(merged), dtype="float32"), PAIRS), live, rtol=1e-5, atol=1e-4)
    given, written = (AutoConfig.from_pretrained(folder).get_text_config() for folder in (base, merged))
    assert written.use_cache == given.use_cache


def test_what_makes_tokens_of_images_goes_with_a_merged_model(tmp_path: Path) -> None:
    base, _ = trained(tmp_path, "qwen2_vl")
    text = '{"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14}'
    (base / "preprocessor_config.json").write_text(text)
    merge_adapter(tmp_path / "run" / "adapter", tmp_path / "merged", base=str(base), dtype="float32")
    assert (tmp_path / "merged" / "preprocessor_config.json").read_text() == text
    for folder in (tmp_path / "merged", tmp_path / "run" / "adapter"):
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "= AutoModelForImageTextToText.from_pretrained(" in card
        assert "AutoModelForCausalLM" not in card


@pytest.mark.row("20")
def test_pairs_without_positions_are_refused_by_a_merge(tmp_path: Path) -> None:
    base, _ = trained(tmp_path, "gpt2")
    write_held_out(tmp_path / "long.jsonl", [replace(PAIRS[0], prompt_ids=[3] * 64)])
    with pytest.raises(InputError, match="positions for 64"):
        merge_adapter(tmp_path / "run" / "adapter", tmp_path / "out", base=str(base), pairs=tmp_path / "long.jsonl")
    assert not (tmp_path / "out").exists()
