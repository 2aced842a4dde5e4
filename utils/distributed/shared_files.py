"""What the machines of a run must share is looked at before anything is read from it."""

import hashlib
import os
import secrets
import socket
import time
from pathlib import Path

from utils.distributed import peers, process_group

SECONDS_TO_APPEAR = 5.0  # a network file system may show a new file a little later
BYTES_COMPARED = 65_536  # of each file's beginning and end
PASSED_OVER = {"checkpoints", "tensorboard"}  # of a model's folder: read by no step
WRITTEN = {"output_dir", "output_file", "data_cache"}


def check(output_dir: str, settings: dict) -> None:
    """End the run where a machine does not see what another one wrote to the output folder, or
    where data or models at a path of the `settings` differ. Every rank must call it."""
    leaders = peers.leaders()
    if len(leaders) < 2:
        return
    problems = _output_problems(Path(output_dir), leaders) + _input_problems(settings, leaders)
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        process_group.leave(2, f"the machines do not see the same files:\n{lines}")


def _output_problems(folder: Path, leaders: list[int]) -> list[str]:
    """Each machine writes a file of its own and looks for those of the others."""
    token = process_group.gather_objects(secrets.token_hex(8))[0]
    files = {rank: folder / f".machine-{token}-{rank}" for rank in leaders}
    mine, error, unseen = files.get(process_group.rank()), "", []
    if mine:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mine.touch()
        except OSError as problem:
            error = str(problem)
    process_group.barrier()
    if mine:
        unseen = _unseen(files)
    ranks = process_group.gather_objects((socket.gethostname(), error, unseen))
    if mine and not error:
        mine.unlink(missing_ok=True)
    hosts = [host for host, _, _ in ranks]
    failed = [f"output_dir={folder} cannot be written to on {h}: {e}" for h, e, _ in ranks if e]
    pairs = [(hosts[w], hosts[r]) for r in leaders for w in ranks[r][2] if not ranks[w][1]]
    return failed + [
        f"output_dir={folder}: what {writer} writes there is not seen on {reader}; give a folder "
        "of a file system that all machines mount (NFS, Lustre, …)"
        for writer, reader in pairs
    ]


def _unseen(files: dict[int, Path]) -> list[int]:
    end = time.monotonic() + SECONDS_TO_APPEAR
    while True:
        unseen = [rank for rank, file in files.items() if not file.exists()]
        if not unseen or time.monotonic() > end:
            return unseen
        time.sleep(0.1)


def _input_problems(settings: dict, leaders: list[int]) -> list[str]:
    """Settings that name a file or folder which is not the same on every machine."""
    mine = _inputs(settings) if process_group.rank() in leaders else {}
    ranks = process_group.gather_objects((socket.gethostname(), mine))
    first, inputs = ranks[0]
    problems = []
    for setting, here in inputs.items():
        others = [(ranks[r][0], ranks[r][1][setting]) for r in leaders[1:]]
        for host, there in [other for other in others if other[1] != here][:1]:
            problems.append(
                f"{setting[0]}={setting[1]}: {_described(here)} on {first}, {_described(there)} on "
                f"{host}; copy it to the same path on every machine, or give one that all mount"
            )
    return problems


def _inputs(settings: dict) -> dict[tuple[str, str], tuple | None]:
    """(setting, value) → (files, bytes, digest) of what lies at that path, None where nothing."""
    inputs = {}
    for name in sorted(settings.keys() - WRITTEN):
        values = settings[name] if isinstance(settings[name], list) else [settings[name]]
        for value in values:
            if isinstance(value, str) and value:
                path = value if os.path.exists(value) else value.rpartition(":")[0]  # NAME:SPLIT
                inputs[name, value] = _fingerprint(Path(path)) if path else None
    return inputs


def _fingerprint(path: Path) -> tuple | None:
    if not path.exists():
        return None
    files = [path] if path.is_file() else _files_below(path)
    digest, size = hashlib.sha256(), 0
    for file in files:
        length = file.stat().st_size
        with open(file, "rb") as opened:
            beginning = opened.read(BYTES_COMPARED)
            opened.seek(max(0, length - BYTES_COMPARED))
            ending = opened.read(BYTES_COMPARED)
        digest.update(repr((str(file.relative_to(path)), length, beginning, ending)).encode())
        size += length
    return len(files), size, digest.hexdigest()


def _files_below(folder: Path) -> list[Path]:
    files = []
    for place, inner, names in os.walk(folder):
        inner[:] = [n for n in inner if n not in PASSED_OVER and not n.startswith(".")]
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(file for file in files if file.is_file())


def _described(entry: tuple | None) -> str:
    if entry is None:
        return "missing"
    files, size, digest = entry
    return f"{files} file{'s' * (files > 1)} of {size:,} bytes ({digest[:8]})"
