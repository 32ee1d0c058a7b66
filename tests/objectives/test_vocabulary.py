"""Objectives of whole distributions: TDPO1, TDPO2, RRPO, PMPO, against decimals and against a model's own logits."""

from __future__ import annotations

import random
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafocal import budget
from lorafocal.arguments import FocalPOConfig
from lorafocal.comparison import Comparison
from lorafocal.config import check_config
from lorafocal.data.differing import differing, differs_of
from lorafocal.data.packing import pad_sequences, share_prefixes
from lorafocal.data.tokens import TokenizedPair
from lorafocal.errors import InputError
from lorafocal.memory import Lengths
from lorafocal.model.adapters import attach_lora
from lorafocal.objectives import OBJECTIVES, PairLogps, build_objective
from lorafocal.objectives.objective import Objective
from lorafocal.ops.divergences import ReferenceRows, compare_tokens
from lorafocal.plan.work import setup_of
from lorafocal.policy import plain_attention, prepare_policy
from tests.objectives.oracles_of_vocabulary import LOSSES, Answer, Answers, slope, value
from tests.test_config import VALUES, mistakes
from tests.tiny import disturb, lora, pairs, relative_difference, tiny_base, tiny_policy, trainer

NAMES = [name for name, entry in OBJECTIVES.items() if entry.divergences]
CASES: list[tuple[str, dict[str, float]]] = [
    ("tdpo1", {"beta": 0.1}),
    ("tdpo1", {"beta": 1.3}),
    ("tdpo2", {"beta": 0.1, "alpha": 0.5}),
    ("tdpo2", {"beta": 0.9, "alpha": 1.5}),
    ("rrpo", {"beta": 0.5, "alpha": 0.05}),
    ("rrpo", {"beta": 0.1, "alpha": 0.01}),
    ("pmpo", {"alpha": 0.5, "beta": 1.0}),
    ("pmpo", {"alpha": 0.2, "beta": 1.7}),
]
STATED = {"pmpo": {"alpha": 0.5, "beta": 1.0}}


def test_each_has_an_oracle() -> None:
    assert set(NAMES) == set(LOSSES) == {name for name, _ in CASES}


# ---- against decimals ------------------------------------------------------------------------------------------------

WORDS = 5


def made_up(draw: random.Random) -> Answers:
    """Answers of 1 to 4 tokens, some shared; over five words."""

    def rows(count: int) -> tuple[tuple[Decimal, ...], ...]:
        return tuple(tuple(Decimal(draw.uniform(-3, 3)) for _ in range(WORDS)) for _ in range(count))

    sides = []
    for ids in ((0, 1, 2)[: draw.randint(1, 3)], (0, 3, 4, 4)[: draw.randint(1, 4)]):
        sides.append(Answer(rows(len(ids)), rows(len(ids)), ids))
    return Answers(*sides)


def losses(objective: Objective, pair: Answers) -> tuple[Tensor, Tensor]:
    """The library's loss of one pair, (1,), by way of its head, and the policy's logits, (N, V), to differentiate."""
    sides = (pair.won, pair.lost)
    policy, before = (
        torch.tensor([[float(x) for x in row] for side in sides for row in rows(side)], dtype=torch.float64)
        for rows in (lambda side: side.policy, lambda side: side.reference)
    )
    policy.requires_grad_()
    weight, ids = torch.eye(WORDS, dtype=torch.float64), torch.tensor(pair.won.ids + pair.lost.ids)
    found = compare_tokens(policy, weight, ids, ReferenceRows(before, weight), rows_per_chunk=2)
    weights = torch.ones_like(found.logps)
    if objective.token_weights is not None:
        marks = differs_of([TokenizedPair("", [1], list(pair.won.ids), list(pair.lost.ids))])
        weights = objective.token_weights(found.logps.detach(), differs=marks)
    won = len(pair.won.ids)

    def sums(of_tokens: Tensor) -> PairLogps:
        return PairLogps(of_tokens[:won].sum()[None], of_tokens[won:].sum()[None])

    out = objective(
        sums(found.logps * weights), sums(found.reference * weights), divergences=torch.cat(sums(found.divergences))
    )
    return out.losses, policy


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_values_and_slopes_are_the_papers(name: str, parameters: dict[str, float]) -> None:
    draw = random.Random(1)
    for _ in range(2):
        pair = made_up(draw)
        loss, logits = losses(build_objective(name, **parameters), pair)
        assert float(loss.detach()) == pytest.approx(float(value(name, pair, **parameters)), rel=1e-12)
        [gradient] = torch.autograd.grad(loss.sum(), logits)
        won = len(pair.won.ids)
        for side, first, count in (("won", 0, won), ("lost", won, len(pair.lost.ids))):
            exact = [
                [float(slope(name, pair, side, token, word, **parameters)) for word in range(WORDS)]
                for token in range(count)
            ]
            ours = gradient[first : first + count]
            torch.testing.assert_close(ours, torch.tensor(exact, dtype=torch.float64), rtol=1e-10, atol=1e-13)


def test_the_focal_factor_goes_around_odds_with_divergences() -> None:
    pair = made_up(random.Random(3))
    for name in ("tdpo1", "tdpo2"):
        plain, _ = losses(build_objective(name, beta=0.7), pair)
        focal, _ = losses(build_objective(name, beta=0.7, focal={"form": "p_gamma", "gamma": 0.2}), pair)
        torch.testing.assert_close(focal, torch.exp(-0.2 * plain) * plain, rtol=1e-12, atol=0)


def test_limits() -> None:
    """Without divergences TDPO is DPO, TDPO2 with alpha 0 is at any; RRPO without its divergence is DPO of differing
    tokens; rewards are what the log-odds are made of."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (PairLogps(*-30 * torch.rand(2, 6, generator=generator).double()) for _ in range(2))
    divergences = 5 * torch.rand(12, generator=generator).double()
    dpo = build_objective("dpo", beta=0.3)(policy, reference)
    for name, parameters, here in (
        ("tdpo1", {}, torch.zeros(12)),
        ("tdpo2", {"alpha": 0.0}, divergences),
        ("rrpo", {"alpha": 0.0}, divergences),
    ):
        out = build_objective(name, beta=0.3, **parameters)(policy, reference, divergences=here)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(out[:4], dpo[:4], strict=True))
    for name, share in (("tdpo1", 1.0), ("tdpo2", 0.5)):
        out = build_objective(name, beta=0.3)(policy, reference, divergences=divergences)
        torch.testing.assert_close(out.margins, out.log_odds)
        torch.testing.assert_close(out.chosen_rewards, dpo.chosen_rewards + 0.3 * share * divergences[:6])
    only = build_objective("pmpo", alpha=1.0, beta=1e-12)(policy, reference, divergences=divergences)
    torch.testing.assert_close(only.losses, -policy.chosen)


# ---- a model's own logits --------------------------------------------------------------------------------------------


def tables(model: nn.Module, batch: list[TokenizedPair]) -> list[Tensor]:
    """Log-probs of the vocabulary at each token of each answer, chosen ones first, from the model's own logits."""
    answers = [(pair.prompt_ids, pair.chosen_ids) for pair in batch] + [(p.prompt_ids, p.rejected_ids) for p in batch]
    with plain_attention(model):
        return [
            model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            for prompt, answer in answers
        ]


def by_hand(name: str, model: Any, batch: list[TokenizedPair], **parameters: float) -> Tensor:
    """The loss of each pair of a policy against its base, one sequence at a time, (B,)."""
    now = tables(model, batch)
    with torch.no_grad(), model.disable_adapter():
        then = tables(model, batch)
    answers = [pair.chosen_ids for pair in batch] + [pair.rejected_ids for pair in batch]
    kls = torch.stack([(r.exp() * (r - p)).sum() for p, r in zip(now, then, strict=True)])
    marks = [differing(pair.chosen_ids, pair.rejected_ids) for pair in batch]
    marks = [mark for mark, _ in marks] + [mark for _, mark in marks]
    logps, before = (
        torch.stack(
            [
                (table[range(len(ids)), ids] * (torch.tensor(mark) if name == "rrpo" else 1)).sum()
                for table, ids, mark in zip(side, answers, marks, strict=True)
            ]
        )
        for side in (now, then)
    )
    (won, lost), (k_w, k_l) = (logps - before).chunk(2), kls.chunk(2)
    beta, alpha = parameters["beta"], parameters.get("alpha", 1.0)
    if name == "pmpo":
        a_w, a_l = logps.chunk(2)
        return -alpha * a_w + (1 - alpha) * a_l + beta * (k_w + k_l) / 2
    held = {"tdpo1": k_w, "tdpo2": alpha * k_w.detach(), "rrpo": 0}[name]
    odds = beta * (won + held - lost - (0 if name == "rrpo" else alpha * k_l))
    return -torch.nn.functional.logsigmoid(odds) + (alpha * k_w if name == "rrpo" else 0)


def shared_ends(count: int) -> list[TokenizedPair]:
    """Pairs whose answers share tokens."""
    return [replace(pair, rejected_ids=pair.rejected_ids[:2] + pair.chosen_ids[2:]) for pair in pairs(count)]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize(("name", "parameters"), CASES[1::2])
def test_losses_and_gradients_are_those_of_the_models_own_logits(name: str, parameters: Any, layout: str) -> None:
    batch = shared_ends(5)
    found = []
    for ours in (True, False):
        model = tiny_policy(dtype=torch.float64)
        if ours:
            prepare_policy(model, layout=layout)
            pack = (share_prefixes if layout == "packed" else pad_sequences)(batch)
            pack = replace(pack, differs=differs_of(batch))
            objective = build_objective(name, **parameters)
            comparison = Comparison(objective, "disabled_adapter", None, noisy=False)
            step = comparison.step(model, [pack], 5)
            losses = comparison(model, step.parts[0]).losses.losses
        else:
            losses = by_hand(name, model, batch, **parameters)
        losses.sum().backward()
        found.append((losses.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (ours, gradients), (expected, exact) = found
    torch.testing.assert_close(ours.double(), expected, rtol=1e-9, atol=1e-9)
    assert relative_difference(gradients, exact) < 1e-6  # rotations are made in float32


# ---- in training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tdpo2", "rrpo"])
def test_packs_and_layouts_change_no_step_and_the_first_step_is_dpo_s(tmp_path: Path, name: str) -> None:
    runs = []
    for number, (layout, tokens) in enumerate((("packed", 10_000), ("packed", 24), ("padded", 60))):
        more = {"layout": layout, "tokens_per_pack": tokens, "learning_rate": 3e-2, "max_steps": 3, "beta": 0.3}
        run = trainer(tmp_path / str(number), shared_ends(8), objective=name, lr_scheduler_type="constant", **more)
        run.train()
        runs.append(run)
    logged = [[line for line in run.state.log_history if "loss" in line] for run in runs]
    for number in (1, 2):
        ours, whole = ([line["loss"] for line in lines] for lines in (logged[number], logged[0]))
        assert ours == pytest.approx(whole, rel=1e-5)
        assert relative_difference(*({n: p.detach() for n, p in runs[k].trained.items()} for k in (number, 0))) < 1e-4
    assert all(lines[0]["rewards/margins"] == 0 for lines in logged)
    assert logged[0][0]["loss"] == pytest.approx(0.6931472, rel=1e-6)
    assert logged[0][-1]["loss"] < logged[0][0]["loss"]


def test_with_dropout_the_identity_probe_rounds_as_the_reference_does(tmp_path: Path) -> None:
    model = disturb(attach_lora(tiny_base(), lora(lora_dropout=0.5)))
    more = {"model": model, "reference": "frozen_copy", "allow_dropout": True, "max_steps": 1}
    run = trainer(tmp_path, pairs(8), objective="tdpo1", beta=0.1, identity_probe=True, **more)
    run.train()
    assert run.state.log_history[0]["loss"] != pytest.approx(0.6931472, rel=1e-6)  # the policy's own pass has noise


@pytest.mark.parametrize("kind", ["frozen_copy", "separate_model"])
def test_other_live_references(tmp_path: Path, kind: str) -> None:
    """A copy of the start, and a second model with a head of its own: at the start neither diverges."""
    more: dict[str, Any] = {"model": tiny_policy(), "reference": kind}
    if kind == "separate_model":
        more["ref_model"] = tiny_policy()
    run = trainer(tmp_path, pairs(8), objective="tdpo1", beta=0.3, max_steps=2, **more)
    run.train()
    first, second = (line["loss"] for line in run.state.log_history if "loss" in line)
    assert first == pytest.approx(0.6931472, rel=1e-6)
    assert second != pytest.approx(first, rel=1e-4)


def test_a_finished_adapter_diverges_from_its_base() -> None:
    model = disturb(tiny_policy())
    prepare_policy(model)
    comparison = Comparison(build_objective("tdpo1"), "disabled_adapter", None, noisy=False)
    inputs = comparison.seen(model, share_prefixes(pairs(4))).inputs
    assert inputs.divergences is not None
    assert (inputs.divergences > 0).all()
    assert inputs.divergences.requires_grad
    assert not inputs.reference.chosen.requires_grad


@pytest.mark.parametrize("name", ["dpo", *NAMES])
def test_the_plan_and_the_trainer_know_what_is_compared(tmp_path: Path, name: str) -> None:
    values = {**VALUES, "objective": {"name": name, **STATED.get(name, {"beta": 0.1})}}
    assert setup_of(check_config(values), Lengths()).divergences == (name != "dpo")
    args = FocalPOConfig(str(tmp_path), objective=name, use_cpu=True)
    assert budget.setup_of(tiny_policy(), args, pairs(3), fused=True).divergences == (name != "dpo")


def test_stored_log_probs_are_refused_before_anything_loads(tmp_path: Path) -> None:
    values = {**VALUES, "objective": {"name": "tdpo1", "beta": 0.1}, "reference": {"kind": "cached"}}
    assert "reference.kind: cached log-probs are of the answers' tokens alone" in mistakes(values)
    with pytest.raises(InputError, match=r"cached log-probs are of the answers' tokens alone.*use a live reference"):
        trainer(tmp_path, pairs(4), objective="pmpo", reference="cached", **STATED["pmpo"])
