"""Files, folders and hub names → the items of a step, each row by the schema of its columns."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from utils.data.rows import BadRow, BadRows, DataError, Row, stream_rows

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


@dataclass(frozen=True)
class Source:
    """One data set and how its rows become items.

    name, splits: as in rows.stream_rows. known: the schemas that fit this use. schema: one of them
    or "auto". convert: (schema, row) → an item, or a list of items; raises BadRow.
    """

    name: str
    splits: Sequence[str]
    known: Mapping[str, Schema]
    schema: str
    convert: Callable[[Schema, Row], Any]

    def open(self, bad: BadRows) -> tuple[str, Iterator[Row]]:
        """(schema, rows as they are read): that of the first row whose columns are known."""
        rows, schema, seen = stream_rows(self.name, self.splits, bad), self.schema, []
        if schema == "auto":
            for row in rows:
                seen.append(row)
                if fits := [n for n, one in self.known.items() if not one.missing(row.data)]:
                    schema = fits[0]
                    break
        if schema == "auto" and seen:
            columns = ", ".join(map(repr, seen[0].data)) or "(none)"
            raise DataError(
                f"{seen[0].where}: the columns {columns} fit no schema known here"
                f" ({', '.join(self.known)}); rename them, or set --data_schema"
            )
        return schema, itertools.chain(seen, rows)

    def items(self, schema: str, rows: Iterable[Row], bad: BadRows) -> Iterator[Any]:
        """The items of rows that all must have one schema; others go to `bad`."""
        for row in rows:
            try:
                if lacks := self.known[schema].missing(row.data):
                    raise BadRow(
                        f"lacks {', '.join(lacks)}, which schema {schema} needs;"
                        f" it has {', '.join(map(repr, row.data)) or 'no columns'}"
                    )
                found = self.convert(self.known[schema], row)
                yield from found if isinstance(found, list) else [found]
            except BadRow as problem:
                bad.add(row.where, str(problem), row.data)


def load_as(
    convert: Callable[[Schema, Row], T],
    known: Mapping[str, Schema],
    splits: Mapping[str, Sequence[str]],
    names: Sequence[str],
    split_role: str,
    schema: str,
    bad: BadRows,
    tabulate: Callable[[Source, BadRows], Sequence] | None = None,
) -> Sequence[T]:
    """Reads all names and converts their rows: what all loaders share.

    Arguments: convert (raises BadRow), known (the schemas that fit this use), splits (candidates
    by split_role), tabulate (what a source becomes instead of a list of its items: row_tables);
    the others as in load_conversations. Raises DataError at the end, with the problems of all
    names.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise DataError("no data is named; give at least one file, folder or hub id")
    if schema != "auto" and schema not in known:
        raise DataError(f"schema={schema!r}: set --data_schema to auto, {', '.join(known)}")
    if split_role not in splits:
        raise DataError(f"split_role={split_role!r}: must be one of {', '.join(splits)}")
    parts, problems = [], []
    for name in names:
        before = len(bad)
        source = Source(name, splits[split_role], known, schema, convert)
        try:
            found = tabulate(source, bad) if tabulate else _listed(source, bad)
            if not len(found) and bad.max_share:
                first = bad.problems[before]
                raise DataError(f"{name}: not one of its rows can be used; first: {first}")
            parts.append(found)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems + (bad.problems if bad.too_many else []))
    return functools.reduce(operator.add, parts)


def _listed(source: Source, bad: BadRows) -> list:
    schema, rows = source.open(bad)
    return list(source.items(schema, rows, bad))
