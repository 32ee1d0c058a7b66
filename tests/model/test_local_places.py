"""Settings beside published weights: what names a place on a machine is gone, all else stays to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3Config, GenerationConfig, LlamaConfig, PretrainedConfig

from lorafocal.model.local_places import CONFIG, GENERATION_CONFIG, forget_places

PLACES = [
    "/home/alice/secret/x",
    "~/x",
    "~alice/x",
    "~",
    "C:\\Users\\alice",
    "\\\\server\\x",
    "file:///home/alice",
    " /tmp",
]
NO_PLACES = ["org/model", "a/b/c", "see https://example.org/x", "~5 of them", "and/or", "", "c: d", 3, None, ["x", "y"]]


def saved(folder: Path, config: PretrainedConfig, generation: dict[str, Any]) -> tuple[str, ...]:
    config.save_pretrained(folder)
    (folder / GENERATION_CONFIG).write_text(json.dumps(generation))
    return forget_places(folder, config)


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("place", PLACES)
def test_places_under_keys_that_no_class_knows_are_dropped_and_noted(tmp_path: Path, place: str) -> None:
    plain = json.loads(LlamaConfig().to_json_string())
    own = {"my_note": place, "made": {"from": [place]}, "team": "org/team"}
    notes = saved(tmp_path, LlamaConfig(**own), {"_from_model": place, "top_k": 3})
    assert read(tmp_path, CONFIG) == plain | {"team": "org/team"}
    assert read(tmp_path, GENERATION_CONFIG) == {"top_k": 3}
    assert notes == (
        "Left out of the base's config.json, as places on a machine: made, my_note.",
        "Left out of the base's generation_config.json, as places on a machine: _from_model.",
    )
    assert place not in "".join(notes) or place == "~"
    assert forget_places(tmp_path, LlamaConfig(**own)) == ()


def test_what_is_no_place_or_is_known_stays_to_the_byte(tmp_path: Path) -> None:
    config = LlamaConfig(**{f"note{n}": value for n, value in enumerate(NO_PLACES)}, id2label={0: "/x", 1: "~"})
    config.save_pretrained(tmp_path)
    before = (tmp_path / CONFIG).read_bytes()
    GenerationConfig(stop_strings=["/end", "~"]).save_pretrained(tmp_path)
    settings = (tmp_path / GENERATION_CONFIG).read_bytes()
    assert forget_places(tmp_path, config) == ()
    assert (tmp_path / CONFIG).read_bytes() == before
    assert (tmp_path / GENERATION_CONFIG).read_bytes() == settings


def test_the_parts_of_a_configuration_are_looked_through(tmp_path: Path) -> None:
    config = Gemma3Config(text_config={"_name_or_path": "/home/alice/x", "note": "/home/alice"})
    notes = saved(tmp_path, config, {})
    assert notes == (
        "Left out of the base's config.json, as places on a machine: text_config._name_or_path, text_config.note.",
    )
    assert "alice" not in (tmp_path / CONFIG).read_text()


class Layered(LlamaConfig):
    @property
    def width(self) -> int:
        """As transformers answers for what differs between layers."""
        raise RuntimeError("ask the layers")


def test_settings_that_differ_between_layers_are_left_alone(tmp_path: Path) -> None:
    saved(tmp_path, LlamaConfig(width=3), {})
    assert forget_places(tmp_path, Layered()) == ()


@pytest.mark.parametrize("text", [None, "no JSON", "[1]"])
def test_a_file_without_settings_is_left_alone(tmp_path: Path, text: str | None) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    if text is not None:
        (tmp_path / GENERATION_CONFIG).write_text(text)
    assert forget_places(tmp_path, LlamaConfig()) == ()
    assert text is None or (tmp_path / GENERATION_CONFIG).read_text() == text
