"""A cache that never answers with something else: what could change a token misses, the rest hits and is equal."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from lorafocal.data import cache
from lorafocal.data.cache import cache_key, cached_tokenization, default_folder
from lorafocal.data.sources import Preference
from lorafocal.data.tokens import tokenize_preferences
from tests.data.test_tokens import QWEN_LIKE, byte_tokenizer, chat

OPTIONS = {"max_length": 200, "truncation": "keep_start"}


def rows() -> list[Preference]:
    good = [
        replace(chat("hi", "yes " * n, "no", f"id {n}"), score_chosen=n / 3, place=f"a, row {n}") for n in range(1, 4)
    ]
    return [*good, replace(chat("hi", "x" * 300, "no", "long"), place="a, row 4"), chat("a</s>", "b", "c", "forged")]


@pytest.fixture
def tokenizations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever the cache has to tokenise."""
    calls: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return tokenize_preferences(*arguments, **options)

    monkeypatch.setattr(cache, "tokenize_preferences", counted)
    return calls


@pytest.mark.row("31")
def test_unchanged_content_hits_and_is_equal(tmp_path: Path, tokenizations: list[int]) -> None:
    """Equal in pairs, scores, counts, examples and details; a tokenizer built anew and used for padding is the same."""
    fresh = tokenize_preferences(rows(), byte_tokenizer(QWEN_LIKE, bos=False), **OPTIONS)
    assert fresh.cut == 1
    assert fresh.drops == {"control_tokens": 1}
    first = cached_tokenization(rows(), byte_tokenizer(QWEN_LIKE, bos=False), folder=tmp_path, **OPTIONS)
    used = byte_tokenizer(QWEN_LIKE, bos=False, pad_token="</s>")
    plain = byte_tokenizer(QWEN_LIKE, bos=False)
    plain.backend_tokenizer.enable_truncation(3)
    second = cached_tokenization(rows(), plain, folder=tmp_path, **OPTIONS)
    assert first == second == fresh
    assert len(tokenizations) == 1
    cached_tokenization(rows(), used, folder=tmp_path, **OPTIONS)
    assert len(tokenizations) == 2  # another special token may be written by the template


@pytest.mark.row("31")
def test_places_are_not_content_but_examples_follow_them(tmp_path: Path, tokenizations: list[int]) -> None:
    tokenizer = byte_tokenizer(QWEN_LIKE, bos=False)
    cached_tokenization(rows(), tokenizer, folder=tmp_path, **OPTIONS)
    moved = [replace(row, place=f"b, row {n}") for n, row in enumerate(rows())]
    assert cached_tokenization(moved, tokenizer, folder=tmp_path, **OPTIONS).examples == {
        "control_tokens": ["b, row 4"]
    }
    assert len(tokenizations) == 1


def _other_text(preferences: list[Preference]) -> None:
    preferences[2] = replace(preferences[2], rejected=[{"role": "assistant", "content": "nO"}])


def _template(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("kind.", "kind!")


CHANGES: dict[str, Callable[[list[Preference], Any, dict[str, Any]], None]] = {
    "a character of a text": lambda rows, tokenizer, options: _other_text(rows),
    "an id": lambda rows, tokenizer, options: rows.__setitem__(0, replace(rows[0], id="id 0")),
    "a score": lambda rows, tokenizer, options: rows.__setitem__(0, replace(rows[0], score_chosen=0.5)),
    "the order": lambda rows, tokenizer, options: rows.reverse(),
    "one row less": lambda rows, tokenizer, options: rows.__delitem__(0),
    "a character of the template": lambda rows, tokenizer, options: _template(tokenizer),
    "the length": lambda rows, tokenizer, options: options.update(max_length=201),
    "the truncation": lambda rows, tokenizer, options: options.update(truncation="drop"),
    "a template option": lambda rows, tokenizer, options: options.update(chat_template_kwargs={"loud": True}),
    "the tokenizer": lambda rows, tokenizer, options: setattr(
        tokenizer.backend_tokenizer, "normalizer", normalizers.Lowercase()
    ),
    "a special token": lambda rows, tokenizer, options: setattr(tokenizer, "eos_token", "</s>"),
}


@pytest.mark.row("31")
@pytest.mark.parametrize("change", CHANGES)
def test_one_change_misses(change: str, tmp_path: Path, tokenizations: list[int]) -> None:
    template = QWEN_LIKE + "{% if loud is defined %}{{ '' }}{% endif %}"
    made = [(rows(), byte_tokenizer(template, bos=False, eos_token="<|eot|>"), dict(OPTIONS)) for _ in range(2)]
    CHANGES[change](*made[1])
    for preferences, tokenizer, options in made:
        kept = cached_tokenization(preferences, tokenizer, folder=tmp_path, **options)
        assert kept == tokenize_preferences(preferences, tokenizer, **options)
    assert len(tokenizations) == 2


@pytest.mark.row("31")
def test_versions_and_schema_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(QWEN_LIKE, bos=False)
    keys = [cache_key(rows(), tokenizer, OPTIONS)]
    monkeypatch.setattr(cache, "SCHEMA", cache.SCHEMA + 1)
    keys.append(cache_key(rows(), tokenizer, OPTIONS))
    monkeypatch.setattr(cache, "installed", lambda name: "0")
    keys.append(cache_key(rows(), tokenizer, OPTIONS))
    assert len(set(keys)) == 3


@pytest.mark.row("31")
def test_a_template_that_writes_the_time_is_not_answered_from_another_moment() -> None:
    """Microseconds stand for days: the key holds what the template writes now."""
    now = "{{ strftime_now('%f') }}"
    dated = byte_tokenizer(
        "{% if day is not defined %}" + now + "{% else %}{{ day }}{% endif %}" + QWEN_LIKE, bos=False
    )
    assert len({cache_key(rows(), dated, OPTIONS) for _ in range(5)}) > 1
    stated = OPTIONS | {"chat_template_kwargs": {"day": "26 Jul 2024"}}
    assert len({cache_key(rows(), dated, stated) for _ in range(5)}) == 1


@pytest.mark.row("31")
@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
@pytest.mark.parametrize("damage", ["a changed byte", "cut short", "emptied", "removed"])
def test_a_damaged_entry_is_passed_over_and_written_again(
    suffix: str, damage: str, tmp_path: Path, tokenizations: list[int]
) -> None:
    tokenizer = byte_tokenizer(QWEN_LIKE, bos=False)
    whole = cached_tokenization(rows(), tokenizer, folder=tmp_path, **OPTIONS)
    [file] = tmp_path.glob(f"*{suffix}")
    content = file.read_bytes()
    if damage == "a changed byte":
        place = content.rindex(b"1") if suffix == ".json" else len(content) - 4
        file.write_bytes(content[:place] + b"2" + content[place + 1 :])
    elif damage == "removed":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut short" else b"")
    assert cached_tokenization(rows(), tokenizer, folder=tmp_path, **OPTIONS) == whole
    assert len(tokenizations) == 2
    assert file.read_bytes() == content


@pytest.mark.row("31")
def test_an_entry_under_another_name_is_not_believed(tmp_path: Path, tokenizations: list[int]) -> None:
    tokenizer = byte_tokenizer(QWEN_LIKE, bos=False)
    cached_tokenization(rows(), tokenizer, folder=tmp_path, **OPTIONS)
    other = cache_key(rows()[1:], tokenizer, OPTIONS)
    for file in list(tmp_path.iterdir()):
        file.rename(file.with_stem(other))
    kept = cached_tokenization(rows()[1:], tokenizer, folder=tmp_path, **OPTIONS)
    assert kept == tokenize_preferences(rows()[1:], tokenizer, **OPTIONS)
    assert len(tokenizations) == 2


def test_several_writers_of_one_entry_do_not_fail(tmp_path: Path) -> None:
    """Ranks of one launch: all miss at once, all write; the second rename replaces equal bytes by equal bytes."""
    tokenizer = byte_tokenizer(QWEN_LIKE, bos=False)
    data = tokenize_preferences(rows(), tokenizer, **OPTIONS)
    key = cache_key(rows(), tokenizer, OPTIONS)
    cache.write_entry(tmp_path, key, data, rows())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with ThreadPool(4) as ranks:
        done = ranks.map(lambda _: cached_tokenization(rows(), tokenizer, folder=tmp_path, **OPTIONS) == data, range(8))
    assert all(done)
    cache.write_entry(tmp_path, key, data, rows())
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert json.loads((tmp_path / f"{key}.json").read_text())["counts"]["key"] == key


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    taken = tmp_path / "a file"
    taken.write_text("")
    with caplog.at_level(logging.WARNING, logger="lorafocal"):
        data = cached_tokenization(rows(), byte_tokenizer(QWEN_LIKE, bos=False), folder=taken, **OPTIONS)
    assert len(data.pairs) == 4
    assert "could not be kept in the cache" in caplog.text


def test_a_tokenizer_that_cannot_be_named_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(QWEN_LIKE, bos=False)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert cached_tokenization(rows(), tokenizer, folder=tmp_path, **OPTIONS).cut == 1
    assert not list(tmp_path.iterdir())


def test_the_folder_is_ours_or_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "LORAFOCAL_CACHE", "/one")
    monkeypatch.setitem(os.environ, "XDG_CACHE_HOME", "/two")
    assert default_folder() == Path("/one")
    monkeypatch.delenv("LORAFOCAL_CACHE")
    assert default_folder() == Path("/two/lorafocal")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "lorafocal"
