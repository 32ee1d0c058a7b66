"""Further answers from rows to packs: read, cut and cached like a pair's own, and scored as if they were alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafocal.data.cache import cache_key, cached_tokenization
from lorafocal.data.columns import FurtherAnswer
from lorafocal.data.packing import PairCollator, pad_sequences, share_prefixes
from lorafocal.data.sources import preferences_from_rows
from lorafocal.data.tokens import OtherAnswer, TokenizedPair, by_twos, tokenize_preferences
from lorafocal.data.truncation import TRUNCATIONS, Limits, truncate
from lorafocal.errors import InputError
from lorafocal.ops.segments import roles, segments_of
from lorafocal.policy import sums_of, token_logps
from lorafocal.probes import choose_layout
from tests.data.test_tokens import LLAMA_3_LIKE, MISTRAL_LIKE, QWEN_LIKE, byte_tokenizer
from tests.tiny import VOCABULARY, pairs, relative_difference, tiny_policy, trainer, weights

PLAIN = {"prompt": "Say", "chosen": " yes", "rejected": " no", "id": "a"}
CHAT = {
    "prompt": [{"role": "user", "content": "Say"}],
    "chosen": [{"role": "assistant", "content": "yes"}],
    "rejected": [{"role": "assistant", "content": "no"}],
    "id": "a",
}


def with_others(batch: list[TokenizedPair], counts: tuple[int, ...] = (1, 0, 3, 2)) -> list[TokenizedPair]:
    """The pairs with some further answers each, every third of them to a prompt of its own."""
    draw = torch.Generator().manual_seed(2)

    def tokens(most: int) -> list[int]:
        length = int(torch.randint(1, most, (1,), generator=draw))
        return torch.randint(2, VOCABULARY, (length,), generator=draw).tolist()

    return [
        replace(
            pair,
            others=tuple(
                OtherAnswer(tokens(9) if n % 3 == 2 else pair.prompt_ids, tokens(8), n / 4)
                for n in range(counts[place % len(counts)])
            ),
        )
        for place, pair in enumerate(batch)
    ]


# ---- texts to ids


@pytest.mark.parametrize(
    ("template", "truncation"),
    [(QWEN_LIKE, "drop"), (LLAMA_3_LIKE, "drop"), (MISTRAL_LIKE, "drop"), (LLAMA_3_LIKE, "recipe")],
    ids=["qwen", "llama-3", "mistral", "recipe"],
)
def test_a_further_answer_has_the_ids_that_it_has_as_a_chosen_one(template: str, truncation: str) -> None:
    options: dict[str, Any] = {"max_length": 200, "truncation": truncation}
    options |= {"max_prompt_length": 100} if truncation == "recipe" else {}
    for row in (PLAIN, CHAT):
        others = [" maybe", {"answer": " y", "score": 0.5}, " yes and no", {"answer": "since", "prompt": "Why?"}]
        read = preferences_from_rows([row | {"others": others}], "rows").pairs
        tokenizer = byte_tokenizer(template)
        [made] = tokenize_preferences(read, tokenizer, others=True, **options).pairs
        assert [other.score for other in made.others] == [None, 0.5, None, None]
        for other, text in zip(made.others, read[0].others, strict=True):
            as_chosen = replace(read[0], prompt=text.prompt or read[0].prompt, chosen=text.answer, others=())
            [alone] = tokenize_preferences([as_chosen], tokenizer, **options).pairs
            assert (other.prompt_ids, other.completion_ids) == (alone.prompt_ids, alone.chosen_ids)
        assert all(other.prompt_ids is made.prompt_ids for other in made.others[:3])
        [without] = tokenize_preferences(read, tokenizer, **options).pairs
        assert without == replace(made, others=())


@pytest.mark.row("28")
@pytest.mark.parametrize(
    ("other", "reason"), [(" a</s>", "control_tokens"), ("  ", "empty_completion"), ("x" * 300, "overlong")]
)
def test_one_that_cannot_be_read_drops_its_pair_and_is_counted(other: str, reason: str) -> None:
    rows = [PLAIN | {"others": [" maybe"]}, PLAIN | {"id": "b", "others": [" maybe", other]}]
    made = tokenize_preferences(
        preferences_from_rows(rows, "rows").pairs, byte_tokenizer(), others=True, max_length=100
    )
    assert [pair.id for pair in made.pairs] == ["a"]
    assert (made.drops, made.examples) == ({reason: 1}, {reason: ["rows, row 2"]})
    assert reason == "overlong" or made.details[reason].startswith("a further answer")


IDS = st.lists(st.integers(1, 9), min_size=1, max_size=30)
LENGTHS = st.integers(2, 40).flatmap(lambda length: st.tuples(st.just(length), st.integers(1, length - 1)))


@pytest.mark.slow
@pytest.mark.parametrize("name", TRUNCATIONS)
@settings(max_examples=100)
@given(sides=st.tuples(IDS, IDS, IDS), others=st.lists(st.tuples(st.booleans(), IDS, IDS), max_size=3), lengths=LENGTHS)
def test_cut_answers_keep_one_prompt_and_fit(name: str, sides: Any, others: Any, lengths: tuple[int, int]) -> None:
    limits = Limits(lengths[0], lengths[1] if name == "recipe" else None, 0)
    further = tuple(OtherAnswer(sides[0] if same else prompt, ids, 1.0) for same, prompt, ids in others)
    pair = TokenizedPair("a", *sides, others=further)
    kept = truncate(pair, name, limits)
    if pair.longest <= limits.max_length:
        assert kept is pair
        return
    if kept is None:
        return
    assert kept.longest <= limits.max_length
    assert len(kept.others) == len(pair.others)
    for before, after in zip(pair.others, kept.others, strict=True):
        assert after.completion_ids
        assert after.completion_ids == before.completion_ids[: len(after.completion_ids)]
        if before.prompt_ids == pair.prompt_ids:
            assert after.prompt_ids == kept.prompt_ids
    if not further:
        assert kept == TRUNCATIONS[name](pair, limits)


def test_the_cache_keeps_them_and_knows_them_apart(tmp_path: Path) -> None:
    rows = [
        CHAT | {"others": ["maybe", {"answer": "never", "score": 0.5, "prompt": "Really?"}], "group": "g"},
        CHAT | {"id": "b", "prompt_embedding": [1.0, 2.0]},
        CHAT | {"id": "c", "others": ["a</s>"]},
    ]
    read = preferences_from_rows(rows, "rows").pairs
    tokenizer, options = byte_tokenizer(QWEN_LIKE), {"max_length": 200, "others": True}
    fresh = tokenize_preferences(read, tokenizer, **options)
    assert fresh.drops == {"control_tokens": 1}
    for _ in range(2):
        assert cached_tokenization(read, tokenizer, folder=tmp_path, **options) == fresh
    assert len([*tmp_path.glob("*.json")]) == 1
    [first, *rest] = read
    changed = [replace(first, others=(*first.others[:1], FurtherAnswer(first.others[1].answer, None, 0.5))), *rest]
    keys = {cache_key(given, tokenizer, options) for given in (read, changed)}
    bare = [replace(row, others=(), group=None, embedding=None) for row in read]
    plain = {cache_key(given, tokenizer, {"max_length": 200}) for given in (read, changed, bare)}
    assert (len(keys), len(plain), len(keys | plain)) == (2, 1, 3)  # who does not ask is not told


def test_groups_are_found_again_where_ids_repeat(tmp_path: Path) -> None:
    [one] = preferences_from_rows([CHAT | {"group": "g"}], "rows").pairs
    twice = [one, replace(one, group="h")]
    for _ in range(2):
        made = cached_tokenization(twice, byte_tokenizer(QWEN_LIKE), folder=tmp_path, max_length=200)
        assert [pair.group for pair in made.pairs] == ["g", "h"]


# ---- packs


def sequences(batch: list[TokenizedPair]) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each sequence in the order of the index."""
    sides = [(pair.prompt_ids, pair.chosen_ids) for pair in batch]
    sides += [(pair.prompt_ids, pair.rejected_ids) for pair in batch]
    return sides + [(other.prompt_ids, other.completion_ids) for pair in batch for other in pair.others]


@pytest.mark.parametrize("layout", [share_prefixes, pad_sequences])
def test_their_sequences_come_behind_those_of_the_pairs(layout: Any) -> None:
    batch = with_others(pairs(6))
    pack = layout(batch)
    flat = pack.input_ids.flatten().tolist()
    found: list[list[tuple[int, int]]] = [[] for _ in sequences(batch)]
    for row, label, sequence in zip(pack.index.positions, pack.index.labels, pack.index.sequence, strict=True):
        found[sequence].append((flat[row], int(label)))
    assert found == [list(zip([prompt[-1], *ids[:-1]], ids, strict=True)) for prompt, ids in sequences(batch)]
    assert pack.index.lengths.tolist() == [len(ids) for _, ids in sequences(batch)]


def test_they_are_spans_like_pairs_by_twos_with_their_prompt_again() -> None:
    own, far = [5, 6], [7]
    pair = TokenizedPair("a", own, [8], [9, 9], others=tuple(OtherAnswer(*ids) for ids in ((own, [2]), (own, [3, 3]))))
    pair = replace(pair, others=(*pair.others, OtherAnswer(own, [4]), OtherAnswer(far, [2, 2])))
    assert [[other.completion_ids for other in two] for two in by_twos(pair.others)] == [[[2], [3, 3]], [[4]], [[2, 2]]]
    pack = share_prefixes([pair])
    assert pack.input_ids.tolist() == [[5, 6, 8, 9, 9, 5, 6, 2, 3, 3, 5, 6, 4, 7, 2, 2]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2, 2, 3, 0, 1, 2, 0, 1, 2]]
    assert pack.num_rows == pair.shared_length
    assert segments_of(roles(pack.segments), torch.device("cpu")).spans == pack.segments.spans


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_each_is_scored_as_it_is_alone_packed_and_padded(kind: str) -> None:
    policy, batch = tiny_policy(kind), with_others(pairs(5))
    alone = [TokenizedPair("one", prompt, ids, ids) for prompt, ids in sequences(batch)]
    for layout, lay_out in (("packed", share_prefixes), ("padded", pad_sequences)):
        choose_layout(policy, layout)
        with torch.no_grad():
            pack = lay_out(batch)
            sums = sums_of(token_logps(policy, pack), pack)
            expected = [sums_of(token_logps(policy, one), one)[0] for one in map(lay_out, ([each] for each in alone))]
        torch.testing.assert_close(sums, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("rejected", [True, False])
def test_no_pack_is_over_its_budget_and_each_pair_is_in_one(layout: str, rejected: bool) -> None:
    batch = with_others(pairs(40))
    buckets = (1, 16) if layout == "packed" else (1,)
    for budget, bucket in [(tokens, bucket) for tokens in (8, 64, 200, 1000) for bucket in buckets]:
        collate = PairCollator(layout, budget, rejected=rejected, bucket=bucket, others=True)
        packs = collate(batch).packs
        assert sorted(pair for pack in packs for pair in pack.pair_ids) == sorted(pair.id for pair in batch)
        by_id = {pair.id: pair for pair in batch}
        for pack in packs:
            alone = max(collate.rows_alone(by_id[pair]) for pair in pack.pair_ids)
            assert pack.num_rows <= max(budget, alone)
            assert len(pack.pair_ids) > 1 or pack.num_rows == alone
            assert len(pack.index.lengths) == 2 * pack.num_pairs + len(pack.others.pair)
            told = [by_id[pack.pair_ids[place]].others for place in pack.others.pair.unique()]
            assert pack.others.scores.tolist() == [other.score for others in told for other in others]


def test_who_does_not_ask_has_packs_as_if_there_were_none() -> None:
    batch = with_others(pairs(6))
    beside = [replace(pair, group="g", embedding=(1.0,)) for pair in batch]
    for layout in ("packed", "padded"):
        collate = PairCollator(layout, 64)
        ours, theirs = collate(beside), collate(pairs(6))
        assert [pack.pair_ids for pack in ours.packs] == [pack.pair_ids for pack in theirs.packs]
        for one, other in zip(ours.packs, theirs.packs, strict=True):
            assert torch.equal(one.input_ids, other.input_ids)
            assert one.others is one.groups is one.embeddings is None
        assert all(collate.rows_alone(pair) == collate.rows_alone(replace(pair, others=())) for pair in batch)


def test_looked_up_log_probs_and_scores_go_with_them_all_or_none() -> None:
    batch = with_others(pairs(4))
    known = [
        replace(pair, others=tuple(replace(other, reference=-float(n)) for n, other in enumerate(pair.others)))
        for pair in batch
    ]
    [pack] = PairCollator(tokens_per_pack=2000, others=True)(known).packs
    assert pack.others.pair.tolist() == [0, 2, 2, 2, 3, 3]
    assert pack.others.reference.tolist() == [0.0, 0.0, -1.0, -2.0, 0.0, -1.0]
    [pack] = PairCollator(tokens_per_pack=2000, others=True)([batch[0], *known[1:]]).packs
    assert pack.others.reference is None
    [empty] = PairCollator(others=True)(pairs(2)).packs
    assert [len(column) for column in empty.others] == [0, 0, 0]


def test_groups_are_numbered_and_embeddings_are_rows() -> None:
    batch = [replace(pair, group="abca"[n], embedding=(n, 2.0)) for n, pair in enumerate(pairs(4))]
    collate = PairCollator(tokens_per_pack=2000, groups=("a", "b", "c"), embedding=2)
    [pack] = collate(batch).packs
    assert pack.groups.tolist() == [0, 1, 2, 0]
    assert pack.embeddings.tolist() == [[0, 2], [1, 2], [2, 2], [3, 2]]
    assert (pack.groups.dtype, pack.embeddings.dtype) == (torch.int64, torch.float64)
    [filler] = collate(pairs(1)).packs
    assert (filler.groups.tolist(), filler.embeddings.tolist()) == ([0], [[0, 0]])
    with pytest.raises(InputError, match="is of group 'x', which no training pair is of; known: a, b, c"):
        collate([replace(batch[0], group="x")])
    with pytest.raises(InputError, match="of 3 numbers and the training pairs have 2"):
        collate([replace(batch[0], embedding=(1.0, 2.0, 3.0))])


# ---- in training


def test_an_answer_keeps_the_room_that_a_cut_of_turns_left_free() -> None:
    """The chosen completion's cut ends where its user speaks, short of the room: others need not end there too."""
    turns = [0] * 4 + [-1] * 8 + [1] * 4
    other = OtherAnswer([5] * 10, [3] * 8)
    dialogue = TokenizedPair("a", [5] * 10, [1] * 16, [2] * 3, chosen_turns=turns, others=(other,))
    kept = truncate(dialogue, "keep_start", Limits(20))
    assert kept is not None
    assert (len(kept.chosen_ids), len(kept.rejected_ids)) == (4, 3)
    assert kept.others == (other,)


@pytest.mark.parametrize(("name", "settings"), [("triple-po", {"nll_weight": 0.5}), ("selm", {"alpha": 0.5})])
def test_packs_change_nothing_in_training(tmp_path: Path, name: str, settings: dict[str, float]) -> None:
    batch = with_others(pairs(12), counts=(1,))
    found = []
    for layout, tokens in (("packed", 24), ("packed", 2000), ("padded", 100)):
        run = trainer(
            tmp_path / f"{layout}-{tokens}", batch, objective=name, beta=0.5, layout=layout, tokens_per_pack=tokens,
            max_steps=2, **settings,
        )  # fmt: skip
        run.train()
        found.append(weights(run))
    plain = trainer(tmp_path / "plain", batch, objective="dpo", beta=0.5, max_steps=2)
    plain.train()
    for other in found[1:]:
        assert relative_difference(other, found[0]) < 1e-4
    assert relative_difference(dict(plain.trained), found[0]) > 1e-2


def test_data_without_them_are_refused_before_the_model_is_touched(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train_dataset: pair 'pair-0' has no further answers, nor has any other pair"):
        trainer(tmp_path, pairs(4), objective="selm")
    with pytest.raises(InputError, match=r"eval_dataset: pair 'pair-1' has 0 further answers, and .* exactly one"):
        trainer(tmp_path, with_others(pairs(4), (1,)), with_others(pairs(4), (1, 0)), objective="selm")
    far = [replace(pair, others=(OtherAnswer([VOCABULARY], [2]),)) for pair in pairs(4)]
    with pytest.raises(InputError, match=f"has token id {VOCABULARY}"):
        trainer(tmp_path, far, objective="selm")


def test_stored_log_probs_of_further_answers_train_as_live_ones_do(tmp_path: Path) -> None:
    batch, found = with_others(pairs(12), (1,)), []
    for kind, store in (("disabled_adapter", None), ("cached", str(tmp_path / "store"))):
        run = trainer(
            tmp_path / kind, batch, objective="selm", beta=0.5, alpha=0.5, reference=kind, reference_store=store,
            max_steps=2,
        )  # fmt: skip
        if store:
            assert run.cache_reference().computed == 3 * len(batch)
        run.train()
        found.append(weights(run))
    assert relative_difference(*found) < 1e-5
