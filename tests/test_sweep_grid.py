"""The grid of a sweep: checked as a whole before anything runs, and a name a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafocal.config import load_config
from lorafocal.errors import InputError
from lorafocal.report.sweep_results import ACCURACY, LOSS
from lorafocal.sweep.grid import Grid, choose_criterion, parse_grid, slug_of
from tests.test_sweep import RATES, SEEDS, write_config
from tests.toy_run import write_inputs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def config(root: Path) -> Path:
    return write_config(root, "run.yaml")


def test_values_are_read_as_yaml() -> None:
    grid = ["training.learning_rate=3e-7, 1e-6", "adapter.targets=all-linear,[q_proj,v_proj]", "training.seed=1,2"]
    assert parse_grid(grid) == {
        "training.learning_rate": [3e-7, 1e-6],
        "adapter.targets": ["all-linear", ["q_proj", "v_proj"]],
        "training.seed": [1, 2],
    }


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([], r"a sweep needs --grid: for example --grid training\.learning_rate="),
        (["training.seed"], "is no axis of a grid; write key=value,value"),
        (["training.seed="], "is no axis of a grid"),
        (["training.seed=1", "training.seed=2"], "--grid training.seed is given twice; list its values once"),
        (
            ["training.seed=1],[2"],
            r"--grid training\.seed: '1\],\[2' is no list of values; write value,value",
        ),
        (["training.seed=&a 1,*a"], "--grid training.seed: '&a 1,\\*a' is no list of values"),
        (["training.seed=1,,2"], "--grid training.seed: a value is missing in '1,,2'; write one comma between two$"),
        (["training.seed=,2"], "--grid training.seed: a value is missing in ',2'"),
    ],
)
def test_what_is_no_grid_is_refused(grid: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_grid(grid)


@pytest.mark.parametrize(
    ("values", "slug"),
    [
        ({"training.learning_rate": 3e-7, "objective.gamma": 0.05, "training.seed": 1}, "lr3e-7-gamma0.05-seed1"),
        ({"objective.name": "dpo", "adapter.r": 8}, "dpo-r8"),
        ({"adapter.init": "pissa", "adapter.use_dora": True}, "init-pissa-use-dora-true"),
        ({"training.weight_decay": 0.0, "training.data_seed": 7}, "decay0-order7"),
        ({"training.invented": -1}, "invented-1"),
        ({"training.invented": 1}, "invented1"),
    ],
)
def test_runs_are_named_by_their_values(values: dict[str, Any], slug: str) -> None:
    assert slug_of(values) == slug


def test_values_that_no_name_can_hold_still_give_names_of_their_own() -> None:
    lists: list[dict[str, Any]] = [
        {"adapter.targets": [f"{name}_proj" for name in names]} for names in ("qk", "qv", "qkvo" * 9)
    ]
    slugs = {slug_of(values) for values in (*lists, {"data.train": "a/x.jsonl"}, {"data.train": "b/x.jsonl"})}
    assert len(slugs) == 5
    assert all(len(slug) <= 64 and "/" not in slug and not slug.startswith(".") for slug in slugs)


@pytest.mark.parametrize(
    ("axis", "why"),
    [
        ("stages=2,3", "a run of a sweep is one stage"),
        ("name=a,b", "each run is named by its values"),
        ("model.dtype=float32,bfloat16", "rewards are relative to the base"),
        ("reference.kind=frozen_copy,disabled_adapter", "rewards are relative to the reference"),
        ("adapter.start_from=a,b", "the reference is the start"),
        ("data.held_out=0.1,0.2", "which held-out pairs there are"),
        ("data.max_length=32,64", "which held-out pairs there are"),
        ("packing.tokens=52,64", "memory and speed, never the result"),
        ("kernels.compile=true,false", "memory and speed, never the result"),
        ("training.activation_checkpointing=none,full", "memory and speed, never the result"),
        ("training.logging_steps=1,2", "all its values give the same adapter"),
        ("objective={name: dpo, beta: 0.1},{name: dpo, beta: 0.2}", "it is a whole section; vary keys inside it"),
    ],
)
def test_keys_that_runs_could_not_be_compared_over_are_refused_with_the_reason(
    config: Path, axis: str, why: str
) -> None:
    with pytest.raises(InputError, match=why):
        Grid.read(config, [axis])


def test_all_mistakes_of_a_grid_are_told_at_once(config: Path) -> None:
    grid = ["objective.gamma=0.05,2", "training.lerning_rate=1e-3", "training.seed=1,-1"]
    with pytest.raises(InputError) as error:
        Grid.read(config, grid)
    text = str(error.value)
    assert "this grid has mistakes, and nothing was run" in text
    assert "did you mean training.learning_rate?  (4 of 4 points)" in text
    assert "training.seed" in text
    assert "gamma is 2" in text
    assert text.count("(2 of 4 points)") == 2


@pytest.mark.parametrize(
    ("grid", "named"),
    [
        (["training.seed=1,2,1"], "training.seed=1"),
        (["training.learning_rate=1e-3,0.001"], r"training\.learning_rate=0\.001"),
        (["training.learning_rate=1,1.0"], r"training\.learning_rate=1 and training\.learning_rate=1\.0"),
    ],
)
def test_points_that_are_the_same_run_are_refused(config: Path, grid: list[str], named: str) -> None:
    with pytest.raises(InputError, match=f"two points of the grid are the same run: {named}"):
        Grid.read(config, grid)


def test_what_a_grid_would_replace_is_refused(config: Path) -> None:
    with pytest.raises(InputError, match=r"training\.seed: it is given as an override too"):
        Grid.read(config, [SEEDS], ["training.seed=3"])


def test_a_grid_has_an_end(config: Path) -> None:
    seeds = ",".join(map(str, range(40)))
    with pytest.raises(InputError, match="the grid has 1,600 points"):
        Grid.read(config, [f"training.seed={seeds}", f"training.data_seed={seeds}"])


def test_a_factor_around_the_loss_is_an_axis(config: Path) -> None:
    plain = ["objective={name: dpo, beta: 0.1}"]
    grid = Grid.read(config, ["objective.focal.gamma=0,0.05", "objective.focal.form=p_gamma,hard"], plain)
    assert [planned.config.objective.model_dump()["focal"] for planned in grid.points] == [
        {"form": form, "gamma": gamma} for gamma in (0.0, 0.05) for form in ("p_gamma", "hard")
    ]
    assert len({planned.point.slug for planned in grid.points}) == 4
    with pytest.raises(InputError, match=r"objective\.focal: focalpo has a factor of its own.*\(2 of 2 points\)"):
        Grid.read(config, ["objective.focal.gamma=0,0.05"], ["objective={name: focalpo, beta: 0.1}"])
    with pytest.raises(InputError, match=r"objective\.focal\.gamma: gamma is 2.*\(1 of 2 points\)"):
        Grid.read(config, ["objective.focal.gamma=0.05,2"], plain)


def test_held_out_pairs_are_needed(root: Path) -> None:
    with pytest.raises(InputError, match=r"chooses by held-out pairs, and there are none: give data\.held_out=0\.05"):
        Grid.read(write_config(root, "blind.yaml", data__eval=None), [RATES])


def test_an_engine_of_several_processes_is_refused(config: Path) -> None:
    with pytest.raises(InputError, match=r"engine\.kind: zero3 is for several processes"):
        Grid.read(config, [RATES], ["engine.kind=zero3"])


def test_a_config_of_several_stages_is_refused(config: Path) -> None:
    with pytest.raises(InputError, match=r"stages: a run of a sweep is one stage: leave it out \(stages=null\)"):
        Grid.read(config, [RATES], ["stages=2"])


def test_a_backend_that_must_be_imported_first_is_refused(config: Path) -> None:
    with pytest.raises(InputError, match=r"model\.backend: unsloth trains one run a process"):
        Grid.read(config, [RATES], ["model.backend=unsloth", "model.dtype=bfloat16"])


def test_training_files_are_compared_on_held_out_pairs_of_their_own(root: Path, config: Path) -> None:
    axis = f"data.train={root / 'train.jsonl'},{root / 'eval.jsonl'}"
    assert len(Grid.read(config, [axis]).points) == 2
    split = write_config(root, "split.yaml", data__eval=None, data__held_out=0.2)
    with pytest.raises(InputError, match=r"--grid data\.train: .*give data\.eval=FILE"):
        Grid.read(split, [axis])


def test_the_last_axis_is_the_fastest(config: Path) -> None:
    grid = Grid.read(config, [RATES, SEEDS])
    slugs = ["lr0.001-seed1", "lr0.001-seed2", "lr0.01-seed1", "lr0.01-seed2"]
    assert [entry.point.slug for entry in grid.points] == slugs
    assert [entry.config.name for entry in grid.points] == slugs
    assert [entry.config.training.fields["learning_rate"] for entry in grid.points] == [1e-3, 1e-3, 1e-2, 1e-2]


# --- the criterion ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "best", "key"),
    [
        (["training.learning_rate"], None, LOSS), (["training.learning_rate"], ACCURACY, ACCURACY),
        (["training.seed", "objective.gamma"], None, ACCURACY), (["objective.beta"], None, ACCURACY),
        (["objective.name"], None, ACCURACY),
    ],
)  # fmt: skip
def test_losses_choose_only_where_they_are_one_loss(config: Path, axes: list[str], best: str | None, key: str) -> None:
    assert choose_criterion(best, dict.fromkeys(axes), load_config(config)).key == key


def test_criteria_that_cannot_choose_are_refused(config: Path) -> None:
    checked = load_config(config)
    with pytest.raises(InputError, match="losses of different gamma are on different scales; use eval_rewards/acc"):
        choose_criterion(LOSS, {"objective.gamma": []}, checked)
    with pytest.raises(InputError, match=r"--best is 'eval_rewards/margins'; choose eval_loss, or eval_rewards/acc"):
        choose_criterion("eval_rewards/margins", {}, checked)
    values = checked.model_dump(mode="json") | {"objective": {"name": "sft"}, "reference": None}
    with pytest.raises(InputError, match="sft ranks no pairs"):
        choose_criterion(ACCURACY, {}, type(checked).model_validate(values))
