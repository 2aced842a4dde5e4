"""What a run ran on, for whoever reads its results: libraries, hardware, commit, command."""

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from utils import whole_files
from utils.settings.secrets import hidden

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "deepspeed", "transformers", "datasets")


def commit() -> str:
    """The commit of the code, "…, changed" where files differ; empty where git knows none."""

    def git(*words: str) -> subprocess.CompletedProcess:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True)

    try:
        found = git("rev-parse", "--short=12", "HEAD")
        changed = git("diff", "--quiet", "HEAD").returncode == 1
    except OSError:  # git is not installed
        return ""
    return found.stdout.strip() + (", changed" if changed else "") if not found.returncode else ""


def processor() -> str:
    """The name of the CPU as Linux tells it."""
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    )
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} × {names[0] if names else platform.machine()}"


def describe(ranks: int) -> dict:
    """{what: text}"""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    libraries = {name: version(name) for name in LIBRARIES}
    return {
        "command": hidden(shlex.join(sys.argv)),
        "commit": commit(),
        "python": platform.python_version(),
        **libraries,
        "system": platform.platform(),
        "processor": processor(),
        "gpus": ", ".join(gpus),
        "ranks": ranks,
    }


def save(output_dir: str, ranks: int) -> None:
    text = json.dumps(describe(ranks), indent=2, ensure_ascii=False)
    whole_files.write_text(Path(output_dir) / "machine.json", text + "\n")
