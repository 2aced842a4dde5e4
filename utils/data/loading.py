"""Files, folders and hub names → items of one kind, each row by the schema of its columns."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa

from utils.data import readers, schemas
from utils.data.readers import Reading
from utils.data.rows import BadRow, BadRows, DataError, Row
from utils.data.schemas import Schema
from utils.data.sources import stream_rows
from utils.distributed.process_group import say
from utils.settings.run_config import columns_of

T = TypeVar("T")
TEXTS = ("transcript", "plain")


@dataclass(frozen=True)
class DataSettings:
    """How a step's data sets are read and shared out: the settings of these names."""

    output_dir: str
    data_schema: str = "auto"
    columns: Sequence[str] = ()
    data_weights: Sequence[float] = ()
    data_split: str = ""
    eval_fraction: float = 0.05
    max_eval_rows: int = 512
    long_prompts: str = "cut"
    data_cache: str = ""
    max_bad_rows: float = 0.0
    seed: int = 42

    def names_of_columns(self) -> dict[str, str]:
        """{our name: its name in the data} of --columns."""
        return columns_of(self.columns)

    def bad_rows(self) -> BadRows:
        return BadRows(self.max_bad_rows, f"{self.output_dir}/bad_rows.jsonl")


@dataclass(frozen=True)
class Kind:
    """What rows are made into.

    use: what the rows are read for, see readers.Reading. item: the class of what a row becomes.
    splits: the splits to train and to evaluate on; the first that a data set has is read.
    convert: (schema, row, reading) → items, none where the row is left out; raises BadRow.
    columns: the attributes of an encoded item that are kept, with their Arrow types.
    build: (those columns, function that gives the item) → what a step works with.
    """

    use: str
    item: type
    splits: Mapping[str, Sequence[str]]
    convert: Callable[[Schema, Row, Reading], list]
    columns: Mapping[str, pa.DataType]
    build: Callable[[dict, Callable], Any]

    def as_read(self) -> Kind:
        """The same without tokens: a step works with the items."""
        return dataclasses.replace(self, columns={}, build=lambda _, item: item())


@dataclass(frozen=True)
class Source:
    """One split of one data set, and as what it is read."""

    name: str
    role: str
    kind: Kind
    reading: Reading

    def fresh(self) -> Source:
        """The same with notes of its own."""
        return dataclasses.replace(self, reading=dataclasses.replace(self.reading, notes=Counter()))

    @property
    def splits(self) -> Sequence[str]:
        return self.kind.splits[self.role]

    def open(self, bad: BadRows) -> tuple[str, Iterator[Row]]:
        """(schema, rows under our column names, as they are read).

        The schema is that of the first row whose columns are known. A set that has none of the
        names of --columns is read by its own; one that has some of them is refused. Raises
        DataError for that, and where no row's columns are known.
        """
        reading, rows = self.reading, stream_rows(self.name, self.splits, bad)
        seen = list(itertools.islice(rows, 1))
        if not seen:
            return reading.schema, iter(())
        columns = _columns_in(seen[0], reading.columns)
        name = reading.schema
        while name == "auto":
            if fitting := _schema_of(renamed(seen[-1], columns), reading, columns):
                name = fitting
            elif row := next(rows, None):
                seen.append(row)
            else:
                raise DataError(
                    f"{seen[0].where}: the columns "
                    f"{', '.join(map(repr, seen[0].data)) or '(none)'} fit no schema known here "
                    f"({', '.join(schemas.known_for(reading.use))}); name them with --columns "
                    "prompt=THEIRS,answer=THEIRS, rename them, or set --data_schema"
                )
        rows = (renamed(row, columns) for row in itertools.chain(seen, rows))
        if join := schemas.SCHEMAS[name].join:
            rows, name = join(rows, bad, reading.notes)
        return name, iter(rows)

    def items(self, schema: str, rows: Iterable[Row], bad: BadRows) -> Iterator[Any]:
        """The items of rows that all should have one schema; others go to `bad`."""
        for row in rows:
            self.reading.noted.clear()
            try:
                if lacks := schemas.SCHEMAS[schema].missing(row.data):
                    raise BadRow(
                        f"lacks {', '.join(lacks)}, which schema {schema} needs;"
                        f" it has {', '.join(map(repr, row.data)) or 'no columns'}"
                    )
                yield from self.kind.convert(schemas.SCHEMAS[schema], row, self.reading)
            except BadRow as problem:
                bad.add(row.where, str(problem), row.data)


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with `columns` {ours: theirs} under our names too; theirs stay, for verifiers."""
    here = {ours: row.data[theirs] for ours, theirs in columns.items() if theirs in row.data}
    return Row({**row.data, **here}, row.where) if here else row


def _columns_in(row: Row, columns: Mapping[str, str]) -> Mapping[str, str]:
    """The --columns that hold for a data set with this row: all or none."""
    lacks = [theirs for theirs in columns.values() if theirs not in row.data]
    if len(lacks) == len(columns):
        return {}
    if lacks:
        raise DataError(
            f"{row.where}: has no column {', '.join(lacks)}, which --columns names; it has "
            f"{', '.join(map(repr, row.data))}"
        )
    return columns


def _schema_of(row: Row, reading: Reading, columns: Mapping[str, str]) -> str | None:
    """The first schema that fits a row and reads all columns that --columns names."""
    wanted = columns.keys() - readers.EXTRA
    known = schemas.known_for(reading.use).items()
    return next((name for name, s in known if wanted <= s.reads and s.fits(row.data)), None)


def reading_of(use: str, schema: str, columns: Mapping[str, str] | None) -> Reading:
    """How rows are to be read by --data_schema and --columns. Raises DataError for what cannot be.

    schema: "auto", a name of SCHEMAS, "transcript" or "plain" (how texts are read), or both as
    NAME:transcript, NAME:plain. columns: {ours: theirs}.
    """
    name, colon, texts = schema.partition(":")
    if schema in TEXTS:
        name, texts = "auto", schema
    known, columns = schemas.known_for(use), columns or {}
    if name not in ("auto", *known) or (colon or texts) and texts not in TEXTS:
        raise DataError(
            f"schema={schema!r}: set --data_schema to auto, {', '.join(known)}, or say how texts "
            "are to be taken: transcript, plain, NAME:transcript, NAME:plain"
        )
    ours = readers.EXTRA.union(*(each.reads for each in schemas.SCHEMAS.values()))
    if unknown := sorted(columns.keys() - ours):
        raise DataError(
            f"--columns {unknown[0]}={columns[unknown[0]]}: no schema has a column {unknown[0]}; "
            f"known are {', '.join(sorted(ours))}"
        )
    return Reading(use, name, columns, texts or "auto")


def load_each(
    make: Callable[[Source, BadRows], T],
    kind: Kind,
    names: Sequence[str],
    role: str,
    schema: str,
    columns: Mapping[str, str] | None,
    bad: BadRows,
) -> list[T]:
    """What `make` makes of each data set. Raises DataError with the problems of all of them."""
    reading = reading_of(kind.use, schema, columns)
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise DataError("no data is named; give at least one file, folder or hub id")
    if role not in kind.splits:
        raise DataError(f"split_role={role!r}: must be one of {', '.join(kind.splits)}")
    parts, problems = [], []
    for name in names:
        before = len(bad)
        source = Source(name, role, kind, reading).fresh()
        try:
            part = make(source, bad)
            if not len(part) and bad.max_share and len(bad) > before:
                first = bad.problems[before]
                raise DataError(f"{name}: not one of its rows can be used; first: {first}")
            parts.append(part)
            reading.notes.update(source.reading.notes)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems + (bad.problems if bad.too_many else []))
    for remark, count in reading.notes.items():
        say(f"{', '.join(names)}: {count} row(s) {remark}")
    return parts


def load_items(
    kind: Kind,
    names: Sequence[str],
    *,
    split_role: str = "train",
    schema: str = "auto",
    columns: Mapping[str, str] | None = None,
    bad: BadRows,
) -> list:
    """The items of a kind in data sets of any schema.

    Arguments: names (files, folders, hub ids, NAME:SPLIT), split_role ("train" or "eval"), schema
    (--data_schema, see reading_of), columns (--columns, {ours: theirs}), bad (gets the bad
    rows; call its finish afterwards). Raises DataError with all that is wrong with whole files.
    """

    def make(source: Source, bad: BadRows) -> list:
        return list(source.items(*source.open(bad), bad))

    return sum(load_each(make, kind, names, split_role, schema, columns, bad), [])
