"""The rows of data sets as tables: what was read of each row, its tokens, what became of it.

The table of a large data set is a file that all ranks of a machine map into memory (cache.py), that
of a small one is made by each rank. Which rows a run uses, in which order, is an array of row
numbers (View).
"""

from __future__ import annotations

import base64
import collections
import hashlib
import json
import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa

from utils.data.chat_template import TemplateError
from utils.data.fitting import Counts
from utils.data.loading import Kind
from utils.data.rows import BadRow, BadRows

COUNTS = tuple(field.name for field in fields(Counts))
TOKENS = pa.list_(pa.int32())
FORGET_EVERY = 2048  # rows
ODD = "\0arrow"  # marks a value that JSON has no form for; no column can have this name


def schema_of(kind: Kind) -> pa.Schema:
    columns = dict(kind.columns) | {name: pa.int32() for name in COUNTS}
    return pa.schema(columns | {"item": pa.large_string()})


def encode_one(item, encode: Callable, bad: BadRows):
    """encode(item) → (encoded item or None, Counts); an item that is refused goes to `bad`."""
    try:
        return encode(item)
    except (TemplateError, BadRow) as error:
        bad.add(item.where, str(error), vars(item))
        return None, Counts()


def encode_all(items: Iterable, encode: Callable, bad: BadRows) -> tuple[list, Counts]:
    """(encoded items, those left out excepted; Counts); see encode_one."""
    results = [encode_one(item, encode, bad) for item in items]
    kept = [encoded for encoded, _ in results if encoded is not None]
    return kept, sum((counts for _, counts in results), Counts())


def to_batch(kind: Kind, items: Iterable, encode: Callable, bad: BadRows) -> pa.RecordBatch:
    """Items as rows of schema_of(kind), those that are refused without tokens and Counts."""
    columns = {name: [] for name in schema_of(kind).names}
    for item in items:
        try:
            columns["item"].append(to_json(item))
        except BadRow as error:
            bad.add(item.where, str(error))
            continue
        encoded, counts = encode_one(item, encode, bad)
        for name in kind.columns:
            columns[name].append(None if encoded is None else getattr(encoded, name))
        for name in COUNTS:
            columns[name].append(getattr(counts, name))
    return pa.RecordBatch.from_pydict(columns, schema_of(kind))


def to_json(item) -> str:
    """The item's fields; a value that JSON has no form for (dates, bytes) as Arrow holds it."""

    def odd(value):
        try:
            batch = pa.record_batch({"value": pa.array([value])})
        except pa.ArrowException:
            kind = type(value).__name__
            raise BadRow(f"holds a {kind}, which cannot be kept; leave that column out") from None
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return {ODD: base64.b64encode(sink.getvalue()).decode()}

    return json.dumps(vars(item), ensure_ascii=False, separators=(",", ":"), default=odd)


def from_json(kind: type, text: str):
    """The item that to_json wrote."""

    def odd(values: dict):
        if values.keys() != {ODD}:
            return values
        with pa.ipc.open_stream(base64.b64decode(values[ODD])) as reader:
            return reader.read_all()["value"][0].as_py()

    values = json.loads(text, object_hook=odd if json.dumps(ODD) in text else None)
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class Digest:
    """SHA-256 of encoded columns, however they are divided into batches."""

    def __init__(self):
        self.streams = collections.defaultdict(hashlib.sha256)

    def add(self, batch: pa.RecordBatch, names: Iterable[str]) -> None:
        for name in names:
            column, level = batch.column(name), 0
            while pa.types.is_list(column.type):
                self.streams[name, level].update(np.diff(column.offsets.to_numpy()).tobytes())
                column, level = column.flatten(), level + 1
            self.streams[name, level].update(column.to_numpy(zero_copy_only=False).tobytes())

    def hexdigest(self) -> str:
        digests = sorted((key, stream.hexdigest()) for key, stream in self.streams.items())
        return hashlib.sha256(repr(digests).encode()).hexdigest()


def prompt_of(item) -> str:
    """The turns that an item's answer follows, as one text."""
    return "\x1e".join(f"{turn['role']}\x1f{turn['content']}" for turn in item.prompt)


def place(item, salt: str) -> float:
    """A number in [0, 1) that the item's prompt decides: the same in every step, file and run."""
    digest = hashlib.sha256(f"{salt}\0{prompt_of(item)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def places_of(kind: Kind, items: Iterable[pa.Array], salt: str) -> np.ndarray:
    """`place` of the items in batches of the column "item"."""
    parts = [
        np.array([place(from_json(kind.item, text), salt) for text in batch.to_pylist()], float)
        for batch in items
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


@dataclass(frozen=True)
class Table:
    """The rows of one data set. digest: of its encoded columns. places: salt → `place` of each row.
    mapping: the mapped file that the rows are in, or None."""

    kind: Kind
    rows: pa.Table
    digest: str
    places: Callable[[str], np.ndarray]
    mapping: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self.rows)


class View(Sequence):
    """Rows of one or several tables in an order, some perhaps more than once.

    view[i] is what a step works with, made when it is asked for; view.item(i) what was read.
    """

    def __init__(self, tables: Sequence[Table], chosen: np.ndarray | None = None):
        self.tables, self._built = tuple(tables), 0
        self._ends = np.cumsum([len(table) for table in self.tables]).tolist()
        self.chosen = np.arange(self._ends[-1]) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def _locate(self, i: int) -> tuple[Table, int]:
        row = int(self.chosen[i])
        number = bisect_right(self._ends, row)
        return self.tables[number], row - (self._ends[number - 1] if number else 0)

    def item(self, i: int):
        table, row = self._locate(i)
        return from_json(table.kind.item, table.rows["item"][row].as_py())

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        table, row = self._locate(i)
        columns = {name: table.rows[name][row].as_py() for name in table.kind.columns}
        self._built += 1
        if self._built % FORGET_EVERY == 0:
            for mapping in (each.mapping for each in self.tables if each.mapping):
                # The pages stay in the machine's cache. In this process they would add up to the
                # whole file.
                mapping.madvise(mmap.MADV_DONTNEED)
        return table.kind.build(columns, lambda: self.item(i))

    def __add__(self, other: View) -> View:
        moved = other.chosen + self._ends[-1]
        return View(self.tables + other.tables, np.concatenate([self.chosen, moved]))

    def take(self, positions: Sequence[int] | np.ndarray) -> View:
        """The rows at these positions of this view, in their order; or where a flag is true."""
        positions = np.asarray(positions) if len(positions) else np.zeros(0, int)
        return View(self.tables, self.chosen[positions])

    def _of_chosen(self, ask: Callable[[Table], np.ndarray]) -> np.ndarray:
        return np.concatenate([ask(table) for table in self.tables])[self.chosen]

    def numbers(self, name: str) -> np.ndarray:
        return self._of_chosen(lambda table: table.rows[name].to_numpy())

    def places(self, salt: str) -> np.ndarray:
        return self._of_chosen(lambda table: table.places(salt))

    def usable(self) -> View:
        """The rows that were encoded: neither refused by the template nor left out as too long."""
        return self.take(self.numbers("kept") > 0)

    def having(self, name: str, test: Callable[[list], bool]) -> View:
        """The rows whose value in a column of tokens or labels passes a test."""

        def passes(table: Table) -> np.ndarray:
            values = table.rows[name].to_pylist()
            return np.array([value is not None and test(value) for value in values], bool)

        return self.take(self._of_chosen(passes))

    def counts(self) -> Counts:
        """What became of these rows."""
        return Counts(*(int(self.numbers(name).sum()) for name in COUNTS))

    def fingerprint(self) -> str:
        """The number of rows and a hash of their content and order, which a resumed run must
        find unchanged."""
        digest = hashlib.sha256("".join(table.digest for table in self.tables).encode())
        digest.update(self.chosen.astype("<i8").tobytes())
        return f"{len(self)} rows ({digest.hexdigest()[:16]})"
