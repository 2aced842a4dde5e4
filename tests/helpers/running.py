"""A two-layer model with data, and programs run on one or two CPU ranks."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from utils.distributed import process_group

ROOT = Path(__file__).resolve().parent.parent.parent
# fp32 sums in another order differ in the seventh digit; a few Adam steps, which divide small
# gradients by their own size, raise that to the fifth.
CLOSE = dict(rel=2e-4, abs=2e-5)


def files_of(folder: Path, pattern: str) -> list[Path]:
    """The repository's files below `folder`, without the environments that were made there."""
    found = sorted(folder.rglob(pattern))
    return [p for p in found if not any(part.startswith(".venv") for part in p.parts)]


def build_tiny(folder: Path, family: str = "llama") -> Path:
    """data/ of the embedded task (small) and base_model/ with two layers, under `folder`."""
    from utils.data import toy_tasks
    from utils.models import from_scratch

    toy_tasks.write(folder / "data", 0, demonstrations=240, prompts=160, held_out=32)
    from_scratch.build(
        folder / "base_model",
        from_scratch.texts_of([str(folder / "data/sft.jsonl")]),
        vocab_size=512,
        hidden_size=32,
        layers=2,
        heads=4,
        intermediate_size=64,
        max_positions=256,
        seed=0,
    )
    return folder


def built_once(tmp_path_factory, name: str, build: Callable[[Path], object]) -> Path:
    """The folder `name`, which `build(folder)` fills: once for all workers of pytest-xdist."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, done = root / name, root / f"{name}.done"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            folder.mkdir()
            build(folder)
            done.touch()
    return folder


def run_ranks(
    jobs: list[tuple[str, list[str]]], ranks: int, timeout: int = 900, accelerator: str = "cpu"
) -> str:
    """Run each (program, arguments) in turn in one process group of `ranks` ranks.

    Returns what all ranks printed; fails the test if a rank exits with another code than 0.
    """
    port = process_group.free_port()
    spec = json.dumps([[program, list(map(str, argv))] for program, argv in jobs])
    processes = []
    for rank in range(ranks):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": accelerator,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "tests/helpers/step_worker.py"), spec],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [p.communicate(timeout=timeout)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()  # a rank that waits for ever would outlive the tests
    codes = [p.returncode for p in processes]
    assert codes == [0] * ranks, f"exit codes {codes}\n" + "\n---\n".join(outputs)
    return "\n".join(outputs)


def metrics_of(folder: Path, name: str) -> list[float]:
    """The values of one metric over the steps of a run."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [row[name] for row in map(json.loads, lines) if name in row]


def assert_same_path(runs, names):
    """`runs`: folders by name; the metrics `names` of all must follow the first one's."""
    (first, reference), *others = runs.items()
    for name in names:
        expected = metrics_of(reference, name)
        assert len(expected) >= 3 and len(set(expected)) > 1, f"{name} does not move: {expected}"
        for other, folder in others:
            got = metrics_of(folder, name)
            assert got == pytest.approx(expected, **CLOSE), f"{name}: {other} is not {first}"


def run_without_a_gpu(script: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a script that needs a GPU, OUTPUT in `folder`, where torch sees none."""
    (folder / "torch.py").write_text("class cuda: is_available = staticmethod(lambda: False)\n")
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", ROOT / script],
        env=os.environ | {"PATH": path, "PYTHONPATH": str(folder), "OUTPUT": str(folder / "o")},
        capture_output=True,
        text=True,
        timeout=120,
    )
