"""Jobs of Slurm on a cluster of our own: submitted, warned, back in the queue, gone on with."""

import json
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, metrics_of
from slurm_cluster import Cluster

pytestmark = pytest.mark.nodes
TWO_NODES = ["--nodes", "2", "--ntasks-per-node", "1"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    found = Cluster(tmp_path_factory.mktemp("slurm"))
    yield found
    found.close()


def submit(cluster, folder: Path, script: str, *words, flags=(), **environment) -> str:
    path = f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    shared = {"PATH": path, "OMP_NUM_THREADS": "1", "OUTPUT": str(folder / "out")}
    words = [*TWO_NODES, "--output", folder / "job.txt", *words, ROOT / script, *flags]
    return cluster.submit(ROOT, *words, **shared | environment)


def told(folder: Path) -> str:
    return (folder / "job.txt").read_text() if (folder / "job.txt").exists() else ""


def wait_until(condition, cluster, number: str, folder: Path, seconds: float = 900) -> float:
    """Wait for `condition(what Slurm knows of the job)`; → seconds it took."""
    began = time.monotonic()
    while not condition(job := cluster.job(number)):
        failed = job.get("JobState") in ("FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
        assert not failed, (job, told(folder))
        assert time.monotonic() - began < seconds, (job, told(folder))
        time.sleep(0.2)
    return time.monotonic() - began


def in_state(*states):
    return lambda job: job.get("JobState") in states


def begun_again(job: dict) -> bool:
    return job.get("Restarts") == "1" and job.get("JobState") == "RUNNING"


def test_run_all_is_warned_by_slurm_and_goes_on(cluster, tmp_path):
    """Of four minutes two are left when Slurm warns: --signal of utils/slurm.sh itself."""
    out = tmp_path / "out"
    flags = """--rounds 1 --sft.max_steps 2000 --collect.num_prompts 100 --reward.max_steps 6
        --ppo.max_steps 2 --ppo.ppo_epochs 1 --ppo.max_eval_rows 16 --save_every 500""".split()
    flags = ["tiny", "--output_dir", out, *flags]
    number = submit(cluster, tmp_path, "utils/slurm.sh", "--time", "4", flags=flags)
    wait_until(lambda job: "asked to stop" in told(tmp_path), cluster, number, tmp_path, 300)
    saved = wait_until(
        lambda job: "goes back into the queue" in told(tmp_path), cluster, number, tmp_path, 120
    )
    waited = wait_until(begun_again, cluster, number, tmp_path, 300)
    cluster.ask("scontrol", "update", f"jobid={number}", "TimeLimit=UNLIMITED")
    assert "SIGUSR1: stopped after step" in told(tmp_path), told(tmp_path)
    lines = len(metrics_of(out / "step1_sft", "loss"))
    assert 0 < lines < 2000
    resumed = wait_until(
        lambda job: len(metrics_of(out / "step1_sft", "loss")) > lines, cluster, number, tmp_path
    )
    print(
        f"\nwarned by Slurm: saved and handed back after {saved:.1f} s, running again after "
        f"{waited:.1f} s more, the next step after {resumed:.1f} s more"
    )
    wait_until(in_state("COMPLETED"), cluster, number, tmp_path, 1200)
    assert "resumed from" in told(tmp_path) and "× ranks 2" in told(tmp_path)
    assert metrics_of(out / "step1_sft", "step") == list(range(1, 2001))
    assert json.loads((out / "summary.json").read_text())["verifier"]["ppo"] >= 0
    assert cluster.job(number)["Restarts"] == "1"


STEP_1 = """--dtype fp32 --zero_stage 0 --global_batch_size 8 --max_length 96
    --max_eval_rows 8""".split()


def test_a_step_is_warned_and_goes_on(cluster, tiny, tmp_path):
    number = submit(
        cluster,
        tmp_path,
        "step1_sft/launch/slurm.sh",
        flags=[*STEP_1, "--max_steps", "400"],
        MODEL=str(tiny / "base_model"),
        DATA=str(tiny / "data/sft.jsonl"),
    )
    metrics = tmp_path / "out/metrics.jsonl"
    wait_until(
        lambda job: metrics.exists() and len(metrics.read_text().splitlines()) > 5,
        *(cluster, number, tmp_path),
    )
    cluster.ask("scancel", "--batch", "--signal=USR1", number)
    handed_back = wait_until(lambda job: job.get("Restarts") == "1", cluster, number, tmp_path)
    waited = wait_until(begun_again, cluster, number, tmp_path, 300)
    print(f"\nwarned: in the queue after {handed_back:.1f} s, running again after {waited:.1f} s")
    wait_until(in_state("COMPLETED"), cluster, number, tmp_path)
    assert "SIGUSR1: stopped after step" in told(tmp_path)
    assert "resumed from" in told(tmp_path)
    assert metrics_of(tmp_path / "out", "step") == list(range(1, 401))


def test_a_cancelled_job_stays_cancelled(cluster, tiny, tmp_path):
    number = submit(
        cluster,
        tmp_path,
        "step1_sft/launch/slurm.sh",
        flags=[*STEP_1, "--max_steps", "100000"],
        MODEL=str(tiny / "base_model"),
        DATA=str(tiny / "data/sft.jsonl"),
    )
    metrics = tmp_path / "out/metrics.jsonl"
    wait_until(
        lambda job: metrics.exists() and len(metrics.read_text().splitlines()) > 5,
        *(cluster, number, tmp_path),
    )
    cluster.ask("scancel", number)
    wait_until(in_state("CANCELLED"), cluster, number, tmp_path, 120)
    time.sleep(15.0)  # a job that went back would be running by now
    assert cluster.job(number)["JobState"] == "CANCELLED"
    assert cluster.job(number)["Restarts"] == "0"
    assert "SIGTERM: stopped after step" in told(tmp_path), "what it had done is saved"
