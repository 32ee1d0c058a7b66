"""Every form is read alike from every file kind; every mistake is named with its place and remedy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from lorafocal.data.sources import BadRow, Preference, preferences_from_rows, read_preferences
from lorafocal.errors import InputError

USER = {"role": "user", "content": "Add 2 and 2."}
GOOD = {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "5"}
PLAIN = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}


def write(rows: list[dict[str, Any]], path: Path) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("form", [PLAIN, CHAT], ids=["plain", "conversational"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_every_file_kind_gives_the_same_preferences(tmp_path: Path, suffix: str, form: dict[str, Any]) -> None:
    rows = [form | {"id": "a", "score_chosen": 2, "score_rejected": 0.5, "source": "unused"}, form]
    path = write(rows, tmp_path / f"pairs{suffix}")
    first, second = read_preferences(path).pairs
    assert first == Preference(**form, id="a", score_chosen=2.0, score_rejected=0.5, place=f"pairs{suffix}, row 1")
    assert second == Preference(**form, id=f"pairs{suffix}:2", place=f"pairs{suffix}, row 2")
    assert preferences_from_rows(rows, path.name).pairs == [first, second]


def test_a_datasets_table_is_read_like_a_list() -> None:
    rows = [CHAT | {"id": None}, CHAT | {"id": 7}]
    table = datasets.Dataset.from_list(rows)
    assert preferences_from_rows(table, "hub") == preferences_from_rows(rows, "hub")
    assert [preference.id for preference in preferences_from_rows(table, "hub").pairs] == ["hub:1", "7"]


def test_what_datasets_saves_is_read_file_by_file(tmp_path: Path) -> None:
    """Also a choice of rows; the folder's other files are none."""
    first, second, third = (CHAT | {"id": number} for number in (1, 2, 3))
    datasets.Dataset.from_list([first, second, third]).select([2, 0]).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"saved is a folder; name its files one by one: data-00000-of-00001\.arrow$"):
        read_preferences(tmp_path / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list([first])}).save_to_disk(tmp_path / "splits")
    with pytest.raises(InputError, match=r"splits is a folder.*: train/data-00000-of-00001\.arrow$"):
        read_preferences(tmp_path / "splits")
    file = tmp_path / "saved" / "data-00000-of-00001.arrow"
    assert read_preferences(file).pairs == preferences_from_rows([third, first], file.name).pairs
    table = pyarrow.Table.from_pylist([CHAT] * 2500)
    with pyarrow.ipc.new_file(tmp_path / "pairs.arrow", table.schema) as whole:
        whole.write_table(table)
    assert [pair.chosen for pair in read_preferences(tmp_path / "pairs.arrow").pairs] == [CHAT["chosen"]] * 2500


@pytest.mark.parametrize("file", ["pairs.parquet", "saved/data-00000-of-00001.arrow"])
def test_values_that_datasets_keeps_as_json_are_values(tmp_path: Path, file: str) -> None:
    """It does so where rows differ in kind; their text would be trained as if somebody had said it."""
    rows = [CHAT, PLAIN | {"chosen": "four", "rejected": "five"}]
    table = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    assert "Json" in repr(table.features["prompt"])
    table.to_parquet(tmp_path / "pairs.parquet")
    table.save_to_disk(tmp_path / "saved")
    read = read_preferences(tmp_path / file).pairs
    assert read == preferences_from_rows(rows, Path(file).name).pairs


@pytest.mark.row("29")
def test_json_of_datasets_that_is_none_costs_its_row(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([CHAT, PLAIN], on_mixed_types="use_json").data.table
    broken = pyarrow.array(['"p', '"q"', "[" * 100_000, '"r"'], table.schema.field("prompt").type)
    answers = {key: pyarrow.array(['"a"', '"b"'] * 2, broken.type) for key in ("chosen", "rejected")}
    columns = {key: answers.get(key, broken) for key in table.schema.names}
    parquet.write_table(pyarrow.table(columns, schema=table.schema), tmp_path / "pairs.parquet")
    read = read_preferences(tmp_path / "pairs.parquet", on_bad_row="drop")
    assert read.bad_rows[0].reason == "not_json"
    assert "pairs.parquet, row 1: a value that datasets keeps as JSON is none" in str(read.bad_rows[0])
    known = pyarrow.schema(
        table.schema, metadata={"huggingface": '{"info": {"features": {"prompt": {"_type": "Json"}}, "x": 1}'}
    )
    parquet.write_table(pyarrow.table(columns, schema=known), tmp_path / "pairs.parquet")
    with pytest.raises(InputError, match=r"pairs\.parquet: the installed datasets does not know its columns"):
        read_preferences(tmp_path / "pairs.parquet")


@pytest.mark.row("29")
def test_an_arrow_file_that_is_damaged_ends_no_process(tmp_path: Path) -> None:
    """Arrow believes the lengths that it finds, and would read wherever they point to."""
    table = pyarrow.table({"prompt": ["p" * 40] * 9, "chosen": ["c"] * 9, "rejected": ["r"] * 9})
    with pyarrow.ipc.new_stream(tmp_path / "pairs.arrow", table.schema) as file:
        file.write_table(table)
    content = (tmp_path / "pairs.arrow").read_bytes()
    place = content.index(b"p" * 40) - 40  # the offsets, nine of which end at most 360 bytes on
    (tmp_path / "pairs.arrow").write_bytes(content[:place] + b"\x7f" * 16 + content[place + 16 :])
    with pytest.raises(InputError, match=r"pairs\.arrow: not a readable Arrow file after row 0"):
        read_preferences(tmp_path / "pairs.arrow")


def test_pandas_records_are_read_like_a_list() -> None:
    rows = [CHAT | {"id": 7, "score_chosen": 0.5, "score_rejected": None, "images": []}]
    arrays = {key: np.array(value, object) for key, value in rows[0].items() if isinstance(value, list)}
    record = arrays | {"id": np.int64(7), "score_chosen": np.float32(0.5), "score_rejected": np.nan}
    assert preferences_from_rows([record], "frame") == preferences_from_rows(rows, "frame")


def test_jsonl_rows_are_lines(tmp_path: Path) -> None:
    """Blank lines count but are no rows; a line separator inside a string splits nothing; a BOM is skipped."""
    odd = PLAIN | {"chosen": " 4\u2028\x85 four"}
    path = tmp_path / "pairs.jsonl"
    text = json.dumps(PLAIN) + "\n\n" + json.dumps(odd, ensure_ascii=False)
    path.write_text(text, encoding="utf-8-sig")
    assert [preference.id for preference in read_preferences(path).pairs] == ["pairs.jsonl:1", "pairs.jsonl:3"]
    assert read_preferences(path).pairs[1].chosen == odd["chosen"]


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in PLAIN.items() if name != key}


def message(**changes: Any) -> dict[str, Any]:
    return CHAT | {"chosen": [GOOD | changes]}


WRONG_ROWS: dict[str, tuple[Any, str, str]] = {
    # what: (row, where, what the message says)
    "no prompt": (without("prompt"), "key `prompt`", "give it a text"),
    "null prompt": (PLAIN | {"prompt": None}, "key `prompt`", "give it a text"),
    "no chosen": (without("chosen"), "key `chosen`", "missing (the row has prompt, rejected)"),
    "no rejected": (without("rejected"), "key `rejected`", "a row needs prompt, chosen and rejected"),
    "empty row": ({}, "key `chosen`", "the row has nothing"),
    "a number": (PLAIN | {"chosen": 4}, "key `chosen`", "found a number"),
    "an object": (PLAIN | {"prompt": USER}, "key `prompt`", "list of messages, found an object"),
    "mixed": (CHAT | {"prompt": "Add."}, "row 2: ", "prompt is a string, chosen is a list"),
    "empty prompt": (PLAIN | {"prompt": ""}, "key `prompt`", "empty string"),
    "empty answer": (PLAIN | {"rejected": ""}, "key `rejected`", "remove the row"),
    "no messages": (CHAT | {"prompt": []}, "key `prompt`", "at least one message"),
    "empty message": (message(content=""), "key `chosen`", "empty"),
    "empty question": (CHAT | {"prompt": [USER | {"content": ""}]}, "key `prompt[0].content`", "empty"),
    "bare string": (CHAT | {"prompt": ["Add."]}, "key `prompt[0]`", "found a string"),
    "other spelling": (
        CHAT | {"prompt": [{"speaker": "human", "text": "x"}]},
        "key `prompt[0]`",
        "the keys speaker, text",
    ),
    "role": (CHAT | {"prompt": [{"role": "human", "content": "x"}]}, "key `prompt[0].role`", "use one of system,"),
    "numbered role": (CHAT | {"prompt": [{"role": 1, "content": "x"}]}, "key `prompt[0].role`", "'1' is no known role"),
    "content parts": (message(content=[{"type": "text"}]), "key `chosen[0].content`", "found a list"),
    "null content": (message(content=None), "key `chosen[0].content`", "found null"),
    "tool calls": (message(tool_calls=[1]), "key `chosen[0].tool_calls`", "remove these rows"),
    "reasoning": (message(thinking="Hm."), "key `chosen[0]`", "keep only role and content"),
    "user answers": (message(role="user"), "key `chosen`", "the assistant's"),
    "an answer after a question": (CHAT | {"rejected": [USER, BAD]}, "key `rejected[0]`", "move what comes before"),
    "answered prompt": (CHAT | {"prompt": [USER, GOOD]}, "key `prompt`", "a prompt ends before"),
    "surrogate": (PLAIN | {"prompt": "ab\ud83d"}, "key `prompt`", "character 3 is half of a surrogate pair"),
    "infinite score": (PLAIN | {"score_chosen": float("inf")}, "key `score_chosen`", "finite number, found inf"),
    "huge score": (PLAIN | {"score_chosen": 10**400}, "key `score_chosen`", "finite number, found a number"),
    "text score": (PLAIN | {"score_rejected": "high"}, "key `score_rejected`", "found 'high'"),
    "boolean score": (PLAIN | {"score_rejected": True}, "key `score_rejected`", "found True"),
    "id": (PLAIN | {"id": 1.5}, "key `id`", "whole number, found 1.5"),
    "half an id": (PLAIN | {"id": "\ud83d"}, "key `id`", "character 1 is half of a surrogate pair"),
    "messages as JSON": (
        {key: json.dumps(value, indent=1) for key, value in CHAT.items()},
        "key `prompt`",
        "as text, as CSV files do",
    ),
    "answers as Python": (
        PLAIN | {"chosen": f"[{GOOD}]", "rejected": f"[{BAD}\n {USER}]"},
        "key `chosen`",
        "Dataset.to_json",  # numpy writes no commas between messages, so nothing reads them back
    ),
    "a prompt as turns": (PLAIN | {"prompt": '[{"from": "human", "value": "x"}]'}, "key `prompt`", "its brackets"),
    "image": (CHAT | {"images": ["a.png"]}, "key `images`", "remove these rows"),
    "list row": ([1], "row 2: ", "not a list"),
}


WAYS_OUT = re.compile(
    r"; .*(add|correct|give|keep|leave|move|needs|remove|repair|say|use|write) |prompt needs|ends before"
)


@pytest.mark.parametrize(
    "changes",
    [
        {"chosen": f"[{GOOD}]"},  # an answer may be JSON of messages where the other is none
        {"prompt": f"Who speaks in [{USER}]"},
        {"chosen": '[{"role": "a"}]', "rejected": '[{"content": "a"}]'},
        {"chosen": "[{a}]", "rejected": "[]"},
    ],
)
def test_texts_that_hold_brackets_are_texts(changes: dict[str, str]) -> None:
    (read,) = preferences_from_rows([PLAIN | changes], "made").pairs
    assert {key: getattr(read, key) for key in PLAIN} == PLAIN | changes


@pytest.mark.parametrize("form", ["explicit", "single_turn", "implicit"])
def test_no_form_of_texts_takes_messages_that_were_written_as_text(form: str) -> None:
    row = {"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD])}
    with pytest.raises(InputError, match="was written as text"):
        preferences_from_rows([row | ({} if form == "implicit" else {"prompt": "p"})], "made", form=form)


@pytest.mark.row("29")
@pytest.mark.parametrize("what", WRONG_ROWS)
def test_a_wrong_row_is_named_with_its_place_and_the_way_out(tmp_path: Path, what: str) -> None:
    row, where, says = WRONG_ROWS[what]
    path = write([PLAIN, row], tmp_path / "pairs.jsonl")
    with pytest.raises(InputError) as error:
        read_preferences(path)
    text = str(error.value)
    assert text.startswith("pairs.jsonl, row 2")
    assert where in text
    assert says in text
    assert WAYS_OUT.search(text)

    dropped = read_preferences(path, on_bad_row="drop")
    assert [pair.place for pair in dropped.pairs] == ["pairs.jsonl, row 1"]
    [bad_row] = dropped.bad_rows
    assert str(bad_row) == text
    assert bad_row.reason.isidentifier()


def test_rows_left_out_are_kept_with_place_reason_and_message(tmp_path: Path) -> None:
    path = write([without("chosen"), PLAIN, CHAT, PLAIN | {"rejected": ""}], tmp_path / "pairs.jsonl")
    read = read_preferences(path, on_bad_row="drop")
    assert [pair.place for pair in read.pairs] == ["pairs.jsonl, row 2", "pairs.jsonl, row 3"]
    missing, empty = read.bad_rows
    assert missing == BadRow(
        "pairs.jsonl, row 1, key `chosen`",
        "missing_key",
        "missing (the row has prompt, rejected); a row needs prompt, chosen and rejected",
    )
    assert (empty.place, empty.reason) == ("pairs.jsonl, row 4, key `rejected`", "empty_completion")


def test_where_every_row_is_bad_the_reasons_are_given() -> None:
    rows = [without("chosen"), without("rejected"), PLAIN | {"prompt": ""}]
    with pytest.raises(InputError) as error:
        preferences_from_rows(rows, "rows", on_bad_row="drop")
    assert "none of its 3 rows can be used: 2 missing_key, such as rows, row 1, key `chosen`" in str(error.value)
    assert "1 empty_prompt, such as rows, row 3" in str(error.value)


def test_pairs_under_the_id_of_their_prompt_are_all_kept() -> None:
    rows = [PLAIN | {"id": 7, "rejected": answer} for answer in ("5", "6", "7")]
    assert [pair.id for pair in preferences_from_rows(rows, "rows").pairs] == ["7", "7~2", "7~3"]


def test_a_way_with_bad_rows_that_is_not_known_is_refused() -> None:
    with pytest.raises(InputError, match="use error or drop"):
        preferences_from_rows([PLAIN], "rows", on_bad_row="ignore")  # type: ignore[arg-type]
