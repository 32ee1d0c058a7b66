"""Processes of one run that were given different things, as where each machine has its own command and cache."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from lorafocal import run
from lorafocal.config import check_config
from lorafocal.errors import InputError
from tests.engine.forked import forked_ranks
from tests.saved_run import plant_adapter
from tests.toy_run import run_config, write_inputs

pytestmark = pytest.mark.engine


@pytest.mark.row("F8")
def test_another_learning_rate_or_base_on_one_of_them_is_refused_on_both_before_training(tmp_path: Path) -> None:
    machines = [write_inputs(tmp_path / name) for name in ("one", "two")]
    config_file = machines[1] / "base" / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"rms_norm_eps": 1e-3}))
    here = Path()  # the same paths on both, and not the same files
    runs = tmp_path / "runs"

    def work(rank: int) -> None:
        os.chdir(machines[rank])
        given = {"config": run_config(here, training__learning_rate=(1e-2, 2e-2)[rank]), "base": run_config(here)}
        for what, config in given.items():
            with pytest.raises(InputError, match=f"rank 1 has another {what} than rank 0"):
                run.train(config, quiet=True, runs_dir=runs)

    assert forked_ranks(work, tmp_path) == [0, 0]
    assert not list(runs.glob("*/adapter"))


@pytest.mark.row("F8")
def test_so_is_another_adapter_to_start_from(tmp_path: Path) -> None:
    machines = [write_inputs(tmp_path / name) for name in ("one", "two")]
    for machine, std in zip(machines, (0.05, 0.1), strict=True):
        plant_adapter(LlamaForCausalLM.from_pretrained(machine / "base"), std=std).save_pretrained(machine / "start")
    values = run_config(Path()).model_dump(exclude_unset=True)
    values |= {"adapter": {"start_from": "start"}, "reference": {"kind": "frozen_copy"}}

    def work(rank: int) -> None:
        os.chdir(machines[rank])
        with pytest.raises(InputError, match="rank 1 has another adapter to start from than rank 0"):
            run.train(check_config(values), quiet=True, runs_dir=tmp_path / "runs")

    assert forked_ranks(work, tmp_path) == [0, 0]
