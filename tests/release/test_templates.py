"""What chat templates were in training goes along: one, several of them, and how they were told to render."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lorafocal.data.toy import toy_tokenizer
from lorafocal.errors import InputError
from lorafocal.generation.subject import find_subject
from lorafocal.model.saved import TEMPLATE_FILE, read_adapter
from lorafocal.release.files import strangers
from lorafocal.release.merge import merge_adapter
from lorafocal.release.package import package_adapter
from lorafocal.trainer import FocalPOConfig, FocalPOTrainer
from tests.saved_run import SavedRun, edit_json, held_out_pairs, save_base, save_run
from tests.tiny import lora

pytestmark = pytest.mark.slow

OWN = "{% for message in messages %}own {{ message.content }}{% endfor %}"


@pytest.fixture
def run(tmp_path: Path) -> SavedRun:
    return save_run(tmp_path)


def template_of(folder: Path) -> str:
    template: str = AutoTokenizer.from_pretrained(folder).chat_template
    return template


def test_a_template_that_was_set_for_a_training_is_saved_with_its_adapter(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = OWN
    base = str(save_base(tmp_path / "base"))
    args = FocalPOConfig(output_dir=str(tmp_path / "run"), max_steps=1, use_cpu=True, learning_rate=1e-2)
    made = FocalPOTrainer(
        base, args=args, train_dataset=held_out_pairs(), processing_class=tokenizer, peft_config=lora()
    )
    made.train()
    made.save_model()
    assert (tmp_path / "run" / "adapter" / TEMPLATE_FILE).read_text(encoding="utf-8") == OWN


def test_an_adapter_is_merged_packaged_and_asked_with_the_template_beside_it(run: SavedRun, tmp_path: Path) -> None:
    (run.adapter / TEMPLATE_FILE).write_text(OWN, encoding="utf-8")
    merge_adapter(run.adapter, tmp_path / "merged")
    merge_adapter([run.adapter], tmp_path / "half", weights=[0.5])
    (tmp_path / "packaged").mkdir()
    package_adapter([read_adapter(run.adapter)], None, tmp_path / "packaged")
    for folder in ("merged", "half", "packaged"):
        assert template_of(tmp_path / folder) == OWN
    assert find_subject(run.adapter).tokenizer.chat_template == OWN
    assert template_of(run.base) != OWN


def test_adapters_of_two_templates_are_not_published_under_one(run: SavedRun, tmp_path: Path) -> None:
    other = save_run(tmp_path / "other")
    edit_json(other.adapter / "lorafocal.json", base=json.loads((run.adapter / "lorafocal.json").read_text())["base"])
    (other.adapter / TEMPLATE_FILE).write_text(OWN, encoding="utf-8")
    with pytest.raises(InputError, match="adapter was trained with another chat template"):
        merge_adapter([run.adapter, other.adapter], tmp_path / "out", base=str(run.base))
    assert not (tmp_path / "out").exists()


def test_a_base_with_several_templates_is_merged_with_all_of_them(run: SavedRun, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": OWN}
    tokenizer.save_pretrained(run.base)
    merge_adapter(run.adapter, tmp_path / "merged")
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.chat_template == tokenizer.chat_template
    templates = tmp_path / "merged" / "additional_chat_templates"
    (templates / "own.py").touch()
    assert strangers(tmp_path / "merged") == ["additional_chat_templates/own.py"]


def test_how_prompts_were_rendered_is_said_where_no_file_holds_it(run: SavedRun, tmp_path: Path) -> None:
    options = {"enable_thinking": False}
    edit_json(run.folder / "config.yaml", data={"max_length": 64, "chat_template_kwargs": options})
    report = merge_adapter(run.adapter, tmp_path / "merged")
    said = 'chat_template_kwargs {"enable_thinking": false}'
    assert any(said in note for note in report.notes)
    assert said in (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "config", [{"model": {"hidden": 128}}, {"model": {"name": "x"}, "data": None}, {"data": "pairs.json"}, [1]]
)
def test_another_program_s_config_beside_an_adapter_is_passed_over(
    run: SavedRun, tmp_path: Path, config: object
) -> None:
    (run.folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    assert read_adapter(run.adapter, base=str(run.base)).tokenization == {"max_length": 2048}
    with pytest.raises(InputError, match="Say where it is with --base"):
        read_adapter(run.adapter)
