"""A checkpoint's folder on disk: all of it or none, and every byte accounted for.

Files are written to `.step-000120.writing`, synced, listed with size and SHA-256 in manifest.json,
and the folder is renamed to `step-000120`. Tensors are safetensors files of our own keys, written
as a stream, so that no second copy of a rank's state is held; everything else is JSON. Nothing is
pickled.
"""

import contextlib
import hashlib
import json
import os
import shutil
from operator import itemgetter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from utils import whole_files
from utils.distributed import process_group

FORMAT = 2
_NAMES = {  # safetensors' names of what a training state holds
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


class Damaged(Exception):
    """A checkpoint that is not what was written; the text names the file and what is wrong."""


def folder_of(output_dir, step: int) -> Path:
    return Path(output_dir) / "checkpoints" / f"step-{step:06d}"


def steps_in(output_dir) -> list[int]:
    """The steps that have a checkpoint under this output folder, newest first."""
    numbers = (f.name[5:] for f in Path(output_dir, "checkpoints").glob("step-*"))
    return sorted((int(n) for n in numbers if n.isdigit()), reverse=True)


def remove_unfinished(output_dir) -> None:
    """What a killed run left of a checkpoint that it was writing or deleting."""
    for folder in Path(output_dir, "checkpoints").glob(".step-*"):
        shutil.rmtree(folder)


def remove(folder: Path) -> None:
    """Delete a checkpoint so that no reader ever sees half of it."""
    away = folder.with_name(f".{folder.name}.deleting")
    shutil.rmtree(away, ignore_errors=True)
    os.replace(folder, away)
    shutil.rmtree(away)


@contextlib.contextmanager
def failing_together():
    """An OSError of one rank inside (a full disk) is an OSError of every rank, which would else
    wait for it. Every rank must pass through it."""
    problem = None
    try:
        yield
    except (OSError, SafetensorError) as error:
        problem = f"rank {process_group.rank()}: {error}"
    problems = [p for p in process_group.gather_objects(problem) if p]
    if problems:
        raise OSError("; ".join(problems))


# Writing.


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> dict:
    """One safetensors file, synced; returns its {"bytes", "sha256"}."""
    header, offset = {}, 0
    for key, t in tensors.items():
        size = t.numel() * t.element_size()
        header[key] = {
            "dtype": _NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest, written = hashlib.sha256(), 0
    with open(path, "wb") as f:
        for part in (len(head).to_bytes(8, "little"), head):
            digest.update(part)
            written += f.write(part)
        for t in tensors.values():
            plain = t.detach().to("cpu").contiguous().reshape(-1)
            if plain.numel():
                data = memoryview(plain.view(torch.uint8).numpy())
                digest.update(data)
                written += f.write(data)
        f.flush()
        os.fsync(f.fileno())
    return {"bytes": written, "sha256": digest.hexdigest()}


def listed(folder: Path, known: dict[str, dict]) -> dict[str, dict]:
    """{path in `folder`: {"bytes", "sha256"}} of the files there that are not `known`, each synced.
    OSError where a known one is not there."""
    for name in known:
        if not (folder / name).is_file():
            raise OSError(
                f"{folder / name} was written by another rank and is not here: --output_dir must "
                "be a folder that all nodes share"
            )
    files = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in known:
            whole_files.sync(path)
            files[name] = _measured(path)
    return files


def seal(temporary: Path, folder: Path, record: dict) -> None:
    """Write the manifest, `record` with its own checksum, and give the folder its final name."""
    text = json.dumps({"sha256": _digest_of(record)} | record, indent=1)
    whole_files.write_text(temporary / "manifest.json", text)
    for inner in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
        whole_files.sync(inner)
    if folder.exists():
        remove(folder)  # a damaged one, which this run resumed from before
    os.replace(temporary, folder)
    whole_files.sync(folder.parent)


def _digest_of(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _measured(path: Path) -> dict:
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as f:
        while block := f.read(2**22):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


# Reading.


def read(folder: Path) -> dict:
    """The manifest of a checkpoint; Damaged where it is not one, or not as it was written."""
    path = folder / "manifest.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{path} is not there") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from None
    if not isinstance(record, dict) or record.pop("sha256", None) != _digest_of(record):
        raise Damaged(f"{path} was changed since it was written (its checksum differs)")
    if record["format"] != FORMAT:
        raise Damaged(f"{path} is of format {record['format']}; this program reads {FORMAT}")
    return record


def verify(folder: Path, record: dict) -> None:
    """Raise Damaged, on every rank, where a file is lost or changed. Ranks share the reading."""
    names = sorted(record["files"])
    mine = names[process_group.rank() :: process_group.world_size()]
    problem = next(filter(None, (_problem_of(folder / n, record["files"][n]) for n in mine)), None)
    problems = [p for p in process_group.gather_objects(problem) if p]
    if problems:
        raise Damaged("; ".join(problems))


def _problem_of(path: Path, expected: dict) -> str | None:
    try:
        now = _measured(path)
    except FileNotFoundError:
        return f"{path} is lost"
    except OSError as error:
        return f"{path} cannot be read: {error}"
    if now["bytes"] != expected["bytes"]:
        return f"{path} has {now['bytes']} bytes and was written with {expected['bytes']}"
    if now["sha256"] != expected["sha256"]:
        return f"{path} was changed since it was written (its SHA-256 differs)"
    return None


class Reader:
    """Flat runs of named tensors from the files of all ranks of a checkpoint.

    A key is `part|name|kind|start`: elements from `start` of the flattened tensor `name`. Which
    rank wrote which run does not matter, so any ZeRO stage and any number of ranks
    can read what another one wrote.
    """

    def __init__(self, folder: Path, names: list[str]):
        self._runs: dict[tuple[str, str, str], list] = {}
        for name in names:
            file = safe_open(folder / name, framework="pt")
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                part, tensor, kind, start = key.split("|")
                length = file.get_slice(key).get_shape()[0]
                runs = self._runs.setdefault((part, tensor, kind), [])
                runs.append((int(start), length, file, key))
        for runs in self._runs.values():
            runs.sort(key=itemgetter(0))

    def has(self, part: str, name: str, kind: str) -> bool:
        return (part, name, kind) in self._runs

    def whole(self, part: str, name: str, kind: str) -> torch.Tensor:
        """A tensor that one rank wrote in one run."""
        ((_, _, file, key),) = self._runs[part, name, kind]
        return file.get_tensor(key)

    def read(self, part: str, name: str, kind: str, start: int, length: int) -> torch.Tensor:
        """Elements [start, start + length) of a flattened tensor, as it was written."""
        pieces, have = [], start
        for begin, count, file, key in self._runs.get((part, name, kind), []):
            if begin <= have < min(begin + count, start + length):
                upto = min(begin + count, start + length)
                pieces.append(file.get_slice(key)[have - begin : upto - begin])
                have = upto
        if have < start + length:
            raise Damaged(
                f"the checkpoint holds {kind} of {part} {name!r} up to element {have}, and "
                f"{start + length} are wanted: it is of another model"
            )
        return torch.cat(pieces) if len(pieces) != 1 else pieces[0]
