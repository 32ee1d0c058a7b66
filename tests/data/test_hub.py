"""Files and hub ids are told apart, a hub id needs a commit, and no script is ever run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from lorafocal.data.hub import is_hub_id, read_source
from lorafocal.errors import InputError

PLAIN = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """A hub of one data set; gives what it was asked for."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def load_dataset(*names: Any, **options: Any) -> datasets.Dataset:
        calls.append((names, options))
        return datasets.Dataset.from_list([PLAIN, PLAIN | {"chosen": None}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_hub_id_is_loaded_at_its_commit(asked: list[Any]) -> None:
    read = read_source("owner/name", revision=COMMIT, split="train_prefs", on_bad_row="drop")
    assert asked == [(("owner/name",), {"revision": COMMIT, "split": "train_prefs"})]
    assert [pair.id for pair in read.pairs] == ["owner/name[train_prefs]:1"]
    assert [bad_row.place for bad_row in read.bad_rows] == ["owner/name[train_prefs], row 2, key `chosen`"]
    read_source("owner/name", revision=COMMIT, columns={"prompt": "prompt"}, form="explicit", on_bad_row="drop")
    assert asked[1][1]["split"] == "train"


@pytest.mark.row("S5")
@pytest.mark.parametrize("revision", [None, "main", COMMIT[:7], COMMIT.upper(), COMMIT + "\n"])
def test_a_hub_id_without_a_commit_is_refused(asked: list[Any], revision: str | None) -> None:
    with pytest.raises(InputError, match=r"owner/name: .*40 hex digits of a commit"):
        read_source("owner/name", revision=revision)
    assert not asked


@pytest.mark.row("S5")
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Dataset scripts are no longer supported, but found name.py"),
        ValueError('Unknown split "tain". Should be one of [train]'),
        datasets.exceptions.DatasetNotFoundError("no such data set"),
        ConnectionError("offline"),
    ],
)
def test_what_the_hub_refuses_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError) as refused:
        read_source("owner/name", revision=COMMIT, split="tain")
    assert str(refused.value).startswith(f"owner/name, split tain: it cannot be loaded ({error})")
    assert "are not run: export their rows" in str(refused.value)


def test_several_splits_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict())
    with pytest.raises(InputError, match=r"split 'all' is not one list of rows"):
        read_source("owner/name", revision=COMMIT, split="all")


def test_files_and_hub_ids_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("owner/name")
    assert is_hub_id("princeton-nlp/llama3-ultrafeedback-armorm")
    assert not is_hub_id("owner/name.jsonl")
    assert not is_hub_id(Path("owner/name"))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_hub_id("owner/name")
    for neither in ("name", "a/b/c", "other/..", "https://host/a b", "a/" + "b" * 5000, "../x"):
        with pytest.raises(InputError, match="neither a file that exists nor a hub id"):
            is_hub_id(neither)


@pytest.mark.row("S5")
def test_a_folder_with_a_script_is_refused_even_where_a_hub_id_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "name.py").write_text("raise SystemExit('ran')")
    with pytest.raises(InputError, match=r"name holds name.py: loading scripts are never run"):
        read_source("owner/name")
    assert not asked


def test_a_file_has_no_revision_and_no_split(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PLAIN))
    assert len(read_source(str(path)).pairs) == 1
    with pytest.raises(InputError, match=r"has no revision and no split; remove it, or say it beside"):
        read_source(path, revision=COMMIT, split="train")
