"""Objectives that weigh single tokens: against the oracles token by token, their limits, and TRL's `ld_alpha`."""

from __future__ import annotations

import inspect
import math
import random
from collections import defaultdict
from dataclasses import fields
from decimal import Decimal
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import DPOTrainer

from lorafocal.data.differing import differing, differs_of
from lorafocal.data.tokens import TokenizedPair
from lorafocal.data.turns import CONTEXT
from lorafocal.objectives import OBJECTIVES, PairLogps, PairLosses, build_objective, python_name
from lorafocal.objectives.tokens import TokenInputs, places, shorter
from tests.objectives import oracles_of_tokens as oracles
from tests.objectives.batch import close
from tests.objectives.oracles_of_tokens import Answer, Answers

WEIGHING = [name for name, entry in OBJECTIVES.items() if entry.token_weights]
OF_TOKENS = {
    "ld-dpo": ({"beta": 0.3, "alpha": 0.5}, {"beta": 1.0, "alpha": 0.0}),
    "sampo": ({"beta": 0.3},),
    "bmc": ({"beta": 0.3, "delta": 2.0}, {"beta": 0.05, "delta": 0.5}),
    "tgdpo": ({"beta": 0.3, "alpha": 0.5}, {"beta": 0.3, "alpha": 4.0}),
    "dmpo": ({"beta": 0.3, "turn_discount": 0.7}, {"beta": 0.3, "turn_discount": 1.0}),
}
DPO_AT = {
    "ld-dpo": {"alpha": 1.0},
    "bmc": {"delta": 0.0},
    "tgdpo": {"alpha": 0.0},
}


class Batch:
    """Made-up pairs of answers of 1 to 9 tokens, alike here and there, of up to four turns; as tensors too."""

    def __init__(self, count: int = 7, *, seed: int = 0, equal: bool = False, turns: bool = True) -> None:
        draw = random.Random(seed)

        def answer(length: int) -> Answer:
            policy = [-draw.expovariate(0.7) for _ in range(length)]
            near = [[a + draw.gauss(0, 1) for a in policy] for _ in range(2)]
            turn = [0, *(draw.random() < 0.4 and turns for _ in range(length - 1))]
            rows = [tuple(map(Decimal, row)) for row in (policy, *near)]
            ids = tuple(draw.randrange(5) for _ in range(length))
            return Answer(*rows, ids, tuple(sum(turn[: n + 1]) for n in range(length)))

        lengths = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(count)]
        self.pairs = [Answers(answer(won), answer(won if equal else lost)) for won, lost in lengths]
        self.sides = [pair.won for pair in self.pairs] + [pair.lost for pair in self.pairs]
        self.lengths = torch.tensor([len(side.ids) for side in self.sides])
        self.sequence = torch.arange(2 * count).repeat_interleave(self.lengths)
        self.draws = torch.tensor([draw.random() for _ in range(count)], dtype=torch.float64)

    def row(self, name: str) -> Tensor:
        return torch.tensor([float(x) for side in self.sides for x in getattr(side, name)], dtype=torch.float64)

    def told(self, **changes: Any) -> TokenInputs:
        found = [differing(pair.won.ids, pair.lost.ids) for pair in self.pairs]
        differs = [mark for side in zip(*found, strict=True) for marks in side for mark in marks]
        given = {
            "reference_tokens": self.row("reference"),
            "guide_tokens": self.row("guide"),
            "differs": torch.tensor(differs),
            "turns": self.row("turns").long(),
            "draws": self.draws,
        }
        return TokenInputs(sequence=self.sequence, lengths=self.lengths, **given | changes)

    def weights(self, name: str, told: TokenInputs | None = None, **parameters: float) -> Tensor:
        asked = (told or self.told()).asked()
        return build_objective(name, **parameters).token_weights(self.row("policy"), **asked)

    def losses(self, name: str, policy: Tensor, **parameters: float) -> PairLosses:
        """As a run has them, weights first; without any for an objective of whole answers."""
        objective = build_objective(name, **parameters)
        weights = torch.ones_like(policy)
        if objective.token_weights is not None:
            weights = objective.token_weights(policy.detach(), **self.told().asked())
        sums = [self.sums(row * weights) for row in (policy, self.row("reference"))]
        return objective(sums[0], sums[1])

    def sums(self, tokens: Tensor) -> PairLogps:
        return PairLogps(*torch.stack([side.sum() for side in tokens.split(self.lengths.tolist())]).chunk(2))

    def drawn(self) -> list[Answers]:
        """The pairs with the tokens that SamPO's weights say were drawn."""
        rows = self.weights("sampo", beta=1.0).split(self.lengths.tolist())
        kept = [tuple(row.nonzero().flatten().tolist()) for row in rows]
        count, found = len(self.pairs), []
        for n, pair in enumerate(self.pairs):
            longer = n if len(pair.won.ids) > len(pair.lost.ids) else n + count
            found.append(Answers(pair.won, pair.lost, kept[longer]))
        return found


@pytest.mark.parametrize(("name", "parameters"), [(n, p) for n, given in OF_TOKENS.items() for p in given])
def test_losses_and_the_slope_of_every_token_are_the_papers(name: str, parameters: dict[str, float]) -> None:
    batch = Batch()
    policy = batch.row("policy").requires_grad_()
    out = batch.losses(name, policy, **parameters)
    pairs = batch.drawn() if name == "sampo" else batch.pairs
    close(out.losses, [oracles.value(name, pair, **parameters) for pair in pairs])
    [slope] = torch.autograd.grad(out.losses.sum(), policy)
    split = slope.split(batch.lengths.tolist())
    for n, pair in enumerate(pairs):
        close(torch.cat((split[n], split[n + len(pairs)])), oracles.slopes(name, pair, **parameters), rtol=1e-9)


def test_every_objective_that_weighs_tokens_has_an_oracle_or_a_file_of_its_own() -> None:
    assert set(WEIGHING) - set(OF_TOKENS) <= {"rrpo"}


@pytest.mark.parametrize("name", [*DPO_AT, "sampo", "dmpo"])
def test_at_its_limit_it_is_dpo(name: str) -> None:
    batch = Batch(equal=name == "sampo", turns=name != "dmpo")
    policy = batch.row("policy")
    ours = batch.losses(name, policy, beta=0.3, **DPO_AT.get(name, {}))
    dpo = batch.losses("dpo", policy, beta=0.3)
    assert torch.equal(ours.losses, dpo.losses)
    assert torch.equal(ours.margins, dpo.margins)


def test_one_turn_a_completion_needs_no_turns() -> None:
    batch = Batch()
    assert torch.equal(batch.weights("dmpo", batch.told(turns=None), beta=1.0), torch.ones_like(batch.row("policy")))


@pytest.mark.parametrize("name", WEIGHING)
def test_an_entry_names_what_its_weights_ask_for_and_nothing_that_they_do_not_go_with(name: str) -> None:
    entry = OBJECTIVES[name]
    assert entry.odds is not None, "a whole loss would have to weigh tokens itself"
    assert not entry.whole_step, "its second pass has sums alone"
    assert not entry.others, "further answers have no weights"
    assert not any((entry.implicit_rewards, entry.of_margin, entry.of_logps))
    assert entry.beyond_rows
    file, _, function = str(entry.token_weights).partition(".")
    asked = inspect.signature(getattr(import_module(f"lorafocal.objectives.{file}"), function)).parameters
    told = {spec.name for spec in fields(TokenInputs)}
    assert next(iter(asked)) == "policy_tokens"
    assert set(asked) - {"policy_tokens"} <= told | {python_name(key) for key in entry.parameters}
    assert [entry.differs, entry.draws, entry.guide] == [key in asked for key in ("differs", "draws", "guide_tokens")]


@pytest.mark.parametrize("name", OF_TOKENS)
def test_extreme_tokens_leave_finite_weights(name: str) -> None:
    batch = Batch()
    far = torch.where(torch.arange(len(batch.sequence)) % 2 == 0, -1e4, -1e-9).float()
    told = batch.told(reference_tokens=far, guide_tokens=far.flip(0))
    asked = build_objective(name, **OF_TOKENS[name][0]).token_weights(far, **told.asked())
    assert asked.isfinite().all()
    assert asked.shape == far.shape


@pytest.mark.row("11")
@pytest.mark.parametrize("discount", [1e-300, 0.7, 1 - 1e-13, 1.0])
def test_dmpos_weights_fall_from_turn_to_turn_and_have_a_limit_at_discount_1(discount: float) -> None:
    turns = torch.arange(30)
    told = TokenInputs(
        sequence=torch.tensor([0] * 29 + [1]), lengths=torch.tensor([29, 1]), turns=torch.where(turns < 29, turns, 0)
    )
    weights = build_objective("dmpo", beta=0.1, turn_discount=discount).token_weights
    found = weights(torch.zeros(30).double(), **told.asked())  # type: ignore[misc]
    assert float(found[0]) == float(found[29]) == 1
    assert (found[:29].diff() <= 0).all()
    assert (found >= 0).all()
    if discount > 0.9:
        assert found[:29].tolist() == pytest.approx([(29 - j) / 29 for j in range(29)], rel=1e-10)


# ---- SamPO's draws ---------------------------------------------------------------------------------------------------


@pytest.mark.row("55")
def test_sampo_draws_as_many_tokens_as_the_shorter_answer_has_by_the_pairs_number_alone() -> None:
    batch = Batch(20)
    found = batch.weights("sampo", beta=1.0)
    assert set(found.tolist()) == {0.0, 1.0}
    assert [int(row.sum()) for row in found.split(batch.lengths.tolist())] == shorter(batch.lengths).tolist()
    assert torch.equal(found, batch.weights("sampo", beta=1.0))
    assert not torch.equal(found, batch.weights("sampo", batch.told(draws=batch.draws / 2), beta=1.0))
    lengths = batch.lengths[[3, 23]]
    told = TokenInputs(
        sequence=torch.arange(2).repeat_interleave(lengths), lengths=lengths, draws=batch.draws[3:4]
    )  # in a pack of its own
    weights = build_objective("sampo", beta=1.0).token_weights
    rows = found.split(batch.lengths.tolist())
    again = weights(torch.zeros(int(lengths.sum())).double(), **told.asked())  # type: ignore[misc]
    assert torch.equal(again, torch.cat([rows[3], rows[23]]))


def test_sampo_draws_every_token_equally_often() -> None:
    lengths, draws = torch.tensor([3, 9]), 3000
    weights = build_objective("sampo", beta=1.0).token_weights
    told = {"sequence": torch.arange(2).repeat_interleave(lengths), "lengths": lengths}
    seen = torch.zeros(12)
    generator = random.Random(0)
    for _ in range(draws):
        draw = torch.tensor([generator.random()], dtype=torch.float64)
        seen += weights(torch.zeros(12), **TokenInputs(**told, draws=draw).asked())  # type: ignore[misc]
    assert (seen[:3] == draws).all()
    assert ((seen[3:] / draws - 1 / 3).abs() < 5 * math.sqrt(2 / 9 / draws)).all()


# ---- tokens that differ ----------------------------------------------------------------------------------------------


def test_differing_tokens_are_outside_of_the_blocks_that_both_answers_have() -> None:
    draw = random.Random(1)
    for _ in range(60):
        won, lost = (tuple(draw.randrange(4) for _ in range(draw.randint(1, 10))) for _ in range(2))
        same = oracles.alike(won, lost)
        for marks, shared in zip(differing(won, lost), same, strict=True):
            assert {place for place, mark in enumerate(marks) if not mark} == shared


def test_differing_tokens_of_a_pack_are_those_that_are_scored_chosen_answers_first() -> None:
    several = TokenizedPair("a", [9], [1, 7, 8, 2], [1, 3], chosen_turns=[0, CONTEXT, CONTEXT, 1])
    plain = TokenizedPair("b", [9], [5, 6], [6, 5, 6])
    assert differs_of([several, plain]).tolist() == [False, True, False, False, False, True, True, False, False]


def test_places_and_shorter_answers() -> None:
    lengths = torch.tensor([2, 3, 4, 1])
    assert places(lengths).tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3, 0]
    assert shorter(lengths).tolist() == [2, 1, 2, 1]


# ---- TRL -------------------------------------------------------------------------------------------------------------


def by_trl(pair: Answers, policy: Tensor, *, beta: float, alpha: float) -> Tensor:
    """TRL's loss of one pair with `ld_alpha`, its models replaced by the made-up log-probs."""
    lengths = [len(pair.won.ids), len(pair.lost.ids)]
    mask = torch.stack([torch.arange(max(lengths)) < length for length in lengths])

    def padded(tokens: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(tokens.split(lengths), batch_first=True)

    def outputs(tokens: Tensor) -> Any:
        rows = padded(tokens)
        return lambda **_: SimpleNamespace(
            log_probs=rows, entropy=torch.zeros_like(rows), mean_logits=torch.zeros_like(rows), is_top1=mask * 0
        )

    class Silent(torch.nn.Module):
        """A model that TRL may ask for its checkpointing."""

        is_gradient_checkpointing = False

    before = torch.tensor([float(x) for side in (pair.won, pair.lost) for x in side.reference], dtype=torch.float64)
    trainer = SimpleNamespace(
        model=Silent(),
        ref_model=outputs(before),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        f_divergence_type="reverse_kl",
        ld_alpha=alpha,
        use_weighting=False,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    completion = torch.nn.functional.pad(mask.long(), (1, 0))  # one token of prompt
    inputs = {
        "input_ids": torch.ones_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
    }
    return DPOTrainer._compute_loss(trainer, outputs(policy), inputs, False)


@pytest.mark.newest
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_ld_dpo_is_trls_ld_alpha(alpha: float) -> None:
    batch = Batch()
    policy = batch.row("policy").requires_grad_()
    out = batch.losses("ld-dpo", policy, beta=0.4, alpha=alpha)
    split, count = policy.split(batch.lengths.tolist()), len(batch.pairs)
    theirs = [
        by_trl(pair, torch.cat((split[n], split[n + count])), beta=0.4, alpha=alpha)
        for n, pair in enumerate(batch.pairs)
    ]
    losses = torch.stack(theirs)
    torch.testing.assert_close(out.losses, losses, rtol=1e-12, atol=1e-15)
    slopes = [torch.autograd.grad(of.sum(), policy, retain_graph=True)[0] for of in (out.losses, losses)]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-15)
