"""Files that are written whole or not at all, and messages for errors of the disk.

A file is written under a temporary name, synced and renamed: a full disk or a killed run leaves the
old content. A file that is appended to (metrics.jsonl) loses an unfinished line again.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

REMEDIES = {
    errno.ENOSPC: "free space on that disk or write elsewhere",
    errno.EDQUOT: "your quota is used up: free space or write elsewhere",
    errno.EFBIG: "a limit on file size (ulimit -f) is reached: raise it or write elsewhere",
    errno.EROFS: "that disk is mounted read-only: write elsewhere",
    errno.EACCES: "this user may not write there: write elsewhere",
    errno.EPERM: "this user may not write there: write elsewhere",
    errno.ENOTDIR: "a part of that path is a file: write elsewhere",
    errno.EEXIST: "a part of that path is a file: write elsewhere",
    errno.EISDIR: "that is a folder: name a file",
    errno.EIO: "the disk is failing: write elsewhere",
}


class CannotWrite(OSError):
    """A file that could not be written; the text names it, the cause and the remedy."""


@contextlib.contextmanager
def naming(path: str | Path, flag: str = "--output_dir") -> Iterator[None]:
    """Turns a failure to write into CannotWrite for `path`; `flag` says where it may go.

    safetensors tells the system's error number only in its text.
    """
    try:
        yield
    except CannotWrite:
        raise
    except (OSError, SafetensorError) as error:
        match = re.search(r"os error (\d+)", str(error))
        number = int(match[1]) if match else getattr(error, "errno", None)
        cause = os.strerror(number) if number else str(error)
        remedy = REMEDIES.get(number, "write elsewhere")
        raise CannotWrite(
            f"cannot write {path}: {cause}; {remedy} ({flag}). What was whole there stays as it was"
        ) from error


@contextlib.contextmanager
def placing(path: str | Path, flag: str = "--output_dir") -> Iterator[Path]:
    """A path beside `path` to write to, which gets its name when all of it is on the disk."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.writing")
    with naming(path, flag):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield beside
            sync(beside)
            os.replace(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise
        sync(path.parent)


@contextlib.contextmanager
def writing(path: str | Path, flag: str = "--output_dir"):
    """An open text file whose content is `path`'s once it is closed, and not before."""
    with placing(path, flag) as beside, open(beside, "w", encoding="utf-8") as file:
        yield file


@contextlib.contextmanager
def folder_beside(folder: str | Path) -> Iterator[Path]:
    """A new folder beside `folder` to write to, which is not there any more afterwards."""
    folder = Path(folder)
    beside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)  # of a run killed while it wrote
    with naming(folder):
        try:
            beside.mkdir(parents=True)
            yield beside
        finally:
            shutil.rmtree(beside, ignore_errors=True)  # a full disk needs the room


# Of a model in other files, or of another kind, that stood in the folder before.
WEIGHTS = ("model*.safetensors*", "adapter_*", "ilql_heads.safetensors", "config.json")


def move_into(new: Path, folder: Path, stale: tuple[str, ...]) -> None:
    """Move every file of `new` into `folder`, each in one step; other files there stay, but for
    those that match one of `stale`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {file.name for file in new.iterdir()}
    for name in written:
        sync(new / name)
    for name in sorted(written):
        os.replace(new / name, folder / name)
    for old in [file for pattern in stale for file in folder.glob(pattern)]:
        if old.name not in written:
            old.unlink()
    sync(folder)


def sync(path: str | Path) -> None:
    """The content of a file, or the names in a folder, are on the disk afterwards."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    with writing(path) as file:
        file.write(text)


def append_lines(path: str | Path, text: str, flag: str = "--output_dir") -> None:
    """Add whole lines at the end of a file, all of them or none."""
    with naming(path, flag):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            append(file, text)


def append(file, text: str) -> None:
    """Add `text` to a file opened with "ab" and buffering=0; on an OSError none of it stays."""
    end = file.seek(0, os.SEEK_END)
    rest = memoryview(text.encode("utf-8"))
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        file.truncate(end)
        raise
