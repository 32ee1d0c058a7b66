"""Further answers, groups and embeddings of rows: read in every form, and named by file, row and key where wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from lorafocal.data.columns import FurtherAnswer
from lorafocal.data.mixture import grouped_by_source, join
from lorafocal.data.needs import check_columns, check_like_training, check_needs, check_scores
from lorafocal.data.sources import preferences_from_rows, read_preferences
from lorafocal.data.tokens import OtherAnswer, TokenizedPair
from lorafocal.errors import InputError
from lorafocal.objectives import OBJECTIVES
from lorafocal.objectives.entry import Entry

USER, GOOD, BAD, THIRD = (
    {"role": role, "content": text}
    for role, text in (("user", "2 + 2?"), ("assistant", "4"), ("assistant", "5"), ("assistant", "four"))
)
PLAIN = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}


def read(row: dict[str, Any], **options: Any) -> Any:
    return preferences_from_rows([row], "pairs.jsonl", **options).pairs[0]


@pytest.mark.parametrize(
    ("others", "answer"),
    [
        ("four", FurtherAnswer([THIRD])),
        (THIRD, FurtherAnswer([THIRD])),
        (["four"], FurtherAnswer([THIRD])),
        ([THIRD], FurtherAnswer([THIRD])),
        ([[THIRD]], FurtherAnswer([THIRD])),
        ([{"from": "gpt", "value": "four"}], FurtherAnswer([THIRD])),
        ({"answer": "four", "score": 0.5}, FurtherAnswer([THIRD], None, 0.5)),
        ([{"answer": [THIRD], "score": None, "prompt": None}], FurtherAnswer([THIRD])),
        ({"answer": THIRD, "prompt": "Why?", "score": "2"}, FurtherAnswer([THIRD], [USER | {"content": "Why?"}], 2.0)),
    ],
)
def test_a_further_answer_is_a_text_a_message_or_an_object(others: Any, answer: FurtherAnswer) -> None:
    assert read(CHAT | {"others": others}).others == (answer,)
    assert read(CHAT | {"gold": others}, columns={"others": "gold"}).others == (answer,)


def test_plain_pairs_have_plain_further_answers() -> None:
    row = PLAIN | {"others": ["four", {"answer": "4.0", "prompt": "Why?", "score": 1}]}
    assert read(row).others == (FurtherAnswer("four"), FurtherAnswer("4.0", "Why?", 1.0))
    assert read(PLAIN | {"others": []}).others == read(PLAIN | {"others": None}).others == ()


def test_a_rationale_answers_which_of_both_is_better_and_why() -> None:
    [plain] = read(PLAIN | {"rationale": "It is even."}).others
    assert plain.answer == "It is even."
    for part in ("2 + 2 =", 'above:" 4"', 'below:" 5"'):
        assert part in plain.prompt  # type: ignore[operator]
    [said] = read(CHAT | {"rationale": "It is even."}).others
    assert said.answer == [{"role": "assistant", "content": "It is even."}]
    assert [message["role"] for message in said.prompt] == ["user"]  # type: ignore[union-attr, index]
    assert said.prompt[0]["content"].startswith("Given the prompt:\n2 + 2?\nWhich")  # type: ignore[index]


def test_groups_and_embeddings_are_read_from_every_kind_of_table(tmp_path: Path) -> None:
    row = CHAT | {"group": "sums", "prompt_embedding": [0.5, -1], "others": [{"answer": "four", "score": 0.5}]}
    expected = read(row)
    assert (expected.group, expected.embedding) == ("sums", (0.5, -1.0))
    assert read({**row, "group": 3}).group == "3"
    table = datasets.Dataset.from_list([row])
    assert preferences_from_rows(table, "pairs.jsonl").pairs == [expected]
    assert read(row | {"prompt_embedding": np.array([0.5, -1], np.float32)}) == expected
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row))
    assert read_preferences(path).pairs == [expected]


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "number": ({"others": 3}, "others", "expected a list of further answers, found a number"),
    "numbers": ({"others": ["a", 3]}, "others[1]", "expected a list of messages, found a number"),
    "empty": ({"others": [""]}, "others[0]", "empty"),
    "user": ({"others": [USER]}, "others[0]", "its role is user"),
    "two turns": ({"others": [[GOOD, USER, BAD]]}, "others[0]", "3 messages"),
    "strange key": ({"others": [{"answer": "a", "rank": 2}]}, "others[0]", "with rank are not read"),
    "no answer": ({"others": [{"score": 2}]}, "others[0]", "no `answer`"),
    "score": ({"others": [{"answer": "a", "score": "high"}]}, "others[0].score", "expected a finite number"),
    "answered": ({"others": [{"answer": "a", "prompt": [GOOD]}]}, "others[0].prompt", "the last message is the assist"),
    "empty prompt": ({"others": [{"answer": "a", "prompt": ""}]}, "others[0].prompt", "empty"),
    "rationale": ({"rationale": ["a"]}, "rationale", "expected a string, found a list"),
    "empty rationale": ({"rationale": ""}, "rationale", "an empty string"),
    "both": ({"rationale": "a", "others": ["b"]}, "rationale", "not in both"),
    "group": ({"group": ["a"]}, "group", "expected a text or a whole number, found a list"),
    "empty group": ({"group": ""}, "group", "an empty text"),
    "embedding": ({"prompt_embedding": 0.5}, "prompt_embedding", "expected a list of numbers, found a number"),
    "no embedding": ({"prompt_embedding": []}, "prompt_embedding", "expected a list of numbers"),
    "text in it": ({"prompt_embedding": [0.5, "a"]}, "prompt_embedding[1]", "expected a finite number, found 'a'"),
    "infinite": ({"prompt_embedding": [float("inf")]}, "prompt_embedding[0]", "expected a finite number"),
    "zeros": ({"prompt_embedding": [0, 0.0]}, "prompt_embedding", "all of its numbers are 0"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_value_is_named_with_its_place(wrong: str) -> None:
    values, key, message = WRONG[wrong]
    dropped = preferences_from_rows([CHAT, CHAT | values], "pairs.jsonl", on_bad_row="drop")
    [bad] = dropped.bad_rows
    assert bad.place == f"pairs.jsonl, row 2, key `{key}`"
    assert message in bad.message
    with pytest.raises(InputError, match=r"pairs.jsonl, row 2, key"):
        preferences_from_rows([CHAT, CHAT | values], "pairs.jsonl")


def test_messages_beside_plain_texts_are_refused() -> None:
    with pytest.raises(InputError, match=r"key `others\[0\]`: messages beside a pair of plain texts"):
        read(PLAIN | {"others": [THIRD]})


def test_a_group_or_rationale_column_is_taken_for_no_prompt() -> None:
    row = {"chosen": "Q: 2 + 2? A: 4", "rejected": "Q: 2 + 2? A: 5", "group": "sums", "rationale": "It is even."}
    assert read(row).prompt == "Q: 2 + 2? A:"


# ---- what an objective asks for


def tokenized(**changes: Any) -> TokenizedPair:
    pair = TokenizedPair("a", [1], [2], [3], 0.9, 0.1, group="g", embedding=(1.0, 0.0))
    return (
        replace(pair, others=(OtherAnswer([1], [4], 0.5),), **changes)
        if "others" not in changes
        else replace(pair, **changes)
    )


ONE, ANY = (Entry({}, others=kind, loss="sft.sft") for kind in ("one", "any"))
SETS = Entry({}, others="any", scores="unit", loss="sft.sft")


@pytest.mark.parametrize(
    ("entry", "changes", "message"),
    [
        (ONE, {"others": ()}, "has no further answers, nor has any other pair"),
        (ONE, {"others": (OtherAnswer([1], [4]),) * 2}, "has 2 further answers, and the objective needs exactly one"),
        (ANY, {"others": ()}, "has no further answers, nor has any other pair"),
        (SETS, {"others": (OtherAnswer([1], [4]),)}, "its further answer 1 has no score"),
        (SETS, {"others": (OtherAnswer([1], [4], 7.0),)}, r"further answer 1 has the score 7, .* from 0 to 1: rescale"),
        (SETS, {"score_chosen": None}, "has no score_chosen"),
        (SETS, {"score_chosen": 9.0}, "has score_chosen 9, and the objective needs scores from 0 to 1: rescale"),
        (SETS, {"score_rejected": 0.95}, "chosen 0.9 and rejected 0.95, and the objective needs the chosen one no low"),
        (Entry({}, groups=True, loss="sft.sft"), {"group": None}, "has no group"),
        (Entry({}, embeddings=True, loss="sft.sft"), {"embedding": None}, "has no prompt_embedding"),
        (Entry({}, embeddings=True, loss="sft.sft"), {"embedding": (0.0, 0.0)}, "of zeros, which points nowhere"),
    ],
)
def test_what_an_objective_asks_for_must_be_there(entry: Entry, changes: dict[str, Any], message: str) -> None:
    check_needs([tokenized()], "train_dataset", entry)
    with pytest.raises(InputError, match=f"train_dataset: pair 'a'.*{message}"):
        check_needs([tokenized(**changes)], "train_dataset", entry)


def test_any_number_of_further_answers_is_none_for_some_pairs() -> None:
    check_needs([tokenized(), tokenized(others=())], "train_dataset", ANY)


@pytest.mark.parametrize(("kind", "ties"), [("gap", False), ("ties", True), ("unit", True)])
def test_ties_are_for_those_who_can_use_them(kind: str, ties: bool) -> None:
    tied = [tokenized(score_rejected=0.9)]
    if ties:
        check_scores(tied, "pairs", kind)
    else:
        with pytest.raises(InputError, match="needs the chosen one above"):
            check_scores(tied, "pairs", kind)


def test_embeddings_of_another_size_and_groups_of_nobody_are_refused() -> None:
    groups, embeddings = (OBJECTIVES[name] for name in ("group-dpo", "relative-dpo"))
    other = tokenized(group="h", embedding=(1.0, 0.0, 0.0))
    with pytest.raises(InputError, match="prompt_embedding of 3 numbers and an earlier pair one of 2"):
        check_columns([tokenized(), other], lambda pair: pair.id, embeddings)
    with pytest.raises(InputError, match=r"eval: pair 'a' is of group 'h', which no training pair is of; known: g"):
        check_like_training([other], [tokenized()], "data.eval", groups)
    with pytest.raises(InputError, match=r"data\.eval: pair 'a' has a prompt_embedding of 3 numbers"):
        check_like_training([other], [tokenized()], "data.eval", embeddings)
    check_like_training([other], [tokenized()], "data.eval", OBJECTIVES["dpo"])


def test_sources_are_groups_where_no_row_names_one() -> None:
    sources = [preferences_from_rows([PLAIN, CHAT], name) for name in ("a.jsonl", "b.jsonl", "b.jsonl")]
    joined = join(sources)
    names = ["a.jsonl", "b.jsonl", "b.jsonl"]
    grouped = grouped_by_source(joined.preferences, joined.source_of, names)
    assert [pair.group for pair in grouped.pairs] == ["a.jsonl"] * 2 + ["b.jsonl"] * 2 + ["b.jsonl~3"] * 2
    named = replace(joined.preferences, pairs=[replace(joined.preferences.pairs[0], group="x"), *grouped.pairs[1:]])
    assert grouped_by_source(named, joined.source_of, names) is named
    alone = join(sources[:1])
    assert grouped_by_source(alone.preferences, alone.source_of, names[:1]) is alone.preferences
