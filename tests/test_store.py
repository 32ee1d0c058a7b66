"""Stored log-probs: found by content, whole or absent, refused by name where missing, altered or foreign."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafocal.caching import SHARD_ROWS
from lorafocal.data.tokens import OtherAnswer, TokenizedPair
from lorafocal.errors import InputError
from lorafocal.store import CONTEXT_FILE, Answer, Context, ReferenceStore, Score, answers_of, sequence_key
from tests.killing import moments
from tests.tiny import pairs

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = Context("a" * 64, "b" * 64, None, "float32", "cpu", "packed", "sdpa", "torch", "2.13.0", "5.23.0", None)
OTHERS = {field.name: 2 if field.name == "version" else "another" for field in fields(Context)}


def value_of(answer: Answer) -> float:
    """A made-up log-prob that is the answer's own."""
    return -float(int.from_bytes(answer.key[:2], "little")) / 64 - 0.1


def scores(of: list[TokenizedPair], *, tokens: bool = False) -> list[Score]:
    distinct = {answer.key: answer for answer in answers_of(of)}.values()
    return [
        Score(a, value_of(a), torch.full((len(a.completion_ids),), value_of(a)) if tokens else None) for a in distinct
    ]


def filled(folder: Path, of: list[TokenizedPair], context: Context = CONTEXT) -> ReferenceStore:
    store = ReferenceStore(folder, context)
    store.write(scores(of))
    return ReferenceStore(folder, context)


def parts(store: ReferenceStore) -> list[Path]:
    return sorted(store.folder.glob("part-*"))


# ---- what is stored


ids = st.lists(st.integers(0, 2**31), min_size=1, max_size=5)


@given(ids, ids, ids, ids)
def test_a_key_is_the_prompts_and_the_completions_own(prompt, completion, other_prompt, other_completion):
    same = (prompt, completion) == (other_prompt, other_completion)
    assert (sequence_key(prompt, completion) == sequence_key(other_prompt, other_completion)) is same


def test_where_the_prompt_ends_is_part_of_the_key():
    assert sequence_key([1, 2], [3]) != sequence_key([1], [2, 3])


def test_what_was_written_is_looked_up_to_the_last_bit_of_fp32(tmp_path):
    of = pairs(20)
    found = filled(tmp_path, of).look_up(of)
    assert [replace(pair, reference=None) for pair in found] == of
    for pair in found:
        expected = [float(torch.tensor(value_of(answer), dtype=torch.float32)) for answer in answers_of([pair])]
        assert list(pair.reference) == expected


def test_pairs_of_a_prompt_share_its_answers(tmp_path):
    a, b, c = [5], [6, 7], [8]
    of = [TokenizedPair(str(n), [1, 2], *two) for n, two in enumerate([(a, b), (a, c), (b, c), (a, b)])]
    store = ReferenceStore(tmp_path, CONTEXT)
    assert len(store.missing(of)) == 3
    store.write(scores(of[:1]))
    assert [answer.completion_ids for answer in store.missing(of)] == [c]
    store.write(scores(of[1:2]))
    first, second, third, again = (pair.reference for pair in store.look_up(of))
    assert first == again
    assert first[0] == second[0]
    assert (first[1], second[1]) == third


def test_the_tokens_own_log_probs_are_kept_on_demand(tmp_path):
    of = pairs(5)
    store = filled(tmp_path, of)
    assert store.missing(of) == []
    assert len(store.missing(of, per_token=True)) == 10
    with pytest.raises(InputError, match="10 of 10 reference log-probs of tokens are missing"):
        store.token_logps(of)
    store.write(scores(of, tokens=True))
    assert store.missing(of, per_token=True) == []
    for pair, (chosen, rejected) in zip(of, store.token_logps(of), strict=True):
        assert (len(chosen), len(rejected)) == (len(pair.chosen_ids), len(pair.rejected_ids))
        assert chosen.dtype == torch.float32
        assert chosen[0] == torch.tensor(value_of(next(answers_of([pair]))))
    assert len(store.look_up(of)) == 5


def test_sums_stay_where_tokens_come_later(tmp_path):
    """A run that goes on reads the bits that it began with; whichever part's name comes first."""
    of = pairs(5)
    for number in range(6):
        folder = tmp_path / str(number)
        before = filled(folder, of).look_up(of)
        store = ReferenceStore(folder, CONTEXT)
        store.write([replace(one, logps=one.logps - 1e-3 * (1 + number)) for one in scores(of, tokens=True)])
        assert store.look_up(of) == before


def test_tokens_are_looked_up_beside_the_sums(tmp_path):
    of = pairs(5)
    store = filled(tmp_path, of)
    store.write(scores(of, tokens=True))
    for pair, plain in zip(store.look_up(of, per_token=True), store.look_up(of), strict=True):
        assert pair.reference == plain.reference
        assert [len(side) for side in pair.reference_tokens] == [len(pair.chosen_ids), len(pair.rejected_ids)]
        assert plain.reference_tokens is None


def test_further_answers_are_looked_up_with_their_pair(tmp_path):
    plain = pairs(3)
    others = tuple(OtherAnswer(prompt, [4, number]) for number, prompt in enumerate((plain[0].prompt_ids, [7, 8, 9])))
    of = [replace(plain[0], others=others), plain[1], replace(plain[2], others=others[1:])]
    store = filled(tmp_path, plain)
    with pytest.raises(InputError, match=r"3 of 9 .* missing, first that of further answer 1 of pair 'pair-0'"):
        store.look_up(of)
    store.write(scores(of))
    found = store.look_up(of)
    assert [pair.reference for pair in found] == [pair.reference for pair in store.look_up(plain)]
    assert found[1].others == ()
    names = {answer.key: value_of(answer) for answer in answers_of(of)}
    for pair in found:
        for other in pair.others:
            key = sequence_key(other.prompt_ids, other.completion_ids)
            assert other.reference == pytest.approx(names[key], rel=1e-6)
    assert found[0].others[1] == found[2].others[0]


@pytest.mark.row("35")
def test_which_tokens_are_scored_is_part_of_the_key():
    ways = [None, [0, -1, 1], [0, 1, 2], [0, -1, 2], [0, -1, -1, 1]]
    completions = [[5, 6, 7]] * 4 + [[5, 6, 7, 8]]
    keys = [sequence_key([1], ids, turns) for ids, turns in zip(completions, ways, strict=True)]
    assert keys[1] == keys[3], "in which turn a token is changes no log-prob"
    assert len(set(keys)) == 4


def test_equal_scores_give_one_file_and_a_look_up_writes_nothing(tmp_path):
    of = pairs(4)
    store = filled(tmp_path / "store", of)
    store.write(scores(of))
    assert len(parts(store)) == 1
    empty = ReferenceStore(tmp_path / "empty", CONTEXT)
    assert len(empty.missing(of)) == 8
    with pytest.raises(InputError):
        empty.look_up(of)
    assert not (tmp_path / "empty").exists()


def test_the_disk_figure_of_the_docs(tmp_path):
    of = pairs(SHARD_ROWS, longest=200)
    store = filled(tmp_path, of)
    measured = sum(file.stat().st_size for file in store.folder.iterdir()) / len(of)
    text = (ROOT / "docs/reference-store.md").read_text(encoding="utf-8")
    (stated,) = re.findall(r"(\d+) bytes a pair", text)
    assert abs(measured - int(stated)) < 2


# ---- what is refused


@pytest.mark.row("35")
def test_a_missing_entry_is_an_error_that_names_the_pair_and_never_a_number(tmp_path):
    of = pairs(6)
    store = filled(tmp_path, of[:5])
    with pytest.raises(InputError, match=r"2 of 12 .* missing.* chosen answer of pair 'pair-5'.*cache-reference"):
        store.look_up(of)
    short = ReferenceStore(tmp_path / "short", CONTEXT)
    short.write(scores(of)[:-1])  # all but one row
    with pytest.raises(InputError, match=r"1 of 12 .* missing.* rejected answer of pair 'pair-5'"):
        short.look_up(of)
    parts(store)[0].unlink()
    with pytest.raises(InputError, match="10 of 10"):
        store.look_up(of[:5])


@pytest.mark.row("35")
@pytest.mark.parametrize("place", [0.05, 0.5, 0.999])
def test_an_altered_part_is_refused_by_name(tmp_path, place):
    of = pairs(50)
    store = filled(tmp_path, of)
    (part,) = parts(store)
    content = bytearray(part.read_bytes())
    content[int(place * len(content))] ^= 1
    part.write_bytes(content)
    for read in (store.look_up, store.missing):
        with pytest.raises(InputError, match=rf"{part.name} has changed since it was written"):
            read(of)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_part_is_refused_by_name(tmp_path, kept):
    store = filled(tmp_path, pairs(5))
    (part,) = parts(store)
    part.write_bytes(part.read_bytes()[:kept])
    with pytest.raises(InputError, match="has changed since it was written"):
        store.look_up(pairs(5))


@pytest.mark.row("35")
@pytest.mark.parametrize("field", sorted(OTHERS))
def test_a_store_of_another_context_is_refused_and_the_field_named(tmp_path, field):
    of = pairs(4)
    filled(tmp_path, of)
    other = ReferenceStore(tmp_path, replace(CONTEXT, **{field: OTHERS[field]}))
    with pytest.raises(InputError, match=rf"missing.*holds it, but {field} is .* there and {OTHERS[field]} here"):
        other.look_up(of)
    other.write(scores(of))
    assert len(other.look_up(of)) == 4
    assert len(list(tmp_path.iterdir())) == 2


def test_of_several_contexts_the_nearest_is_named_alone(tmp_path):
    near = replace(CONTEXT, torch="1.0.0")
    for context in (replace(near, dtype="float64", layout="padded"), near, replace(near, quantization="int8")):
        filled(tmp_path, pairs(2), context)
    with pytest.raises(InputError) as caught:
        ReferenceStore(tmp_path, CONTEXT).look_up(pairs(2))
    assert str(caught.value).count(" holds it, but ") == 1
    assert f"{near.sha256[:16]} holds it, but torch is 1.0.0 there and {CONTEXT.torch} here)" in str(caught.value)


def test_a_context_that_does_not_hold_the_pair_is_not_named(tmp_path):
    held = filled(tmp_path, pairs(4))
    other = ReferenceStore(tmp_path, replace(CONTEXT, dtype="bfloat16"))
    with pytest.raises(InputError, match="are missing") as refusal:
        other.look_up(pairs(4, seed=9)[3:])
    assert "holds it" not in str(refusal.value)
    parts(held)[0].write_bytes(b"")
    with pytest.raises(InputError, match="are missing"):  # a damage elsewhere is not what is wrong here
        other.look_up(pairs(4))


@pytest.mark.row("35")
def test_a_part_that_was_moved_into_another_context_is_refused(tmp_path):
    of = pairs(4)
    here = filled(tmp_path, of[:2])
    there = filled(tmp_path, of[2:], replace(CONTEXT, quantization="nf4"))
    (moved,) = parts(there)
    moved.rename(here.folder / moved.name)
    with pytest.raises(InputError, match=r"another context .quantization is nf4 there and None here"):
        here.look_up(of)
    (there.folder / CONTEXT_FILE).unlink()
    with pytest.raises(InputError, match="knows nothing"):
        here.look_up(of)


def test_a_folder_under_another_contexts_name_is_refused(tmp_path):
    other = replace(CONTEXT, dtype="bfloat16")
    filled(tmp_path, pairs(4)).folder.rename(tmp_path / other.sha256[:16])
    with pytest.raises(InputError, match=r"another context .dtype is float32 there and bfloat16 here"):
        ReferenceStore(tmp_path, other)


def test_a_folder_under_a_name_of_its_own_is_told_what_it_should_be_called(tmp_path):
    store = filled(tmp_path, pairs(4))
    right = store.folder.name
    store.folder.rename(tmp_path / "mine")
    with pytest.raises(InputError, match=rf"mine holds it, but its name is not that .*, {right}: rename it so\)"):
        ReferenceStore(tmp_path, CONTEXT).look_up(pairs(4))
    begun = filled(tmp_path, pairs(4)[:1])
    with pytest.raises(InputError, match=rf"mine holds it, but .*, {right}: move its parts there\)"):
        begun.look_up(pairs(4))
    for part in (tmp_path / "mine").glob("part-*"):
        part.rename(begun.folder / part.name)
    assert len(begun.look_up(pairs(4))) == 4


@pytest.mark.parametrize("content", [None, "", "[]", "{"])
def test_parts_of_nobody_knows_what_are_refused(tmp_path, content):
    file = filled(tmp_path, pairs(4)).folder / CONTEXT_FILE
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(InputError, match=r"context\.json is missing or damaged"):
        ReferenceStore(tmp_path, CONTEXT)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("in_tokens", [False, True])
def test_what_is_not_a_finite_number_is_not_stored(tmp_path, value, in_tokens):
    good, bad = scores(pairs(1), tokens=True)
    tokens = torch.tensor([-1.0, value]) if in_tokens else bad.token_logps
    bad = replace(bad, logps=-1.0 if in_tokens else value, token_logps=tokens)
    with pytest.raises(InputError, match=r"rejected answer of pair 'pair-0'.*nothing"):
        ReferenceStore(tmp_path, CONTEXT).write([good, bad])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file", "file/inside"])
def test_a_store_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path, place):
    (tmp_path / "file").touch()
    store = ReferenceStore(tmp_path / place, CONTEXT)
    message = r"reference store .* cannot be written \(.*name another folder by reference.store"
    with pytest.raises(InputError, match=message):
        store.check_writable()
    with pytest.raises(InputError, match=message):
        store.write(scores(pairs(1)))
    ReferenceStore(tmp_path / "new" / "inside", CONTEXT).check_writable()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lorafocal.store.os.access", lambda place, mode: place != tmp_path)
    with pytest.raises(InputError, match="no permission to write"):
        ReferenceStore(tmp_path / "new", CONTEXT).check_writable()


# ---- kills and company


def test_the_context_says_itself_what_it_is(tmp_path):
    store = filled(tmp_path, pairs(4))
    assert json.loads((store.folder / CONTEXT_FILE).read_text()) == CONTEXT.as_dict()
    assert store.folder.name == CONTEXT.sha256[:16]


@pytest.mark.row("35")
def test_killed_anywhere_in_a_write_a_part_is_there_whole_or_not_at_all(tmp_path):
    of, seen = pairs(6), []

    def write() -> None:
        ReferenceStore(tmp_path, CONTEXT).write(scores(of))

    for _ in moments(write, tmp_path):
        store = ReferenceStore(tmp_path, CONTEXT)
        seen.append(len(store.missing(of)))
        for part in parts(store):
            part.unlink()
    assert set(seen) == {0, 12}
    assert seen[-1] == 0


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    """Four write shares that overlap, into a folder that none of them has made yet."""
    of = pairs(40)
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                store = ReferenceStore(tmp_path, CONTEXT)
                for first in range(number, 40, 4):
                    store.write(scores(of[first : first + 2]))
                    store.missing(of)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0, 0]
    store = ReferenceStore(tmp_path, CONTEXT)
    assert store.missing(of) == []
    assert [pair.reference for pair in store.look_up(of)] == [
        pair.reference for pair in filled(tmp_path / "alone", of).look_up(of)
    ]
