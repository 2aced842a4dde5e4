"""Jobs of Slurm on a cluster of our own: submitted, warned, back in the queue, gone on with."""

import json
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.machines import tidy_up_when_terminated
from tests.helpers.running import ROOT, metrics_of
from tests.helpers.slurm_cluster import CREDENTIALS_EXPIRE, Cluster

pytestmark = pytest.mark.nodes
TWO_NODES = ["--nodes", "2", "--ntasks-per-node", "1"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    tidy_up_when_terminated()
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


def handed_back(cluster, number: str, folder: Path) -> str:
    """Waits until a warned job runs again; → how long that took."""
    queued = wait_until(lambda job: job.get("Restarts") == "1", cluster, number, folder, 300)
    waited = wait_until(begun_again, cluster, number, folder, 300)
    assert "goes back into the queue" in told(folder)
    assert "SIGUSR1: stopped after step" in told(folder), told(folder)
    return f"in the queue after {queued:.1f} s, running again after {waited:.1f} s more"


def wait_for_step(cluster, number: str, folder: Path, step: str, more_than: int) -> float:
    metrics = folder / "out" / step / "metrics.jsonl"
    return wait_until(
        lambda job: metrics.exists() and len(metrics.read_text().splitlines()) > more_than,
        *(cluster, number, folder),
    )


def test_run_all_goes_back_into_the_queue_and_is_finished(cluster, tmp_path):
    """Warned as --signal=B:USR1 warns: the signal comes to the job's shell alone."""
    out = tmp_path / "out"
    flags = """--rounds 1 --sft.max_steps 150 --collect.num_prompts 100 --reward.max_steps 6
        --ppo.max_steps 2 --ppo.ppo_epochs 1 --ppo.max_eval_rows 16 --save_every 50""".split()
    flags = ["tiny", "--output_dir", out, *flags]
    number = submit(cluster, tmp_path, "utils/slurm.sh", flags=flags)
    wait_for_step(cluster, number, tmp_path, "step1_sft", 20)
    cluster.ask("scancel", "--batch", "--signal=USR1", number)
    how = handed_back(cluster, number, tmp_path)
    lines = len(metrics_of(out / "step1_sft", "loss"))
    assert 20 < lines < 150
    resumed = wait_for_step(cluster, number, tmp_path, "step1_sft", lines)
    print(f"\nrun_all.sh warned: {how}, a step further after {resumed:.1f} s more")
    wait_until(in_state("COMPLETED"), cluster, number, tmp_path, 1500)
    assert "resumed from" in told(tmp_path) and "× ranks 2" in told(tmp_path)
    assert metrics_of(out / "step1_sft", "step") == list(range(1, 151))
    assert json.loads((out / "summary.json").read_text())["verifier"]["ppo"] >= 0


def test_slurm_warns_by_itself_and_a_cancelled_job_stays_cancelled(cluster, tiny, tmp_path):
    """Once less of its time is left than --signal of launch/slurm.sh says."""
    small = """--dtype fp32 --zero_stage 0 --global_batch_size 8 --max_length 96 --max_eval_rows 8
        --sample_answers 0 --max_steps 100000""".split()
    data = {"MODEL": str(tiny / "base_model"), "DATA": str(tiny / "data/sft.jsonl")}
    number = submit(cluster, tmp_path, "step1_sft/launch/slurm.sh", flags=small, **data)
    wait_for_step(cluster, number, tmp_path, ".", 5)
    hours, minutes, _ = map(int, cluster.job(number)["RunTime"].split(":"))
    limit = 60 * hours + minutes + 2  # one to two minutes from now
    cluster.ask("scontrol", "update", f"jobid={number}", f"TimeLimit={limit}")
    wait_until(lambda job: "asked to stop" in told(tmp_path), cluster, number, tmp_path, 100)
    how = handed_back(cluster, number, tmp_path)
    cluster.ask("scontrol", "update", f"jobid={number}", "TimeLimit=UNLIMITED")
    lines = len(metrics_of(tmp_path / "out", "loss"))
    resumed = wait_for_step(cluster, number, tmp_path, ".", lines)
    print(f"\nwarned by Slurm: {how}, a step further after {resumed:.1f} s more")
    assert "resumed from" in told(tmp_path)
    cluster.ask("scancel", number)
    wait_until(in_state("CANCELLED"), cluster, number, tmp_path, 120)
    time.sleep(CREDENTIALS_EXPIRE + 5.0)  # a job that went back would be running by now
    assert cluster.job(number)["JobState"] == "CANCELLED"
    assert cluster.job(number)["Restarts"] == "1"
