"""One .json, .jsonl, .csv or .parquet file → rows, every bad one named by its line or number."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from utils import strict_json
from utils.data.rows import BadRows, DataError, Row, text_problem

TEXT_FILES = tuple(
    f".{kind}{packed}" for packed in ("", ".gz") for kind in ("json", "jsonl", "csv")
)
FILES = (*TEXT_FILES, ".parquet")
MAX_NESTING = 100
UTF8_BOM = b"\xef\xbb\xbf"
# What follows an element of a JSON array: a comma, or the bracket that ends array and file.
ARRAY_MARK = re.compile(r"[ \t\n\r]*(,|\][ \t\n\r]*\Z)[ \t\n\r]*")
# How files begin that are not the text their name says.
OTHER_THINGS = {
    rb"\x1f\x8b": "is packed with gzip; name it .gz or unpack it",
    rb"BZh[1-9]1AY&SY|\xfd7zXZ\0|\x28\xb5\x2f\xfd|PK\x03\x04": "is packed; unpack it",
    rb"PAR1": "is Parquet; name it .parquet",
    rb"\xff\xfe|\xfe\xff": "is UTF-16 or UTF-32; save it as UTF-8",
    rb"version https://git-lfs": "is a Git LFS pointer and not the data; run git lfs pull",
    rb"(?i)\s*<(!doctype html|html|\?xml)": "is a web page and not the data; download it anew",
}
# What datasets and pyarrow raise about damaged files, beside their own.
FROM_LIBRARIES = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
)


@contextmanager
def refusals_named(name: str) -> Iterator[None]:
    """Turns what datasets and pyarrow raise about data into a DataError that names the data. Only
    around their code."""
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    try:
        yield
    except DataError:
        raise
    except (*FROM_LIBRARIES, ArrowException, DatasetsError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise DataError(f"{name}: {type(error).__name__}: {error}{cause}") from error


def number_rows(label: str, rows: Iterable[dict]) -> Iterator[Row]:
    """Rows of a table, named by their number from 1. Raises DataError where there is none."""
    number = 0
    for number, data in enumerate(rows, 1):
        yield Row(data, f"{label} row {number}")
    if not number:
        raise DataError(f"{label}: holds no rows")


def read_file(path: str, bad: BadRows) -> Iterator[Row]:
    """Reads one of FILES row by row; see sources.stream_rows for arguments and errors.

    Only a JSON array is in memory as a whole: its errors are named by line and column.
    """
    extension = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    if not path.lower().endswith(FILES):
        raise DataError(f"{path}: cannot read {extension or 'this'}; known are {', '.join(FILES)}")
    if not os.path.isfile(path):
        raise DataError(f"{path}: is no file that could be read to its end")
    if extension == ".parquet":
        yield from _read_parquet(path, bad)
        return
    before, some = len(bad), False
    lines, beginning, first = _lines(path), [], b""
    for line in lines:
        beginning.append(line)
        if first := line.strip():
            break
    read = _read_json_lines  # also for .json: Belle's files are JSON Lines under that name
    if extension == ".csv":
        read = _read_csv
    elif extension == ".json" and first.startswith(b"["):
        read = _read_json_array
    for row in read(path, itertools.chain(beginning, lines), bad):
        some = True
        yield row
    if not some and len(bad) == before:
        raise DataError(f"{path}: {'holds no rows' if first else 'the file is empty'}")


def _lines(path: str) -> Iterator[bytes]:
    """The lines of a text file, unpacked, one by one. Raises DataError where it is none."""
    try:
        with (gzip.open if path.lower().endswith(".gz") else open)(path, "rb") as file:
            start = file.read(4096)
            for beginning, what in OTHER_THINGS.items():
                if re.match(beginning, start):
                    raise DataError(f"{path}: {what}")
            file.seek(len(UTF8_BOM) if start.startswith(UTF8_BOM) else 0)
            for line in file:
                yield line.removesuffix(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"{path}: {error.strerror or error}") from error
        raise DataError(f"{path}: cannot be unpacked: {error}") from error


def _read_parquet(path: str, bad: BadRows) -> Iterator[Row]:
    with refusals_named(path):
        from pyarrow import parquet

        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise DataError(f"{path}: has the columns {', '.join(twice)} twice")
            batches = (_values(batch) for batch in file.iter_batches(1024))
            for row in number_rows(path, itertools.chain.from_iterable(batches)):
                if isinstance(row.data, dict):
                    yield row
                else:
                    bad.add(row.where, row.data)


def _values(batch) -> list[dict | str]:
    """Rows of a pyarrow batch; of one that Python cannot hold (text that is not UTF-8, a time out
    of its range) the reason."""
    try:
        return batch.to_pylist()
    except (ValueError, ArithmeticError, LookupError) as error:
        if len(batch) == 1:
            return [f"{type(error).__name__}: {error}"]
    return [value for n in range(len(batch)) for value in _values(batch.slice(n, 1))]


def _decode(raw: bytes) -> tuple[str, str | None]:
    """The text of a line, and what is wrong with its bytes or None."""
    reason = "holds a NUL byte" if b"\0" in raw else None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
        text = raw.decode("utf-8", "replace")
    return text.replace("\0", ""), reason


def _read_json_lines(path: str, lines: Iterable[bytes], bad: BadRows) -> Iterator[Row]:
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        (text, reason), data = _decode(raw), None
        try:
            data = strict_json.loads(text) if reason is None else None
        except (ValueError, RecursionError) as error:
            reason = _json_refusal(error)
        reason = reason or _json_row_problem(data)
        if reason is None:
            yield Row(data, f"{path}:{number}")
        else:
            bad.add(f"{path}:{number}", reason, text)


def _json_refusal(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        ending = ", where the text ends" if error.pos >= len(error.doc.rstrip()) else ""
        return f"not JSON: {error.msg} at column {error.colno}{ending}"
    # The others: an integer of more than 4,300 digits, a name that stands twice in an object.
    return "nested too deeply" if isinstance(error, RecursionError) else f"not usable: {error}"


def _read_json_array(path: str, lines: Iterable[bytes], bad: BadRows) -> Iterator[Row]:
    """Element by element, so that an error is known by its line and column."""
    decoded = [_decode(line) for line in lines]
    if spoiled := [f"{path}:{n}: {reason}" for n, (_, reason) in enumerate(decoded, 1) if reason]:
        raise DataError(spoiled)
    text = "\n".join(line for line, _ in decoded)
    rest = text[text.index("[") + 1 :].lstrip(" \t\n\r")
    position, mark = len(text) - len(rest), "]" if rest.rstrip() == "]" else ","
    number = 0
    while mark == ",":
        number, start = number + 1, position
        try:
            data, end = strict_json.DECODER.raw_decode(text, start)
            following = ARRAY_MARK.match(text, end)
            if not following:
                raise json.JSONDecodeError("Expecting ',' or the final ']'", text, end)
        except (ValueError, RecursionError) as error:
            at = getattr(error, "pos", start)
            place = f"{text.count(chr(10), 0, at) + 1}:{at - text.rfind(chr(10), 0, at)}"
            refusal = f"{_json_refusal(error)}, in element {number}"
            raise DataError(f"{path}:{place}: {refusal}") from error
        position, mark = following.end(), following[1][0]
        reason = _json_row_problem(data)
        if reason is None:
            yield Row(data, f"{path}[{number}]")
        else:
            bad.add(f"{path}[{number}]", reason, text[start:end])


def _json_row_problem(data: Any) -> str | None:
    """Why a decoded value cannot be a row, or None. A loop, for recursion would reach its limit."""
    if not isinstance(data, dict):
        hint = "; name a file that is one JSON array .json" if isinstance(data, list) else ""
        return f"a JSON {type(data).__name__}, not an object{hint}"
    stack: list[tuple[Any, int]] = [(data, 0)]
    while stack:
        value, depth = stack.pop()
        if isinstance(value, str) and (problem := text_problem(value)):
            return f"a text {problem}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"holds {value}, which is not a finite number"
        if isinstance(value, (dict, list)):
            if depth > MAX_NESTING:
                return f"nested more than {MAX_NESTING} levels deep"
            parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            stack += [(part, depth + 1) for part in parts]
    return None


def _read_csv(path: str, lines: Iterable[bytes], bad: BadRows) -> Iterator[Row]:
    """A row is named by the line it starts on; a quoted field may contain line ends."""
    spoiled: list[str] = []  # what is wrong with the bytes of the present row

    def texts() -> Iterator[str]:
        for text, wrong in map(_decode, lines):
            spoiled.extend([wrong] if wrong else [])
            yield text + "\n"

    # Strict: otherwise a quote that is left open silently contains the rest of the file.
    reader = csv.reader(texts(), strict=True)
    csv.field_size_limit(2**31 - 1)
    header = None
    while True:
        spoiled.clear()
        start, fields, reason = reader.line_num, [], None
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = f"not CSV: {error}"
        reason = spoiled[0] if spoiled else reason
        where = f"{path}:{start + 1}"
        if not fields and not reason:
            continue
        if not reason and header and len(fields) != len(header):
            reason = f"{len(fields)} fields, but the header names {len(header)}"
        if not reason and not header and (len(set(fields)) < len(fields) or "" in fields):
            reason = f"a column name of the header is empty or there twice: {fields}"
        if header and reason:
            bad.add(where, reason, fields)
        elif header:
            yield Row(dict(zip(header, fields, strict=True)), where)
        elif reason:
            raise DataError(f"{where}: {reason}")
        else:
            header = fields
