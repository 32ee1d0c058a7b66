"""Files to rows: every kind of file is read, packed or not, and damage is named and costs as few rows as it can."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lorafocal.data import readers
from lorafocal.data.places import RowFault
from lorafocal.data.readers import EXTENSIONS, read_rows
from lorafocal.data.sources import read_preferences
from lorafocal.errors import InputError

PLAIN = {"prompt": "2 + 2 =", "chosen": ' 4, "four"', "rejected": " 5,\nfive\u2028"}
LINE = json.dumps(PLAIN).encode()


def write(rows: list[dict[str, Any]], path: Path) -> Path:
    """Rows as a file of the kind that its name says."""
    kind = path.name.partition(".")[2]
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if kind == "arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(path, table.schema) as file:
            file.write_table(table)
        return path
    if kind.startswith("jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
    elif kind.startswith("json"):
        text = json.dumps(rows)
    else:
        quoted = [[str(value).replace('"', '""') for value in row.values()] for row in rows]
        text = ",".join(rows[0]) + "\n" + "".join('"' + '","'.join(row) + '"\n' for row in quoted)
    path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    return path


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, extension: str) -> None:
    rows = [PLAIN, PLAIN | {"prompt": "Größe"}]
    path = write(rows, tmp_path / f"pairs{extension}")
    assert [*read_rows(path)] == [(1, rows[0]), (2, rows[1])]
    shouted = path.rename(tmp_path / f"PAIRS{extension.upper()}")
    assert [*read_rows(shouted)] == [(1, rows[0]), (2, rows[1])]


def faults(path: Path) -> dict[int, str]:
    """Row number -> reason, of the rows that could not be read."""
    return {number: row.bad_row.reason for number, row in read_rows(path) if isinstance(row, RowFault)}


@pytest.mark.row("29")
def test_a_broken_line_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    lines = [LINE, b'{"prompt": "x', b'{"prompt": "\xff"}', b"", b"[" * 100_000, b"1" * 5000, b"{}", LINE]
    path.write_bytes(b"\n".join(lines))
    assert faults(path) == {2: "not_json", 3: "not_utf8", 5: "not_json", 6: "not_json"}
    assert [number for number, row in read_rows(path) if row == PLAIN] == [1, 8]
    read = read_preferences(path, on_bad_row="drop")
    assert [bad_row.place for bad_row in read.bad_rows] == [
        "pairs.jsonl, row 2",
        "pairs.jsonl, row 3",
        "pairs.jsonl, row 5",
        "pairs.jsonl, row 6",
        "pairs.jsonl, row 7, key `chosen`",
    ]


@pytest.mark.row("S17")
@pytest.mark.parametrize("extension", [".jsonl", ".jsonl.gz"])
def test_a_line_over_the_limit_is_skipped_without_being_held(tmp_path: Path, extension: str) -> None:
    """The long line is 48 MiB; the reader may hold a limit or two of it, and goes on with the line that follows."""
    path = tmp_path / f"pairs{extension}"
    with gzip.open(path, "wb", compresslevel=1) if extension.endswith("gz") else path.open("wb") as file:
        file.write(LINE + b'\n{"prompt": "')
        for _ in range(48):
            file.write(b"x" * readers.MIB)
        file.write(b'"}\n' + LINE)
    tracemalloc.start()
    [(_, first), (number, fault), (_, last)] = read_rows(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first == last == PLAIN
    assert number == 2
    assert fault.bad_row.reason == "too_long"
    assert "16,777,216 bytes; remove or shorten it" in str(fault)
    assert peak < 36 * readers.MIB


@pytest.mark.row("S17")
def test_a_line_of_just_the_limit_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", len(LINE))
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(LINE + b"\n" + LINE + b" \n" + LINE)
    assert faults(path) == {2: "too_long"}


@pytest.mark.row("S17")
@pytest.mark.parametrize("extension", [".json", ".json.gz", ".csv"])
def test_a_file_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: str) -> None:
    monkeypatch.setattr(readers, "MAX_JSON_BYTES", 1000)
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    path = write([PLAIN, PLAIN | {"chosen": "x" * 2000}], tmp_path / f"pairs{extension}")
    with pytest.raises(InputError, match=r"more than 1,000 bytes"):
        list(read_rows(path))


def test_jsonl_rows_are_lines(tmp_path: Path) -> None:
    """Blank lines count but are no rows; a line separator inside a string splits nothing; a BOM is skipped."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PLAIN) + "\n\n" + json.dumps(PLAIN, ensure_ascii=False), encoding="utf-8-sig")
    assert [*read_rows(path)] == [(1, PLAIN), (3, PLAIN)]


def test_csv_is_text_below_a_header(tmp_path: Path) -> None:
    """A BOM and blanks around names are skipped, an empty cell is no value, long cells are read, numbers are scores."""
    path = tmp_path / "pairs.csv"
    long = "x" * 200_000
    path.write_text(
        f'prompt, chosen,rejected,id,score_chosen\na,b,{long},,\n\na,"b\nc",d,7,0.5\n', encoding="utf-8-sig"
    )
    first, second = read_preferences(path).pairs
    assert (first.id, first.rejected, first.score_chosen) == ("pairs.csv:1", long, None)
    assert (second.id, second.chosen, second.score_chosen) == ("7", "b\nc", 0.5)


@pytest.mark.row("29")
def test_a_broken_csv_row_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_bytes(b"prompt,chosen,rejected\na,b,c\na,b\na,b,c,d\na,\xe9,c\na,b,d\n")
    assert faults(path) == {2: "wrong_width", 3: "wrong_width", 4: "not_utf8"}
    read = read_preferences(path, on_bad_row="drop")
    assert [pair.id for pair in read.pairs] == ["pairs.csv:1", "pairs.csv:5"]
    assert "2 cells where the header names 3; quote its commas" in str(read.bad_rows[0])
    assert str(read.bad_rows[2]).startswith("pairs.csv, row 4, key `chosen`: bytes that are not UTF-8")


@pytest.mark.row("29")
def test_a_parquet_row_that_is_not_utf8_costs_itself_only(tmp_path: Path) -> None:
    """Arrow does not look into strings when it writes or reads them."""
    texts = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary()).buffers()
    )
    parquet.write_table(pyarrow.table({"prompt": texts, "chosen": ["b"] * 3}), tmp_path / "pairs.parquet")
    assert faults(tmp_path / "pairs.parquet") == {2: "not_utf8"}
    assert [number for number, _ in read_rows(tmp_path / "pairs.parquet")] == [1, 2, 3]


HEADER = b"prompt,chosen,rejected\n"
WRONG_FILES: dict[str, tuple[str, bytes, str]] = {
    # what: (file name, content, what the message says)
    "extension": ("pairs.tsv", b"prompt\tchosen", "end in .jsonl, .json, .csv, .parquet, .arrow, .jsonl.gz"),
    "script": ("pairs.py", b"print(1)", "convert the file or rename it"),
    "packed parquet": ("pairs.parquet.gz", b"", "convert the file or rename it"),
    "empty lines": ("pairs.jsonl", b"\n\n", "holds no rows"),
    "empty": ("pairs.json", b"", "holds no rows"),
    "empty list": ("pairs.json", b"[]", "holds no rows"),
    "empty csv": ("pairs.csv", b"", "holds no rows"),
    "header only": ("pairs.csv", HEADER, "holds no rows"),
    "no header": ("pairs.csv", b"2 + 2 =,4,5\n1 + 1 =,2,3\n", "a CSV needs a header"),
    "semicolons": ("pairs.csv", b"prompt;chosen;rejected\na;b;c\n", "a CSV needs a header, with commas"),
    "two columns alike": ("pairs.csv", b"prompt,chosen,chosen\na,b,c\n", "names 'chosen' twice"),
    "open quote": ("pairs.csv", HEADER + b'a,b,c\n"a,b,c\n', "line 3, after row 1: not valid CSV"),
    "text after quote": ("pairs.csv", HEADER + b'a,"b" b,c\n', "repair the quotes there"),
    "empty parquet": ("pairs.parquet", b"", "not a readable Parquet file"),
    "empty arrow": ("pairs.arrow", b"", "not a readable Arrow file after row 0"),
    "not arrow": ("pairs.arrow", b"ARROW1 but no more", "not a readable Arrow file"),
    "cut arrow": ("pairs.arrow", b"\xff\xff\xff\xff\x10", "not a readable Arrow file"),
    "not parquet": ("pairs.parquet", b"PAR1 but no more", "not a readable Parquet file"),
    "cut line": ("pairs.jsonl", LINE + b'\n{"prompt": "x', "row 2: not valid JSON"),
    "cut list": ("pairs.json", b'[{"prompt": 1}', "not valid JSON"),
    "latin-1 list": ("pairs.json", '[{"prompt": "é"}]'.encode("latin-1"), "not UTF-8; save the file"),
    "latin-1": ("pairs.jsonl", '{"prompt": "é"}'.encode("latin-1"), "row 1: byte 13 is not UTF-8"),
    "lines": (
        "pairs.json",
        LINE + b"\n\n" + LINE + b'\n{"cut',
        "one row a line, and a .json file one list of rows; name",
    ),
    "broken lines": ("pairs.json", LINE + b'\n{"cut', "not valid JSON (Extra data at line 2, column 1)"),
    "object": ("pairs.json", b'{"data": []}', "one list of rows, not an object"),
    "deep": ("pairs.jsonl", b"[" * 100_000, "row 1: not valid JSON (nested too deeply"),
    "long number": ("pairs.json", b"[" + b"1" * 5000 + b"]", "not valid JSON"),
    "no gzip": ("pairs.jsonl.gz", LINE, "cannot be read after row 0"),
    "cut gzip": ("pairs.jsonl.gz", gzip.compress((LINE + b"\n") * 9000)[:-20], "write or copy it again"),
    "damaged gzip": ("pairs.csv.gz", gzip.compress(HEADER)[:-8] + b"01234567", "cannot be read after row 0"),
}


@pytest.mark.row("29")
@pytest.mark.parametrize("on_bad_row", ["error", "drop"])
@pytest.mark.parametrize("what", WRONG_FILES)
def test_a_wrong_file_is_named(tmp_path: Path, what: str, on_bad_row: Any) -> None:
    name, content, says = WRONG_FILES[what]
    (tmp_path / name).write_bytes(content)
    if what == "cut line" and on_bad_row == "drop":
        assert len(read_preferences(tmp_path / name, on_bad_row="drop").bad_rows) == 1
        return
    with pytest.raises(InputError) as error:
        read_preferences(tmp_path / name, on_bad_row=on_bad_row)
    assert str(error.value).startswith(name)
    assert says in str(error.value)
    assert str(tmp_path) not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        read_preferences(tmp_path / "pairs.jsonl")
    with pytest.raises(InputError, match="cannot be read after row 0"):
        read_preferences(tmp_path / ("x" * 300 + ".jsonl"))


@pytest.mark.row("S5")
def test_a_folder_with_a_loading_script_is_refused_and_none_is_run(tmp_path: Path) -> None:
    folder = tmp_path / "data_set"
    folder.mkdir()
    write([PLAIN], folder / "pairs.jsonl")
    with pytest.raises(InputError, match=r"data_set is a folder; name its files one by one: pairs.jsonl"):
        read_preferences(folder)
    (folder / "data_set.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    with pytest.raises(InputError, match=r"data_set holds data_set.py: loading scripts are never run"):
        read_preferences(folder)
    assert not Path("ran").exists()
