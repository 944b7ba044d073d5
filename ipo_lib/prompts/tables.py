"""Tables that users give: CSV, TSV, JSON lines, a JSON array or Parquet, each also as ``.gz``.

1. ``read_rows`` yields one row after the other with its place. All but a JSON array is read as it
   is used. A row that does not fit the header, a quotation mark that is not closed, or a line that
   is no JSON object is an error that names its line.
2. ``text_cell`` takes the text of one cell. A cell without text is an error that names its row and
   column, and never a prompt called "None" or "nan".

CSV is read by the standard library in its strict mode. pyarrow lets a quotation mark that is not
closed swallow the rest of a file, and pandas takes a row with too few cells for one with empty
ones.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ipo_lib.records import BadInput

Row = Mapping[str, Any]
DELIMITERS = {".csv": ",", ".tsv": "\t"}
USERS, ROLES = ("user", "human"), ("role", "from")  # how conversations name a user and a role
CONTENTS = ("content", "value", "text")


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a file with their places, such as ``prompts.csv, line 7``.

    Raises:
        BadInput: the file is missing, is none of the formats, or holds a broken row.
    """
    if not path.is_file():
        raise BadInput(
            f"prompt file {str(path)!r} is missing; put it there or name another in the profile"
        )
    file = f"prompt file {str(path)!r}"
    try:
        yield from _rows(path, file)
    except UnicodeDecodeError as error:
        raise BadInput(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadInput(f"{file} cannot be unpacked ({error}); copy it again") from None


def _rows(path: Path, file: str) -> Iterator[tuple[str, Row]]:
    packed = path.suffix == ".gz"
    ending = path.with_suffix("").suffix if packed else path.suffix
    if ending == ".parquet":
        yield from _parquet_rows(path, file)
        return
    with _opened(path, packed) as text:
        if ending in DELIMITERS:
            yield from _csv_rows(text, file, DELIMITERS[ending])
        else:
            yield from _json_rows(text, file)


@contextmanager
def _opened(path: Path, packed: bool) -> Iterator[TextIO]:
    """The file as text. A byte order mark is no part of it, and only ``\\n`` ends a line."""
    options: dict[str, Any] = {"encoding": "utf-8-sig", "newline": ""}
    with gzip.open(path, "rt", **options) if packed else path.open(**options) as text:
        yield text


def _csv_rows(text: TextIO, file: str, delimiter: str) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(sys.maxsize)  # a prompt may be longer than the 128 KiB of the default
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    line = 0
    try:
        header = next(reader, [])
        for name in header:
            if header.count(name) > 1:
                raise BadInput(f"{file}: two columns are called {name!r}; give them other names")
        line = reader.line_num
        for cells in reader:
            place = f"{file}, line {line + 1}"
            line = reader.line_num
            if not cells:  # a blank line
                continue
            if len(cells) != len(header):
                raise BadInput(
                    f"{place}: {len(cells)} cells, where the header has {len(header)}; put "
                    "quotation marks around a cell with a delimiter"
                )
            yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise BadInput(
            f"{file}, line {line + 1}: {error}; a quotation mark inside a quoted cell is doubled"
        ) from None


def _json_rows(text: TextIO, file: str) -> Iterator[tuple[str, Row]]:
    head = text.read(1)
    while head.isspace():
        head = text.read(1)
    if head == "[":
        yield from _array_rows(head + text.read(), file)
        return
    first = itertools.chain([head + text.readline()], text)
    for number, line in enumerate(first, 1):
        if line.strip():
            place = f"{file}, line {number}"
            try:
                yield place, dict(json.loads(line))
            except (ValueError, TypeError, RecursionError):
                raise BadInput(f"{place}: no JSON object; correct or delete the line") from None


def _array_rows(content: str, file: str) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file}: no JSON array ({error}); correct it") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise BadInput(f"{file}, element {number}: no JSON object; correct or delete it")
        yield f"{file}, element {number}", row


def _parquet_rows(path: Path, file: str) -> Iterator[tuple[str, Row]]:
    import pyarrow
    from pyarrow import parquet

    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{file} cannot be read as Parquet ({reason}); copy it again") from None


def text_cell(row: Row, column: str, place: str) -> str:
    """The text of a cell: a text, or the one user's message of a conversation.

    Args:
        row: of a table.
        column: its name.
        place: of the row, for the message.

    Raises:
        BadInput: there is no such column, or no text in it.
    """
    if column not in row:
        raise BadInput(f"{place}: no column {column!r}; columns: {', '.join(map(str, row))}")
    value = row[column]
    if isinstance(value, list):
        value = _user_message(value, f"{place}, column {column!r}")
    if isinstance(value, str) and value.strip():
        return value
    no_number = isinstance(value, float) and math.isnan(value)
    empty = value is None or no_number or isinstance(value, str)
    what = "is empty" if empty else f"holds {value!r:.40}, which is no text"
    raise BadInput(f"{place}, column {column!r}: {what}; fill the cell or delete the row")


def _user_message(messages: list[Any], place: str) -> Any:
    """What the user says in a conversation of one turn."""
    said = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise BadInput(f"{place}: a list that is no conversation; name a column of texts")
        role = next((message[name] for name in ROLES if name in message), None)
        if role in USERS:
            said.append(next((message[name] for name in CONTENTS if name in message), None))
    if len(said) != 1:
        raise BadInput(
            f"{place}: a conversation with {len(said)} messages of a user; only one is understood, "
            "name a column of texts"
        )
    return said[0]
