"""The environment that TRL runs in beside this repository: benchmarks/.venv_trl (1.7 GB)."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv_trl"
REQUIREMENTS = HERE / "requirements_trl.txt"
VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def make_environment() -> Path:
    """An interpreter with the TRL that is pinned: this one if it has it, else that of .venv_trl,
    which is made where it is missing or its pins have changed."""
    python, done = VENV / "bin/python", VENV / "installed.txt"
    pins = REQUIREMENTS.read_text(encoding="utf-8")
    if f"trl=={_installed('trl')} " in pins:
        return Path(sys.executable)
    if done.exists() and done.read_text(encoding="utf-8") == pins:
        return python
    print(f"making {VENV} from {REQUIREMENTS.name} (some minutes)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch first and alone: packages that ask for any torch are then content with this one.
    torch = next(line.split()[0] for line in pins.splitlines() if line.startswith("torch=="))
    subprocess.run([*pip, torch, "setuptools", "wheel"], check=True)
    subprocess.run([*pip, "-r", REQUIREMENTS], check=True)
    done.write_text(pins, encoding="utf-8")
    return python


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(make_environment())
