"""Pairs that a list names: exactly those go, nothing else moves, and a list that no longer fits is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafocal.data.leave_out import Named, digest, line_of, read_list
from lorafocal.data.prepare import Part, check_sources
from lorafocal.data.sources import Preference
from lorafocal.data.toy import toy_preferences
from lorafocal.errors import InputError
from lorafocal.schema import Data
from tests.data.test_prepare import prepared, write

ROWS = toy_preferences(60, seed=1)


def ids(part: Part) -> list[str]:
    return [pair.id for pair in part.tokens.pairs]


def listed(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def test_exactly_the_named_pairs_go_and_nothing_else_moves(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", ROWS)
    section: dict[str, Any] = {"train": train, "held_out": 0.2, "on_bad_row": "error"}
    before = prepared(**section)
    out = [before["train"].preferences[n] for n in (3, 17)]
    names = listed(tmp_path / "out.txt", out[1].id, "", line_of(out[0]), out[1].id)
    after = prepared(**section, leave_out=names)
    gone = {pair.id for pair in out}
    assert ids(after["train"]) == [name for name in ids(before["train"]) if name not in gone]
    assert after["eval"].tokens == before["eval"].tokens
    assert [(drop.reason, drop.count) for drop in after["train"].drops] == [("in_leave_out", 2)]
    assert "out.txt names them (data.leave_out)" in str(after["train"])
    assert after["eval"].drops == ()


def test_of_weighted_sources_all_copies_go_and_the_drawn_ones_stay_the_same(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", ROWS[:20]), write(tmp_path / "b.jsonl", ROWS[20:])
    section: dict[str, Any] = {"train": [{"path": first, "weight": 2.5}, {"path": second, "weight": 0.5}]}
    before = ids(prepared(**section)["train"])
    drawn = [name for name in before if name.startswith("b.jsonl")]
    out = ["a.jsonl:4", drawn[0], "a.jsonl:9"]
    after = ids(prepared(**section, leave_out=listed(tmp_path / "out.txt", *out))["train"])
    assert after == [name for name in before if name.partition("#")[0] not in out]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.jsonl:99", r"out\.txt, line 2: 'a\.jsonl:99' names no training pair.*did you mean a\.jsonl:9"),
        ("a.jsonl:1 ", r"line 2: 'a\.jsonl:1 ' names no training pair"),
        ("a.jsonl:2#2", r"line 2: .* names no training pair"),
        ("a.jsonl:2\t0123456789abcdef", r"line 2: 'a\.jsonl:2' is another pair now .*a\.jsonl, row 2"),
        ("\x1b[31m", r"line 2: '\\\\x1b\[31m' names no"),
        pytest.param("a" * 100_000, r"line 2: 'a{120}\.\.\.' names no", id="a long line"),
        ("b", r"known: a\.jsonl:1, .*, a\.jsonl:20 and 40 more$"),
    ],
)
def test_an_id_that_names_no_training_pair_is_refused_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    train = [{"path": write(tmp_path / "a.jsonl", ROWS), "weight": 2.0}]
    with pytest.raises(InputError, match=message):
        prepared(train=train, leave_out=listed(tmp_path / "out.txt", "a.jsonl:1", line))


def test_a_held_out_pair_and_a_list_of_all_are_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", ROWS)
    kept_back = ids(prepared(train=train, held_out=5)["eval"])[0]
    with pytest.raises(InputError, match=r"line 1: .* is a held-out pair, which nothing is trained on"):
        prepared(train=train, held_out=5, leave_out=listed(tmp_path / "out.txt", kept_back))
    everything = listed(tmp_path / "all.txt", *(f"a.jsonl:{n}" for n in range(1, 61)))
    with pytest.raises(InputError, match=r"names all 60 training pairs"):
        prepared(train=train, leave_out=everything)


@pytest.mark.row("31")
def test_a_list_by_rows_is_refused_once_a_row_above_has_gone(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", ROWS)
    lines = [line_of(pair) for pair in prepared(train=train)["train"].preferences[10:12]]
    names = listed(tmp_path / "out.txt", *lines)
    assert len(ids(prepared(train=train, leave_out=names)["train"])) == 58
    write(tmp_path / "a.jsonl", ROWS[1:])
    with pytest.raises(InputError, match=r"line 1: 'a\.jsonl:11' is another pair now than when the list was written"):
        prepared(train=train, leave_out=names)


def test_what_is_no_list_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for content, message in ((None, "cannot be read"), (b"\n \n", "names no pair"), (b"\xff\xfe", "cannot be read")):
        path = tmp_path / "out.txt"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=f"data.leave_out: .*{message}"):
            check_sources(Data.model_validate({"train": "nowhere.jsonl", "leave_out": str(path)}))


def test_lists_of_other_systems_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_bytes("\ufeffone\r\n\r\ntwo 2\tabc\r\n\u2028three".encode())
    assert read_list(path) == [Named(1, "one", None), Named(3, "two 2", "abc"), Named(4, "\u2028three", None)]


def test_the_digest_is_of_the_texts_and_of_who_was_chosen() -> None:
    pair = Preference("q", "a", "b", "1", place="x, row 1")
    same = Preference([{"role": "user", "content": " q"}], "a ", [{"role": "assistant", "content": "b"}], "2")
    assert digest(pair) == digest(same)
    assert digest(pair) != digest(Preference("q", "b", "a", "1"))
    for name in ("a\tb", "a\nb", " "):
        with pytest.raises(InputError, match="cannot stand in a line"):
            line_of(Preference("q", "a", "b", name))
