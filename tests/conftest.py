"""Fixtures that many tests share."""

import os
from pathlib import Path

import pytest

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two threads that wait for each other cost more than models this small, and each worker of
# pytest-xdist would have as many as there are cores.
os.environ["OMP_NUM_THREADS"] = "1"

from tests.helpers.jobs import collect, reward, sft
from tests.helpers.running import build_tiny, built_once, run_ranks
from utils.kernels import cpu_products

# What takes longest begins first, so that no worker is left with it when the others have finished.
LONG_FIRST = ["test_steps.py", "test_launch.py", "test_self_check.py", "test_main.py"]
LONG_FIRST += ["test_pretended_device.py"]


@pytest.hookimpl(trylast=True)  # pytest itself sorts by the parameters of fixtures
def pytest_collection_modifyitems(items) -> None:
    places = {name: place for place, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))  # stable


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return built_once(tmp_path_factory, "tiny", build_tiny)


@pytest.fixture(scope="session")
def chain(tiny, tmp_path_factory) -> Path:
    """Steps 1 and 2 once, for step 3 to start from."""

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
    from tests.helpers import chat_templates, families
    from utils.models import from_scratch

    def build(folder):
        texts = filter(str.isascii, from_scratch.texts_of([str(tiny / "data/sft.jsonl")]))
        tokenizer = from_scratch.train_tokenizer(texts, 400)
        tokenizer.chat_template = chat_templates.AT_SPECIAL_TOKENS
        families.write(folder, "GPT2", tokenizer)

    return built_once(tmp_path_factory, "other", build) / "reward"


@pytest.fixture
def onednn_wherever_it_can(monkeypatch):
    """oneDNN multiplies on every CPU that has the kernels, faster or not."""
    monkeypatch.setattr(cpu_products, "MARGIN", 1e-9)


@pytest.fixture
def older_cpu() -> dict[str, str]:
    """The environment of a process that takes this CPU for one without AVX-512. It reaches torch's
    own kernels and oneDNN; MKL, NumPy and what DeepSpeed compiles still see the real one."""
    return os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
