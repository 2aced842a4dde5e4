"""CUDA_VISIBLE_DEVICES through utils/launch.sh: ranks get it as the user wrote it."""

import os
import subprocess
import sys

import pytest

from tests.helpers.running import ROOT

RANK = """
import os, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
seen = [os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "WORLD_SIZE")]
(folder / f"rank{os.environ['RANK']}").write_text("; ".join([*seen, *sys.argv[1:]]))
"""


def launch(folder, program, *words, **environment):
    """utils/launch.sh's `launch`, of a program outside the repository."""
    script = f'. "{ROOT}/utils/launch.sh"; launch "$@"'
    done = subprocess.run(
        ["bash", "-c", script, "bash", os.path.relpath(program, ROOT), *words],
        cwd=folder,
        env=os.environ | {"DS_ACCELERATOR": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


# In the order the user wants, which DeepSpeed would sort, and by name, which it cannot read.
DEVICES = "5,GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,4"


def test_ranks_of_the_real_launcher_see_the_devices_named(tmp_path):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    (tmp_path / "rank.py").write_text(RANK)
    given = dict(CUDA_VISIBLE_DEVICES=DEVICES, PATH=path)
    output = launch(tmp_path, tmp_path / "rank.py", "--output_dir", "out", "--x", "a b", **given)
    assert "ignoring" not in output
    found = {p.name: p.read_text() for p in (tmp_path / "out").glob("rank*")}
    ranks = min(2, os.cpu_count())
    assert found == {
        f"rank{i}": f"{DEVICES}; {i}; {ranks}; --output_dir; out; --x; a b" for i in range(ranks)
    }


# Stands for Python: answers launch.sh's questions, else writes down how it was started.
RECORDER = """#!/bin/bash
case $1 in - | -c | */launch.py) exec {python} "$@" ;; esac
echo "sees ${{CUDA_VISIBLE_DEVICES-nothing}}; $*" >started
"""


@pytest.mark.parametrize(
    "flags, devices, expected",
    [
        # launch/single_gpu.sh's
        ("--num_gpus 1", DEVICES, f"sees nothing; --num_gpus 1 ... env {DEVICES}"),
        (
            "--master_port 9",
            "3,1",
            "sees nothing; --master_port 9 --num_accelerators N ... env 3,1",
        ),
        ("--num_gpus 1", "", "sees ; --num_gpus 1"),
        # Devices named twice: DeepSpeed takes these, and says so.
        ("--include localhost:1", "4,5", "sees 4,5; --include localhost:1"),
        ("--exclude=localhost:1", "4,5", "sees 4,5; --exclude=localhost:1"),
        ("--hostfile hosts", "4,5", "sees 4,5; --hostfile hosts"),
    ],
)
def test_what_the_launcher_is_told(tmp_path, flags, devices, expected):
    python = tmp_path / "python3"
    python.write_text(RECORDER.format(python=sys.executable))
    python.chmod(0o755)
    (tmp_path / "rank.py").touch()
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    environment = dict(PATH=f"{tmp_path}:{os.environ['PATH']}", LAUNCH=flags)
    environment["CUDA_VISIBLE_DEVICES"] = devices
    launch(tmp_path, tmp_path / "rank.py", "--output_dir", "out", **environment)
    told = (tmp_path / "started").read_text().strip()
    for given, short in (
        ("-m deepspeed.launcher.runner --log_level warning ", ""),
        (f" {ROOT / os.path.relpath(tmp_path / 'rank.py', ROOT)} --output_dir out", ""),
        (f"--num_accelerators {min(2, os.cpu_count())}", "--num_accelerators N"),
        (f"--no_python --no_local_rank env CUDA_VISIBLE_DEVICES={devices} {python} -u",
         f"... env {devices}"),
    ):  # fmt: skip
        told = told.replace(given, short)
    assert told == expected
