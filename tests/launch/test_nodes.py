"""Two machines joined by ssh and pdsh: run_all.sh by DeepSpeed's launcher, killed, cut off, asked.

bash tests/nodes.sh        # as root; says which Debian packages are missing
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.machines import NAMES, Machines, tidy_up_when_terminated
from tests.helpers.running import ROOT

pytestmark = pytest.mark.nodes
LIMIT = 60.0  # seconds that ranks may outlive those of another machine
STEPS = ("step1_sft", "step2_reward", "step3_ppo/actor", "step3_ppo/critic")
FLAGS = """--rounds 1 --save_every 25 --sft.max_steps 150 --collect.num_prompts 100
    --reward.max_steps 30 --reward.save_every 5 --ppo.max_steps 4 --ppo.save_every 1
    --ppo.ppo_epochs 1 --ppo.max_eval_rows 16 --dtype fp32""".split()


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    tidy_up_when_terminated()
    folder = tmp_path_factory.mktemp("machines")
    found = Machines(folder)
    slots = "".join(f"{address} slots=1\n" for address in found.addresses.values())
    (folder / "hosts").write_text(slots)
    yield found
    found.close()


def start(machines, program, *flags, out: Path, **environment) -> subprocess.Popen:
    """The command of a user on node-a, in the folder of the hostfile."""
    shared = {"LAUNCH": "--hostfile hosts", "OMP_NUM_THREADS": "1", "OUTPUT": str(out)}
    out.parent.mkdir(exist_ok=True, parents=True)
    with open(f"{out}.txt", "a") as told:
        return machines.start(
            "node-a",
            ["bash", ROOT / program, *flags],
            cwd=machines.folder,
            env=shared | environment,
            stdout=told,
            stderr=subprocess.STDOUT,
        )


def told(out: Path) -> str:
    return Path(f"{out}.txt").read_text()


def run_all(machines, out: Path) -> subprocess.Popen:
    return start(machines, "run_all.sh", "tiny", "--output_dir", out, *FLAGS, out=out)


def wait_for_step(process, out: Path, step: str, number: int) -> None:
    metrics, end = out / step / "metrics.jsonl", time.monotonic() + 600
    while not metrics.exists() or len(metrics.read_text().splitlines()) < number:
        assert process.poll() is None and time.monotonic() < end, told(out)
        time.sleep(0.05)


def seconds_until_all_ended(machines, process) -> tuple[float, float]:
    """(until no rank was left on any machine, until the launcher and run_all.sh had ended too)."""
    began = time.monotonic()
    while machines.ranks():
        assert time.monotonic() - began < LIMIT, [p.cmdline() for p in machines.ranks()]
        time.sleep(0.1)
    ranks = time.monotonic() - began
    process.wait(timeout=LIMIT)
    return ranks, time.monotonic() - began


def kill(machines, name: str) -> None:
    ranks = machines.ranks(name)
    assert ranks
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)


def weights(out: Path) -> dict[str, bytes]:
    return {step: (out / step / "model.safetensors").read_bytes() for step in STEPS}


def metrics(out: Path) -> list[dict]:
    """Of all steps, without times."""
    lines = [
        json.loads(line)
        for step in ("step1_sft", "step2_reward", "step3_ppo")
        for line in (out / step / "metrics.jsonl").read_text().splitlines()
    ]
    return [{k: v for k, v in row.items() if "second" not in k} for row in lines]


@pytest.fixture(scope="module")
def whole(machines, tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    began = time.monotonic()
    assert run_all(machines, out).wait(timeout=1200) == 0, told(out)
    assert "× ranks 2" in told(out)
    print(f"\nundisturbed: {time.monotonic() - began:.0f} s")
    return out


def test_run_all_survives_a_killed_machine_and_a_signal(machines, whole, tmp_path):
    """Each machine's ranks are killed once, the run is asked to stop once, and ends bit-equal."""
    out = tmp_path / "out"
    for victim, step, number in (("node-b", "step1_sft", 60), ("node-a", "step2_reward", 8)):
        process = run_all(machines, out)
        wait_for_step(process, out, step, number)
        kill(machines, victim)
        ranks, everything = seconds_until_all_ended(machines, process)
        print(
            f"SIGKILL of {victim}'s ranks in {step}: all ranks had ended after {ranks:.1f} s, "
            f"run_all.sh after {everything:.1f} s"
        )
        assert process.returncode not in (0, 75), told(out)
        rank = NAMES.index(victim)
        assert f"on {victim}) is gone, and the run ends with it" in told(out), told(out)
        assert f"rank {rank} (process" in told(out)
    process = run_all(machines, out)
    wait_for_step(process, out, "step3_ppo", 1)
    (shell,) = psutil.Process(process.pid).children()  # of nsenter, which hands no signal on
    shell.send_signal(signal.SIGUSR1)
    ranks, everything = seconds_until_all_ended(machines, process)
    print(f"SIGUSR1 to run_all.sh: it had saved and ended after {everything:.1f} s")
    assert process.returncode == 75, told(out)
    assert "SIGUSR1: stopped after step" in told(out)
    assert run_all(machines, out).wait(timeout=1200) == 0, told(out)
    assert told(out).count("resumed from") >= 3, told(out)
    assert weights(out) == weights(whole)
    assert metrics(out) == metrics(whole)


SMALL = """--dtype fp32 --zero_stage 0 --global_batch_size 8 --micro_batch_size 4
    --max_length 96 --max_eval_rows 8 --sample_answers 0""".split()


def start_step_1(machines, tiny, out: Path, *flags) -> subprocess.Popen:
    data = {"MODEL": str(tiny / "base_model"), "DATA": str(tiny / "data/sft.jsonl")}
    script = "step1_sft/launch/multi_node.sh"
    return start(machines, script, *SMALL, *flags, out=out, **data)


def test_a_machine_that_is_cut_off_ends_the_run(machines, tiny, tmp_path):
    out = tmp_path / "out"
    process = start_step_1(machines, tiny, out, "--max_steps", "100000")
    wait_for_step(process, out, ".", 5)
    machines.cable("node-b", "down")
    try:
        ranks, everything = seconds_until_all_ended(machines, process)
    finally:
        machines.cable("node-b", "up")
    print(
        f"\nnode-b cut off: all ranks had ended after {ranks:.1f} s, the launcher after "
        f"{everything:.1f} s"
    )
    assert process.returncode not in (0, 75), told(out)
    assert "on node-b)'s machine does not answer any more" in told(out), told(out)


def test_torchrun_on_each_machine(machines, tiny, tmp_path):
    """README's third way."""
    processes, out = [], tmp_path / "out"
    program = [ROOT / "step1_sft/main.py", "--model_name_or_path", tiny / "base_model"]
    program += ["--sft_data", tiny / "data/sft.jsonl", "--output_dir", out, *SMALL]
    for node, name in enumerate(NAMES):
        where = ["--nnodes", "2", "--node_rank", node, "--nproc_per_node", "1"]
        where += ["--master_addr", machines.addresses["node-a"], "--master_port", "29500"]
        words = [Path(sys.executable).parent / "torchrun", *where, *program, "--max_steps", "3"]
        kept = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        processes.append(machines.start(name, words, text=True, **kept))
    output = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    assert "× ranks 2" in output[0] and (out / "model.safetensors").exists()


def test_an_output_folder_that_is_not_shared_is_named(machines, tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    machines.run("node-b", ["mount", "-t", "tmpfs", "tmpfs", out])
    process = start_step_1(machines, tiny, out)
    assert process.wait(timeout=600) == 2, told(out)
    machines.run("node-b", ["umount", out])
    assert f"output_dir={out}: what node-b writes there is not seen on node-a" in told(out)
    assert "Traceback" not in told(out)
    assert os.listdir(out) == ["log.txt"]
