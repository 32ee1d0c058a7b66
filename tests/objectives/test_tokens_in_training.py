"""Objectives of weighted tokens in the trainer: the definition token by token, every layout, and stored references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafocal import comparison
from lorafocal.comparison import Comparison, Part
from lorafocal.data.packing import Pack, PairCollator
from lorafocal.data.tokens import TokenizedPair
from lorafocal.data.turns import CONTEXT, scored, scored_turns
from lorafocal.errors import InputError
from lorafocal.evaluations import evaluation_files, read_evaluation
from lorafocal.model.adapters import AdapterSwitch
from lorafocal.objectives import build_objective, sampo
from lorafocal.policy import plain_attention, prepare_policy, sequence_logps
from lorafocal.reference import SeparateModelReference
from lorafocal.store import Score, answers_of
from lorafocal.trainer import FocalPOTrainer
from tests.objectives import oracles_of_tokens as oracles
from tests.objectives.oracles_of_tokens import Answer, Answers
from tests.tiny import disturb, pairs, relative_difference, tiny_policy, trainer

SETTINGS: dict[str, dict[str, float]] = {
    "ld-dpo": {"alpha": 0.3},
    "sampo": {},
    "bmc": {"delta": 2.0},
    "tgdpo": {"alpha": 0.8},
    "dmpo": {"turn_discount": 0.6},
}
LAYOUTS = (("packed", 10_000), ("packed", 40), ("padded", 80))


def data(count: int = 8, seed: int = 1) -> list[TokenizedPair]:
    """Pairs of answers that share tokens, every third with completions of several turns."""
    found = []
    for number, pair in enumerate(pairs(count, longest=9, seed=seed)):
        rejected = [*pair.chosen_ids[:2], *pair.rejected_ids]
        chosen = [*pair.chosen_ids, 3, 4, 5]
        turns = [*[0] * len(pair.chosen_ids), CONTEXT, 1, 2] if number % 3 == 0 else None
        found.append(replace(pair, chosen_ids=chosen, rejected_ids=rejected, chosen_turns=turns))
    return found


@pytest.fixture
def guide(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A model that stands for the guide, in every layout."""

    class Guide:
        def token_logps(self, pack: Pack) -> Tensor:
            model = guiding()
            prepare_policy(model, layout="padded" if pack.segments is None else "packed")
            return SeparateModelReference(model).token_logps(pack)

    monkeypatch.setattr(comparison, "build_guide", lambda _: Guide())
    return guiding()


def guiding() -> nn.Module:
    return disturb(tiny_policy(), scale=0.3).eval()


def row(model: nn.Module, prompt: list[int], answer: list[int], turns: list[int] | None) -> Tensor:
    """Log-probs of one sequence's scored tokens, from the model's own logits."""
    with plain_attention(model):
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    found = logits.double().log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).squeeze(-1)
    return found if turns is None else found[[turn != CONTEXT for turn in turns]]


def plainly(name: str, model: nn.Module, guide: nn.Module, pair: TokenizedPair, kept: Sequence[int]) -> Tensor:
    """The loss of one pair by its paper's equation, of one sequence at a time; SamPO's draw is given.

    Differentiable: the oracle's slope of each token goes to the model.
    """
    policy, answers = [], []
    for ids, turns in ((pair.chosen_ids, pair.chosen_turns), (pair.rejected_ids, pair.rejected_turns)):
        policy.append(row(model, pair.prompt_ids, ids, turns))
        with torch.no_grad(), AdapterSwitch(model).off():
            before = row(model, pair.prompt_ids, ids, turns)
        rows = (policy[-1].detach(), before, row(guide, pair.prompt_ids, ids, turns).detach())
        exact = [tuple(map(Decimal, tokens.tolist())) for tokens in rows]
        answers.append(Answer(*exact, tuple(scored(ids, turns)), tuple(scored_turns(ids, turns))))
    made = Answers(answers[0], answers[1], tuple(kept))
    numbers = {"beta": 0.3, **SETTINGS[name]}
    slopes = torch.tensor([float(slope) for slope in oracles.slopes(name, made, **numbers)], dtype=torch.float64)
    tokens = torch.cat(policy)
    return float(oracles.value(name, made, **numbers)) + (slopes * (tokens - tokens.detach())).sum()


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_and_gradients_are_the_definition_token_by_token_in_every_layout(name: str, guide: nn.Module) -> None:
    batch, objective = data(), build_objective(name, beta=0.3, **SETTINGS[name])
    for layout, budget in LAYOUTS:
        model = tiny_policy().eval()
        prepare_policy(model, layout=layout)
        compared = Comparison(objective, "disabled_adapter", None, noisy=False, seed=5)
        packs = PairCollator(layout, budget, differs=objective.entry.differs)(batch).packs
        losses: dict[str, Tensor] = {}
        total = torch.zeros(())
        for pack in packs:
            found = compared(model, Part(pack))
            losses |= zip(pack.pair_ids, found.losses.losses, strict=True)
            total = total + found.losses.losses.sum()
            for ours, plain in zip(found.policy, sequence_logps(model, pack), strict=True):
                assert torch.equal(ours, plain), "what is logged of log-probs is not weighted"
        if layout == "packed" and budget > 1000:
            kept = kept_of(compared, packs[0]) if name == "sampo" else [[]] * len(batch)
            wanted = torch.stack([plainly(name, model, guide, *each) for each in zip(batch, kept, strict=True)])
            slopes = gradients(wanted.sum(), model)
        found_losses = torch.stack([losses[pair.id] for pair in batch])
        torch.testing.assert_close(found_losses.double(), wanted, rtol=1e-4, atol=1e-6)
        assert relative_difference(gradients(total, model), slopes) < 1e-4


def kept_of(compared: Comparison, pack: Pack) -> list[list[int]]:
    """The tokens of each pair's longer answer that SamPO's weights say were drawn."""
    zeros = torch.zeros(len(pack.index.labels))
    lengths = pack.index.lengths
    rows = sampo.weights(zeros, lengths=lengths, draws=compared._draws(pack)).split(lengths.tolist())
    both = zip(rows[: pack.num_pairs], rows[pack.num_pairs :], strict=True)
    return [max(sides, key=len).nonzero().flatten().tolist() for sides in both]


def train(folder: Path, name: str, **settings: Any) -> FocalPOTrainer:
    defaults = {"objective": name, "beta": 0.3, "max_steps": 3, "learning_rate": 3e-2, "tokens_per_pack": 60}
    run = trainer(folder, data(), data(4, seed=2), **defaults | SETTINGS[name] | settings)
    if settings.get("reference") == "cached":
        run.cache_reference()
    run.train()
    return run


def logged(run: FocalPOTrainer, key: str) -> list[float]:
    return [line[key] for line in run.state.log_history if key in line]


def test_a_stored_reference_of_tokens_trains_what_a_live_one_does(tmp_path: Path) -> None:
    live = train(tmp_path / "live", "bmc", eval_strategy="steps", eval_steps=3)
    store = {"reference": "cached", "reference_store": str(tmp_path / "store")}
    ours = train(tmp_path / "stored", "bmc", eval_strategy="steps", eval_steps=3, **store)
    for key in ("loss", "rewards/margins", "logps/chosen", "eval_loss"):
        assert logged(ours, key) == pytest.approx(logged(live, key), rel=2e-5, abs=1e-6)
    weights = [{name: p.detach() for name, p in run.trained.items()} for run in (ours, live)]
    assert relative_difference(*weights) < 1e-4
    tables = [read_evaluation(evaluation_files(folder)[3]) for folder in (tmp_path / "stored", tmp_path / "live")]
    for mine, theirs in zip(*tables, strict=True):
        assert mine.reference_chosen == pytest.approx(theirs.reference_chosen, rel=1e-5)


def stored(folder: Path, **settings: Any) -> FocalPOTrainer:
    return trainer(folder / "run", data(), reference="cached", reference_store=str(folder / "store"), **settings)


def test_a_store_without_tokens_is_refused_with_the_command_and_then_filled(tmp_path: Path) -> None:
    whole = stored(tmp_path, objective="dpo", beta=0.3)
    whole.cache_reference()
    whole.look_up_reference()  # DPO asks for no tokens
    assert all(pair.reference_tokens is None for pair in whole.train_dataset)
    weighing = stored(tmp_path, objective="bmc", beta=0.3)
    with pytest.raises(InputError, match=r"reference log-probs of tokens are missing, .*`lorafocal cache-reference"):
        weighing.train()
    assert weighing.cache_reference().computed == len({answer.key for answer in answers_of(data())})
    weighing.look_up_reference()
    for pair in weighing.train_dataset:
        assert [len(side) for side in pair.reference_tokens] == [*pair.scored_tokens]
        sums = [float(side.double().sum()) for side in pair.reference_tokens]
        assert sums == pytest.approx(list(pair.reference), rel=1e-5)


def swapped(score: Score) -> Score:
    tokens = score.token_logps
    return score if tokens is None else replace(score, token_logps=tokens.flip(0))


def raised(score: Score) -> Score:
    return replace(score, token_logps=score.token_logps + 1e-2)  # type: ignore[operator]


@pytest.mark.row("35")
@pytest.mark.parametrize("spoil", [swapped, raised])
def test_tokens_that_are_not_the_references_stop_the_run_though_their_sums_are(
    tmp_path: Path, spoil: Callable[[Score], Score]
) -> None:
    run = stored(tmp_path, objective="bmc", beta=0.3)
    write = run.stored.store.write
    run.stored.store.write = lambda scores: write([spoil(score) for score in scores])
    run.cache_reference()
    with pytest.raises(InputError, match=r"the stored log-prob of a token .*remove its folder and run"):
        run.look_up_reference()
