"""Losses that do not start at log-odds of 0: what a factor would push the wrong way is told before the first step."""

from __future__ import annotations

import logging

import pytest
import torch

from lorafocal.errors import InputError
from lorafocal.health import check_first_step
from lorafocal.model.load import load_base
from lorafocal.objectives import build_objective
from tests.tiny import lora, pairs, tiny_base, trainer, weights

PAIRS = pairs(24)
SETTINGS = {"objective": "simpo", "max_steps": 2, "pairs_per_step": 24, "logging_steps": 1, "learning_rate": 1e-2}


def made(folder, *, gamma: float, beta: float = 2.0, **more):
    settings = SETTINGS | {"beta": beta, "focal": {"form": "p_gamma", "gamma": gamma}} | more
    return trainer(folder, PAIRS, **settings)


@pytest.mark.row("64")
def test_a_first_step_that_goes_the_wrong_way_is_refused_and_changes_nothing(tmp_path):
    run = made(tmp_path, gamma=1.0, tokens_per_pack=40)
    before = weights(run)
    with pytest.raises(
        InputError, match=r"of the first step's pairs lie .* p\^gamma of simpo .*gamma 1: log-odds below -0\.5413"
    ) as told:
        run.train()
    assert all(way in str(told.value) for way in ("smaller gamma", "smaller objective.beta", "objective.guard: clip"))
    assert all(torch.equal(before[name], parameter) for name, parameter in run.trained.items())
    assert not run.state.log_history


def test_a_guard_lets_it_go_on_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    run = made(tmp_path, gamma=1.0, guard="clip")
    run.train()
    assert run.state.global_step == 2
    assert "objective.guard: clip leaves them without one" in caplog.text
    first = run.state.log_history[0]
    assert 0.05 < first["focal/turned_share"] < 1
    assert first["focal/weight_mean"] > 0


def test_the_share_is_that_of_all_packs_of_the_step(tmp_path):
    shares = []
    for number, budget in enumerate((10_000, 40)):
        with pytest.raises(InputError) as told:
            made(tmp_path / str(number), gamma=1.0, tokens_per_pack=budget).train()
        shares.append(str(told.value))
    assert shares[0] == shares[1]


def test_what_starts_at_log_odds_of_0_and_small_gammas_say_nothing(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="lorafocal.health")
    made(tmp_path / "small", gamma=0.01).train()
    trainer(tmp_path / "dpo", PAIRS, **SETTINGS | {"objective": "focalpo", "beta": 0.1, "gamma": 1.0}).train()
    assert "first step" not in caplog.text


@pytest.mark.parametrize(("share", "told"), [(0.0, 0), (0.001, 0), (0.002, 1), (0.05, 1), (0.0501, 2)])
def test_a_thousandth_is_told_and_a_twentieth_refused(share, told, caplog):
    caplog.set_level(logging.WARNING)
    objective = build_objective("simpo", focal={"form": "p_gamma", "gamma": 0.2})
    if told == 2:
        with pytest.raises(InputError, match=r"5\.0% of the first step's pairs"):
            check_first_step(objective, share)
    else:
        check_first_step(objective, share)
    assert ("takes them the wrong way" in caplog.text) == (told == 1)


def test_a_run_with_a_factor_goes_on_only_as_it_was(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")

    def loaded(**settings):
        base = load_base(str(tmp_path / "base"), dtype="float32")
        return made(tmp_path / "run", model=base, peft_config=lora(), save_strategy="steps", save_steps=1, **settings)

    run = loaded(gamma=0.01, max_steps=1)
    run.train()
    assert run.lineage().objective["focal"] == {"form": "p_gamma", "gamma": 0.01}
    for other, told in (
        ({"gamma": 0.02}, r"objective\.focal\.gamma: 0\.01 -> 0\.02"),
        ({"gamma": 0.01, "guard": "clip"}, r"objective\.guard: .* -> .*clip"),
    ):
        with pytest.raises(InputError, match=told):
            loaded(**other).train(resume_from_checkpoint=True)
    again = loaded(gamma=0.01)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
