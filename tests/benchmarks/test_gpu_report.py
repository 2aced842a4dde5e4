"""benchmarks/gpu.sh: what its figures come to, and that it never passes without a GPU."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import gpu_report, trl_environment
from tests.helpers.running import ROOT, run_without_a_gpu

RATES = {"fp32": 5e13, "bf16": 6e14, "memory": 3e12}


def side(name, floor, **seconds):
    """A record as figures.compare makes it, of three turns."""
    turns = {phase: [2 * s, s, s / 2] for phase, s in seconds.items()}
    return {"system": name, "seconds": turns, "floor_seconds": floor, "peak_memory": 12.34e9}


def write(folder, part, *systems):
    folder.mkdir(parents=True, exist_ok=True)
    result = {"systems": systems, "rates": RATES, "tokens": 4096}
    text = json.dumps({"results": [result]})
    (folder / f"{part}_throughput.json").write_text(text, encoding="utf-8")


@pytest.fixture
def measured(tmp_path):
    shape = tmp_path / "qwen"
    floor, total = {"generate": 0.25}, {"train": 1.0, "total": 2.0}
    write(
        shape,
        "rollout",
        side("generate-bf16", floor, generate=4.0),
        side("compiled-bf16", floor, generate=1.5),
        side("ours-bf16, ZeRO-0", floor, generate=0.5),
    )
    write(shape, "ppo", side("ours-bf16", total, train=2.0, total=4.0))
    write(shape / "trl", "ppo", side("trl-bf16", total, train=5.0, total=14.0))
    write(shape, "sft", side("ours-bf16", {"total": 0.4}, total=1.0))
    write(shape, "reward", side("ours-bf16", {"total": 0.5}, total=1.0))
    case = {"case": "sft-q0.5B", "predicted": 9e9, "measured": 1e10, "ratio": 0.9, "phase": "loss"}
    (tmp_path / "planner.json").write_text(json.dumps([case]))
    return tmp_path


def report(folder, *flags):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_report", folder, "--device", "cpu", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, (folder / "gpu.md").read_text(encoding="utf-8")


def test_the_tables_hold_the_ratios_and_the_record_everything(measured):
    (measured / "left_out.txt").write_text("gpu.sh: LEFT OUT: something\n")
    code, text = report(measured)
    assert code == 0
    for row in (
        "| shape | system | tokens/s | ÷ compiled | of the floor | ÷ generate |",
        "| qwen | generate-bf16 | 1,024 | 0.38 | 6.2% |  |",
        "| qwen | ours-bf16, ZeRO-0 | 8,192 | 3.00 | 50.0% | 8.00 |",
        "| qwen | ours-bf16 | train | 2 | 50.0% | 2.50 |  |  |",
        "| qwen | ours-bf16 | total | 4 | 50.0% | 3.50 | 1,024 | 12.3 |",
        "| qwen | trl-bf16 | total | 14 | 14.3% |  | 293 | 12.3 |",
        "| qwen | ours-bf16 | total | 1 | 40.0% | 4,096 | 12.3 |",
        "| sft-q0.5B | 9,000 | 10,000 | 0.900 | loss |",
        "qwen: 50,000 GFLOP/s in fp32, 600,000 GFLOP/s in bf16, 3,000 GB/s.",
        "- gpu.sh: LEFT OUT: something",
        "**A walk without a GPU, on tiny shapes: these figures say nothing.**",
    ):
        assert row in text.splitlines(), f"{row}\nis not in\n{text}"
    kept = json.loads((measured / "gpu.json").read_text(encoding="utf-8"))
    assert kept["walk"] and kept["date"] and kept["machine"]["cpu"] and kept["commit"]
    assert kept["shapes"]["qwen"]["ppo"]["trl-bf16"]["seconds"]["total"] == [28.0, 14.0, 7.0]


def test_what_is_faster_than_its_floor_is_told(measured):
    shapes = gpu_report.read(measured)["shapes"]
    assert gpu_report.impossible(shapes) == []
    shapes["qwen"]["ppo"]["ours-bf16"]["floor_seconds"]["train"] = 2.3
    (told,) = gpu_report.impossible(shapes)
    assert told == "qwen/ppo ours-bf16, train: 2 s, and the floor is 2.3"


def test_a_part_that_is_missing_fails_the_report(measured):
    (measured / "qwen/ppo_throughput.json").unlink()  # TRL's own is still there
    (measured / "planner.json").unlink()
    code, text = report(measured)
    assert code == 1
    assert "- gpu.sh: MISSING: qwen/ppo" in text and "- gpu.sh: MISSING: planner" in text


def test_without_a_gpu_the_script_fails_and_says_so(tmp_path):
    done = run_without_a_gpu("benchmarks/gpu.sh", tmp_path)
    assert done.returncode == 4 and "torch sees no GPU here" in done.stderr
    assert not (tmp_path / "o").exists()


def test_an_interpreter_that_has_trl_is_taken(monkeypatch):
    """A machine without network may bring it."""
    monkeypatch.setattr(trl_environment.importlib.metadata, "version", lambda name: "1.12.0")
    assert str(trl_environment.make_environment()) == sys.executable
    monkeypatch.setattr(trl_environment.importlib.metadata, "version", lambda name: "1.12")
    monkeypatch.setattr(trl_environment.subprocess, "run", refuse)
    monkeypatch.setattr(trl_environment, "VENV", ROOT / "no such folder")
    with pytest.raises(FileNotFoundError, match="venv"):
        trl_environment.make_environment()


def refuse(command, check):
    raise FileNotFoundError(" ".join(map(str, command)))


@pytest.mark.slow
def test_the_walk_goes_through(tmp_path):
    environment = os.environ | {"OUTPUT": str(tmp_path)}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu.sh", "--walk"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    for system in ("generate-bf16", "compiled-bf16", "ours-bf16, ZeRO-0", "ours-bf16"):
        assert f"| walk | {system} |" in text, text
    assert "| sft-20M-bf16-zero0 |" in text and "these figures say nothing" in text
    assert gpu_report.read(tmp_path)["missing"] == []
