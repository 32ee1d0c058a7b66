"""Files to numbered rows, one function a kind of file; what stands in a row is not looked at here.

A row that cannot be read (too long, not UTF-8, not JSON) is yielded as its `RowFault`, so that the rest of the file is
still read. A file that cannot be read is an InputError.
"""

from __future__ import annotations

import csv
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from gzip import GzipFile
from io import BufferedReader, BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.ipc
from pyarrow import parquet

from lorafocal.data.messages import kind
from lorafocal.data.places import Place, RowFault
from lorafocal.errors import InputError

NumberedRow = tuple[int, Any]  # rows count from 1; instead of a row there may be its RowFault
Reader = Callable[[IO[bytes], str], Iterator[NumberedRow]]

MIB = 2**20
MAX_LINE_BYTES = 16 * MIB  # a longer line is skipped piece by piece, never held as a whole
MAX_JSON_BYTES = 1024 * MIB  # a .json file is one value, which has to be held as a whole
BATCH_ROWS = 1000  # of a table, made into objects at a time
ARROW_FILE = b"ARROW1"
DESCRIBING = {"dataset_dict.json", "dataset_info.json", "state.json"}  # beside the rows that `save_to_disk` writes


def read_rows(path: Path) -> Iterator[NumberedRow]:
    """Rows of a file of one of the `EXTENSIONS`. Raises InputError for a file that is missing or damaged."""
    number = 0
    try:
        reader, packed = reader_of(path)
        with path.open("rb") as raw, BufferedReader(GzipFile(fileobj=raw)) if packed else raw as file:
            for number, row in reader(file, path.name):
                yield number, row
    except (OSError, EOFError, zlib.error) as error:  # of the disk, or of a damaged gzip
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path.name}: it cannot be read after row {number} ({why}); write or copy it again"
        ) from error


def objects(rows: Iterable[NumberedRow], source: str, what: str) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """Rows with their places, each of which has to be an object: `what` says of what. Raises the first RowFault."""
    for number, values in rows:
        if isinstance(values, RowFault):
            raise values
        place = Place(source, number)
        if not isinstance(values, Mapping):
            raise place.fault("no_object", f"{what} is an object, not {kind(values)}; write it as one")
        yield place, values


def reader_of(path: Path) -> tuple[Reader, bool]:
    """How a file is read, and whether it is packed. Raises InputError for what is no such file."""
    if path.is_dir():
        raise InputError(folder_problem(path))
    extension = extension_of(path)
    if extension is None:
        raise InputError(f"{path.name}: preference files end in {', '.join(EXTENSIONS)}; convert the file or rename it")
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; check the path")
    return READERS[extension.removesuffix(".gz")], extension.endswith(".gz")


def folder_problem(path: Path) -> str:
    """Why a folder is no source: code in it is never run."""
    scripts = sorted(file.name for file in path.glob("*.py"))
    if scripts:
        return (
            f"{path.name} holds {scripts[0]}: loading scripts are never run; export its rows to a file such as .jsonl"
        )
    inside = [*path.glob("*"), *path.glob("*/*")]  # `save_to_disk` gives each split a folder
    files = sorted(str(file.relative_to(path)) for file in inside if extension_of(file) and file.name not in DESCRIBING)
    return f"{path.name} is a folder; name its files one by one" + (f": {', '.join(files[:5])}" if files else "")


def extension_of(path: Path) -> str | None:
    """The known extension that a path ends in, whatever its case."""
    return next((extension for extension in EXTENSIONS if path.name.lower().endswith(extension)), None)


# ---- JSON


def read_jsonl(file: IO[bytes], name: str) -> Iterator[NumberedRow]:
    """One JSON value a line, split at line feeds only, as JSON strings may hold other separators; blank lines count."""
    for number, line in bounded_lines(file):
        place = Place(name, number)
        if line is None:
            yield number, place.fault("too_long", f"a line of more than {MAX_LINE_BYTES:,} bytes; remove or shorten it")
        elif line.strip():
            try:
                yield number, decode_json(line)
            except ValueError as error:
                reason = "not_utf8" if isinstance(error, UnicodeDecodeError) else "not_json"
                yield number, place.fault(reason, json_problem(error))


def bounded_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Lines with their numbers; None for one over the limit, of which one piece at a time was read."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n"):
            yield number, line
            continue
        del line
        while (piece := file.readline(MIB)) and not piece.endswith(b"\n"):
            pass
        yield number, None


def read_json(file: IO[bytes], name: str) -> Iterator[NumberedRow]:
    """One JSON list of rows."""
    pieces = iter(lambda: file.read(MIB), b"")  # in pieces: one large read would reserve all of the limit
    text = b"".join(islice(pieces, MAX_JSON_BYTES // MIB + 1))
    if len(text) > MAX_JSON_BYTES:
        raise InputError(
            f"{name}: more than {MAX_JSON_BYTES:,} bytes in one JSON value; write one row a line as .jsonl"
        )
    try:
        rows = decode_json(text) if text.strip() else []
    except ValueError as error:
        if _is_jsonl(text):
            right = ".jsonl.gz" if name.lower().endswith(".gz") else ".jsonl"
            raise InputError(
                f"{name}: it holds one row a line, and a .json file one list of rows; name it {right}"
            ) from error
        raise InputError(f"{name}: {json_problem(error)}") from error
    if not isinstance(rows, list):
        raise InputError(f"{name}: a .json file holds one list of rows, not {kind(rows)}; one row a line is .jsonl")
    yield from enumerate(rows, start=1)


def _is_jsonl(text: bytes) -> bool:
    """Whether the first two lines that are not blank are objects of their own."""
    lines = [*islice((line for line in BytesIO(text) if line.strip()), 2)]
    try:
        return len(lines) == 2 and all(isinstance(decode_json(line), dict) for line in lines)
    except ValueError:
        return False


def decode_json(text: bytes) -> Any:
    """The JSON value of UTF-8 bytes (a byte order mark is skipped). Raises ValueError."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("nested too deeply to be a row") from error


def json_problem(error: ValueError) -> str:
    """What is wrong with JSON text, with the way out."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is not UTF-8; save the file as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg} at line {error.lineno}, column {error.colno}); repair or remove it"
    return f"not valid JSON ({error}); repair or remove it"


# ---- CSV


def read_csv(file: IO[bytes], name: str) -> Iterator[NumberedRow]:
    """Records below a header line, of text alone; an empty cell is a missing value.

    After broken quotes nothing that follows can be trusted, so they are a fault of the file.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))  # of the process; else long answers are refused
    records = csv.reader(csv_lines(file, name), strict=True)
    header: list[str] = []
    number = -1
    try:
        for cells in records:
            if not cells:
                continue
            number += 1
            if number == 0:
                header = csv_header(cells, name)
            else:
                yield number, csv_row(header, cells, Place(name, number))
    except csv.Error as error:
        where = f"{name}: line {records.line_num}, after row {max(number, 0)}"
        raise InputError(f"{where}: not valid CSV ({error}); repair the quotes there") from error


def csv_lines(file: IO[bytes], name: str) -> Iterator[str]:
    """Decoded lines; bytes that are not UTF-8 stay visible as escapes, for `csv_row` to find."""
    for number, line in bounded_lines(file):
        if line is None:
            raise InputError(f"{name}: line {number} has more than {MAX_LINE_BYTES:,} bytes; remove or shorten it")
        yield line.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape")


def csv_header(cells: list[str], name: str) -> list[str]:
    """The names of the columns, each once."""
    header = [cell.strip() for cell in cells]
    twice = [column for column, count in Counter(header).items() if count > 1]
    if twice:
        raise InputError(
            f"{name}: the header names {twice[0][:40]!r} twice; the first line gives each column its own name"
        )
    return header


def csv_row(header: list[str], cells: list[str], place: Place) -> dict[str, str | None] | RowFault:
    """One record as an object."""
    if len(cells) != len(header):
        return place.fault("wrong_width", f"{len(cells)} cells where the header names {len(header)}; quote its commas")
    for column, cell in zip(header, cells, strict=True):
        if not cell.isascii() and any("\udc80" <= character <= "\udcff" for character in cell):
            return place.at(column).fault("not_utf8", "bytes that are not UTF-8; save the file as UTF-8")
    return {column: cell or None for column, cell in zip(header, cells, strict=True)}


# ---- Parquet and Arrow


def read_parquet(file: IO[bytes], name: str) -> Iterator[NumberedRow]:
    """Rows of a Parquet file, batch by batch."""
    return table_rows(_parquet_batches(file), name, "Parquet")


def read_arrow(file: IO[bytes], name: str) -> Iterator[NumberedRow]:
    """Rows of an Arrow file or stream, which is what `save_to_disk` of datasets writes, batch by batch."""
    return table_rows(_arrow_batches(file), name, "Arrow")


def _parquet_batches(file: IO[bytes]) -> Iterator[pyarrow.RecordBatch]:
    with parquet.ParquetFile(file) as table:
        yield from table.iter_batches(batch_size=BATCH_ROWS)


def _arrow_batches(file: IO[bytes]) -> Iterator[pyarrow.RecordBatch]:
    begins = file.read(len(ARROW_FILE))
    file.seek(0)
    if begins == ARROW_FILE:
        table = pyarrow.ipc.open_file(file)
        batches = map(table.get_batch, range(table.num_record_batches))
    else:
        batches = iter(pyarrow.ipc.open_stream(file))
    for batch in batches:
        batch.validate(full=True)  # Arrow trusts the lengths in such a file, and would read past its end
        yield from (batch.slice(start, BATCH_ROWS) for start in range(0, batch.num_rows, BATCH_ROWS))


def table_rows(batches: Iterator[pyarrow.RecordBatch], name: str, what: str) -> Iterator[NumberedRow]:
    """The rows of a table. Raises InputError where it cannot be read on."""
    number, as_json = 0, None
    try:
        for batch in batches:
            as_json = json_columns(batch.schema, name) if as_json is None else as_json  # of all batches
            for row in batch_rows(batch):
                number += 1
                if row is None:
                    yield number, Place(name, number).fault("not_utf8", "text that is not UTF-8; write it again")
                else:
                    yield number, decoded(row, as_json, Place(name, number)) if as_json else row
    except (pyarrow.ArrowException, OSError, MemoryError) as error:  # of lengths that are damaged
        raise InputError(f"{name}: not a readable {what} file after row {number}; write it again") from error


def json_columns(schema: pyarrow.Schema, name: str) -> Any:
    """The columns in which datasets keeps JSON text for values, as its `Features`: where rows differ in their kinds."""
    described = (schema.metadata or {}).get(b"huggingface", b"")
    if b'"Json"' not in described:
        return {}
    from datasets import Features  # here: it takes seconds

    try:
        features = Features.from_arrow_schema(schema)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{name}: the installed datasets does not know its columns ({reason}); update it") from error
    return Features({key: feature for key, feature in features.items() if "Json(" in repr(feature)})


def decoded(row: dict[str, Any], as_json: Any, place: Place) -> dict[str, Any] | RowFault:
    """The row with the values of its `json_columns`."""
    try:
        return row | as_json.decode_example({key: row[key] for key in as_json})
    except (ValueError, RecursionError) as error:
        return place.fault("not_json", f"a value that datasets keeps as JSON is none ({error}); write it again")


def batch_rows(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch; None for one with text that is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                yield batch.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None


TEXTS: dict[str, Reader] = {".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv}
READERS: dict[str, Reader] = TEXTS | {".parquet": read_parquet, ".arrow": read_arrow}
EXTENSIONS = (*READERS, *(f"{extension}.gz" for extension in TEXTS))
