"""Any file, folder or hub name -> rows, with every bad one named by its file and line."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from utils.distributed import process_group

TEXT_FILES = (".json", ".jsonl", ".csv")
FILES = (*TEXT_FILES, ".parquet")
SHOWN_PROBLEMS = 20
MAX_NESTING = 100
UTF8_BOM = b"\xef\xbb\xbf"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# What follows an element of a JSON array: a comma, or the bracket that ends array and file.
ARRAY_MARK = re.compile(r"[ \t\n\r]*(,|\][ \t\n\r]*\Z)[ \t\n\r]*")


@dataclass(frozen=True)
class Row:
    """One row as read, and where it stands, in words that a person can follow."""

    data: dict
    where: str


class DataError(ValueError):
    """What is wrong with the data, every problem beginning with the place where it is.

    Arguments: problems (one text or several), title (a line before them), advice (a line after).
    """

    def __init__(self, problems: str | Sequence[str], title: str = "", advice: str = ""):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        lines = [title] if title else []
        lines += self.problems[:SHOWN_PROBLEMS]
        if len(self.problems) > SHOWN_PROBLEMS:
            lines.append(f"... and {len(self.problems) - SHOWN_PROBLEMS} more")
        super().__init__("\n".join(lines + ([advice] if advice else [])))


class BadRow(ValueError):
    """Why one row cannot be used; raised by converters, turned into an entry of BadRows."""


class BadRows:
    """Collects the bad rows of one loading, and in the end refuses them or writes them down.

    Arguments: on_bad_rows ("error" or "skip"), report_path (JSON Lines file for skipped rows).
    Raises DataError for another on_bad_rows.
    """

    def __init__(self, on_bad_rows: str = "error", report_path: str | None = None):
        if on_bad_rows not in ("error", "skip"):
            raise DataError(f"on_bad_rows={on_bad_rows!r}: set --on_bad_rows to error or skip")
        self.on_bad_rows = on_bad_rows
        self.report_path = report_path
        self._rows: list[tuple[str, str, Any]] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def problems(self) -> list[str]:
        """One text a bad row, `where: reason`."""
        return [f"{where}: {reason}" for where, reason, _ in self._rows]

    def add(self, where: str, reason: str, data: Any = None) -> None:
        """Notes one bad row: its place, what is wrong with it, and the row or its raw text."""
        self._rows.append((where, reason, data))

    def finish(self, label: str) -> int:
        """Ends one loading and returns how many rows were left out.

        "error" raises one DataError that names all bad rows. "skip" appends them to report_path
        and prints one line. Either way the collection is empty afterwards.
        """
        rows, problems = self._rows, self.problems
        self._rows = []
        if not rows:
            return 0
        if self.on_bad_rows == "error":
            raise DataError(
                problems,
                title=f"{label}: {len(rows)} bad row(s)",
                advice="Mend them, or leave them out with --on_bad_rows skip.",
            )
        written = ""
        if not process_group.is_main():
            return len(rows)  # rank 0 tells and writes for all
        if self.report_path:
            os.makedirs(os.path.dirname(self.report_path) or ".", exist_ok=True)
            with open(self.report_path, "a", encoding="utf-8") as handle:
                handle.writelines(_report_line(*row) + "\n" for row in rows)
            written = f", listed in {self.report_path}"
        print(f"{label}: left out {len(rows)} bad row(s){written}", flush=True)
        return len(rows)


def _report_line(where: str, reason: str, data: Any) -> str:
    record = {"where": where, "reason": reason, "row": data}
    # ASCII on purpose: a lone surrogate may be the very thing that is reported, and it cannot be
    # written as UTF-8. A row that holds NaN goes in as text, so that the report is strict JSON.
    try:
        return json.dumps(record, default=str, allow_nan=False)
    except ValueError:
        return json.dumps({**record, "row": json.dumps(data, default=str)})


def text_problem(text: str) -> str | None:
    """What a tokenizer could not take in `text` (a NUL, half a surrogate pair), or None."""
    if "\0" in text:
        return "holds a NUL character"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"holds a lone surrogate, U+{ord(text[error.start]):04X}"
    return None


def read_rows(name: str, split_candidates: Sequence[str], bad: BadRows) -> list[Row]:
    """Reads all rows of a local file, a local folder or a hub data set.

    Arguments: name (a .json, .jsonl, .csv or .parquet file, a folder, a hub id, or NAME:SPLIT),
    split_candidates (the first that the data set has is read; a plain file is read whole), bad
    (takes the rows that cannot be read). Raises DataError for what is wrong with a whole file.
    """
    kind, path, pinned = _locate(name)
    if kind == "file":
        return read_file(path, bad)
    readers = _split_readers(name, kind, path)
    wanted = (pinned,) if pinned else tuple(split_candidates)
    for split in wanted:
        if split in readers:
            with _refusals_named(name):
                return readers[split](bad)
    raise DataError(
        f"{name}: has the splits {', '.join(readers) or '(none)'}, but not {' or '.join(wanted)};"
        " name one of them as NAME:SPLIT"
    )


def has_split(name: str, split_candidates: Sequence[str]) -> bool:
    """Whether `name` has one of the splits, to evaluate on while another is trained on.

    False for a plain file, which has none, and for NAME:SPLIT, which means that split for both.
    Raises DataError for a name that cannot be found.
    """
    kind, path, pinned = _locate(name)
    if kind == "file" or pinned:
        return False
    return not _split_readers(name, kind, path).keys().isdisjoint(split_candidates)


def _locate(name: str) -> tuple[str, str, str | None]:
    """("file" | "folder" | "hub", path or hub id, pinned split or None)."""
    path, pinned = name, None
    base, colon, split = name.rpartition(":")
    if colon and base and re.fullmatch(r"[\w.-]+", split) and not os.path.exists(name):
        path, pinned = base, split
    if os.path.isdir(path):
        return "folder", path, pinned
    if os.path.exists(path):
        if pinned:
            raise DataError(f"{name}: {path} is a plain file and has no split {pinned}")
        return "file", path, None
    if path.lower().endswith(FILES) or path.startswith(("/", ".", "~")):
        raise DataError(f"{name}: no such file or folder (looked in {os.getcwd()})")
    if not HUB_ID.fullmatch(path):
        raise DataError(f"{name!r}: neither a file, nor a folder, nor a hub id (owner/name)")
    return "hub", path, pinned


@contextmanager
def _refusals_named(name: str) -> Iterator[None]:
    """Turns what datasets and pyarrow raise about data into a DataError that names the data."""
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, ArrowException, DatasetsError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise DataError(f"{name}: {type(error).__name__}: {error}{cause}") from error


def _split_readers(name: str, kind: str, path: str) -> dict[str, Callable[[BadRows], list[Row]]]:
    """Each split that a folder or hub data set has, with the function that reads it."""
    with _refusals_named(name):
        import datasets

        if kind == "folder" and any(
            os.path.exists(os.path.join(path, mark)) for mark in ("dataset_dict.json", "state.json")
        ):
            saved = datasets.load_from_disk(path)
            if not isinstance(saved, dict):
                saved = {str(saved.split or "train"): saved}
            return {key: partial(_number, f"{path}[{key}]", part) for key, part in saved.items()}
        if kind == "folder":
            files = datasets.load_dataset_builder(path).config.data_files or {}
            # Text files are read here rather than by datasets, which cannot name a bad line.
            if files and all(
                str(file).lower().endswith(TEXT_FILES) for part in files.values() for file in part
            ):
                return {str(key): partial(_read_files, part) for key, part in files.items()}
        return {
            str(key): partial(_load_split, path, str(key))
            for key in datasets.get_dataset_split_names(path)
        }


def _load_split(path: str, split: str, bad: BadRows) -> list[Row]:
    from datasets import load_dataset

    return _number(f"{path}[{split}]", load_dataset(path, split=split), bad)


def _number(label: str, rows: Iterable[dict], bad: BadRows) -> list[Row]:
    numbered = [Row(data, f"{label} row {number}") for number, data in enumerate(rows, 1)]
    if not numbered:
        raise DataError(f"{label}: holds no rows")
    return numbered


def _read_files(paths: Iterable[str], bad: BadRows) -> list[Row]:
    rows, problems = [], []
    for path in map(str, paths):
        try:
            rows += read_file(path, bad)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return rows


def read_file(path: str, bad: BadRows) -> list[Row]:
    """Reads one .json, .jsonl, .csv or .parquet file; see read_rows for arguments and errors."""
    extension = os.path.splitext(path)[1].lower()
    if extension not in FILES:
        raise DataError(f"{path}: cannot read {extension or 'this'}; known are {', '.join(FILES)}")
    if extension == ".parquet":
        with _refusals_named(path):
            from pyarrow import parquet

            return _number(path, parquet.read_table(path).to_pylist(), bad)
    before = len(bad)
    try:
        with open(path, "rb") as handle:
            lines = handle.read().removeprefix(UTF8_BOM).split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    first = next((line.strip() for line in lines if line.strip()), b"")
    if extension == ".csv":
        rows = _read_csv(path, lines, bad)
    elif extension == ".json" and first.startswith(b"["):
        rows = _read_json_array(path, lines, bad)
    else:  # Belle's .json files are JSON Lines under that name
        rows = _read_json_lines(path, lines, bad)
    if not rows and len(bad) == before:
        raise DataError(f"{path}: {'holds no rows' if first else 'the file is empty'}")
    return rows


def _decode(raw: bytes) -> tuple[str, str | None]:
    """The text of a line, and what is wrong with its bytes or None."""
    reason = "holds a NUL byte" if b"\0" in raw else None
    try:
        return raw.decode("utf-8").replace("\0", ""), reason
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
        return raw.decode("utf-8", "replace").replace("\0", ""), reason


def _read_json_lines(path: str, lines: list[bytes], bad: BadRows) -> list[Row]:
    rows = []
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        (text, reason), data = _decode(raw), None
        try:
            data = json.loads(text) if reason is None else None
        except (ValueError, RecursionError) as error:
            reason = _json_refusal(error)
        reason = reason or _json_row_problem(data)
        if reason is None:
            rows.append(Row(data, f"{path}:{number}"))
        else:
            bad.add(f"{path}:{number}", reason, text)
    return rows


def _json_refusal(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        ending = ", where the text ends" if error.pos >= len(error.doc.rstrip()) else ""
        return f"not JSON: {error.msg} at column {error.colno}{ending}"
    # The other ValueError is an integer of more than 4,300 digits.
    return "nested too deeply" if isinstance(error, RecursionError) else f"not usable: {error}"


def _read_json_array(path: str, lines: list[bytes], bad: BadRows) -> list[Row]:
    """Element by element, so that whatever goes wrong is known by its line and column."""
    decoded = [_decode(line) for line in lines]
    if spoiled := [f"{path}:{n}: {reason}" for n, (_, reason) in enumerate(decoded, 1) if reason]:
        raise DataError(spoiled)
    text = "\n".join(line for line, _ in decoded)
    rows, number, decoder = [], 0, json.JSONDecoder()
    rest = text[text.index("[") + 1 :].lstrip(" \t\n\r")
    position, mark = len(text) - len(rest), "]" if rest.rstrip() == "]" else ","
    while mark == ",":
        number, start = number + 1, position
        try:
            data, end = decoder.raw_decode(text, start)
            found = ARRAY_MARK.match(text, end)
            if not found:
                raise json.JSONDecodeError("Expecting ',' or the final ']'", text, end)
        except (ValueError, RecursionError) as error:
            at = getattr(error, "pos", start)
            place = f"{text.count(chr(10), 0, at) + 1}:{at - text.rfind(chr(10), 0, at)}"
            refusal = f"{_json_refusal(error)}, in element {number}"
            raise DataError(f"{path}:{place}: {refusal}") from error
        position, mark = found.end(), found[1][0]
        reason = _json_row_problem(data)
        if reason is None:
            rows.append(Row(data, f"{path}[{number}]"))
        else:
            bad.add(f"{path}[{number}]", reason, text[start:end])
    return rows


def _json_row_problem(data: Any) -> str | None:
    """Why a decoded value cannot be a row, or None. Iterative: depth must not end the program."""
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


def _read_csv(path: str, lines: list[bytes], bad: BadRows) -> list[Row]:
    """A row is named by the line it starts on; a quoted field may run over many lines."""
    decoded = [_decode(line) for line in lines]
    # Strict: otherwise a quote left open swallows the rest of the file without a word.
    reader = csv.reader((text + "\n" for text, _ in decoded), strict=True)
    csv.field_size_limit(2**31 - 1)
    rows, header = [], None
    while True:
        start, fields, reason = reader.line_num, [], None
        try:
            fields = next(reader)
        except StopIteration:
            return rows
        except csv.Error as error:
            reason = f"not CSV: {error}"
        covered = decoded[start : reader.line_num]
        reason = next((spoiled for _, spoiled in covered if spoiled), reason)
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
            rows.append(Row(dict(zip(header, fields, strict=True)), where))
        elif reason:
            raise DataError(f"{where}: {reason}")
        else:
            header = fields
