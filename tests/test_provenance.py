"""A run again from its manifest: the same bits from the same inputs wherever they lie, other inputs refused by name."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lorafocal import run
from lorafocal.errors import InputError
from lorafocal.provenance import INPUTS, check_same_inputs, config_of, reproduce, same_weights
from lorafocal.run import RunSummary
from tests.toy_run import run_config, write_inputs

DIGESTS = [path for path in INPUTS if path[0] not in ("reference_model", "reference_adapters", "start_from")]
ADAPTERS = [path for path in INPUTS if path[0] == "reference_adapters"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def first(root: Path) -> RunSummary:
    config = run_config(root, packing__tokens="auto", training__save_steps=100)
    return run.train(config, quiet=True, runs_dir=root / "runs")


@pytest.fixture(scope="module")
def path(first: RunSummary) -> Path:
    return first.folder / "manifest.json"


@pytest.fixture(scope="module")
def manifest(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def changed(manifest: dict[str, Any], keys: tuple[str, ...], value: Any) -> dict[str, Any]:
    other = copy.deepcopy(manifest)
    place = other
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return other


# --- the same again -----------------------------------------------------------------------------------------


@pytest.mark.row("58")
def test_moved_inputs_give_the_same_bits(root: Path, path: Path, manifest: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(root / "base", tmp_path / "moved")
    shutil.copy(root / "train.jsonl", tmp_path / "pairs.jsonl")
    moved = [f"model.name={tmp_path / 'moved'}", f"data.train={tmp_path / 'pairs.jsonl'}", "training.logging_steps=1"]
    config = config_of(path, moved)
    assert config.name == "toy-again"
    assert config.packing.tokens == manifest["settled"]["tokens_per_pack"]  # auto, then
    found = reproduce(config, path, quiet=True, runs_dir=tmp_path / "runs")
    assert found.same is True
    assert str(found).endswith("its weights are bit for bit those of toy")
    again = json.loads((tmp_path / "runs" / "toy-again" / "manifest.json").read_text())
    assert {key for key in manifest if manifest[key] != again[key]} - {"kernels"} == {  # which say who set the packs
        "config", "config_sha256", "base", "data",
    }  # fmt: skip
    assert again["base"]["sha256"] == manifest["base"]["sha256"]
    twice = config_of(tmp_path / "runs" / "toy-again" / "manifest.json")
    assert twice == config.model_copy(update={"name": "toy-again-again"})


def test_weights_that_differ_or_lack_are_told_apart(first: RunSummary, tmp_path: Path) -> None:
    ours = first.folder / "adapter"
    assert same_weights(ours, ours) is True
    assert same_weights(ours, tmp_path) is False
    assert same_weights(tmp_path, ours) is None


# --- other inputs -------------------------------------------------------------------------------------------


@pytest.mark.row("58")
def test_another_row_is_refused_by_name_before_anything_is_written(root: Path, path: Path, tmp_path: Path) -> None:
    rows = (root / "train.jsonl").read_text().splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(rows[:-1]))
    config = config_of(path, [f"data.train={tmp_path / 'fewer.jsonl'}"])
    with pytest.raises(InputError, match=r"data\.train\.tokens_sha256: .* the training pairs: data\.train=FILE names"):
        reproduce(config, path, quiet=True, runs_dir=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.row("58")
@pytest.mark.parametrize("keys", DIGESTS, ids=".".join)
def test_every_other_input_is_refused_by_name(manifest: dict[str, Any], keys: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        check_same_inputs(manifest, changed(manifest, keys, "f" * 64))
    assert f"\n  {'.'.join(keys)}: " in str(caught.value)
    assert f"-> ffffffffffff..., {INPUTS[keys]}" in str(caught.value)


def test_other_models_and_adapters_to_start_from_are_refused_too(manifest: dict[str, Any]) -> None:
    for key in ("reference_model", "start_from"):
        old = changed(manifest, (key,), {"sha256": "a" * 64})
        for value in ({"sha256": "b" * 64}, None):
            with pytest.raises(InputError, match=rf"{key}\.sha256: aaaaaaaaaaaa\.\.\. -> (bbbbbbbbbbbb\.\.\.|none), "):
                check_same_inputs(old, changed(manifest, (key,), value))


@pytest.mark.row("58")
@pytest.mark.parametrize("keys", ADAPTERS, ids=".".join)
def test_other_adapters_of_a_reference_are_refused_by_name(manifest: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Each by itself: another one in its place, one missing, and a reference without any."""
    digests = {name: name[0] * 64 for _, name in ADAPTERS}
    old = changed(manifest, ("reference_adapters",), digests)
    fewer = {name: digest for name, digest in digests.items() if name != keys[1]}
    said = f"\n  {'.'.join(keys)}: {keys[1][0] * 12}... -> "
    for value, found in ((fewer | {keys[1]: "f" * 64}, "ffffffffffff..."), (fewer, "none"), (None, "none")):
        with pytest.raises(InputError) as caught:
            check_same_inputs(old, changed(manifest, ("reference_adapters",), value))
        assert f"{said}{found}, {INPUTS[keys]}" in str(caught.value)
        assert str(caught.value).count("reference_adapters.") == (len(ADAPTERS) if value is None else 1)


def test_no_member_of_a_reference_is_passed_over(manifest: dict[str, Any]) -> None:
    """However many there are: another fourth one, one that was not there, and the base in another place."""
    four = {str(number): str(number) * 64 for number in range(1, 5)}
    old = changed(manifest, ("reference_adapters",), four)
    assert check_same_inputs(old, copy.deepcopy(old)) == []
    for value, said in ({**four, "4": "f" * 64}, "4: 4{12}... -> f{12}"), ({**four, "5": "f" * 64}, "5: none -> f{12}"):
        with pytest.raises(InputError, match=rf"reference_adapters\.{said}\.\.\., a further adapter"):
            check_same_inputs(old, changed(manifest, ("reference_adapters",), value))
    first, again = (
        changed(old, ("config", "reference", "members"), members) for members in (["base", "a"], ["moved", "base"])
    )
    with pytest.raises(InputError, match=r"reference\.members: base is at \[1\] -> \[2\] of them"):
        check_same_inputs(first, again)


def test_all_that_differs_is_named_at_once(manifest: dict[str, Any]) -> None:
    other = changed(changed(manifest, ("base", "sha256"), "f" * 64), ("chat_template_sha256",), "f" * 64)
    with pytest.raises(InputError, match=r"(?s)base\.sha256: .*\n  chat_template_sha256: "):
        check_same_inputs(manifest, other)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("versions", "torch"), "9.9"),
        (("processes",), 8),
        (("threads",), 99),
        (("hardware",), "Abacus"),
        (("config", "engine"), {"kind": "zero3"}),
    ],
)
def test_other_versions_and_machines_are_noted(manifest: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    [note] = check_same_inputs(manifest, changed(manifest, keys, value))
    assert note.startswith(".".join(keys).removeprefix("config."))
    assert note.endswith("(the last bits may differ from the first run)")


def test_a_manifest_that_says_less_is_compared_as_far_as_it_says(manifest: dict[str, Any]) -> None:
    older = copy.deepcopy(manifest)
    del older["data"]["train"]["scores_sha256"], older["start_from"]
    assert check_same_inputs(older, manifest) == []


# --- what may be said otherwise -----------------------------------------------------------------------------


@pytest.mark.parametrize("override", ["training.learning_rate=1e-3", "objective.gamma=0", "data.max_length=32"])
def test_what_would_make_another_run_is_refused(path: Path, override: str) -> None:
    with pytest.raises(InputError, match=r"would make another run than the one of .*; for another run, train .*config"):
        config_of(path, [override])


def test_a_word_that_sets_nothing_is_named(path: Path) -> None:
    with pytest.raises(InputError, match="'nonsense' is not an override"):
        config_of(path, ["nonsense"])


def test_name_and_engine_may_change(path: Path) -> None:
    config = config_of(path, ["name=mine", "engine.kind=ddp", "training.use_cpu=true"])
    assert (config.name, config.engine and config.engine.kind) == ("mine", "ddp")


def test_a_long_name_stays_a_name(path: Path, manifest: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(changed(manifest, ("config", "name"), "x" * 64)))
    assert config_of(file).name == "x" * 58 + "-again"


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"config": {}, "base": 3}'])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"--repro takes the manifest\.json of a run folder"):
        config_of(tmp_path / "manifest.json")


def test_a_missing_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the manifest"):
        config_of(tmp_path / "manifest.json")
