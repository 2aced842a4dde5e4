"""Rows of large data sets are tokenised once a machine and kept: files that every rank maps.

A file is named by all that decides its content (key_of), is there whole or not at all, and is made
by one process while others wait; two machines that cannot see each other's lock make the same file
twice and the later one stays. No file is ever changed: delete what is not needed any more.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import mmap
import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
from filelock import FileLock, Timeout

from utils import whole_files
from utils.data import chat_template, row_tables
from utils.data.loading import Source
from utils.data.row_tables import Collected, Layout, Table, View
from utils.data.rows import BadRows, DataError, files_behind
from utils.data.splits import DataSettings, place
from utils.distributed import process_group
from utils.settings.run_config import check_folder

SMALL = 8 * 2**20  # bytes of files, below which reading again costs less than keeping
CHUNK = 1000  # rows that a worker gets at a time
TELL_EVERY = 10.0  # seconds
PROBES = (  # a template may say more, the date perhaps, where there is a system turn
    [{"role": "user", "content": "a"}],
    [{"role": "system", "content": "b"}, {"role": "user", "content": "a"}],
)


@dataclass(frozen=True)
class Reader:
    """reader(names, split_role) → View of what a loader makes of the rows, encoded.

    load: a loader (instructions.load_conversations, …) with its settings. encode: a function
    (tokenizer, items, …, bad) → (encoded, Counts) with tokenizer and settings. Both as
    functools.partial: their keywords are part of a file's name. settings: data_cache, output_dir.
    """

    load: functools.partial
    encode: functools.partial
    layout: Layout
    settings: DataSettings
    bad: BadRows

    def __call__(self, names: list[str], role: str) -> View:
        return self.load(names, split_role=role, bad=self.bad, tabulate=self.tabulate)

    def tabulate(self, source: Source, bad: BadRows) -> View:
        files = files_behind(source.name, source.splits)
        if sum(map(os.path.getsize, files)) < SMALL:
            found = Collected()
            try:
                table = self._in_memory(source, found)
            finally:  # beside what is wrong with the whole file, if anything is
                found.hand_on(bad)
        else:
            path = folder_of(self.settings) / f"{self.key_of(source, files)}.arrow"
            once(path, lambda file: self._write(file, source, path, bad))
            table, found = self._mapped(path, source)
            found.hand_on(bad)
        return View([table], np.arange(len(table)))

    def _in_memory(self, source: Source, found: Collected) -> Table:
        schema, rows = source.open(found)
        columns, items, refused = row_tables.encoded(source, self.encode, self.layout, schema, rows)
        types = [field for field in self.layout.schema if field.name in columns]
        part = pa.RecordBatch.from_pydict(columns, pa.schema(types))
        digest = row_tables.Digest()
        digest.add(part, self.layout.columns)
        found += refused
        return Table(self.layout, [part], digest.hexdigest(), items=items)

    def key_of(self, source: Source, files: list[str]) -> str:
        """Names a file by all that decides what is in it."""
        parts = {
            "code": _code(inspect.getsourcefile(self.encode.func)),
            "libraries": [_version(name) for name in ("tokenizers", "transformers", "pyarrow")],
            "data": (source.name, tuple(source.splits), [_content(file) for file in files]),
            "load": (self.load.func.__qualname__, self.load.args, self.load.keywords),
            "encode": (self.encode.func.__qualname__, *map(_told, self.encode.args)),
            "settings": _told(self.encode.keywords),
            "schema": str(self.layout.schema),
        }
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def _write(self, file, source: Source, path: Path, bad: BadRows) -> None:
        """All rows of `source`, and behind them what is to be told of them. `bad` takes bad rows
        only where they stand beside an error of the whole."""
        begun = told = time.monotonic()
        found, digest, rows = Collected(), row_tables.Digest(), 0
        notes = source.reading.notes
        of_others = collections.Counter(notes)
        notes.clear()
        with pa.ipc.new_file(file, self.layout.schema) as writer:
            for part, refused, found.seen in self._parts(source, bad):
                writer.write_batch(part)
                digest.add(part, self.layout.columns)
                found += refused
                rows += len(part)
                if time.monotonic() - told > TELL_EVERY:
                    told = time.monotonic()
                    _say(f"{source.name}: {rows:,} rows, {rows / (told - begun):,.0f} a second")
            facts = {"digest": digest.hexdigest(), "seen": found.seen, "bad": list(found)}
            facts["notes"] = dict(notes)
            end = pa.RecordBatch.from_pylist([], self.layout.schema)
            writer.write_batch(end, custom_metadata={"facts": json.dumps(facts, default=str)})
        notes.clear()
        notes.update(of_others)  # _mapped adds this file's
        speed = rows / (time.monotonic() - begun)
        _say(f"{source.name}: {rows:,} rows, {speed:,.0f} a second, kept in {path}")

    def _parts(
        self, source: Source, bad: BadRows
    ) -> Iterator[tuple[pa.RecordBatch, Collected, int]]:
        """(rows, bad rows among them, rows seen so far), in order, from one process a core."""
        unread = Collected()
        try:
            schema, rows = source.open(unread)
        except DataError:
            unread.hand_on(bad)
            raise
        count = len(os.sched_getaffinity(0))
        job = functools.partial(_part, source, self.encode, self.layout, schema)
        # Forked, so that tokenizers of a model's own Python files need not be sent: a worker
        # touches neither the accelerator nor torch's threads, which it would not find again.
        context = multiprocessing.get_context("fork")
        waiting, more = collections.deque(), True
        with futures.ProcessPoolExecutor(count, context, _begin, (job, os.getpid())) as pool:
            while more or waiting:
                while more and len(waiting) < 2 * count + 2:
                    some = list(itertools.islice(rows, CHUNK))
                    more = len(some) == CHUNK
                    waiting.append((Collected(unread), pool.submit(_work, some)))
                    unread.clear()
                refused, future = waiting.popleft()
                try:
                    part, more_refused, told = future.result()
                except BrokenProcessPool as error:
                    raise DataError(
                        f"{source.name}: a process that tokenised rows was killed, for want of "
                        "memory perhaps; nothing was kept, so start again"
                    ) from error
                source.reading.notes.update(told)
                yield part, Collected([*refused, *more_refused]), unread.seen

    def _mapped(self, path: Path, source: Source) -> tuple[Table, Collected]:
        try:
            with open(path, "rb") as opened:
                mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            file = pa.ipc.open_file(pa.py_buffer(mapping))
            last = file.num_record_batches - 1
            parts = [file.get_batch(number) for number in range(last)]
            facts = file.get_batch_with_custom_metadata(last).custom_metadata[b"facts"]
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{path}: damaged ({error}); delete it, it is made again") from error
        facts = json.loads(facts)
        places = functools.partial(_kept_places, path, self.layout)
        table = Table(self.layout, parts, facts["digest"], mapping=mapping, kept_places=places)
        source.reading.notes.update(facts["notes"])
        found = Collected(map(tuple, facts["bad"]))
        found.seen = facts["seen"]
        return table, found


def _part(source: Source, encode, layout: Layout, schema: str, rows: list):
    source.reading.notes.clear()
    columns, items, bad = row_tables.encoded(source, encode, layout, schema, rows)
    columns["item"] = list(map(row_tables.to_json, items))
    return pa.RecordBatch.from_pydict(columns, layout.schema), bad, dict(source.reading.notes)


_job: Callable = None  # a worker's


def _begin(job: Callable, parent: int) -> None:
    """What a worker does first. It must not outlive a parent that is killed: it holds the lock
    and the parent's connections to other ranks."""
    global _job
    _job = job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    set_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _work(rows: list):
    return _job(rows)


def folder_of(settings: DataSettings) -> Path:
    """Where the files go: --data_cache, or beside what the hub's libraries keep (HF_HOME), or in
    the output folder where that cannot be written."""
    if settings.data_cache:
        return Path(settings.data_cache)
    from huggingface_hub.constants import HF_HOME

    home = Path(HF_HOME, "rlhf_rows")
    try:
        check_folder(str(home))
    except ValueError as problem:
        _say(f"rows are kept in {settings.output_dir}/data_cache: {problem} (--data_cache)")
        return Path(settings.output_dir, "data_cache")
    return home


def once(path: Path, make: Callable) -> None:
    """Where there is no file `path` yet: `make(file)` writes it, in one process, while others that
    want it wait. It gets its name when all of it is on the disk."""
    if path.exists():
        return
    with whole_files.naming(path, "--data_cache"):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        try:
            held = lock.acquire(timeout=5)
        except Timeout:
            _say(f"another process makes {path}: waiting for it")
            held = lock.acquire()
        with held:
            if path.exists():
                return
            _remove_leftovers(path)
            own = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}")
            with whole_files.placing(own, "--data_cache") as beside, open(beside, "wb") as file:
                make(file)
            os.replace(own, path)


def _remove_leftovers(path: Path) -> None:
    """Of processes of this machine that were killed while they wrote."""
    for old in path.parent.glob(f".{path.name}.{socket.gethostname()}-*.writing"):
        if not psutil.pid_exists(int(old.name.removesuffix(".writing").rpartition("-")[2])):
            old.unlink(missing_ok=True)


def _kept_places(path: Path, layout: Layout, salt: str) -> np.ndarray:
    """Table.places of the rows in `path`, from a file beside it."""
    kept = path.with_suffix(f".{hashlib.sha256(salt.encode()).hexdigest()[:8]}.npy")
    once(kept, lambda file: np.save(file, _places(path, layout, salt)))
    return np.load(kept, mmap_mode="r")


def _places(path: Path, layout: Layout, salt: str) -> np.ndarray:
    # Read and not mapped: all the rows' text would count as this process's memory.
    only = pa.ipc.IpcReadOptions(included_fields=[layout.schema.get_field_index("item")])
    found = []
    with pa.OSFile(str(path)) as source, pa.ipc.open_file(source, options=only) as file:
        for number in range(file.num_record_batches):
            texts = file.get_batch(number).column("item").to_pylist()
            items = (row_tables.from_json(layout.item, text) for text in texts)
            found.append(np.array([place(item, salt) for item in items], float))
    return np.concatenate(found)


def _content(path: str) -> tuple:
    """A file's length, time and both ends: what changes when its content does."""
    facts = os.stat(path)
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(65_536))
        file.seek(max(0, facts.st_size - 65_536))
        digest.update(file.read())
    return path, facts.st_size, facts.st_mtime_ns, digest.hexdigest()


@functools.lru_cache
def _code(encoder: str) -> str:
    """Of the programs that decide what becomes of a row."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    scorers = here.parent / "models/scorer.py"  # sorts prompts out in step 3's encoder
    for file in sorted({*here.glob("*.py"), scorers, Path(encoder)}):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _version(name: str) -> str:
    from importlib.metadata import version

    return f"{name} {version(name)}"


def _told(value):
    """A setting in a form that says all of it, in every process the same."""
    if hasattr(value, "save_pretrained"):
        return _tokenizer(value)
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {name: _told(inner) for name, inner in value.items()}
    return [_told(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _tokenizer(tokenizer) -> str:
    """Of all that a tokenizer saves, and of what its template makes of prompts here and now."""
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


def _say(text: str) -> None:
    if process_group.is_main():
        print(text, flush=True)
