"""Ranks killed at random: SIGKILL, over the whole tiny pipeline, in its checkpoints too.

    python -m pytest -m chaos tests/whole/chaos.py        # CHAOS_KILLS=50

Rounds of SFT → comparisons → reward model → PPO on two ranks, under ZeRO 0, 2 and 3 in turn, with a
checkpoint after every step. Each attempt has one rank killed; the same command goes on, until the
round is through. Its end must be that of a run that nobody killed.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from tests.helpers.jobs import collect, ppo, reward, sft
from tests.helpers.running import ROOT, run_ranks
from tests.helpers.same_end import assert_same_end
from utils.checkpoints import manifest
from utils.distributed.process_group import free_port

pytestmark = pytest.mark.chaos
STEPS = ("sft", "reward", "ppo")
LIMIT = 60.0  # seconds that the others may outlive a killed rank
PATIENCE = 30.0  # DeepSpeed's launcher: seconds between SIGTERM and SIGKILL for the others


def pipeline(tiny, out: Path, stage: int) -> list:
    """The jobs of one round, all of which go on where they stopped."""
    again = ["--resume", "auto", "--save_every", 1, "--zero_stage", stage]
    comparisons = ["--output_file", out / "comparisons.jsonl", "--overwrite", "false"]
    on_them = ["--preference_data", out / "comparisons.jsonl", "--max_steps", 6]
    quick = ["--sample_answers", 0, "--max_steps", 4, "--score_normalisation", "running"]
    return [
        sft(tiny, out / "sft", "--max_steps", 12, "--eval_every", 4, *again),
        collect(tiny, out / "sft", *comparisons, "--resume", "auto"),
        reward(tiny, out / "sft", out / "reward", *on_them, *again),
        ppo(tiny, out / "sft", out / "reward", out / "ppo", *quick, *again),
    ]


class Ranks:
    """Two ranks at work on `jobs`."""

    def __init__(self, jobs, ranks: int = 2):
        spec = json.dumps([[program, list(map(str, argv))] for program, argv in jobs])
        shared = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        shared |= {"OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"}
        self.output = tempfile.TemporaryFile("w+")
        self.processes = [
            subprocess.Popen(
                [sys.executable, ROOT / "tests/helpers/step_worker.py", spec],
                env=os.environ
                | {k: str(v) for k, v in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()},
                stdout=self.output,
                stderr=subprocess.STDOUT,
            )
            for rank in range(ranks)
        ]

    def running(self) -> bool:
        return all(p.poll() is None for p in self.processes)

    def codes(self) -> list:
        return [p.poll() for p in self.processes]

    def printed(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def wait_for_the_rest(self) -> float:
        """What a launcher does once a rank has died; → seconds until all had ended."""
        died = time.monotonic()
        for p in self.processes:
            p.terminate()
        while any(p.poll() is None for p in self.processes):
            if time.monotonic() - died > PATIENCE:
                for p in self.processes:
                    p.kill()
            time.sleep(0.01)
        return time.monotonic() - died


def progress(out: Path) -> int:
    """Lines of metrics so far, of all steps."""
    files = [out / step / "metrics.jsonl" for step in STEPS]
    return sum(len(f.read_bytes().splitlines()) for f in files if f.exists())


def saving(out: Path) -> set[int]:
    """The folders (inodes) of checkpoints that are being written."""
    found = set()
    for step in STEPS:
        for folder in (out / step).glob("checkpoints/.step-*"):
            with contextlib.suppress(FileNotFoundError):  # it has got its name meanwhile
                found.add(folder.stat().st_ino)
    return found


def half_written(out: Path) -> bool:
    """Had the writers of a checkpoint more to write? (Else it only had no name yet.)"""
    for folder in out.glob("*/checkpoints/.step-*.writing"):
        ranks = list(folder.glob("rank-*.safetensors"))
        weights = list(folder.glob("weights/**/*.safetensors"))
        if len(ranks) < 2 or not weights or any(p.suffix == ".writing" for p in folder.rglob("*")):
            return True
        for path in ranks:
            try:
                safe_open(path, framework="pt")
            except SafetensorError:
                return True
    return False


def wait_for_a_moment(ranks: Ranks, out: Path, draw: random.Random) -> str:
    """Returns at a random moment of the run, and what moment that is."""
    kind = draw.choice(["starting", "training", "training", "saving", "saving"])
    if kind == "starting":
        end = time.monotonic() + draw.uniform(0.0, 8.0)
        while ranks.running() and time.monotonic() < end:
            time.sleep(0.005)
        return kind
    before, upto, left, seen = progress(out), draw.randint(1, 7), saving(out), set()
    while ranks.running():
        if kind == "saving":
            seen |= saving(out) - left
            if len(seen) >= upto:
                time.sleep(draw.uniform(0.0, 0.03))
                break
        elif progress(out) - before >= upto:
            time.sleep(draw.uniform(0.0, 0.2))
            break
        time.sleep(0.001)
    return kind


def assert_a_kill_is_survived(ranks: Ranks, out: Path, draw: random.Random) -> str | None:
    """Kill a rank at some moment: the others must end soon, and say why. → what happened; None
    where the round was through before."""
    moment = wait_for_a_moment(ranks, out, draw)
    if not ranks.running():
        while any(code is None for code in ranks.codes()):
            time.sleep(0.05)
        assert ranks.codes() == [0, 0], f"{ranks.codes()}\n{ranks.printed()}"
        return None
    victim = draw.randrange(len(ranks.processes))
    ranks.processes[victim].kill()
    inside = moment != "starting" and bool(saving(out))
    seconds = ranks.wait_for_the_rest()
    text = ranks.printed()
    assert seconds < LIMIT, text
    assert "is damaged" not in text, text
    if moment != "starting":  # before they have joined nobody but the launcher can know
        assert f"rank {victim} (process" in text and "--resume auto goes on" in text, text
    where = "inside a checkpoint" if inside else moment
    if inside and half_written(out):  # by now the other rank has ended too
        where += ", half written"
    return f"rank {victim} {where}, the other ended after {seconds:.1f} s"


def assert_nothing_is_half_written(out: Path) -> None:
    left = [p for p in out.rglob("*") if p.name.endswith((".writing", ".deleting"))]
    assert not left, left
    for step in STEPS:
        for number in manifest.steps_in(out / step):
            folder = manifest.folder_of(out / step, number)
            manifest.verify(folder, manifest.read(folder))


def comparisons_of(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "comparisons.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "provenance"} for row in rows]


def test_every_kill_is_survived(tiny, tmp_path):
    wanted, draw = int(os.environ.get("CHAOS_KILLS", "50")), random.Random(time.time_ns())
    kills, rounds, references = [], 0, {}
    while len(kills) < wanted:
        stage = (0, 2, 3)[rounds % 3]
        if stage not in references:
            references[stage] = tmp_path / f"whole{stage}"
            run_ranks(pipeline(tiny, references[stage], stage), 2, timeout=900)
        rounds += 1
        out = tmp_path / f"round{rounds}"
        while True:
            ranks = Ranks(pipeline(tiny, out, stage))
            try:
                what = assert_a_kill_is_survived(ranks, out, draw)
            finally:
                for process in ranks.processes:
                    process.kill()
            if what is None:
                break
            kills.append(what)
            print(f"kill {len(kills)}, round {rounds}, ZeRO-{stage}: {what}", flush=True)
            if len(kills) >= wanted:
                run_ranks(pipeline(tiny, out, stage), 2, timeout=900)
                break
        for step in STEPS:
            assert_same_end(out / step, references[stage] / step)
        assert comparisons_of(out) == comparisons_of(references[stage])
        assert_nothing_is_half_written(out)
    inside = sum("inside a checkpoint" in k for k in kills)
    half = sum("half written" in k for k in kills)
    print(
        f"{len(kills)} kills in {rounds} rounds, {inside} of them inside a checkpoint, {half} of "
        "those with its files half written: all survived"
    )
    assert len(kills) == wanted
