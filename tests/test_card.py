"""Cards and lineage: what they say, what they never say, and that they read back."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import BitsAndBytesConfig

from lorafocal.card import adapter_card, bundle_card, compressed_card, merged_card, model_card
from lorafocal.compatibility import QUANTIZED
from lorafocal.errors import InputError
from lorafocal.lineage import CONTINUED, LINEAGE_FILE, MERGED, BaseIdentity, Lineage, Stage, lineage_of
from lorafocal.model.quantized import bitsandbytes_config

HUB = BaseIdentity("org/model", "0" * 40, "ab" * 32)
LINEAGE = Lineage(
    base=HUB,
    objective={"name": "focalpo", "beta": 0.01, "gamma": 0.05},
    steps=100,
    pairs_seen=6400,
    lorafocal="0.1",
)
LOCAL = replace(LINEAGE, base=BaseIdentity("tiny", None, "cd" * 32))

RUN = {
    "config": {
        "model": {"name": "/home/somebody/base"},
        "adapter": {"r": 8, "targets": ["q_proj", "v_proj"], "start_from": "sft", "init": None},
        "data": {"train": "private/rows.jsonl", "eval": None, "max_length": 512, "truncation": "recipe"},
        "training": {"learning_rate": 1e-4, "deepspeed": "configs/zero3.json", "logging_dir": "~logs", "bf16": True},
    },
    "data": {
        "train": {
            "sources": [{"name": "rows|1.jsonl", "form": "standard", "pairs": 85}],
            "pairs": 80, "left_out": {"too_long": 5}, "tokens_sha256": "ab" * 32,
        },
        "eval": {"sources": [], "pairs": 8, "left_out": {}, "tokens_sha256": "cd" * 32},
    },
    "versions": {"torch": "2.13.0", "bitsandbytes": None},
    "hardware": "CPU x86_64",
}  # fmt: skip
"""A run's manifest, with places that nobody else is to read."""


def front_matter(card: str) -> dict[str, object]:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


@pytest.mark.parametrize(
    "lineage",
    [
        LINEAGE,
        LOCAL,
        replace(LINEAGE, objective=None, reference=None, parents=(Stage("a", "b"),)),
        replace(LINEAGE, quantization="nf4", parents=(Stage("a", "b", quantization="fp4-double"),)),
    ],
)
def test_lineage_reads_back(tmp_path: Path, lineage: Lineage) -> None:
    lineage.write(tmp_path)
    assert lineage_of(tmp_path) == lineage
    assert json.loads((tmp_path / LINEAGE_FILE).read_text())["format"] == 2


def test_numbers_are_in_one_order_whatever_order_they_come_in() -> None:
    results = {"eval_rewards/margins": 0.5, "eval_rewards/accuracies": 0.75}
    assert adapter_card(LINEAGE, results) == adapter_card(LINEAGE, dict(reversed(results.items())))


def test_lineage_stamps_the_running_version_where_none_is_given() -> None:
    assert replace(LINEAGE, lorafocal="").as_dict()["lorafocal"]


def test_no_lineage_is_not_an_error_but_a_broken_one_is(tmp_path: Path) -> None:
    assert lineage_of(tmp_path) is None
    for broken in (
        "{",
        "[]",
        "{}",
        json.dumps(LINEAGE.as_dict() | {"format": 5}),
        json.dumps({"format": 1, "base": {}}),
    ):
        (tmp_path / LINEAGE_FILE).write_text(broken)
        with pytest.raises(InputError, match=r"lorafocal\.json"):
            lineage_of(tmp_path)


def test_the_adapter_s_card_names_base_objective_and_numbers() -> None:
    card = adapter_card(LINEAGE, {"rewards/accuracies": 0.75})
    head = front_matter(card)
    assert head["base_model"] == "org/model"
    assert head["library_name"] == "peft"
    assert {"lorafocal", "focalpo"} <= set(head["tags"])  # type: ignore[call-overload]
    for expected in (
        "beta 0.01, gamma 0.05",
        "| rewards/accuracies | 0.75 |",
        "ab" * 32,
        'revision="000',
        "PeftModel",
    ):
        assert expected in card
    assert "No held-out numbers" in adapter_card(LINEAGE)


def test_a_factor_and_a_guard_are_in_the_card_and_no_older_reader_leaves_them_out(tmp_path: Path) -> None:
    objective = {"name": "simpo", "beta": 2.0, "focal": {"form": "p_gamma", "gamma": 0.05}, "guard": "clip"}
    made = replace(LINEAGE, objective=objective)
    assert "| objective | simpo (beta 2, p_gamma 0.05, guard clip) |" in adapter_card(made)
    made.write(tmp_path)
    assert json.loads((tmp_path / LINEAGE_FILE).read_text())["format"] == 4
    assert lineage_of(tmp_path).objective == objective
    merged = replace(LINEAGE, parents=(made.stage("adapter", "ab" * 32, "merged"),))
    assert merged.as_dict()["format"] == 4


def test_a_local_base_is_not_passed_off_as_a_hub_id() -> None:
    card = adapter_card(LOCAL)
    assert "base_model" not in front_matter(card)
    assert 'from_pretrained("FOLDER_OF_THE_BASE")' in card


def test_dpo_without_gamma_has_a_card() -> None:
    assert "dpo (beta 0.1)" in adapter_card(replace(LINEAGE, objective={"name": "dpo", "beta": 0.1, "gamma": None}))


def test_the_merged_card_holds_both_tables_and_the_notes() -> None:
    lineage = replace(LINEAGE, parents=(Stage("adapter", "ef" * 32),))
    card = merged_card(lineage, dtype="bfloat16", gate="GATE TABLE", survival="SURVIVAL TABLE", notes=("a note",))
    head = front_matter(card)
    assert head["library_name"] == "transformers"
    assert head["base_model_relation"] == "finetune"
    for expected in ("GATE TABLE", "SURVIVAL TABLE", "- a note", "ef" * 32, 'dtype="bfloat16"'):
        assert expected in card
    other_tool = merged_card(replace(lineage, objective=None), dtype="float32", gate="", survival="")
    assert "not recorded" in other_tool


SFT = Stage("sft", "12" * 32, CONTINUED, {"name": "sft"}, None, 40, 320)
MERGE = Stage("first", "34" * 32, MERGED, {"name": "dpo", "beta": 0.1}, "frozen_copy", 7, 56)


@pytest.mark.row("5")
def test_a_chain_of_stages_reads_back_and_says_what_it_was_continued_from(tmp_path: Path) -> None:
    lineage = replace(LOCAL, parents=(SFT, MERGE, SFT), origin=HUB)
    lineage.write(tmp_path)
    assert lineage_of(tmp_path) == lineage
    assert json.loads((tmp_path / LINEAGE_FILE).read_text())["start"] == {"adapter": "sft", "sha256": "12" * 32}
    assert (lineage.start, lineage.contained, lineage.merged, lineage.first_base) == (SFT, (SFT,), (MERGE,), HUB)
    merged = replace(LOCAL, parents=(SFT, MERGE))
    assert (merged.start, merged.contained, merged.first_base) == (None, (), LOCAL.base)
    card = adapter_card(lineage)
    assert "stage 1: sft adapter `sft`, continued, sha256 | " + "12" * 32 in card
    assert "stage 2: dpo adapter `first`, merged, sha256 | " + "34" * 32 in card
    assert "first base | org/model" in card


def test_a_file_of_the_first_version_is_still_read(tmp_path: Path) -> None:
    old = {
        "format": 1, "lorafocal": "0.1", "base": {"name": "b", "revision": None, "sha256": "ab"},
        "parents": [{"adapter": "adapter", "sha256": "cd"}], "reference": "disabled_adapter",
        "objective": {"name": "dpo", "beta": 0.1, "gamma": 0.0}, "steps": 3, "pairs_seen": 24,
    }  # fmt: skip
    (tmp_path / LINEAGE_FILE).write_text(json.dumps(old))
    lineage = lineage_of(tmp_path)
    assert lineage is not None
    assert (lineage.parents, lineage.quantization) == ((Stage("adapter", "cd"),), None)
    assert "dpo (beta 0.1, gamma 0)" in adapter_card(lineage)


@pytest.mark.parametrize("quantization", ["nf5", 4])
def test_a_quantisation_that_is_none_is_told_with_its_file(tmp_path: Path, quantization: object) -> None:
    record = LINEAGE.as_dict() | {"quantization": quantization}
    (tmp_path / LINEAGE_FILE).write_text(json.dumps(record))
    with pytest.raises(InputError, match=rf"lorafocal\.json: quantization {quantization!r}; known are nf4, .*Restore"):
        lineage_of(tmp_path)


def test_a_card_of_sft_claims_no_preferences() -> None:
    card = adapter_card(replace(LINEAGE, objective={"name": "sft"}, reference=None))
    assert "supervised-fine-tuning" in front_matter(card)["tags"]  # type: ignore[operator]
    assert "reference" not in card.lower()
    assert "preference" not in card.lower()
    chained = adapter_card(replace(LINEAGE, parents=(SFT,)))
    assert "preference-tuning" in front_matter(chained)["tags"]  # type: ignore[operator]


@pytest.mark.row("9", "42")
@pytest.mark.parametrize("quantization", QUANTIZED)
def test_the_card_of_an_adapter_on_a_quantised_base_opens_that_base(quantization: str) -> None:
    card = adapter_card(replace(LINEAGE, quantization=quantization))
    name = quantization.replace("-double", " (double quantisation)").replace("nf4", "NF4").replace("fp4", "FP4")
    assert f"was trained on the {name.replace('int8', 'INT8')} base" in card
    [settings] = re.findall(r"quantization_config=BitsAndBytesConfig\((.*?)\)", card)
    asked = BitsAndBytesConfig(**eval(f"dict({settings})"))
    assert asked.to_dict() == bitsandbytes_config(quantization, torch.bfloat16).to_dict()
    assert "BitsAndBytesConfig" not in adapter_card(LINEAGE)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_the_card_opens_the_base_in_the_dtype_of_training(quantization: str | None) -> None:
    """A checkpoint may be stored in another, which transformers takes if nothing is said."""
    card = adapter_card(replace(LINEAGE, quantization=quantization, dtype="float32"))
    assert re.search(r'AutoModelForCausalLM\.from_pretrained\(.*, dtype="float32"[,)]', card)
    assert ('bnb_4bit_compute_dtype="float32"' in card) == (quantization is not None)
    assert re.search(r"\| base in training \| .*computing in float32 \|", card)
    assert "bfloat16" not in card


def test_a_stage_on_a_quantised_base_is_told_in_the_card() -> None:
    lineage = replace(LINEAGE, quantization="int8", parents=(Stage("sft", "12" * 32, CONTINUED, quantization="nf4"),))
    card = adapter_card(lineage)
    assert "| base in training | quantised to INT8 with bitsandbytes |" in card
    assert "stage 1: adapter `sft` (trained on NF4), continued" in card


@pytest.mark.row("51")
def test_data_and_recipe_come_from_the_manifest_without_places() -> None:
    merged = {"dtype": "bfloat16", "gate": "GATE", "survival": "SURVIVAL"}
    cards = (
        adapter_card(LINEAGE, run=RUN),
        merged_card(LINEAGE, **merged, run=RUN),
        bundle_card(LINEAGE, **merged, pairs=12, notes=("a note",), run=RUN),
        compressed_card(LINEAGE, title="nf4", loading="LOADING", measured={"Cost": "COST"}, notes=["a note"], run=RUN),
    )
    for card in cards:
        for expected in (
            "| train | rows\\|1.jsonl (standard) | 85 | 80 | 5 too_long | " + "ab" * 32 + " |",
            "| eval | split off |  | 8 | none | " + "cd" * 32 + " |",
            "| training.learning_rate | 0.0001 |",
            '| adapter.targets | ["q_proj", "v_proj"] |',
            "| data.truncation | recipe |",
            "| training.bf16 | true |",
            "| version of torch | 2.13.0 |",
            "| hardware | CPU x86_64 |",
        ):
            assert expected in card
        for private in ("somebody", "private", "zero3", "~logs", "sft", "None"):
            assert private not in card
    assert "## Data" not in adapter_card(LINEAGE)


@pytest.mark.parametrize(
    "manifest",
    [{}, {"name": "an app", "icons": []}, {"config": {}, "data": ["x"]}, {"versions": ["1"]}],
    ids=["nothing", "an app's", "a list of data", "a list of versions"],
)
def test_a_manifest_of_another_program_is_no_recipe(manifest: dict[str, object]) -> None:
    """It may lie in the folder in which somebody saves a model."""
    card = model_card(LINEAGE, dtype="bfloat16", run=manifest)
    assert card == model_card(LINEAGE, dtype="bfloat16")
    assert "## Recipe" not in card


def test_the_cards_of_releases_say_how_they_are_checked_and_what_they_cost() -> None:
    card = bundle_card(LINEAGE, dtype="float16", gate="GATE TABLE", survival="SURVIVAL", pairs=12, notes=("a note",))
    for expected in (
        "python verify.py",
        "12 held-out pairs",
        "GATE TABLE",
        "- a note",
        'THIS_BUNDLE/merged", dtype="float16"',
    ):
        assert expected in card
    card = compressed_card(
        LINEAGE, title="GGUF (q8_0)", loading="HOW", measured={"What it cost": "COST"}, notes=["lossy"]
    )
    assert front_matter(card)["base_model_relation"] == "quantized"
    for expected in (": GGUF (q8_0)", "## What it cost\n\n```text\nCOST\n```", "## Loading\n\nHOW", "- lossy"):
        assert expected in card
