"""Long tests, behind `-m slow`."""

import sys
from pathlib import Path

import pytest

from tests.helpers.jobs import ppo
from tests.helpers.running import ROOT
from tests.launch.test_launch import run
from utils.distributed.process_group import free_port

pytestmark = pytest.mark.slow


def test_two_ranks_under_zero3_exit_0_twenty_times_in_a_row(tiny, chain, tmp_path):
    """A rank that leaves the group too early or waits for ever shows once in many runs."""
    deepspeed = [Path(sys.executable).parent / "deepspeed", "--num_accelerators", "2"]
    for number in range(20):
        out = tmp_path / f"run{number}"
        program, argv = ppo(tiny, chain / "sft", chain / "reward", out, "--zero_stage", "3")
        code, output = run([*deepspeed, ROOT / program, *argv], tmp_path)
        assert code == 0, f"run {number}:\n{output}"
        assert (out / "actor_ema/model.safetensors").exists()


def test_the_tiny_launchers_walk_the_three_steps(tmp_path):
    for step, flags in (
        ("step1_sft", ["--max_steps", "150"]),
        ("step2_reward", ["--max_steps", "10"]),
        ("step3_ppo", ["--max_steps", "2"]),
    ):
        code, output = run(["bash", ROOT / step / "launch/tiny.sh", *flags], tmp_path)
        assert code == 0, output
    assert (tmp_path / "output/tiny/step3_ppo/actor/model.safetensors").exists()


@pytest.mark.parametrize("kind", ["single_gpu", "zero2", "zero3", "zero3_offload"])
def test_every_launcher_trains_on_what_it_is_given(tiny, chain, tmp_path, kind):
    """The scripts themselves, with a tiny model on two CPU ranks in place of GPUs."""
    small = ["--dtype", "fp32", "--max_steps", "1", "--global_batch_size", "4"]
    small += ["--micro_batch_size", "1"]
    environment = {"LAUNCH": f"--num_accelerators 2 --master_port {free_port()}"}
    length, data = ["--max_length", "96"], str(tiny / "data/prompts.jsonl")
    for step, flags, model in (
        ("step1_sft", [*length, "--sft_data", str(tiny / "data/sft.jsonl")], tiny / "base_model"),
        (
            "step2_reward",
            [*length, "--preference_data", str(tiny / "data/comparisons.jsonl")],
            chain / "sft",
        ),
        (
            "step3_ppo",
            [
                "--prompt_data",
                data,
                "--prompts_per_rollout",
                "4",
                "--max_prompt_length",
                "48",
                "--max_response_length",
                "8",
                "--max_eval_rows",
                "4",
            ],
            chain / "sft",
        ),
    ):
        where = environment | {
            "MODEL": str(model),
            "REWARD": str(chain / "reward"),
            "OUTPUT": str(tmp_path / step),
        }
        script = ROOT / step / "launch" / f"{kind}.sh"
        code, output = run(["bash", script, *small, *flags], tmp_path, **where)
        assert code == 0, output
