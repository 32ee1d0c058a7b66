"""Every form gives the same pair, TRL's helpers being the oracle; what a form cannot say is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl import extract_prompt, maybe_convert_to_chatml, maybe_extract_prompt

from lorafocal.data.forms import FORMS, Row, Sides, form
from lorafocal.data.sources import SCORES, preferences_from_rows
from lorafocal.errors import InputError

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Add 2 and 2."},
]
GOOD = {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "5"}
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}
TEXT = "\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: Add 2 and 2.\n\nAssistant:"


def turns(*messages: dict[str, str]) -> list[dict[str, str]]:
    """Messages in ShareGPT's spelling."""
    return [{"from": SHAREGPT[message["role"]], "value": message["content"]} for message in messages]


# form -> rows of that form, all of which say TURNS, GOOD, BAD
ROWS: dict[str, list[dict[str, Any]]] = {
    "explicit": [
        {"prompt": TURNS, "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": turns(*TURNS), "chosen": turns(GOOD), "rejected": turns(BAD)},
    ],
    "implicit": [
        {"chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]},
        {"chosen": turns(*TURNS, GOOD), "rejected": turns(*TURNS, BAD), "question": "a column of no meaning here"},
    ],
    "ultrafeedback": [
        {"prompt": "Hi!", "prompt_id": "0f", "chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD], "messages": [*TURNS]},
        {
            "prompt": "Add 2 and 2.",
            "chosen": [*TURNS, GOOD],
            "rejected": [*TURNS, BAD],
            "all_generated_responses": ["4", "5"],
            "all_rm_scores": [0.2, 0.1],
        },
        {"prompt": TURNS, "chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]},
    ],
    "sharegpt": [
        {"conversations": turns(*TURNS), "chosen": turns(GOOD)[0], "rejected": turns(BAD)[0], "tools": ""},
        {"conversations": TURNS, "chosen": [GOOD], "rejected": [BAD], "tools": "[]"},
    ],
    "hh": [
        {"chosen": f"{TEXT} 4", "rejected": f"{TEXT} 5 "},
        {side: f"{TEXT} {answer}\n".replace("\n", "\r\n") for side, answer in (("chosen", 4), ("rejected", 5))},
    ],
    "openai": [
        {
            "input": {"messages": TURNS, "tools": [], "parallel_tool_calls": True},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        }
    ],
}
CASES = [
    pytest.param(name, row, id=f"{name}{number}") for name, rows in ROWS.items() for number, row in enumerate(rows)
]


def read_one(row: dict[str, Any], **options: Any) -> tuple[Any, str]:
    read = preferences_from_rows([row], "rows", **options)
    return read.pairs[0], read.form


@pytest.mark.parametrize("stated", [False, True], ids=["recognised", "stated"])
@pytest.mark.parametrize(("name", "row"), CASES)
def test_every_form_says_the_same_pair(name: str, row: dict[str, Any], stated: bool) -> None:
    before = copy.deepcopy(row)
    pair, found = read_one(row, form=name if stated else None)
    assert found == name
    assert (pair.prompt, pair.chosen, pair.rejected) == (TURNS, [GOOD], [BAD])
    assert row == before


def test_every_form_is_tried() -> None:
    assert {*ROWS, "single_turn", "whole_conversations"} == set(FORMS)


def test_strings_become_a_conversation_where_that_is_stated() -> None:
    row = {"system": "Be brief.", "question": "2 + 2?", "chosen": "4", "rejected": "5"}
    rows = [row, row | {"system": ""}]
    first, second = preferences_from_rows(rows, "rows", form="single_turn", columns={"prompt": "question"}).pairs
    asked = {"role": "user", "content": "2 + 2?"}
    assert (first.prompt, first.chosen, first.rejected) == ([SYSTEM, asked], [GOOD], [BAD])
    assert (second.prompt, second.chosen, second.rejected) == ([asked], [GOOD], [BAD])


def test_the_input_beside_an_instruction_is_not_lost() -> None:
    row = {"instruction": "Add.", "input": "2 and 2", "chosen": "4", "rejected": "5"}
    with pytest.raises(InputError, match=r"key `input`: half .* join"):
        read_one(row, columns={"prompt": "instruction"})
    assert read_one(row | {"input": ""}, columns={"prompt": "instruction"})[0].prompt == "Add."


@pytest.mark.parametrize(("name", "row"), CASES)
def test_trl_finds_the_same_prompt_in_conversations(name: str, row: dict[str, Any]) -> None:
    if name not in ("implicit", "ultrafeedback") or isinstance(row.get("prompt"), list):
        return  # not read by TRL, or not split
    theirs = maybe_extract_prompt(maybe_convert_to_chatml(copy.deepcopy(row)))
    pair, _ = read_one(row)
    for side in ("prompt", "chosen", "rejected"):
        assert [message["content"] for message in theirs[side]] == [
            message["content"] for message in getattr(pair, side)
        ]


TEXTS = st.text("ab \n", min_size=1, max_size=8)


@given(TEXTS, TEXTS, TEXTS)
def test_an_implicit_prompt_in_strings_is_trls(prompt: str, chosen: str, rejected: str) -> None:
    """Refused where TRL would find no prompt (its index then wraps around), or answers are equal."""
    row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    chosen, rejected = row["chosen"], row["rejected"]
    theirs = extract_prompt(row)
    if chosen == rejected or chosen[0] != rejected[0] or not theirs["prompt"]:
        with pytest.raises(InputError, match=r"share no beginning|are equal"):
            read_one(row, form="implicit")
    else:
        pair, _ = read_one(row, form="implicit")
        assert {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} == theirs


JUDGED = {"all_generated_responses": ["5", " 4 ", "6", "4", "5"], "all_rm_scores": [0.1, 0.2, 0.15, 0.3, 0.05]}


def test_scores_are_looked_up_among_all_the_answers_that_were_judged() -> None:
    """llama3-ultrafeedback-armorm: five answers, the best chosen and the worst rejected; here both are there twice."""
    [_, row, _] = ROWS["ultrafeedback"]
    pair, _ = read_one(row | JUDGED)
    assert (pair.score_chosen, pair.score_rejected) == (0.3, 0.05)
    named, _ = read_one(row | JUDGED | {"score_chosen": 2.0, "score_rejected": 0.5})
    assert (named.score_chosen, named.score_rejected) == (2.0, 0.5)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"all_generated_responses": ["4", "6"], "all_rm_scores": [0.3, 0.1]}, (0.3, None)),  # not by their order
        ({"all_rm_scores": [0.3, 0.1]}, (None, None)),
        ({"all_rm_scores": None}, (None, None)),
        ({"all_generated_responses": [None, 4, "4", "5", ""]}, (0.15, 0.3)),
        ({"all_rm_scores": [None, 0.2, None, None, 0.05]}, (0.2, 0.05)),
    ],
)
def test_a_score_that_is_not_an_answers_own_is_none(changes: dict[str, Any], found: tuple[float | None, ...]) -> None:
    pair, _ = read_one(ROWS["ultrafeedback"][1] | JUDGED | changes)
    assert (pair.score_chosen, pair.score_rejected) == found


def test_a_judged_score_that_is_no_number_is_named() -> None:
    with pytest.raises(InputError, match=r"key `all_rm_scores`: expected a finite number"):
        read_one(ROWS["ultrafeedback"][1] | JUDGED | {"all_rm_scores": [0.1, "high", 0.2, 0.3, 0.4]})


@pytest.mark.parametrize(
    "keys",
    SCORES,
)
def test_scores_are_kept_under_any_of_their_names(keys: tuple[str, str]) -> None:
    for rows in ROWS.values():
        pair, _ = read_one(rows[0] | dict(zip(keys, (2, 0.5), strict=True)))
        assert (pair.score_chosen, pair.score_rejected) == (2.0, 0.5)


def test_an_answers_beginning_is_no_prompt_where_other_rows_have_one() -> None:
    rows = [PAIR | {"prompt": "Pet?"}, PAIR, ROWS["hh"][0]]
    read = preferences_from_rows(rows, "rows", on_bad_row="drop")
    assert [pair.place for pair in read.pairs] == ["rows, row 1", "rows, row 3"]
    assert [(bad_row.place, bad_row.reason) for bad_row in read.bad_rows] == [
        ("rows, row 2, key `prompt`", "missing_key")
    ]


def test_columns_that_say_where_a_pair_is_from_are_no_prompt() -> None:
    known = {"id": "a", "prompt_id": "b", "source": "c d", "chosen_model": "e f", "score_chosen": "1", "note": None}
    pair, found = read_one(PAIR | known)
    assert (pair.prompt, found) == ("The", "implicit")
    assert read_one(PAIR | {"Task": "Pet?"}, form="implicit") == (replace(pair, id="rows:1", score_chosen=None), found)


def test_mixed_forms_are_recognised_row_by_row() -> None:
    read = preferences_from_rows([ROWS["hh"][0], *ROWS["sharegpt"]], "rows")
    assert read.form == "sharegpt, hh"
    assert len(read.pairs) == 3


def test_a_system_column_opens_the_conversation() -> None:
    row = ROWS["sharegpt"][0]
    pair, _ = read_one(row | {"system": "Be brief."})
    assert pair.prompt == [SYSTEM, *TURNS]
    pair, _ = read_one(row | {"system": "Be brief.", "conversations": turns(SYSTEM, *TURNS)})
    assert pair.prompt == [SYSTEM, *TURNS]


def test_columns_of_other_names_are_read_as_ours() -> None:
    row = {"question": "2 + 2 =", "good": "4", "bad": "5", "margin": 0.5, "key": 7, "chosen": "of no meaning"}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad", "score_chosen": "margin", "id": "key"}
    pair, found = read_one(row, columns=columns)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.score_chosen, pair.id) == ("2 + 2 =", "4", "5", 0.5, "7")
    assert found == "explicit"
    pair, _ = read_one({"messages": TURNS, "chosen": GOOD, "rejected": BAD}, columns={"conversations": "messages"})
    assert (pair.prompt, pair.chosen) == (TURNS, [GOOD])


PAIR = {"chosen": "The cat", "rejected": "The dog"}
LIST_PAIR = {"chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}

# what: (row, reason, where, what the message says)
REFUSED: dict[str, tuple[dict[str, Any], str, str, str]] = {
    # what two answers begin with is not the prompt where another column is
    "other prompt": (PAIR | {"question": "Pet?"}, "missing_key", "key `prompt`", "columns: {prompt: question}"),
    "any other text": (PAIR | {"Task": "Pet?"}, "missing_key", "key `prompt`", "columns: {prompt: Task}"),
    "null prompt": (PAIR | {"prompt": None}, "missing_key", "key `prompt`", "give it a text"),
    "null question": (PAIR | {"question": None}, "missing_key", "key `prompt`", "give it a text"),
    "no prompt": ({"chosen": "A cat", "rejected": "The dog"}, "no_shared_prompt", "key `prompt`", "add a `prompt`"),
    "equal strings": ({"chosen": "A", "rejected": "A"}, "identical_completions", "rows, row 1:", "remove the row"),
    "string and list": (LIST_PAIR | {"chosen": "4"}, "mixed_types", "rows, row 1:", "in the same form"),
    "no shared turns": (
        {"chosen": [TURNS[0], GOOD], "rejected": [TURNS[2], BAD]},
        "no_shared_prompt",
        "key `prompt`",
        "share no beginning",
    ),
    "apart early": (
        {"chosen": [TURNS[0], GOOD, TURNS[2], GOOD], "rejected": [TURNS[0], BAD, TURNS[2], BAD]},
        "long_answer",
        "key `chosen`",
        "3 messages; an answer is one",
    ),
    "user last": (
        {"chosen": [TURNS[0], TURNS[2]], "rejected": [TURNS[0], TURNS[0]]},
        "not_an_answer",
        "key `chosen`",
        "the judged message is the assistant's",
    ),
    "another prompt": (LIST_PAIR | {"prompt": "Subtract."}, "prompt_mismatch", "key `prompt`", "leave prompt out"),
    "another list": (LIST_PAIR | {"prompt": TURNS[:1]}, "prompt_mismatch", "key `prompt`", "leave prompt out"),
    "gpt asked": (
        {"conversations": turns(GOOD), "chosen": turns(GOOD)[0], "rejected": turns(BAD)[0]},
        "answered_prompt",
        "key `conversations`",
        "ends before the answer",
    ),
    "user answers": (
        {"conversations": turns(*TURNS), "chosen": turns(TURNS[0])[0], "rejected": turns(BAD)[0]},
        "not_an_answer",
        "key `chosen`",
        "the judged message is the assistant's",
    ),
    "sharegpt robot": (
        {"conversations": [{"from": "robot", "value": "x"}], "chosen": turns(GOOD)[0], "rejected": turns(BAD)[0]},
        "unknown_role",
        "key `conversations[0].from`",
        "use one of system, human",
    ),
    "sharegpt observation": (
        {"conversations": [{"from": "observation", "value": "x"}], "chosen": GOOD, "rejected": BAD},
        "tools",
        "key `conversations[0].from`",
        "remove these rows",
    ),
    "tools column": (LIST_PAIR | {"tools": [{"name": "add"}]}, "tools", "key `tools`", "remove these rows"),
    "tools text": (LIST_PAIR | {"tools": '[{"name": "add"}]'}, "tools", "key `tools`", "remove these rows"),
    "openai tools": (
        {**ROWS["openai"][0], "input": {"messages": TURNS, "tools": [{"type": "function"}]}},
        "tools",
        "key `input.tools`",
        "remove these rows",
    ),
    "tool call": (
        {"prompt": TURNS, "chosen": [CALL], "rejected": [BAD]},
        "tools",
        "key `chosen[0].tool_calls`",
        "remove these rows",
    ),
    "tool role": (
        {"prompt": [*TURNS, {"role": "tool", "content": "4"}], "chosen": [GOOD], "rejected": [BAD]},
        "tools",
        "key `prompt[3].role`",
        "remove these rows",
    ),
    "options of one row": (
        LIST_PAIR | {"chat_template_kwargs": {"enable_thinking": False}},
        "chat_template_kwargs",
        "key `chat_template_kwargs`",
        "set chat_template_kwargs to that in the config",
    ),
    "media": (LIST_PAIR | {"images": [b"png"]}, "media", "key `images`", "remove these rows"),
    "openai text": (ROWS["openai"][0] | {"input": "Hi!"}, "wrong_type", "key `input`", "expected an object"),
    "openai part": (
        {**ROWS["openai"][0], "input": {"messages": TURNS[:2]}},
        "answered_prompt",
        "key `input.messages`",
        "ends before the answer",
    ),
    "system beside text": (PAIR | {"prompt": "Pet?", "system": "x"}, "system_column", "key `system`", "as messages"),
    "two systems": (
        {"prompt": [SYSTEM, *TURNS], "chosen": [GOOD], "rejected": [BAD], "system": "Be long."},
        "system_column",
        "key `system`",
        "keep one of the two",
    ),
    "silent transcript": (
        {"chosen": f"{TEXT} 4", "rejected": f"{TEXT} "},
        "empty_completion",
        "key `rejected`",
        "remove the row",
    ),
    "half a row": (
        {"conversations": TURNS, "chosen": GOOD},
        "missing_key",
        "key `rejected`",
        "a row needs conversations",
    ),
}


@pytest.mark.row("29")
@pytest.mark.parametrize("what", REFUSED)
def test_what_a_form_cannot_say_is_refused_by_name(what: str) -> None:
    row, reason, where, says = REFUSED[what]
    good = ROWS["hh"][0]
    read = preferences_from_rows([row, good], "rows", on_bad_row="drop")
    [bad_row] = read.bad_rows
    assert bad_row.reason == reason
    assert where in str(bad_row)
    assert says in str(bad_row)
    assert str(bad_row).startswith("rows, row 1")
    assert len(read.pairs) == 1


def test_a_stated_form_that_does_not_fit_names_the_key() -> None:
    with pytest.raises(
        InputError, match=r"rows, row 1, key `conversations`: missing .*needs conversations, chosen and"
    ):
        read_one(ROWS["explicit"][0], form="sharegpt")
    with pytest.raises(InputError, match=r"rows, row 1, key `chosen`: no transcript"):
        read_one({"chosen": "Yes", "rejected": "No"}, form="hh")


def test_an_unknown_form_or_column_is_named_with_the_nearest() -> None:
    row = ROWS["explicit"][0]
    with pytest.raises(InputError, match=r"'sharegtp' is no form of rows; did you mean sharegpt\?"):
        read_one(row, form="sharegtp")
    with pytest.raises(InputError, match=r"columns: 'promt' is no key of ours; did you mean prompt"):
        read_one(row, columns={"promt": "question"})
    with pytest.raises(InputError, match=r"rows: columns: \{prompt: qestion\} names a column.*did you mean question\?"):
        read_one({"question": "Pet?", **PAIR}, columns={"prompt": "qestion"})


@pytest.fixture
def alpaca() -> Iterator[None]:
    @form("alpaca", "instruction", "chosen", "rejected")
    def alpaca(row: Row) -> Sides:
        return row.text("instruction"), row.text("chosen"), row.text("rejected")

    yield
    del FORMS["alpaca"]


@pytest.mark.usefixtures("alpaca")
def test_a_form_is_added_in_three_lines() -> None:
    pair, found = read_one({"instruction": "Add 2 and 2.", "chosen": "4", "rejected": "5"})
    assert found == "alpaca"
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Add 2 and 2.", "4", "5")
    with pytest.raises(InputError, match=r"rows, row 1, key `instruction`: an empty string"):
        read_one({"instruction": "", "chosen": "4", "rejected": "5"})
