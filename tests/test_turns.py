"""Completions of several turns, scored: every layout, the store and a bundle's gate against sums over plain logits."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from lorafocal.assembly import check_pairs
from lorafocal.caching import cache_reference
from lorafocal.data.packing import PairCollator, pad_sequences, share_prefixes
from lorafocal.data.sources import preferences_from_rows
from lorafocal.data.tokens import TokenizedPair, tokenize_preferences
from lorafocal.data.turns import CONTEXT
from lorafocal.errors import InputError
from lorafocal.manifest import _tokens_sha256 as tokens_sha256
from lorafocal.model import eva
from lorafocal.objectives import build_objective
from lorafocal.policy import plain_attention, sequence_logps, sums_of
from lorafocal.probes import choose_layout
from lorafocal.release import verify
from lorafocal.report.check import pair_text, shown_pair
from lorafocal.report.check_page import pair_section
from lorafocal.store import Context, ReferenceStore, sequence_key
from tests.data.test_dialogues import ASKED, DIALOGUE, FAMILIES, LONG, SHORT
from tests.data.test_tokens import byte_tokenizer
from tests.tiny import SIZES, VOCABULARY, enlarged, pairs, tiny_policy, trainer

MARKED = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|eot|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|eot|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def dialogues() -> list[TokenizedPair]:
    """Made-up pairs; of one both completions have several turns, of two one has, and turns may follow at once."""
    made = pairs(5)
    turns = {
        1: ([0, 0, CONTEXT, CONTEXT, 1, CONTEXT, 2], None),
        2: (None, [0, CONTEXT, 1, 1, 1, CONTEXT, CONTEXT, CONTEXT, 2, 2, 3, 3]),
    }
    made = [
        replace(pair, chosen_turns=turns.get(n, (None, None))[0], rejected_turns=turns.get(n, (None, None))[1])
        for n, pair in enumerate(made)
    ]
    both = replace(made[1], id="both", rejected_ids=[3, 4, 5], rejected_turns=[0, CONTEXT, 1])
    return [*made, both]


def told(ids: list[int], turns: list[int] | None) -> list[int]:
    return [0] * len(ids) if turns is None else turns


def sides_of(batch: list[TokenizedPair]) -> list[tuple[TokenizedPair, list[int], list[int]]]:
    chosen = [(pair, pair.chosen_ids, told(pair.chosen_ids, pair.chosen_turns)) for pair in batch]
    return chosen + [(pair, pair.rejected_ids, told(pair.rejected_ids, pair.rejected_turns)) for pair in batch]


def plain_logps(model: Any, batch: list[TokenizedPair]) -> Tensor:
    """Of each completion the masked sum over the model's own logits, one sequence at a time, (2B,) float64."""
    sums = []
    for pair, ids, turns in sides_of(batch):
        row = torch.tensor([[*pair.prompt_ids, *ids]])
        with torch.no_grad(), plain_attention(model):
            logps = model(input_ids=row).logits[0].double().log_softmax(-1)
        of_tokens = logps[len(pair.prompt_ids) - 1 : -1].gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
        sums.append(of_tokens[torch.tensor(turns) != CONTEXT].sum())
    return torch.stack(sums)


# ---- packs


@pytest.mark.parametrize("layout", [share_prefixes, pad_sequences])
def test_the_index_has_what_is_scored_and_turns_say_where(layout: Any) -> None:
    batch = dialogues()
    pack = layout(batch)
    expected = [
        (number, token, turn, ([*pair.prompt_ids, *ids][len(pair.prompt_ids) + place - 1]))
        for number, (pair, ids, turns) in enumerate(sides_of(batch))
        for place, (token, turn) in enumerate(zip(ids, turns, strict=True))
        if turn != CONTEXT
    ]
    flat = pack.input_ids.flatten()
    found = zip(pack.index.sequence, pack.index.labels, pack.turns, flat[pack.index.positions], strict=True)
    assert [tuple(map(int, one)) for one in found] == expected
    scored = [tokens for side in zip(*(pair.scored_tokens for pair in batch), strict=True) for tokens in side]
    assert pack.index.lengths.tolist() == scored
    assert pack.to(torch.device("cpu")).turns.equal(pack.turns)


def test_pairs_of_one_turn_have_no_turns_and_the_same_pack() -> None:
    batch = pairs(4)
    pack = share_prefixes(batch)
    assert pack.turns is None
    zeros = [replace(p, chosen_turns=[0] * len(p.chosen_ids), rejected_turns=[0] * len(p.rejected_ids)) for p in batch]
    spelled = share_prefixes(zeros)
    for name in ("positions", "labels", "sequence", "lengths"):
        assert getattr(pack.index, name).equal(getattr(spelled.index, name))
    [alone] = PairCollator(rejected=False)(dialogues()).packs
    assert alone.turns is not None
    assert len(alone.turns) == len(alone.index.labels)


@pytest.mark.row("23", "27")
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_every_layout_scores_the_turns_and_nothing_else(layout: str) -> None:
    policy, batch = tiny_policy(), dialogues()
    choose_layout(policy, layout)
    [pack] = PairCollator(layout, 10**6, bucket=16 if layout == "packed" else 1)(batch).packs
    found = torch.cat(sequence_logps(policy, pack)).double()
    by_id = {pair.id: pair for pair in batch}
    expected = plain_logps(policy, [by_id[name] for name in pack.pair_ids])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


# ---- beside packs


def test_keys_and_digests_tell_what_is_scored_and_are_of_one_turn_what_they_were() -> None:
    masks = ([0, CONTEXT, 1], [0, 0, 1], [0, 1, 1], None)
    keys = [sequence_key([1, 2], [5, 6, 7], turns) for turns in masks]
    assert keys[1] == keys[2]  # all is scored in both
    assert len({*keys[:2], keys[3], sequence_key([1], [5, 6, 7], [0, CONTEXT, 1])}) == 4
    assert sequence_key([1, 2], [5, 6]) == hashlib.sha256(np.array([2, 1, 2, 5, 6], "<i8").tobytes()).digest()
    one = pairs(3)
    plain = [[pair.prompt_ids, pair.chosen_ids, pair.rejected_ids] for pair in one]
    assert tokens_sha256(one) == hashlib.sha256(json.dumps(plain).encode()).hexdigest()
    assert tokens_sha256(dialogues()) != tokens_sha256([replace(pair, chosen_turns=None) for pair in dialogues()])


def test_eva_looks_at_the_turns_alone() -> None:
    batch = dialogues()
    labels = eva._padded(batch)["labels"]
    for row, (pair, ids, turns) in zip(labels.tolist(), sides_of(batch)[: len(batch)], strict=True):
        expected = [eva.IGNORED] * len(pair.prompt_ids)
        expected += [eva.IGNORED if turn == CONTEXT else token for token, turn in zip(ids, turns, strict=True)]
        assert row[: len(expected)] == expected
        assert set(row[len(expected) :]) <= {eva.IGNORED}


def test_a_bundles_gate_scores_the_turns_alone() -> None:
    model, batch = tiny_policy(), dialogues()
    expected = plain_logps(model, batch).tolist()
    chosen = [verify.logp(model, pair.prompt_ids, pair.chosen_ids, pair.chosen_turns) for pair in batch]
    rejected = [verify.logp(model, pair.prompt_ids, pair.rejected_ids, pair.rejected_turns) for pair in batch]
    assert chosen + rejected == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("turns", [[0], [0, CONTEXT, CONTEXT], [1, 1, 1], [0, 2, 2]])
def test_turns_that_do_not_go_with_the_tokens_are_refused(turns: list[int]) -> None:
    pair = TokenizedPair("a", [1], [2, 3, 4], [5], chosen_turns=turns)
    with pytest.raises(InputError, match="train: pair 'a' has turns that do not go with its tokens"):
        check_pairs([pair], "train", [tiny_policy()])


def test_the_check_shows_what_is_scored() -> None:
    tokenizer = FAMILIES["qwen"]
    [pair] = tokenize_preferences([DIALOGUE], tokenizer, max_length=1000).pairs
    shown = shown_pair([pair], tokenizer)
    first, between = "I stay.<|eot|>", "⏎<|start|>user⏎Night falls.<|eot|>⏎<|start|>assistant⏎"
    assert f"rejected  ⟦{first}⟧{between}⟦I lose.<|eot|>⟧" in pair_text(shown)
    page = pair_section(shown)
    assert page.count('class="scored rejected"') == pair.scored_tokens[1]
    assert page.count('class="scored"') == pair.scored_tokens[0]


# ---- training


def test_a_store_gives_back_sums_and_tokens_of_what_is_scored(tmp_path: Path) -> None:
    policy, batch = tiny_policy(), dialogues()
    choose_layout(policy, "packed")
    collator = PairCollator("packed", 64)
    context = Context("a" * 64, "b" * 64, None, "float32", "cpu", "packed", "sdpa", "torch", "2", "5", None)
    store = ReferenceStore(tmp_path, context)
    cache_reference(policy, batch, store, collator=collator, per_token=True)
    found = store.look_up(batch, per_token=True)
    expected = plain_logps(policy, batch)
    sums = torch.tensor([pair.reference for pair in found], dtype=torch.float64).T.flatten()
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-4)
    assert [tuple(map(len, pair.reference_tokens or ())) for pair in found] == [pair.scored_tokens for pair in batch]
    [pack] = PairCollator("packed", 10**6)(found).packs
    torch.testing.assert_close(sums_of(pack.reference_tokens, pack), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("objective", ["dpo", "dmpo"])
def test_training_packed_and_padded_is_the_same(tmp_path: Path, objective: str) -> None:
    """One step on pairs of several turns, and of one; DMPO weighs the turns."""
    losses = {}
    for layout in ("packed", "padded"):
        run = trainer(tmp_path / layout, dialogues(), objective=objective, beta=0.1, layout=layout, max_steps=2)
        run.train()
        losses[layout] = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses["packed"] == pytest.approx(losses["padded"], abs=1e-5)
    assert len(losses["packed"]) == 2


def test_segments_are_trained_as_dpo_on_masked_sums() -> None:
    """SDPO's segment form (Kong et al. 2025, arXiv:2501.01821) from a row: its oracle shares nothing with the library.

    Ids and mask are transformers' own, by the template's generation markers; sums are over the plain logits of each
    whole conversation, the loss is -log sigmoid(beta (margin - reference's margin)).
    """
    tokenizer = byte_tokenizer(MARKED, bos=False, eos_token="<|eot|>")
    history = [*ASKED, {"role": "assistant", "content": "West?"}, {"role": "user", "content": "Yes."}]
    segment = LONG[:3]  # as many turns as the rejected one has
    row = {"prompt": history, "chosen": segment, "rejected": SHORT}
    sizes = SIZES | {"vocab_size": len(tokenizer)}
    torch.manual_seed(1)
    models = [enlarged(AutoModelForCausalLM.from_config(LlamaConfig(**sizes))).float().eval() for _ in range(2)]

    def masked(model: Any, answer: Any) -> Tensor:
        conversation = tokenizer.apply_chat_template(
            history + answer, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = torch.tensor(conversation["input_ids"]), torch.tensor(conversation["assistant_masks"]).bool()
        mask[: len(tokenizer.apply_chat_template(history, return_dict=False))] = False  # turns of the history
        with torch.no_grad(), plain_attention(model):
            logps = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        return logps[:-1].gather(-1, ids[1:, None]).squeeze(-1)[mask[1:]].sum()

    expected = [[masked(model, answer) for answer in (segment, SHORT)] for model in models]
    margins = [chosen - rejected for chosen, rejected in expected]
    loss = -torch.nn.functional.logsigmoid(0.1 * (margins[0] - margins[1]))

    [preference] = preferences_from_rows([row], "rows").pairs
    [pair] = tokenize_preferences([preference], tokenizer, max_length=1000).pairs
    for model in models:
        choose_layout(model, "packed")
    [pack] = PairCollator("packed", 10**6)([pair]).packs
    with torch.no_grad():
        policy, reference = (sequence_logps(model, pack) for model in models)
    torch.testing.assert_close(torch.cat(policy).double(), torch.stack(expected[0]), rtol=1e-5, atol=1e-3)
    found = build_objective("dpo", beta=0.1)(policy, reference).losses
    torch.testing.assert_close(found.double(), loss[None], rtol=1e-4, atol=1e-4)
    assert VOCABULARY < len(tokenizer)
