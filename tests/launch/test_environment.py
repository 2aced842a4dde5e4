"""utils/environment.sh: which Python is taken, what makes it refuse, and when the CPU will do."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers.running import ROOT

PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.M))
# Stands for Python: in .venv it has what requirements.txt pins, elsewhere what $HAVE holds. Answers
# questions itself, makes .venv by copying itself, and writes down what pip is told.
FAKE = """#!/bin/bash
case $0 in */.venv/*) have=$PINNED ;; *) have=$HAVE ;; esac
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") case "$*" in *--report*) cat "$REPORT" ;; *) echo "pip ${*: -1}" ;; esac ;;
    *) PYTHONPATH=$have exec "$REAL" -S "$@" ;;  # with no packages of its own
esac
"""


def installed(folder, **versions):
    """A folder in which importlib.metadata finds the pinned versions, or these."""
    for name, version in (PINS | versions).items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(text)
    return folder


@pytest.fixture
def house(tmp_path):
    """A clone with nothing in it but what set-up reads, and a fake Python on its own PATH."""
    (tmp_path / "clone/utils").mkdir(parents=True)
    for name in ("utils/environment.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / "clone" / name)
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin/python3", FAKE)
    installed(tmp_path / "pinned")
    return tmp_path


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)


def set_up(house, calls="set_up_environment", **environment):
    """(exit code, all output) of the shell functions `calls`, then `PYTHON`'s place."""
    script = (
        f'ROOT={house}/clone; . "$ROOT/utils/environment.sh"; {calls}; echo "took ${{PYTHON:-}}"'
    )
    shared = {k: v for k, v in os.environ.items() if k not in ("DS_ACCELERATOR", "PYTHONPATH")}
    shared |= {"PATH": f"{house}/bin:/usr/bin:/bin", "REAL": sys.executable}
    shared |= {"PINNED": str(house / "pinned"), "HAVE": str(house / "have")}
    done = subprocess.run(
        ["bash", "-c", script],
        env=shared | {"REPORT": str(house / "report")} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("torch", ["2.11.0", "2.11.0a0+vendor", "2.12.1+cpu", PINS["torch"]])
def test_versions_from_the_floor_to_the_pin_are_taken_in_silence(house, torch):
    installed(house / "have", torch=torch, transformers="5.17.0", deepspeed="0.19.4")
    assert set_up(house) == (0, f"took {house}/bin/python3\n")


def test_newer_versions_are_taken_and_told(house):
    installed(house / "have", torch="2.13.1+cu130", transformers="6.0.0", ruff="0.17.5")
    code, output = set_up(house)
    told = f"torch 2.13.1+cu130 ({PINS['torch']}), transformers 6.0.0 ({PINS['transformers']})\n"
    assert code == 0 and f"newer than what was tested (in brackets): {told}" in output
    assert f"took {house}/bin/python3" in output


def test_versions_below_the_floor_are_not_taken(house):
    """All in one message, and .venv is made in their place."""
    installed(house / "have", torch="2.10.9", transformers="5.9.0", deepspeed="0.19.3")
    shutil.rmtree(next((house / "have").glob("tqdm-*")))
    code, output = set_up(house)
    assert code == 0, output
    lacks = "torch 2.11 or newer (older ones were never tried; it has 2.10.9), "
    lacks += (
        "deepspeed 0.19.4 or newer (the first with managed_gradient_accumulation; it has 0.19.3), "
    )
    lacks += "transformers 5.17 or newer (older ones were never tried; it has 5.9.0), tqdm"
    assert f"{house}/bin/python3 lacks {lacks} → making {house}/clone/.venv" in output
    assert "pip wheel" in output and f"pip {house}/clone/requirements.txt" in output
    assert f"took {house}/clone/.venv/bin/python" in output
    # The next run finds it, if nothing in it is too old.
    assert set_up(house) == (0, f"took {house}/clone/.venv/bin/python\n")
    installed(house / "old", torch="2.9.0")
    assert "→ making" in set_up(house, PINNED=str(house / "old"))[1]


WHEELS = {"cpu": ["filelock", "triton; extra"], "cuda": ["filelock", "nvidia-cudnn-cu13==9.2"]}


@pytest.mark.parametrize(
    "free, wheel, enough",
    [
        (3.9, "cpu", False),
        (4.1, "cpu", True),
        (9.9, "cuda", False),
        (9.9, None, False),  # a pip that cannot tell
        (10.1, "cuda", True),
        (10.1, None, True),
    ],
)
def test_disk_is_checked_for_the_torch_that_pip_would_install(house, free, wheel, enough):
    (house / "have").mkdir()
    if wheel:
        report = {"install": [{"metadata": {"name": "torch", "requires_dist": WHEELS[wheel]}}]}
        (house / "report").write_text(json.dumps(report))
    line = f"/dev/x 99999999 1 {int(free * 1e6)} 1% /"
    program(house / "bin/df", f"#!/bin/sh\necho header\necho {line}\n")
    code, output = set_up(house)
    assert code == (0 if enough else 3), output
    need = "4 GB are needed, as pip takes torch for CPUs"
    if wheel != "cpu":
        need = "10 GB are needed, as pip takes torch for CUDA"
    assert (need in output) == (not enough) and ("pip wheel" in output) == enough


# torch on a machine whose driver is too old for it, or that has no GPU.
TORCH = """
__version__ = "2.13.0"
class version: cuda = "13.0"
class cuda:
    is_available = staticmethod(lambda: {available})
    def init(): raise RuntimeError("The NVIDIA driver is too old (found version 11040).\\nMore.")
"""
SMI = "#!/bin/sh\necho 'GPU 0: NVIDIA A10 (UUID: GPU-1)'\n"
NO_SMI = "#!/bin/sh\necho 'No devices found.'\n"
ASK = 'PYTHON=$(command -v python3); set_up_accelerator; echo "accelerator ${DS_ACCELERATOR:-open}"'


def accelerator(house, available=False, smi=SMI, **environment):
    (house / "have").mkdir(exist_ok=True)
    (house / "have/torch.py").write_text(TORCH.format(available=available))
    program(house / "bin/nvidia-smi", smi)
    # Whatever the machine of the test has: only what nvidia-smi says counts.
    return set_up(house, "compgen() { false; }; " + ASK, **environment)


def test_a_gpu_that_torch_cannot_use_ends_the_run(house):
    code, output = accelerator(house)
    assert code == 3 and "accelerator" not in output
    for part in (
        "a GPU (GPU 0: NVIDIA A10 (UUID: GPU-1)) that torch cannot use",
        "The NVIDIA driver is too old (found version 11040). (torch 2.13.0, built for CUDA 13.0)",
        "DS_ACCELERATOR=cpu",
    ):
        assert part in output
    code, output = accelerator(house, CUDA_VISIBLE_DEVICES="7")
    assert code == 3 and "CUDA_VISIBLE_DEVICES (now 7)" in output


def test_a_device_file_shows_a_gpu_where_nvidia_smi_is_not_installed(house):
    (house / "have").mkdir()
    (house / "have/torch.py").write_text(TORCH.format(available=False))
    code, output = set_up(house, "compgen() { echo /dev/nvidia0; }; " + ASK)
    assert code == 3 and "a GPU (/dev/nvidia0) that torch cannot use" in output


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_gpus_hidden_on_purpose_are_not_missed(house, hidden):
    code, output = accelerator(house, CUDA_VISIBLE_DEVICES=hidden)
    assert (code, output.splitlines()[0]) == (0, "accelerator cpu")


def test_a_choice_is_kept_and_without_a_gpu_there_is_none(house):
    for given, expected in (
        (dict(DS_ACCELERATOR="cpu"), "cpu"),
        (dict(DS_ACCELERATOR="cuda"), "cuda"),
        (dict(available=True), "open"),
        (dict(smi=NO_SMI), "cpu"),
    ):
        code, output = accelerator(house, **given)
        assert (code, output.splitlines()[0]) == (0, f"accelerator {expected}"), given
