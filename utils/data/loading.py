"""Files, folders and hub names → the items of a step, each row by the schema of its columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from utils.data import schemas
from utils.data.reading import Reading, Schema
from utils.data.rows import BadRow, BadRows, DataError, Row, read_rows

T = TypeVar("T")


def load_as(
    convert: Callable[[Schema, Row], list[T]],
    reading: Reading,
    splits: Mapping[str, Sequence[str]],
    names: Sequence[str],
    split_role: str,
    bad: BadRows,
) -> list[T]:
    """Reads all names and converts their rows: what all loaders share.

    Arguments: convert (the items of a row, none where it is left out; raises BadRow), reading (its
    notes are told at the end), splits (candidates by split_role); the others as in
    load_conversations. Raises DataError at the end, with the problems of all names.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise DataError("no data is named; give at least one file, folder or hub id")
    if split_role not in splits:
        raise DataError(f"split_role={split_role!r}: must be one of {', '.join(splits)}")
    items, problems = [], []
    for name in names:
        before = len(bad)
        try:
            rows = read_rows(name, splits[split_role], bad)
            found = _convert_rows(convert, *schemas.opened(rows, reading, bad), bad)
            if not found and bad.max_share and len(bad) > before:
                first = bad.problems[before]
                raise DataError(f"{name}: not one of its rows can be used; first: {first}")
            items += found
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems + (bad.problems if bad.too_many else []))
    reading.tell(names)
    return items


def _convert_rows(
    convert: Callable[[Schema, Row], list[T]], name: str, rows: Iterable[Row], bad: BadRows
) -> list[T]:
    """The items of all rows, which must have the schema `name`."""
    items = []
    for row in rows:
        try:
            if lacks := schemas.SCHEMAS[name].missing(row.data):
                raise BadRow(
                    f"lacks {', '.join(lacks)}, which schema {name} needs;"
                    f" it has {', '.join(map(repr, row.data)) or 'no columns'}"
                )
            items += convert(schemas.SCHEMAS[name], row)
        except BadRow as problem:
            bad.add(row.where, str(problem), row.data)
    return items
