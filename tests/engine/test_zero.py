"""DeepSpeed ZeRO in two processes trains exactly what one does, on steps that do not divide evenly between them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorafocal.compatibility import Cell, verdict
from lorafocal.engines import zero
from lorafocal.engines.zero_parts import set_entries
from lorafocal.errors import InputError
from tests.engine import launches, zero_run
from tests.engine.compared_runs import CASES, ZERO, run, runs_of
from tests.engine.forked import both, forked_ranks
from tests.engine.ragged_run import HANGS_S
from tests.engine.zero_run import KILLED_IN
from tests.tiny import relative_difference, tiny_base, trainer

pytestmark = pytest.mark.engine

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    tiny_base().save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def together(root: Path) -> Ranks:
    return both(zero_run.everything, root, waits_s=4 * HANGS_S).ranks


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], Path]]:
    folders = {name: tmp_path_factory.mktemp("alone") for name in CASES}
    return {name: (run(root, folders[name], case, None), folders[name]) for name, case in CASES.items()}


@pytest.mark.row("F8")
@pytest.mark.parametrize(("name", "engine"), runs_of(*ZERO))
def test_deepspeed_runs_and_every_process_holds_half_of_the_states(together: Ranks, name: str, engine: str) -> None:
    ranks = [rank[f"{name} {engine}"] for rank in together]
    for rank in ranks:
        assert rank["wrapped"] == "DeepSpeedEngine"
        assert rank["held"] < 0.55 * rank["elements"]
        assert (rank["whole"] == 0) == (engine == "zero3")  # split weights are empty between passes
    assert sum(rank["held"] for rank in ranks) >= ranks[0]["elements"]  # padded


@pytest.mark.row("F1", "F3", "F4", "34", "40", "48", "49")
@pytest.mark.parametrize(("name", "engine"), runs_of(*ZERO))
def test_losses_norms_and_gradients_are_those_of_one_process(
    together: Ranks, root: Path, alone: dict[str, tuple[dict[str, Any], Path]], name: str, engine: str
) -> None:
    (expected, folder), bound = alone[name], CASES[name].bound
    for rank in together:
        for what in ("losses", "evaluations", "norms"):
            assert rank[f"{name} {engine}"][what] == pytest.approx(expected[what], rel=bound)
    ours, theirs = (load_file(where / "gradients.safetensors") for where in (root / f"{name} {engine}", folder))
    assert ours.keys() == theirs.keys()
    for step in range(1, len(expected["losses"]) + 1):
        of_step = [{k: v for k, v in some.items() if k.startswith(f"{step}/")} for some in (ours, theirs)]
        assert relative_difference(*of_step) < bound


@pytest.mark.row("F10")
def test_weights_and_states_come_back_bit_for_bit_in_every_engine_and_precision(together: Ranks) -> None:
    for rank in together:
        assert len(rank["restored"]) == 2 * (len(ZERO) + 1)
        for engine, (fresh, same) in rank["restored"].items():
            assert fresh, engine
            assert same, engine


@pytest.mark.row("13", "49")
@pytest.mark.parametrize("engine", ZERO)
def test_a_step_of_1e_7_moves_the_masters_of_a_bf16_model(together: Ranks, engine: str) -> None:
    for rank in together:
        found = rank["masters"][engine]
        assert not found["still"]
        assert 0 < found["far"] < 1e-6
        assert found["losses"] == pytest.approx(found["losses"][:1] * 3, rel=0.05)


@pytest.mark.row("F3")
@pytest.mark.parametrize("engine", ZERO)
def test_a_gradient_that_is_missing_or_not_finite_stops_all_ranks_before_the_step(together: Ranks, engine: str) -> None:
    for rank in together:
        idle, infinite = rank["unhealthy"][engine]
        assert "1 of 22 trained tensors received no gradient (first: model.idle)" in idle
        assert "step 1 was stopped before it changed anything: the gradient is not finite" in infinite


def test_what_zero_cannot_step_is_refused_by_name(together: Ranks) -> None:
    for rank in together:
        of_bitsandbytes, brought, again, wide = rank["refusals"][:4]
        assert "adamw_8bit" in of_bitsandbytes
        assert "adamw_torch" in of_bitsandbytes
        assert "`optimizers`" in brought
        assert "Build another trainer" in again
        assert "1 of its own in float32 (model.norm.weight is one)" in wide


@pytest.mark.row("48")
def test_what_zero_3_cannot_split_is_refused(together: Ranks) -> None:
    told = (("int8", "lora"), ("float32", "trainable_tokens"))
    cells = [Cell(base, frozenset({word}), engine="zero3") for base, word in told]
    for rank in together:
        for said, cell in zip(rank["refusals"][4:], cells, strict=True):
            assert str(verdict(cell)) in said


@pytest.mark.row("55")
def test_a_killed_rank_ends_the_launch_by_name_and_the_resumed_run_is_the_whole_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output = launches.run([*launches.TORCHRUN, zero_run.__file__, str(root)])
    assert code != 0
    # torch 2.11 names the signal some lines after the code
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9 (.*\n){,2}?.*SIGKILL", output)
    assert (root / f"killed/checkpoint-{KILLED_IN - 1}").is_dir()
    monkeypatch.setattr(zero, "PERSISTENT_ENTRIES", 0)
    assert forked_ranks(lambda _: zero_run.resumed(root), root) == [0, 0]
    ours, theirs = (load_file(root / f"{name}.safetensors") for name in ("killed", "whole"))
    assert relative_difference(ours, theirs) < 1e-6


def test_one_process_without_a_launcher_is_told_the_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--engine zero3 --processes N"):
        trainer(tmp_path, [], engine="zero3")


def test_entries_that_processes_do_not_divide_evenly_are_set_with_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    seen: list[list[float]] = []
    optimizer = SimpleNamespace(set_local_hp_param=lambda value, parameter, key: seen.append(value.tolist()))
    held = SimpleNamespace(ds_id=0, ds_tensor=SimpleNamespace(ds_numel=3), _z3_optimizer=optimizer)
    set_entries(held, torch.arange(5.0))
    assert seen == [[3.0, 4.0, 0.0]]
