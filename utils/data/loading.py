"""Files, folders and hub names → the items of a step, each row by the schema of its columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from utils.data.rows import BadRow, BadRows, DataError, Row, read_rows

T = TypeVar("T")


@dataclass(frozen=True)
class Schema:
    """How rows of one shape are recognised and read.

    columns: each entry lists alternatives, of which one must be there. prompt: the turns up to
    the last user's. answer: the assistant's answer to them; None where the rows hold prompts only.
    """

    columns: tuple[tuple[str, ...], ...]
    prompt: Callable[[dict], list[dict]]
    answer: Callable[[dict], str] | None

    def missing(self, data: dict) -> list[str]:
        """The columns that the row lacks."""
        return [" or ".join(names) for names in self.columns if data.keys().isdisjoint(names)]


def load_as(
    convert: Callable[[Schema, Row], T],
    known: Mapping[str, Schema],
    splits: Mapping[str, Sequence[str]],
    names: Sequence[str],
    split_role: str,
    schema: str,
    bad: BadRows,
) -> list[T]:
    """Reads all names and converts their rows: what all loaders share.

    Arguments: convert (raises BadRow), known (the schemas that fit this use), splits (candidates
    by split_role); the others as in load_conversations. Raises DataError at the end, with the
    problems of all names.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise DataError("no data is named; give at least one file, folder or hub id")
    if schema != "auto" and schema not in known:
        raise DataError(f"schema={schema!r}: set --data_schema to auto, {', '.join(known)}")
    if split_role not in splits:
        raise DataError(f"split_role={split_role!r}: must be one of {', '.join(splits)}")
    items, problems = [], []
    for name in names:
        before = len(bad)
        try:
            rows = read_rows(name, splits[split_role], bad)
            found = _convert_rows(convert, known, schema, rows, bad)
            if not found and bad.max_share:
                first = bad.problems[before]
                raise DataError(f"{name}: not one of its rows can be used; first: {first}")
            items += found
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems + (bad.problems if bad.too_many else []))
    return items


def _convert_rows(
    convert: Callable[[Schema, Row], T],
    known: Mapping[str, Schema],
    schema: str,
    rows: Iterable[Row],
    bad: BadRows,
) -> list[T]:
    """The schema is that of the first row whose columns are known; all others must have it too."""
    rows = list(rows)
    if schema == "auto" and rows:
        fits = (n for row in rows for n, one in known.items() if not one.missing(row.data))
        schema = next(fits, None)
        if schema is None:
            columns = ", ".join(map(repr, rows[0].data)) or "(none)"
            raise DataError(
                f"{rows[0].where}: the columns {columns} fit no schema known here"
                f" ({', '.join(known)}); rename them, or set --data_schema"
            )
    items = []
    for row in rows:
        try:
            if lacks := known[schema].missing(row.data):
                raise BadRow(
                    f"lacks {', '.join(lacks)}, which schema {schema} needs;"
                    f" it has {', '.join(map(repr, row.data)) or 'no columns'}"
                )
            items.append(convert(known[schema], row))
        except BadRow as problem:
            bad.add(row.where, str(problem), row.data)
    return items
