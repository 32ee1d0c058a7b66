"""Which points of a sweep share one pass of the reference store: those that look the same up, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafocal import run
from lorafocal.caching import CacheReport
from lorafocal.sweep import sweep
from lorafocal.sweep.grid import Grid
from lorafocal.sweep.runs import cache_references
from tests.test_sweep import SEEDS, states, write_config
from tests.toy_run import write_inputs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def stored_config(root: Path, store: Path, **changes: Any) -> Path:
    stored = {"reference__kind": "cached", "reference__store": str(store)}
    return write_config(root, "stored.yaml", objective__name="dpo", **stored, **changes)


@pytest.mark.parametrize(
    ("grid", "changes", "passes"),
    [
        (["adapter.r=2,4", SEEDS], {}, 1),
        (["adapter.targets=[q_proj],[v_proj]"], {}, 1),
        (["objective.name=dpo,f-dpo-js"], {}, 1),
        (["objective.name=dpo,ld-dpo,sampo"], {}, 2),  # log-probs of tokens
        (["objective.name=dpo,xpo"], {}, 2),  # further answers
        (["objective.name=dpo,odpo"], {}, 2),  # which drops pairs without different scores
        (["adapter.use_dora=false,true"], {}, 2),
        (["adapter.targets=[q_proj],[v_proj]"], {"adapter__use_dora": True}, 2),
        (["adapter.r=2,4", SEEDS], {"adapter__use_dora": True}, 1),
        (["adapter.modules_to_save=[],[lm_head]"], {}, 2),
        (["adapter.trainable_tokens=[],[3]"], {}, 2),
    ],
    ids=str,
)
def test_points_share_a_pass_where_they_look_the_same_up(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: list[str], changes: Any, passes: int
) -> None:
    monkeypatch.setattr(run, "cache_reference", lambda config, quiet: CacheReport(8, 0, 1.0))
    points = Grid.read(stored_config(root, tmp_path, **changes), grid, ()).points
    assert len(list(cache_references(points, quiet=True))) == passes


def test_sums_are_not_computed_apart_from_tokens(root: Path, tmp_path: Path) -> None:
    points = Grid.read(stored_config(root, tmp_path / "store"), ["objective.name=dpo,ld-dpo"], ()).points
    tokens, sums = cache_references(points, quiet=True)
    assert tokens.computed > 0 == sums.computed
    assert sums.found == tokens.computed


@pytest.mark.engine
@pytest.mark.parametrize("axis", ["objective.name=dpo,ld-dpo", "adapter.use_dora=false,true"])
def test_every_point_finds_what_it_looks_up(root: Path, tmp_path: Path, axis: str) -> None:
    file = stored_config(root, tmp_path / "store")
    report = sweep(file, [axis], runs_dir=tmp_path / "runs", quiet=True)
    assert list(states(report).values()) == ["finished"] * 2
