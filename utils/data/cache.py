"""Rows of large data sets are tokenised once a machine and kept: files that every rank maps.

A file's name is a hash of all that decides its content (_key). It is written by one process while
others wait, and gets its name when it is complete; two machines that cannot see each other's lock
both write it, and the later one stays. Files never change: delete those that are not needed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import mmap
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock, Timeout

from utils import whole_files
from utils.data import chat_template
from utils.data.fitting import Counts
from utils.data.loading import DataSettings, Kind, Source, load_each
from utils.data.rows import BadRows, DataError
from utils.data.sources import files_behind
from utils.data.tables import Digest, Table, View, places_of, schema_of, to_batch
from utils.distributed.process_group import say
from utils.settings.run_config import check_folder

SMALL = 8 * 2**20  # bytes of files, below which reading again costs less than keeping
CHUNK = 1000  # rows that a worker gets at a time
REPORT_EVERY = 10.0  # seconds
PROBES = (  # a template may state more, such as the date, where there is a system turn
    [{"role": "user", "content": "a"}],
    [{"role": "system", "content": "b"}, {"role": "user", "content": "a"}],
)


def load_view(
    kind: Kind,
    names: Sequence[str],
    role: str,
    encode: Callable | None,
    settings: DataSettings,
    bad: BadRows,
) -> View:
    """The items of a kind in data sets, encoded; without `encode` as they were read.

    encode: a dataclass, item → (encoded item or None, Counts); its values are part of a file's
    name. The other arguments and the errors are those of loading.load_items.
    """
    if encode is None:
        kind, encode = kind.as_read(), AsRead()
    make = functools.partial(_table, encode=encode, settings=settings)
    reading = settings.data_schema, settings.names_of_columns()
    return View(load_each(make, kind, names, role, *reading, bad))


@dataclass(frozen=True)
class AsRead:
    """The `encode` of rows that are not tokenised."""

    def __call__(self, item) -> tuple[Any, Counts]:
        return item, Counts(kept=1)


def _table(source: Source, bad: BadRows, encode: Callable, settings: DataSettings) -> Table:
    files = files_behind(source.name, source.splits)
    mapping = None
    if sum(map(os.path.getsize, files)) < SMALL:
        batches: list[pa.RecordBatch] = []
        facts = _encode(source.fresh(), encode, map, batches.append, bad)
        rows = pa.Table.from_batches(batches, schema_of(source.kind))
        places = functools.partial(places_of, source.kind, rows["item"].chunks)
    else:
        path = folder_for(settings) / f"{_key(source, encode, files)}.arrow"
        once(path, lambda file: _write(file, source.fresh(), encode, path, bad))
        rows, facts, mapping = _mapped(path)
        places = functools.partial(_kept_places, path, source.kind)
    bad.entries += map(tuple, facts["bad"])
    bad.seen += facts["seen"]
    source.reading.notes.update(facts["notes"])
    return Table(source.kind, rows, facts["digest"], places, mapping)


def _encode(
    source: Source, encode: Callable, map_chunks: Callable, keep: Callable, bad: BadRows
) -> dict:
    """Hands all rows of a source to keep(batch), in order; returns what there is to say of them.

    map_chunks: a form of `map`. Bad rows are in the result; `bad` gets them where the source as a
    whole cannot be read.
    """
    digest, own = Digest(), BadRows()
    try:
        job = functools.partial(_encode_chunk, source, encode)
        for batch, bad_rows, notes in map_chunks(job, _chunks(source, own)):
            keep(batch)
            digest.add(batch, source.kind.columns)
            own.merge(bad_rows)
            source.reading.notes.update(notes)
    except DataError:
        bad.merge(own)
        raise
    facts = {"digest": digest.hexdigest(), "seen": own.seen, "bad": own.entries}
    return facts | {"notes": dict(source.reading.notes)}


def _chunks(source: Source, bad: BadRows) -> Iterator[tuple[str, list, BadRows]]:
    """(schema, CHUNK rows, rows that could not be read); the last of these go to `bad`."""
    unread, more = BadRows(), True
    try:
        schema, rows = source.open(unread)
        while more:
            some = list(itertools.islice(rows, CHUNK))
            more = len(some) == CHUNK
            yield schema, some, unread.moved()
    finally:
        bad.merge(unread)


def _encode_chunk(source: Source, encode: Callable, chunk: tuple):
    """(record batch, bad rows, notes) of one chunk."""
    (schema, rows, bad), source = chunk, source.fresh()
    batch = to_batch(source.kind, source.items(schema, rows, bad), encode, bad)
    return batch, bad, source.reading.notes


class _Job:
    """A function as the data set of a torch DataLoader."""

    def __init__(self, function: Callable):
        self.function = function

    def __getitem__(self, argument):
        return self.function(argument)


def _map_in_processes(function: Callable, arguments: Iterable) -> Iterator:
    """`map` with one process a core. Few arguments are read ahead."""
    # Forked, so that tokenizers from a model's own Python files need not be pickled. Workers use
    # neither the accelerator nor torch's threads, which do not survive a fork.
    loader = torch.utils.data.DataLoader(
        _Job(function),
        sampler=arguments,
        batch_size=None,
        collate_fn=lambda result: result,
        num_workers=len(os.sched_getaffinity(0)),
        multiprocessing_context="fork",
        worker_init_fn=functools.partial(_start_worker, os.getpid()),
        generator=torch.Generator(),  # it would draw from the run's own
    )
    yield from loader


def _start_worker(parent: int, number: int) -> None:
    """A worker must not outlive a parent that is killed: it holds the parent's lock and its
    connections to other ranks."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    set_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _write(file, source: Source, encode: Callable, path: Path, bad: BadRows) -> None:
    """Writes all rows of a source, and behind them the facts that go with them."""
    begun = reported = time.monotonic()
    schema, rows = schema_of(source.kind), 0

    def keep(batch: pa.RecordBatch) -> None:
        nonlocal reported, rows
        writer.write_batch(batch)
        rows += len(batch)
        if time.monotonic() - reported > REPORT_EVERY:
            reported = time.monotonic()
            say(f"{source.name}: {rows:,} rows, {rows / (reported - begun):,.0f} a second")

    with pa.ipc.new_file(file, schema) as writer:
        try:
            facts = _encode(source, encode, _map_in_processes, keep, bad)
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise DataError(
                f"{source.name}: a process that tokenised rows was killed, for want of memory "
                f"perhaps; nothing was kept, so start again ({error})"
            ) from error
        end = pa.RecordBatch.from_pylist([], schema)
        writer.write_batch(end, custom_metadata={"facts": json.dumps(facts, default=str)})
    speed = rows / (time.monotonic() - begun)
    say(f"{source.name}: {rows:,} rows, {speed:,.0f} a second, kept in {path}")


def _mapped(path: Path) -> tuple[pa.Table, dict, mmap.mmap]:
    """What _write wrote, and the mapping that the rows are in."""
    try:
        with open(path, "rb") as opened:
            mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        file = pa.ipc.open_file(pa.py_buffer(mapping))
        last = file.num_record_batches - 1
        facts = file.get_batch_with_custom_metadata(last).custom_metadata[b"facts"]
        return file.read_all(), json.loads(facts), mapping
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: damaged ({error}); delete it, it is made again") from error


def folder_for(settings: DataSettings) -> Path:
    """Where the files go: --data_cache, else beside what the hub's libraries keep (HF_HOME), else,
    where that cannot be written, the output folder."""
    if settings.data_cache:
        return Path(settings.data_cache)
    from huggingface_hub.constants import HF_HOME

    home = Path(HF_HOME, "rlhf_rows")
    try:
        check_folder(str(home))
    except ValueError as problem:
        say(f"rows are kept in {settings.output_dir}/data_cache: {problem} (--data_cache)")
        return Path(settings.output_dir, "data_cache")
    return home


def once(path: Path, make: Callable) -> None:
    """Where there is no file `path`, make(file) writes it, in one process while others wait. It
    gets its name when all of it is on the disk."""
    if path.exists():
        return
    with whole_files.naming(path, "--data_cache"):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        try:
            held = lock.acquire(timeout=5)
        except Timeout:
            say(f"another process makes {path}: waiting for it")
            held = lock.acquire()
        with held:
            if path.exists():
                return
            # What a killed process of this machine left has the same name, and is overwritten.
            own = path.with_name(f"{path.name}.{socket.gethostname()}")
            with whole_files.placing(own, "--data_cache") as beside, open(beside, "wb") as file:
                make(file)
            os.replace(own, path)


def _kept_places(path: Path, kind: Kind, salt: str) -> np.ndarray:
    """The places of the rows in `path`, from a file beside it."""
    kept = path.with_suffix(f".{hashlib.sha256(salt.encode()).hexdigest()[:8]}.npy")
    once(kept, lambda file: np.save(file, _places(path, kind, salt)))
    return np.load(kept, mmap_mode="r")


def _places(path: Path, kind: Kind, salt: str) -> np.ndarray:
    # Read and not mapped: all the rows' text would count as this process's memory.
    only = pa.ipc.IpcReadOptions(included_fields=[schema_of(kind).get_field_index("item")])
    with pa.OSFile(str(path)) as opened, pa.ipc.open_file(opened, options=only) as file:
        numbers = range(file.num_record_batches)
        return places_of(kind, (file.get_batch(n).column("item") for n in numbers), salt)


def _key(source: Source, encode: Callable, files: list[str]) -> str:
    """A hash of all that decides what a file holds."""
    here = [str(path) for path in sorted(Path(__file__).parent.glob("*.py"))]
    reading = source.reading
    parts = {
        "code": _code(*here),
        "libraries": [version(name) for name in ("tokenizers", "transformers", "pyarrow")],
        "data": (source.name, tuple(source.splits), [_content(file) for file in files]),
        "reading": (reading.use, reading.schema, dict(reading.columns), reading.texts),
        "encode": _described(encode),
        "schema": str(schema_of(source.kind)),
    }
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _content(path: str) -> tuple:
    """A file's length, time and both ends: what changes when its content does."""
    facts = os.stat(path)
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(65_536))
        file.seek(max(0, facts.st_size - 65_536))
        digest.update(file.read())
    return path, facts.st_size, facts.st_mtime_ns, digest.hexdigest()


@functools.lru_cache
def _code(*files: str) -> str:
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def _described(value):
    """A setting as text and numbers that are the same in every process."""
    if hasattr(value, "save_pretrained"):
        return _tokenizer(value)
    if dataclasses.is_dataclass(value):
        kind = type(value)
        return [kind.__qualname__, _code(inspect.getsourcefile(kind)), _described(vars(value))]
    if isinstance(value, dict):
        return {name: _described(inner) for name, inner in value.items()}
    return [_described(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _tokenizer(tokenizer) -> str:
    """A hash of all that a tokenizer saves, and of what its template makes of two prompts now."""
    digest = hashlib.sha256(type(tokenizer).__qualname__.encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(file.name.encode() + file.read_bytes())
    for messages in PROBES:
        try:
            probe = repr(chat_template.encode_prompt(tokenizer, messages))
        except chat_template.TemplateError as error:
            probe = str(error)
        digest.update(probe.encode())
    return digest.hexdigest()
