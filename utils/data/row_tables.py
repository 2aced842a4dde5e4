"""The rows of data sets as tables: what was read of a row, its tokens, what became of it.

A large data set's table is a file that all ranks of a machine map into their memory (row_cache.py);
a small one is made by each rank. Which rows a run takes, in which order, is an array of numbers.
"""

from __future__ import annotations

import base64
import collections
import hashlib
import json
import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa

from utils.data.batches import Counts
from utils.data.chat_template import Encoded
from utils.data.instructions import Conversation
from utils.data.loading import Source
from utils.data.rows import DataError, Row
from utils.data.splits import place

COUNTS = tuple(field.name for field in fields(Counts))
TOKENS = pa.list_(pa.int32())
FORGET_EVERY = 2048  # rows
ODD = "\0arrow"  # names a value that JSON has no form for; no column can be called so


@dataclass(frozen=True)
class Layout:
    """What is kept of one kind of rows.

    item: the class of what a loader makes of a row. columns: the attributes of its encoded form,
    with their types. build: (encoded columns by name, function that gives the item) → what a step
    works with.
    """

    item: type
    columns: Mapping[str, pa.DataType]
    build: Callable[[dict, Callable], object]

    @property
    def schema(self) -> pa.Schema:
        columns = dict(self.columns) | {name: pa.int32() for name in COUNTS}
        return pa.schema(columns | {"item": pa.large_string()})


SUPERVISED = Layout(
    Conversation,
    {"ids": TOKENS, "supervised": pa.list_(pa.bool_())},
    lambda found, _: Encoded(**found),
)
CONVERSATIONS = Layout(Conversation, {}, lambda _, item: item())


def as_read(items: list, bad) -> tuple[list, Counts]:
    """The `encode` of what is not tokenised."""
    return items, Counts(kept=len(items))


class Collected(list):
    """Bad rows as a worker or a cache hands them on: (where, reason, data). A rows.BadRows takes
    them up with `add`."""

    def __init__(self, entries: Iterable = ()):
        super().__init__(entries)
        self.seen = 0

    def add(self, where: str, reason: str, data=None) -> None:
        self.append((where, reason, data))

    def hand_on(self, bad) -> None:
        for entry in self:
            bad.add(*entry)
        bad.seen += self.seen


def encoded(
    source: Source, encode: Callable, layout: Layout, schema: str, rows: Iterable[Row]
) -> tuple[dict[str, list], list, Collected]:
    """(columns of layout.columns and COUNTS, the items themselves, bad rows) of some rows.

    encode: ([item], bad=…) → ([its encoded form] or [], Counts)."""
    bad, items = Collected(), []
    columns: dict[str, list] = {name: [] for name in (*layout.columns, *COUNTS)}
    for item in source.items(schema, rows, bad):
        found, counts = encode([item], bad=bad)
        items.append(item)
        for name in layout.columns:
            columns[name].append(getattr(found[0], name) if found else None)
        for name in COUNTS:
            columns[name].append(getattr(counts, name))
    return columns, items, bad


def to_json(item) -> str:
    """An item's fields; values that JSON has no form for (dates, bytes) as Arrow holds them."""

    def odd(value):
        try:
            batch = pa.record_batch({"value": pa.array([value])})
        except pa.ArrowException:
            raise DataError(
                f"{item.where}: holds a {type(value).__name__}, which cannot be kept; leave that "
                "column out"
            ) from None
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return {ODD: base64.b64encode(sink.getvalue()).decode()}

    return json.dumps(vars(item), ensure_ascii=False, separators=(",", ":"), default=odd)


def from_json(kind: type, text: str):
    """The item that to_json wrote."""

    def odd(found: dict):
        if found.keys() != {ODD}:
            return found
        with pa.ipc.open_stream(base64.b64decode(found[ODD])) as reader:
            return reader.read_all()["value"][0].as_py()

    values = json.loads(text, object_hook=odd if json.dumps(ODD) in text else None)
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class Digest:
    """SHA-256 of encoded columns, however they are cut into batches."""

    def __init__(self):
        self.streams = collections.defaultdict(hashlib.sha256)

    def add(self, part: pa.RecordBatch, names: Iterable[str]) -> None:
        for name in names:
            column, level = part.column(name), 0
            while pa.types.is_list(column.type):
                self.streams[name, level].update(np.diff(column.offsets.to_numpy()).tobytes())
                column, level = column.flatten(), level + 1
            self.streams[name, level].update(column.to_numpy(zero_copy_only=False).tobytes())

    def hexdigest(self) -> str:
        found = sorted((key, stream.hexdigest()) for key, stream in self.streams.items())
        return hashlib.sha256(repr(found).encode()).hexdigest()


class Table:
    """One data set's rows. parts: record batches of layout.schema, without `item` where `items` are
    given. digest: of its encoded columns. mapping: the mmap that the parts lie in, if they do.
    kept_places: salt → what a file keeps of `places`."""

    def __init__(
        self,
        layout: Layout,
        parts: list,
        digest: str,
        *,
        items: list | None = None,
        mapping: mmap.mmap | None = None,
        kept_places: Callable[[str], np.ndarray] | None = None,
    ):
        self.layout, self.parts, self.digest = layout, parts, digest
        self.ends = np.cumsum([len(part) for part in parts], dtype=np.int64).tolist()
        self._items, self._mapping, self._kept_places = items, mapping, kept_places
        self._taken = 0

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def _find(self, row: int):
        number = bisect_right(self.ends, row)
        return self.parts[number], row - (self.ends[number - 1] if number else 0)

    def item(self, row: int):
        if self._items is not None:
            return self._items[row]
        part, at = self._find(row)
        return from_json(self.layout.item, part.column("item")[at].as_py())

    def built(self, row: int):
        part, at = self._find(row)
        found = {name: part.column(name)[at].as_py() for name in self.layout.columns}
        self._taken += 1
        if self._mapping is not None and self._taken % FORGET_EVERY == 0:
            # The pages stay in the machine's cache; here they would come to be all of the file.
            self._mapping.madvise(mmap.MADV_DONTNEED)
        return self.layout.build(found, lambda: self.item(row))

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers."""
        found = [part.column(name).to_numpy() for part in self.parts]
        return np.concatenate(found) if found else np.zeros(0, np.int32)

    def asked(self, name: str, holds: Callable[[list], bool]) -> np.ndarray:
        """Of which encoded rows it holds for what stands in a column."""
        values = (value for part in self.parts for value in part.column(name).to_pylist())
        return np.array([value is not None and holds(value) for value in values], bool)

    def places(self, salt: str) -> np.ndarray:
        """Where each row's prompt falls in [0, 1); see splits.place."""
        if self._kept_places is not None:
            return self._kept_places(salt)
        return np.array([place(item, salt) for item in self._items], float)


class View(Sequence):
    """Rows of one table or several, in an order, perhaps more than once.

    view[i] is what a step works with, made when asked for; view.item(i) what was read of the row.
    """

    def __init__(self, tables: Sequence[Table], rows: np.ndarray):
        self.tables, self.chosen = tuple(tables), rows
        self.starts = np.cumsum([0, *map(len, self.tables)]).tolist()

    def __len__(self) -> int:
        return len(self.chosen)

    def _find(self, i: int) -> tuple[Table, int]:
        row = int(self.chosen[i])
        number = bisect_right(self.starts, row) - 1
        return self.tables[number], row - self.starts[number]

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        table, row = self._find(i)
        return table.built(row)

    def item(self, i: int):
        table, row = self._find(i)
        return table.item(row)

    def __add__(self, other: View) -> View:
        moved = other.chosen + self.starts[-1]
        return View(self.tables + other.tables, np.concatenate([self.chosen, moved]))

    def take(self, positions: Sequence[int]) -> View:
        """The rows at these positions of this view, in their order."""
        return View(self.tables, self.chosen[np.asarray(positions, np.int64)])

    def _of_tables(self, ask: Callable[[Table], np.ndarray]) -> np.ndarray:
        return np.concatenate([ask(table) for table in self.tables])[self.chosen]

    def places(self, salt: str) -> np.ndarray:
        return self._of_tables(lambda table: table.places(salt))

    def usable(self) -> View:
        """The rows that were encoded: neither refused by the template nor dropped as too long."""
        return self.take(np.flatnonzero(self._of_tables(lambda t: t.numbers("kept"))))

    def where(self, name: str, holds: Callable[[list], bool]) -> View:
        """The rows of which it holds for what stands in one column."""
        flags = self._of_tables(lambda table: table.asked(name, holds))
        return self.take(np.flatnonzero(flags))

    def counts(self) -> Counts:
        """What became of these rows."""
        return Counts(*(int(self._of_tables(lambda t, n=n: t.numbers(n)).sum()) for n in COUNTS))

    def fingerprint(self) -> str:
        """How many rows, and what decides their content and order: a resumed run must read what
        it read before."""
        digest = hashlib.sha256("".join(table.digest for table in self.tables).encode())
        digest.update(self.chosen.astype("<i8").tobytes())
        return f"{len(self)} rows ({digest.hexdigest()[:16]})"
