"""Only what cannot reach the weights may change on resume; the rest is refused by name."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from lorafocal.errors import InputError
from lorafocal.resume import MAY_CHANGE, WHY_NOT, changes, check_resumable

MANIFEST: dict[str, Any] = {
    "config": {
        "name": "quickstart",
        "adapter": {"r": 8, "targets": ["q_proj", "v_proj"]},
        "objective": {"name": "focalpo", "beta": 0.1, "gamma": 0.05},
        "training": {"pairs_per_step": 64, "max_steps": 100, "logging_steps": 10, "save_steps": 50},
        "packing": {"layout": "packed", "tokens": 8192},
        "data": {"max_length": 64},
    },
    "base": {"name": "toy", "revision": None, "sha256": "aa"},
    "data": {"train": {"sha256": "bb", "pairs": 64}},
    "versions": {"torch": "2.13.0"},
    "threads": 1,
}


def changed(key: str, value: Any) -> dict[str, Any]:
    manifest = copy.deepcopy(MANIFEST)
    *sections, last = key.split(".")
    inner = manifest
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[last] = value
    return manifest


def test_nothing_changed_says_nothing() -> None:
    assert check_resumable(MANIFEST, json.loads(json.dumps(MANIFEST))) == []


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("config.name", "other", "name: 'quickstart' -> 'other'"),
        ("config.adapter.r", 16, "adapter.r: 8 -> 16"),
        ("config.adapter.targets", ["q_proj"], "adapter.targets: ['q_proj', 'v_proj'] -> ['q_proj']"),
        ("config.adapter.alpha", 16, "adapter.alpha: (absent) -> 16"),
        ("config.objective.gamma", 0.0, "objective.gamma: 0.05 -> 0.0"),
        ("config.training.max_steps", 200, "training.max_steps: 100 -> 200 (the learning-rate schedule"),
        ("config.training.pairs_per_step", 32, "training.pairs_per_step: 64 -> 32 (it decides which pairs"),
        ("config.training.invented", 1, "training.invented: (absent) -> 1"),
        ("config.packing.layout", "padded", "packing.layout: 'packed' -> 'padded' (another layout adds"),
        ("base.sha256", "ab", "base.sha256: 'aa' -> 'ab'"),
        ("data.train.sha256", "bc", "data.train.sha256: 'bb' -> 'bc'"),
    ],
)
def test_a_forbidden_change_is_refused_by_name_with_both_values(key: str, value: Any, line: str) -> None:
    with pytest.raises(InputError) as caught:
        check_resumable(MANIFEST, changed(key, value))
    assert f"\n  {line}" in str(caught.value)
    assert "new run under another name" in str(caught.value)
    with pytest.raises(InputError):
        check_resumable(changed(key, value), MANIFEST)


def test_another_config_of_the_base_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"base\.config_sha256: 'cc' -> 'cd' \(the base's config\.json is not the one"):
        check_resumable(changed("base.config_sha256", "cc"), changed("base.config_sha256", "cd"))


def test_every_forbidden_change_is_named_at_once() -> None:
    both = changed("config.objective.beta", 0.2)
    both["base"]["sha256"] = "zz"
    with pytest.raises(InputError, match=r"objective\.beta: 0\.1 -> 0\.2\n  base\.sha256: 'aa' -> 'zz'"):
        check_resumable(MANIFEST, both)


@pytest.mark.parametrize("key", MAY_CHANGE)
def test_an_allowed_change_is_noted_with_its_reason(key: str) -> None:
    [note] = check_resumable(MANIFEST, changed(f"config.{key}", "new"))
    assert note.startswith(f"{key}: ")
    assert note.endswith(f"(allowed: {MAY_CHANGE[key]})")


def test_a_run_that_one_process_kept_waiting_too_long_goes_on_with_more_time() -> None:
    """What docs/several-processes.md advises."""
    [note] = check_resumable(MANIFEST, changed("config.training.ddp_timeout", 7200))
    assert note.startswith("training.ddp_timeout: (absent) -> 7200 (allowed: ")


def test_smaller_packs_are_allowed_and_said_to_change_the_last_bits() -> None:
    """What the message of a several-process run that is out of memory advises."""
    [note] = check_resumable(MANIFEST, changed("config.packing.tokens", 4096))
    assert note.startswith("packing.tokens: 8192 -> 4096 (allowed: ")
    assert "last bits" in note


@pytest.mark.parametrize(("key", "value"), [("versions.torch", "2.14.0"), ("threads", 2)])
def test_another_library_or_thread_count_is_noted(key: str, value: Any) -> None:
    [note] = check_resumable(MANIFEST, changed(key, value))
    assert note.startswith(f"{key}: ")
    assert "last bits" in note


def test_the_tables_are_data_that_do_not_contradict_each_other() -> None:
    assert not MAY_CHANGE.keys() & WHY_NOT.keys()
    assert json.loads(json.dumps(MAY_CHANGE)) == MAY_CHANGE
    assert all(MAY_CHANGE.values())


def test_a_key_that_an_older_manifest_lacks_is_the_same_as_none() -> None:
    """A run begun before `engine` and `recipe` were keys goes on."""
    assert check_resumable(MANIFEST, changed("config.engine", None)) == []
    assert check_resumable(changed("data.train.scores_sha256", None), MANIFEST) == []
    assert check_resumable(MANIFEST, changed("base.config_sha256", "cc")) == []
    assert changes({"adapter": None}, {"adapter": {"r": 8}}, ()) == ["adapter.r: (absent) -> 8"]


def test_a_run_may_go_on_in_another_engine_or_in_none() -> None:
    split = changed("config.engine", {"kind": "zero3", "offload": "none"})
    for old, new in ((MANIFEST, split), (split, MANIFEST)):
        kind, offload = check_resumable(old, new)
        assert kind.startswith("engine.kind: ")
        assert "last bits" in kind
        assert offload.startswith("engine.offload: ")


def test_scores_that_an_older_run_did_not_read_do_not_stop_it() -> None:
    scored = changed("data.train.scores_sha256", "ss")
    assert check_resumable(MANIFEST, scored) == []
    for other in (MANIFEST, changed("data.train.scores_sha256", "tt")):
        with pytest.raises(InputError, match=r"data\.train\.scores_sha256: 'ss' -> "):
            check_resumable(scored, other)


@pytest.mark.parametrize(
    ("key", "section"),
    [("adapter.start_from", "start_from"), ("model.name", "base"), ("reference.model", "reference_model")],
)
def test_weights_may_lie_elsewhere_as_long_as_they_are_known_to_be_the_same(key: str, section: str) -> None:
    here, there = (changed(f"config.{key}", place) | {section: {"sha256": "aa"}} for place in ("runs/x", "/moved/x"))
    assert check_resumable(here, there) == [
        f"{key}: 'runs/x' -> '/moved/x' (allowed: the same weights, in another place)"
    ]
    for digest in ("bb", None):
        with pytest.raises(InputError, match=f"{key}: 'runs/x' -> '/moved/x'"):
            check_resumable(here | {section: {"sha256": digest}}, there | {section: {"sha256": digest and "aa"}})


def test_tuples_and_lists_are_the_same_setting() -> None:
    assert changes({"a": {"b": (1, 2)}}, {"a": {"b": [1, 2]}}, ()) == []
    assert changes({"a": {"b": 1}}, {"a": 1}, ()) == ["a: (absent) -> 1", "a.b: 1 -> (absent)"]
