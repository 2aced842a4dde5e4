"""Long tests, behind `-m slow`."""

import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_launch import run
from test_steps import chain, ppo  # noqa: F401

pytestmark = pytest.mark.slow


def test_two_ranks_under_zero3_exit_0_twenty_times_in_a_row(tiny, chain, tmp_path):  # noqa: F811
    """A rank that leaves the group too early or waits for ever shows once in many runs."""
    deepspeed = [Path(sys.executable).parent / "deepspeed", "--num_accelerators", "2"]
    for number in range(20):
        out = tmp_path / f"run{number}"
        program, argv = ppo(tiny, chain / "sft", chain / "reward", out, "--zero_stage", "3")
        code, output = run([*deepspeed, ROOT / program, *argv], tmp_path)
        assert code == 0, f"run {number}:\n{output}"
        assert (out / "actor_ema/model.safetensors").exists()
