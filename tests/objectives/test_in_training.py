"""The objectives in the trainer: scores and sums over the step arrive, packs change nothing, and nobody is asked for
what an objective does not look at."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorafocal import comparison
from lorafocal.comparison import FILLER, Part
from lorafocal.data.needs import check_scores
from lorafocal.data.packing import PairCollator, scores_of
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.evaluations import evaluation_files
from lorafocal.metrics import MOMENTS, sum_keys
from lorafocal.objectives import OBJECTIVES, build_objective
from lorafocal.policy import sequence_logps
from lorafocal.reference import DisabledAdapterReference
from tests.tiny import pairs, relative_difference, trainer

NEW = ("focal-hard", "odpo", "kto", "orpo", "simpo", "omni-dpo")


def judged(count: int, *, seed: int = 1) -> list[TokenizedPair]:
    """Made-up pairs whose scores lie 0.5 to 3 apart."""
    plain = pairs(count, seed=seed)
    return [replace(pair, score_chosen=2.0 + n % 6 / 2, score_rejected=1.5) for n, pair in enumerate(plain)]


def always_logged(name: str) -> set[str]:
    """The keys of every line under the objective `name`."""
    return set(sum_keys(build_objective(name))) - MOMENTS


def settings(name: str) -> dict[str, object]:
    """Of a run whose margins move, so that everything that depends on them shows."""
    return {"objective": name, "learning_rate": 3e-2, "lr_scheduler_type": "constant", "max_steps": 3}


@pytest.mark.parametrize("name", NEW)
def test_packs_and_layouts_change_no_step(tmp_path, name):
    runs = []
    for number, (layout, budget) in enumerate((("packed", 10_000), ("packed", 24), ("padded", 60))):
        run = trainer(tmp_path / str(number), judged(24), layout=layout, tokens_per_pack=budget, **settings(name))
        run.train()
        runs.append(run)
    whole, *others = runs
    for other in others:
        ours, theirs = ([line["loss"] for line in run.state.log_history if "loss" in line] for run in (other, whole))
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert relative_difference(*({n: p.detach() for n, p in run.trained.items()} for run in (other, whole))) < 1e-4
    logged = [line for line in whole.state.log_history if "loss" in line]
    assert always_logged(name) <= logged[0].keys()
    assert all(abs(line[key]) < 1e4 for line in logged for key in always_logged(name))
    assert abs(logged[-1]["rewards/margins"] - logged[0]["rewards/margins"]) > 1e-3


@pytest.mark.parametrize("name", NEW)
def test_the_logged_loss_is_the_objective_of_all_pairs_of_the_step_at_once(tmp_path, name):
    """Of the third step, computed again in one pack from the weights after the second."""
    batch = judged(8)
    run = trainer(tmp_path, batch, tokens_per_pack=24, **settings(name) | {"max_steps": 2})
    run.train()
    objective = build_objective(name)
    again = trainer(tmp_path / "again", batch, tokens_per_pack=24, **settings(name))
    again.train()
    [pack] = PairCollator("packed", 10_000)(batch).packs
    with torch.no_grad():
        policy = sequence_logps(run.model, pack)
        reference = DisabledAdapterReference(run.model).logps(pack)
        losses = objective(policy, reference, pack.index.lengths, scores=scores_of(batch)).losses
    logged = [line["loss"] for line in again.state.log_history if "loss" in line]
    assert logged[2] == pytest.approx(float(losses.mean()), rel=1e-5)


@pytest.mark.parametrize("name", [name for name in NEW if not OBJECTIVES[name].reference])
def test_without_a_reference_none_is_built_and_no_table_of_pairs_is_left(tmp_path, monkeypatch, name):
    def no_reference(*_):
        raise AssertionError("a reference was built")

    monkeypatch.setattr(comparison, "build_reference", no_reference)
    run = trainer(tmp_path, pairs(8), pairs(5, seed=3), eval_strategy="steps", eval_steps=3, **settings(name))
    run.train()
    evaluated = next(entry for entry in run.state.log_history if "eval_loss" in entry)
    assert {f"eval_{key}" for key in always_logged(name)} <= evaluated.keys()
    assert evaluation_files(tmp_path) == {}


def test_a_filler_moves_nothing_even_where_its_own_loss_is_no_number(tmp_path):
    run = trainer(tmp_path, pairs(4), objective="alphapo", beta=1.0, alpha=50.0)  # exp(50 * nats) of one unlikely token
    [pack] = run.data_collator([FILLER]).packs
    told = run.compared.seen(run.model, pack).inputs
    assert run.objective.of(told).losses.isnan().all()
    assert (run.compared(run.model, Part(pack)).losses.losses == 0).all()
    run._part_loss(run.model, Part(pack), 1).backward()
    assert all((parameter.grad == 0).all() for parameter in run.trained.values())


def test_a_judge_s_scores_of_the_answers_are_asked_for(tmp_path):
    whole = judged(8)
    for broken, told in (
        (replace(whole[3], score_rejected=None), r"train_dataset: pair 'pair-3' has no score_rejected"),
        (replace(whole[3], score_chosen=None), r"train_dataset: pair 'pair-3' has no score_chosen"),
        (replace(whole[3], score_chosen=1.5), r"train_dataset: pair 'pair-3' scores chosen 1.5 and rejected 1.5"),
    ):
        with pytest.raises(InputError, match=told):
            trainer(tmp_path, [*whole[:3], broken, *whole[4:]], objective="odpo")
    with pytest.raises(InputError, match=r"eval_dataset: pair 'pair-0' has no score_chosen"):
        trainer(tmp_path, whole, pairs(4), objective="odpo")
    check_scores(whole, "whole")
    trainer(tmp_path, pairs(8), objective="dpo")  # nobody else asks
