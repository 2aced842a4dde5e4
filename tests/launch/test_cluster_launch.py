"""How utils/launch.py and utils/requeue.sh speak with pdsh and Slurm, who are played by scripts.

tests/launch/test_nodes.py and tests/launch/test_slurm.py have the real ones (bash tests/nodes.sh).
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.running import ROOT
from utils import launch
from utils.distributed.process_group import free_port, interface_towards


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def environment(folder: Path, **more) -> dict[str, str]:
    """Where the programs of folder/bin stand first on the path."""
    path = f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "HOME": str(folder)} | more


def bash(folder: Path, command: str, **more) -> str:
    done = subprocess.run(
        ["bash", "-c", f". {ROOT}/utils/launch.sh; {command}"],
        cwd=folder,
        env=environment(folder, **more),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


HOSTS = "# two machines\nnode-a slots=8\n\nnode-b  slots=4 # of eight\n#node-c slots=16\n"


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ("--num_accelerators 2 --master_port 7", 2),
        ("--num_gpus 4", 4),
        ("--hostfile hosts", 12),
        ("--master_port 7 -H hosts", 12),
        ("--hostfile=hosts", 12),
        ("--hostfile hosts --include node-a", 0),
        ("--hostfile hosts --num_nodes 1", 0),
        ("--hostfile hosts --num_gpus 2", 0),
        ("--hostfile nowhere", 0),
        ("srun --mpi none", 16),
    ],
)
def test_ranks_of_a_launcher(tmp_path, monkeypatch, flags, ranks):
    (tmp_path / "hosts").write_text(HOSTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_NTASKS", "16")
    assert launch.ranks_of(flags.split()) == ranks


def test_other_machines_get_what_changes_a_run_and_no_secret(tmp_path, monkeypatch):
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n\nMINE=1")
    monkeypatch.chdir("/")
    for name, value in dict(
        HOME=str(tmp_path),
        HF_HUB_OFFLINE="1",
        HF_TOKEN="hf_secret",
        OMP_NUM_THREADS="3",
        DS_ACCELERATOR="cpu",
        GLOO_SOCKET_IFNAME="",
    ).items():
        monkeypatch.setenv(name, value)
    found = launch.environment_for_machines()
    assert found.splitlines()[:2] == ["NCCL_DEBUG=INFO", "MINE=1"]
    assert {"HF_HUB_OFFLINE=1", "OMP_NUM_THREADS=3", "DS_ACCELERATOR=cpu"} <= set(found.split("\n"))
    assert "secret" not in found and "GLOO" not in found


# Runs what it is given on "machines" of this one, %n being their number, as pdsh does; of the
# environment they have what ssh would leave them.
PDSH = r"""#!/usr/bin/env python3
import os, subprocess, sys
words, left = sys.argv[1:], {name: os.environ[name] for name in ("PATH", "HOME")}
hosts, command = words[words.index("-w") + 1].split(","), " ".join(words[words.index("-w") + 2:])
started = [
    subprocess.Popen(["bash", "-c", command.replace("%n", str(n))], env=left)
    for n in range(len(hosts))
]
sys.exit(max(p.wait() for p in started))
"""
RANK = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
os.write(1, "rank {RANK} of {WORLD_SIZE} {HF_HOME}\\n".format(**os.environ).encode())
time.sleep(600)
"""


@pytest.mark.parametrize("way", ["pdsh", "this machine"])
def test_ranks_are_asked_to_save_and_75_comes_back(tmp_path, way):
    script(tmp_path / "bin/pdsh", PDSH)
    program = script(tmp_path / "rank.py", RANK)
    (tmp_path / "hosts").write_text("node-a slots=1\nnode-b slots=2\n")
    flags = "--hostfile hosts --no_ssh_check --master_addr 127.0.0.1"
    flags = flags if way == "pdsh" else "--num_accelerators 3"
    relative = os.path.relpath(program, ROOT)
    command = f". {ROOT}/utils/launch.sh; launch {relative} --output_dir {tmp_path}/out"
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=environment(
            tmp_path, LAUNCH=f"{flags} --master_port {free_port()}", HF_HOME="/models/hf"
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    log, end = tmp_path / "out/log.txt", time.monotonic() + 200
    try:
        while not log.exists() or log.read_text().count("/models/hf") < 3:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):  # all of them have ended
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75, output
    assert {f"rank {rank} of 3 /models/hf" for rank in range(3)} <= set(output.splitlines())
    assert "could be asked:" not in output


def test_ranks_that_do_not_run_yet_are_asked_once_they_do():
    """A launcher that starts a process late, which starts a rank later still."""
    late = "import subprocess, sys, time; time.sleep(0.2); sys.exit(-subprocess.call(sys.argv[1:]))"
    rank = [sys.executable, "-c", "import time; time.sleep(60)"]
    launcher = subprocess.Popen([sys.executable, "-c", late, sys.executable, "-c", late, *rank])
    launch.ask_ranks_to_stop(launcher.pid)
    assert launcher.wait(timeout=20) == 256 - signal.SIGUSR1
    ended = subprocess.Popen(["true"])
    launch.ask_ranks_to_stop(ended.pid)
    assert ended.wait() == 0


# Two nodes with two tasks each: every task's surroundings are Slurm's, its program's ours.
SRUN = """#!/bin/bash
echo "srun $1 $2 $3 $4"
while [ "$1" != bash ]; do shift; done
for task in 0 1 2 3; do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=4 SLURM_NNODES=2 "$@" || exit
done
"""
SCONTROL = """#!/bin/bash
case "$1 $2 $3" in
"show hostnames n[1-2]") printf 'n1\\nn2\\n' ;;
"show node n1") echo "NodeName=n1 NodeAddr=10.1.2.3 NodeHostName=h1 Port=0" ;;
*) exit 1 ;;
esac
"""
SHOW = "import os, sys; print(*(os.environ[n] for n in sys.argv[1].split(',')), *sys.argv[2:])"


def test_a_task_of_slurm_is_a_rank(tmp_path):
    script(tmp_path / "bin/srun", SRUN)
    script(tmp_path / "bin/scontrol", SCONTROL)
    program = script(tmp_path / "show.py", SHOW)
    names = "RANK,LOCAL_RANK,WORLD_SIZE,LOCAL_WORLD_SIZE,MASTER_ADDR,MASTER_PORT,OMP_NUM_THREADS"
    found = bash(
        tmp_path,
        f"launch {os.path.relpath(program, ROOT)} {names} 'two words' '$(id)'",
        LAUNCH="srun --mpi none",
        SLURM_JOB_ID="123456",
        SLURM_JOB_NODELIST="n[1-2]",
        SLURM_CPUS_PER_TASK="5",
        OMP_NUM_THREADS="",
    )
    first, *lines = found.splitlines()
    assert first == "srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task=5 --mpi"
    port = 15000 + 123456 % 10000
    assert lines == [
        f"{rank} {rank % 2} 4 2 10.1.2.3 {port} 5 two words $(id)" for rank in range(4)
    ]


@pytest.mark.parametrize(
    ("warned", "code", "requeued"),
    [(True, 75, True), (True, 138, True), (True, 1, False), (False, 75, False), (False, 0, False)],
)
def test_a_job_goes_back_into_the_queue_where_it_was_warned_and_has_saved(
    tmp_path, warned, code, requeued
):
    script(tmp_path / "bin/scontrol", f'#!/bin/bash\necho "$@" >>{tmp_path}/asked\n')
    work = f"trap 'exit {code}' USR1; touch {tmp_path}/works; "
    work += "while :; do sleep 0.02; done" if warned else f"exit {code}"
    command = f'. "$SLURM_SUBMIT_DIR/utils/requeue.sh"; requeued bash -c "{work}"'
    job = subprocess.Popen(
        ["bash", "-c", command],
        env=environment(tmp_path, SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID="7"),
    )
    try:
        while not (tmp_path / "works").exists():
            time.sleep(0.01)
        if warned:
            job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=60) == code
    finally:
        job.kill()
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert asked == ("requeue 7\n" if requeued else "")


def test_a_job_that_is_warned_before_its_command_runs_is_asked_to_save_too(tmp_path):
    """`trap` here warns as soon as it listens: before the process that it would ask is known."""
    script(tmp_path / "bin/scontrol", f'#!/bin/bash\necho "$@" >>{tmp_path}/asked\n')
    warn = 'trap() { builtin trap "$@"; kill -USR1 $$; }'
    work = "trap 'exit 75' USR1; while :; do sleep 0.02; done"
    job = subprocess.run(
        [
            "bash",
            "-c",
            f'. "$SLURM_SUBMIT_DIR/utils/requeue.sh"; {warn}; requeued bash -c "{work}"',
        ],
        env=environment(tmp_path, SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID="7"),
        timeout=60,
    )
    assert job.returncode == 75
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


def test_the_interface_towards_a_machine():
    """One that has the address which the kernel would send from; none for this machine alone."""
    import psutil

    assert interface_towards("127.0.0.1") is None
    assert interface_towards("localhost") is None
    own = [
        (name, address.address)
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family.name == "AF_INET" and not address.address.startswith("127.")
    ]
    for name, address in own:  # rank 0's machine is asked for its own address
        assert interface_towards(address) == name
