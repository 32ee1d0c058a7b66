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
from lorafocal.model.head import causal_lm
from lorafocal.objectives import OBJECTIVES, build_objective
from lorafocal.policy import sequence_logps
from lorafocal.reference import DisabledAdapterReference
from tests.tiny import disturb, lora, pairs, relative_difference, tiny_policy, trainer

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


# ---- losses over the whole step --------------------------------------------------------------------------------------

STEPWISE = ("dr-dpo", "beta-dpo", "gamma-po", "group-dpo", "relative-dpo")


def grouped(count: int, *, seed: int = 1) -> list[TokenizedPair]:
    """Judged pairs of three groups, whose prompts have embeddings."""
    whole = judged(count, seed=seed)
    return [replace(pair, group="abc"[n % 3], embedding=(1.0, n % 4 - 1.5)) for n, pair in enumerate(whole)]


@pytest.mark.row("15")
@pytest.mark.parametrize("name", STEPWISE)
def test_gradients_of_packs_are_those_of_one_pack_by_autograd(tmp_path, name):
    batch = grouped(12)
    stated = {"gamma_beta_ratio": 4.0, "tau": 2.0} if name == "gamma-po" else {}
    settings = {"objective": name, "beta": 0.5, "tokens_per_pack": 24, "identity_probe": False, **stated}
    run = trainer(tmp_path, batch, model=tiny_policy(dtype=torch.float64), **settings)
    run.create_optimizer_and_scheduler(1)
    step = run.data_collator(batch)
    assert len(step.packs) > 4
    loss = run.training_step(run.model, step)
    found = {name: parameter.grad.clone() for name, parameter in run.trained.items()}
    run.model.zero_grad()
    [whole] = replace(run.data_collator, tokens_per_pack=10_000)(batch).packs
    wanted = run.objective.of(run.compared.seen(run.model, whole).inputs).losses.mean()
    wanted.backward()
    assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-9)
    assert relative_difference(found, {name: parameter.grad for name, parameter in run.trained.items()}) < 1e-8


def test_a_state_is_resumed_and_no_evaluation_moves_it(tmp_path):
    """An uninterrupted run without evaluations, and one that evaluates each step and is resumed after the second."""
    steps = settings("beta-dpo") | {"max_steps": 4, "filtered_share": 0.5}
    whole = trainer(tmp_path / "whole", grouped(24), **steps)
    whole.train()
    evaluating = steps | {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path / "again", grouped(24), grouped(10, seed=3), **evaluating).train()
    resumed = trainer(tmp_path / "again", grouped(24), grouped(10, seed=3), **evaluating)
    resumed.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-2"))
    assert {key: float(value) for key, value in resumed.compared.state.items()} == {
        key: float(value) for key, value in whole.compared.state.items()
    }
    assert set(whole.compared.state) == {"mean", "std"}
    assert all(torch.equal(value, whole.trained[key]) for key, value in resumed.trained.items())


@pytest.mark.row("14")
def test_both_passes_of_a_step_meet_the_same_dropout_and_steps_another(tmp_path):
    wild = lora(lora_dropout=0.5)
    run = trainer(tmp_path, pairs(8), objective="kto", allow_dropout=True, tokens_per_pack=24, peft_config=wild)
    disturb(run.model)
    run.model.train()
    packs = run.data_collator(run.train_dataset).packs
    seen = {}
    for number in (0, 1):
        step = run.compared.step(run.model, packs, 8, number)
        for part in step.parts:
            first, second = part.share.inputs.policy, run.compared(run.model, part).policy
            assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
        seen[number] = step.parts[0].share.inputs.policy.chosen
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.row("14")
def test_each_pack_of_a_step_has_dropout_of_its_own_that_no_other_seed_or_rank_has(tmp_path):
    """Seed and step were added up: runs of seeds side by side had each other's noise."""
    run = trainer(tmp_path, pairs(4), allow_dropout=True, peft_config=lora(lora_dropout=0.5))
    disturb(run.model)
    run.model.train()
    [pack] = run.data_collator(run.train_dataset).packs
    seen = []
    for seed, rank, number in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0)]:
        run.compared.seed, run.compared.rank = seed, rank
        step = run.compared.step(run.model, [pack, pack], 8, number)
        seen += [run.compared(run.model, part).policy.chosen for part in step.parts]
    again, first = seen[-2:], seen[:-2]
    assert all(torch.equal(one, other) for one, other in zip(again, first, strict=False))
    assert len({tuple(chosen.tolist()) for chosen in first}) == len(first) == 8
    before = torch.get_rng_state()
    run.compared(run.model.eval(), step.parts[0])  # without dropout nothing is drawn, and others' draws are left alone
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.row("F4")
def test_a_filler_calls_the_models_as_often_as_a_pack_does(tmp_path):
    """Or ranks with a sharded model wait for each other."""
    run = trainer(tmp_path, pairs(3), objective="kto", tokens_per_pack=10_000)
    packs = *run.data_collator(run.train_dataset).packs, *run.data_collator([FILLER]).packs
    calls = []
    causal_lm(run.model).base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    step = run.compared.step(run.model, packs, 3)
    assert len(calls) == 4  # two of each pack, under the policy and under the reference
    for part in step.parts:
        calls.clear()
        compared = run.compared(run.model, part)
        assert len(calls) == 1
        assert compared.reference is not None
    assert (compared.losses.losses == 0).all()
