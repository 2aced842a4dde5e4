"""Shared fixtures: a two-layer model with data, and programs run on one or two CPU ranks."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two threads that wait for each other cost more than models this small, and each worker of
# pytest-xdist would have as many as there are cores.
os.environ["OMP_NUM_THREADS"] = "1"

from utils.distributed import process_group
from utils.models import cpu_products

# What takes longest begins first, so that no worker is left with it when the others have finished.
LONG_FIRST = ["test_steps.py", "test_launch.py", "test_self_check.py", "test_ppo_options.py"]
LONG_FIRST += ["test_pretended_device.py"]


@pytest.hookimpl(trylast=True)  # pytest itself sorts by the parameters of fixtures
def pytest_collection_modifyitems(items) -> None:
    places = {name: place for place, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))  # stable


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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return built_once(tmp_path_factory, "tiny", build_tiny)


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
                [sys.executable, str(ROOT / "tests/step_worker.py"), spec],
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


@pytest.fixture(scope="session")
def chain(tiny, tmp_path_factory) -> Path:
    """Steps 1 and 2 once, for step 3 to start from."""
    from test_steps import collect, reward, sft

    def build(folder):
        jobs = [
            sft(tiny, folder / "sft", "--max_steps", 60),
            collect(tiny, folder / "sft"),
            reward(tiny, folder / "sft", folder / "reward", "--max_steps", 30),
        ]
        run_ranks(jobs, 1)

    return built_once(tmp_path_factory, "chain", build)


@pytest.fixture(scope="session")
def other(tiny, tmp_path_factory) -> Path:
    """A GPT-2 as reward model: fewer tokens, other ids, a template of its own."""
    import families
    from test_reward_model import TEMPLATE

    from utils.models import from_scratch

    def build(folder):
        texts = filter(str.isascii, from_scratch.texts_of([str(tiny / "data/sft.jsonl")]))
        tokenizer = from_scratch.train_tokenizer(texts, 400)
        tokenizer.chat_template = TEMPLATE
        families.write(folder, "GPT2", tokenizer)

    return built_once(tmp_path_factory, "other", build) / "reward"


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


@pytest.fixture
def onednn_wherever_it_can(monkeypatch):
    """oneDNN multiplies on every CPU that has the kernels, faster or not."""
    monkeypatch.setattr(cpu_products, "MARGIN", 1e-9)


@pytest.fixture
def older_cpu() -> dict[str, str]:
    """The environment of a process that takes this CPU for one without AVX-512. It reaches torch's
    own kernels and oneDNN; MKL, NumPy and what DeepSpeed compiles still see the real one."""
    return os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
