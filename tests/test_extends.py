"""A config that extends others: what wins, where files are looked for, and what is said where they are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafocal.config import layers, load_config
from lorafocal.errors import InputError

BASE = """
name: base
model: {name: owner/base, dtype: float32}
adapter: {r: 8, alpha: 16}
data: {train: [a.jsonl, b.jsonl], held_out: 0.1}
objective: {name: focalpo, beta: 0.1, gamma: 0.1}
reference: {kind: disabled_adapter}
training: {pairs_per_step: 8, learning_rate: 1.0e-4}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "base.yaml", BASE)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_own_keys_win_inside_sections_and_the_rest_stays(folder: Path) -> None:
    own = write(folder / "own.yaml", "extends: base.yaml\nname: own\ntraining: {learning_rate: 2.0e-4}\n")
    config, base = load_config(own), load_config(folder / "base.yaml")
    assert config.training.fields["learning_rate"] == 2e-4
    training = base.training.model_copy(update={"learning_rate": 2e-4})
    assert config == base.model_copy(update={"name": "own", "training": training})


def test_lists_and_nulls_replace_what_is_below(folder: Path) -> None:
    own = write(
        folder / "own.yaml",
        "extends: base.yaml\ndata: {train: c.jsonl}\nobjective: {name: dpo, gamma: null}\nadapter: null\n"
        "reference: {kind: cached}\n",
    )
    config = load_config(own)
    assert [source.path for source in config.data.train] == ["c.jsonl"]
    assert config.data.held_out == 0.1
    assert (config.objective.name, config.adapter) == ("dpo", None)


def test_of_several_the_later_wins_and_overrides_win_over_all(folder: Path) -> None:
    write(folder / "slow.yaml", "training: {learning_rate: 1.0e-6, warmup_ratio: 0.2}\n")
    write(folder / "fast.yaml", "training: {learning_rate: 1.0e-3}\n")
    own = write(folder / "own.yaml", "extends: [base.yaml, slow.yaml, fast.yaml]\n")
    assert load_config(own).training.fields["learning_rate"] == 1e-3
    assert load_config(own).training.warmup_ratio == 0.2
    assert load_config(own, ["training.learning_rate=5e-5"]).training.fields["learning_rate"] == 5e-5


def test_each_file_is_looked_for_beside_the_one_that_names_it(folder: Path) -> None:
    write(folder / "inner" / "middle.yaml", "extends: ../base.yaml\nname: middle\n")
    own = write(folder / "own.yaml", "extends: inner/middle.yaml\n")
    assert load_config(own).name == "middle"
    assert [file.name for file, _ in layers(own)] == ["base.yaml", "middle.yaml", "own.yaml"]


def test_one_file_may_be_reached_twice(folder: Path) -> None:
    for name in ("left", "right"):
        write(folder / f"{name}.yaml", f"extends: base.yaml\nname: {name}\n")
    assert load_config(write(folder / "own.yaml", "extends: [left.yaml, right.yaml]\n")).name == "right"


def test_a_circle_is_refused_with_the_way_round(folder: Path) -> None:
    write(folder / "base.yaml", "extends: own.yaml\n" + BASE)
    own = write(folder / "own.yaml", "extends: base.yaml\n")
    with pytest.raises(InputError, match=r"base\.yaml: extends: own\.yaml leads back to itself \(.*own.* > .*base.*\)"):
        load_config(own)


@pytest.mark.parametrize("stated", ["3", "{a: b}", "[base.yaml, 3]", "''"])
def test_what_is_no_file_name_is_refused(folder: Path, stated: str) -> None:
    own = write(folder / "own.yaml", f"extends: {stated}\n")
    with pytest.raises(InputError, match=r"own\.yaml: extends: found .*; allowed: a config file, or a list of them"):
        load_config(own)


def test_a_missing_file_is_told_with_the_one_that_names_it(folder: Path) -> None:
    own = write(folder / "own.yaml", "extends: nowhere.yaml\n")
    with pytest.raises(InputError, match=r"own\.yaml: extends: cannot read the config .*nowhere\.yaml: No such file"):
        load_config(own)


def test_a_mistake_names_every_file_it_may_stand_in(folder: Path) -> None:
    write(folder / "wrong.yaml", "training: {learning_rat: 1.0e-3}\n")
    own = write(folder / "own.yaml", "extends: [base.yaml, wrong.yaml]\n")
    with pytest.raises(
        InputError, match=r"own\.yaml \(extends .*base\.yaml, .*wrong\.yaml\): 1 mistake\n.*learning_rat"
    ):
        load_config(own)


def test_the_schema_never_sees_it(folder: Path) -> None:
    config = load_config(write(folder / "own.yaml", "extends: base.yaml\n"))
    assert "extends" not in config.model_dump()
    assert config.sha() == load_config(folder / "base.yaml").sha()
