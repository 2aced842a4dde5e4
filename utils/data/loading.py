"""Files, folders and hub names → the items of a step, each row by the schema of its columns."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from utils.data import schemas
from utils.data.reading import Reading, Schema
from utils.data.rows import BadRow, BadRows, DataError, Row, stream_rows

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """One data set and how its rows become items.

    name, splits: as in rows.stream_rows. reading: by which schemas, and what is to be told of the
    rows. convert: (schema, row) → its items, none where it is left out; raises BadRow.
    """

    name: str
    splits: Sequence[str]
    reading: Reading
    convert: Callable[[Schema, Row], list[Any]]

    def open(self, bad: BadRows) -> tuple[str, Iterator[Row]]:
        """(schema, rows as they are read); see schemas.opened."""
        name, rows = schemas.opened(stream_rows(self.name, self.splits, bad), self.reading, bad)
        return name, iter(rows)

    def items(self, schema: str, rows: Iterable[Row], bad: BadRows) -> Iterator[Any]:
        """The items of rows that all must have one schema; others go to `bad`."""
        for row in rows:
            try:
                if lacks := schemas.SCHEMAS[schema].missing(row.data):
                    raise BadRow(
                        f"lacks {', '.join(lacks)}, which schema {schema} needs;"
                        f" it has {', '.join(map(repr, row.data)) or 'no columns'}"
                    )
                yield from self.convert(schemas.SCHEMAS[schema], row)
            except BadRow as problem:
                bad.add(row.where, str(problem), row.data)


def load_as(
    convert: Callable[[Schema, Row], list[T]],
    reading: Reading,
    splits: Mapping[str, Sequence[str]],
    names: Sequence[str],
    split_role: str,
    bad: BadRows,
    tabulate: Callable[[Source, BadRows], Sequence] | None = None,
) -> Sequence[T]:
    """Reads all names and converts their rows: what all loaders share.

    Arguments: convert (the items of a row, none where it is left out; raises BadRow), reading (its
    notes are told at the end), splits (candidates by split_role), tabulate (what a source becomes
    instead of a list of its items: row_tables); the others as in load_conversations. Raises
    DataError at the end, with the problems of all names.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise DataError("no data is named; give at least one file, folder or hub id")
    if split_role not in splits:
        raise DataError(f"split_role={split_role!r}: must be one of {', '.join(splits)}")
    parts, problems = [], []
    for name in names:
        before = len(bad)
        source = Source(name, splits[split_role], reading, convert)
        try:
            found = tabulate(source, bad) if tabulate else _listed(source, bad)
            if not len(found) and bad.max_share and len(bad) > before:
                first = bad.problems[before]
                raise DataError(f"{name}: not one of its rows can be used; first: {first}")
            parts.append(found)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems + (bad.problems if bad.too_many else []))
    reading.tell(names)
    return functools.reduce(operator.add, parts)


def _listed(source: Source, bad: BadRows) -> list:
    schema, rows = source.open(bad)
    return list(source.items(schema, rows, bad))
