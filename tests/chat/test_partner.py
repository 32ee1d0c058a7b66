"""What is found in a folder, and prompts whose tokens are those of training."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config

from lorafocal.chat.partner import meet
from lorafocal.data.encoding import Encoder
from lorafocal.data.held_out import write_held_out
from lorafocal.data.toy import toy_prompts, toy_tokenizer
from lorafocal.errors import InputError
from lorafocal.generation.speech import Speech
from lorafocal.generation.subject import check_room, find_subject, speaker_folder
from lorafocal.lineage import CONTINUED, Stage, lineage_of
from lorafocal.model.saved import tokenization_of
from tests.saved_run import SavedRun, save_base
from tests.spoken import QUESTION, spoken


def test_prompts_have_the_tokens_of_training(run: SavedRun, speech: Speech) -> None:
    questions = [prompt[0]["content"] for prompt in toy_prompts(len(run.pairs), seed=3, held_out=True)]
    assert [speech.prompt_ids(question) for question in questions] == [pair.prompt_ids for pair in run.pairs]
    tokenizer = speech.encoder.tokenizer
    assert tokenizer.decode(speech.prompt_ids("sort 1", "sort 2")).count("<|end|>") == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [("sort <|end|>", "spells the special token '<|end|>'"), ("sort \ud800", "surrogate"), ("", "no tokens")],
)
def test_texts_that_no_training_row_may_have_are_refused(speech: Speech, text: str, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        replace(speech, templated=False).prompt_ids(text)


@pytest.mark.row("27")
def test_an_answer_ends_with_the_models_ids_the_eos_and_the_templates_end_of_turn() -> None:
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = "<|unknown|>"
    speech = Speech(Encoder.of(tokenizer, {}), templated=True)
    end, eos = tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id
    assert speech.ends(GenerationConfig(eos_token_id=[7, 8])) == {7, 8, end, eos}
    assert speech.ends(GenerationConfig(eos_token_id=7)) == {7, end, eos}
    assert replace(speech, templated=False).ends(None) == {eos}


def test_a_run_of_plain_text_is_continued_as_plain_text(run: SavedRun, tmp_path: Path) -> None:
    plain = shutil.copytree(run.folder, tmp_path / "plain")
    write_held_out(plain / "held_out.jsonl", [replace(pair, prompt_ids=pair.prompt_ids[1:-2]) for pair in run.pairs])
    with pytest.raises(InputError, match="--system needs a chat template"):
        spoken(plain, QUESTION, system="sort")
    assert "continued as plain text" in spoken(plain, QUESTION)
    assert "go through the chat template" in spoken(run.folder, QUESTION, system="sort")


def test_a_run_whose_prompts_end_before_the_generation_prompt_goes_through_the_template(
    run: SavedRun, tmp_path: Path
) -> None:
    """As `truncation: recipe` writes them."""
    end = toy_tokenizer().convert_tokens_to_ids("<|end|>")
    turns = [pair.prompt_ids[: len(pair.prompt_ids) - pair.prompt_ids[::-1].index(end)] for pair in run.pairs]
    assert all(ids != pair.prompt_ids for ids, pair in zip(turns, run.pairs, strict=True))
    folder = shutil.copytree(run.folder, tmp_path / "recipe")
    write_held_out(
        folder / "held_out.jsonl",
        [replace(pair, prompt_ids=ids) for pair, ids in zip(run.pairs, turns, strict=True)],
    )
    assert "go through the chat template" in spoken(folder, QUESTION, system="sort")


def test_answers_beyond_the_positions_are_refused_with_both_ways_out() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=97, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    check_room(model, 8, 8)
    with pytest.raises(InputError, match=r"prompt's 9 tokens with 8 new ones .*shorten the prompt.*--max-new-tokens"):
        check_room(model, 9, 8)


def test_an_adapter_outside_a_run_needs_its_base_named(run: SavedRun, tmp_path: Path) -> None:
    lonely = shutil.copytree(run.adapter, tmp_path / "lonely")
    with pytest.raises(InputError, match="--base FOLDER"):
        spoken(lonely, QUESTION)
    answers = spoken(lonely, QUESTION, base=str(run.base), temperature=0)
    assert "[adapter on: lonely]" in answers
    assert answers.split("]")[1:] == spoken(run.adapter, QUESTION, temperature=0).split("]")[1:]


def test_a_whole_model_has_one_column_and_says_why(tmp_path: Path) -> None:
    model = save_base(tmp_path / "merged", dtype=torch.float32)
    answer = spoken(model, QUESTION)
    assert answer.count("[") == 1
    assert "no adapter to switch off" in answer
    with pytest.raises(InputError, match="leave --base out"):
        spoken(model, QUESTION, base="other")


def test_what_speaks_with_the_adapter_off_is_said(run: SavedRun, tmp_path: Path) -> None:
    folder = shutil.copytree(run.folder, tmp_path / "next")
    lineage = lineage_of(folder / "adapter")
    assert lineage is not None
    first, second = Stage("sft", "a" * 64), Stage("first", "b" * 64, CONTINUED)
    notes: dict[str, dict[str, Any]] = {
        "went on from an adapter of unknown making 'first'": {"parents": (first, second), "reference": "frozen_copy"},
        "compared with the adapter's start": {"reference": "frozen_copy"},
        "compared with another model": {"reference": "separate_model"},
    }
    for note, change in notes.items():
        replace(lineage, **change).write(folder / "adapter")
        partner = meet(folder)
        assert any(note in line for line in partner.notes), note
        assert partner.voices[1].title.endswith("the base base" + ", with 'sft' merged in" * ("parents" in change))
    assert not any("compared" in line for line in meet(run.folder).notes)


def test_a_folder_with_nothing_to_talk_to_is_refused_with_the_nearest_that_has(tmp_path: Path, run: SavedRun) -> None:
    with pytest.raises(InputError, match="there is no such folder"):
        speaker_folder(tmp_path / "missing")
    with pytest.raises(InputError, match="holds no adapter and no model"):
        speaker_folder(tmp_path)
    shutil.copytree(run.adapter, tmp_path / "checkpoint-4" / "adapter")
    with pytest.raises(InputError, match=r"its newest checkpoint has one: name that, .*checkpoint-4/adapter"):
        speaker_folder(tmp_path)


def test_a_checkpoint_speaks_as_its_run(run: SavedRun, tmp_path: Path) -> None:
    folder = shutil.copytree(run.folder, tmp_path / "stopped")
    (folder / "checkpoint-4").mkdir()
    (folder / "adapter").rename(folder / "checkpoint-4" / "adapter")
    plain = [replace(pair, prompt_ids=pair.chosen_ids[:1]) for pair in run.pairs]  # not of the chat template
    write_held_out(folder / "held_out.jsonl", plain)
    settings = {"model": {"name": str(run.base), "dtype": "float32"}, "data": {"max_length": 17}}
    (folder / "config.yaml").write_text(json.dumps(settings))
    subject = find_subject(folder / "checkpoint-4" / "adapter")
    assert subject.name == "stopped-checkpoint-4"
    assert not subject.speech.templated
    assert tokenization_of(folder / "checkpoint-4" / "adapter")["max_length"] == 17


def test_a_run_of_all_parameters_speaks_by_its_model(run: SavedRun, tmp_path: Path) -> None:
    shutil.copytree(run.base, tmp_path / "whole" / "model")
    (tmp_path / "whole" / "manifest.json").write_text("{}")
    partner = meet(tmp_path / "whole")
    assert [voice.title for voice in partner.voices] == ["whole"]
    assert any("whole model" in note for note in partner.notes)
    assert partner.speech.templated
    shutil.copy(run.adapter / "lorafocal.json", tmp_path / "whole" / "model")
    write_held_out(
        tmp_path / "whole" / "held_out.jsonl", [replace(pair, prompt_ids=pair.chosen_ids[:1]) for pair in run.pairs]
    )
    assert not meet(tmp_path / "whole").speech.templated  # as its own pairs were plain text


def test_what_the_generation_config_asks_for_beyond_a_temperature_is_said(run: SavedRun, tmp_path: Path) -> None:
    model = shutil.copytree(run.base, tmp_path / "model")
    (model / "generation_config.json").write_text('{"do_sample": true, "top_p": 0.8, "repetition_penalty": 1.05}')
    assert "without the top_p 0.8, repetition_penalty 1.05 of the generation config" in spoken(model, QUESTION)
