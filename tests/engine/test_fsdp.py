"""FSDP2 in two processes trains exactly what one process does, on steps that do not divide evenly between them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._ops._math_ops import _NormPartial

from lorafocal.engines.fsdp import _with_whole_norm
from tests.engine import fsdp_run
from tests.engine.compared_runs import CASES, run
from tests.engine.forked import both
from tests.engine.launches import Together
from tests.tiny import relative_difference, tiny_base

pytestmark = pytest.mark.engine

BOUND = 1e-5  # relative; some 5e-7 is seen


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    tiny_base().save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def together(root: Path) -> Together:
    return both(fsdp_run.everything, root)


@pytest.mark.row("F8")
def test_every_process_holds_half_and_nothing_is_wrapped_in_ddp(together: Together) -> None:
    for name in CASES:
        ranks = [rank[name] for rank in together.ranks]
        assert [rank["wrapped"].startswith("FSDP") for rank in ranks] == [True, True]
        assert sum(rank["held"] for rank in ranks) == ranks[0]["elements"]
        assert max(rank["held"] for rank in ranks) < 0.55 * ranks[0]["elements"]


@pytest.mark.row("F1", "F3", "34", "40", "48", "49")
@pytest.mark.parametrize("name", CASES)
def test_losses_norms_and_gradients_are_those_of_one_process(
    together: Together, root: Path, tmp_path: Path, name: str
) -> None:
    alone = run(root, tmp_path, CASES[name], None)
    for rank in together.ranks:
        for what in ("losses", "evaluations", "norms"):
            assert rank[name][what] == pytest.approx(alone[what], rel=BOUND)
    ours, theirs = (load_file(folder / "gradients.safetensors") for folder in (root / name, tmp_path))
    assert ours.keys() == theirs.keys()
    for step in range(1, len(alone["losses"]) + 1):
        of_step = [{k: v for k, v in some.items() if k.startswith(f"{step}/")} for some in (ours, theirs)]
        assert relative_difference(*of_step) < BOUND


def norm_in_parts(folder: Path) -> float:
    """The parts 3 and 4 of a norm, as torch 2.9's clipping gives it back."""
    part = torch.tensor(3.0 + dist.get_rank())
    norm = DTensor.from_local(part, init_device_mesh("cpu", (2,)), [_NormPartial(2.0)], run_check=False)
    return float(_with_whole_norm(lambda: norm)())


@pytest.mark.row("F1")
def test_a_norm_in_parts_is_given_whole(tmp_path: Path) -> None:
    assert both(norm_in_parts, tmp_path).ranks == [5.0, 5.0]


@pytest.mark.row("F10")
def test_weights_and_states_come_back_also_after_an_evaluation_and_the_run_with_them(
    together: Together,
) -> None:
    for rank in together.ranks:
        again = rank["again"]
        assert again["shapes"]
        assert again["restored"]
        assert again["trained"] != pytest.approx(again["at the start"], rel=1e-4)
        assert again["at the start again"] == pytest.approx(again["at the start"], rel=1e-6)
        assert again["second"] == pytest.approx(again["first"], rel=1e-6)


@pytest.mark.row("13", "49")
def test_a_step_of_1e_7_moves_the_masters_of_a_bf16_model(together: Together) -> None:
    for rank in together.ranks:
        found = rank["masters"]
        assert found["dtypes"] == ["torch.float32"]
        assert not found["still"]
        assert 0 < found["far"] < 1e-6
        assert found["losses"] == pytest.approx(found["losses"][:1] * 3, rel=0.05)


def test_what_cannot_be_split_is_refused_by_name(together: Together) -> None:
    for rank in together.ranks:
        of_bitsandbytes, brought, twice, wide = rank["refusals"]
        assert "optim: adamw_8bit" in of_bitsandbytes
        assert "adamw_torch" in of_bitsandbytes
        assert "`optimizers`" in brought
        assert "fsdp2" in brought
        assert "load it again" in twice
        assert "1 of its own in float32 (model.norm.weight is one)" in wide
