"""Runs with an environment: one path on any ranks and stages, exact resumes, what they learn."""

import json
import subprocess

import pytest

from tests.helpers.jobs import ppo
from tests.helpers.running import ROOT, assert_same_path, metrics_of, run_ranks

SAYS = """
def replies(conversations, rows):
    said = [turns[-1]["content"] for turns in conversations]
    return [None if len(text) % 3 == 0 else f"{len(text)} letters" for text in said]
"""


@pytest.mark.slow
def test_ranks_and_stages_take_one_path_and_a_resumed_run_the_same(tiny, chain, tmp_path):
    (tmp_path / "says.py").write_text(SAYS)

    def job(out, *flags):
        own = ["--environment", tmp_path / "says.py:replies", "--max_turns", 3]
        own += ["--max_response_length", 48, "--seed", 3, "--prompts_per_rollout", 15]
        own += ["--global_batch_size", 15, "--micro_batch_size", 5, "--generation_tokens", 500]
        return ppo(tiny, chain / "sft", chain / "reward", tmp_path / out, *own, *flags)

    saved = ["--save_every", 1]
    program, argv = job("resumed", *saved)
    stopped = "tests/helpers/stop_at.py", [ROOT / program, 2, "SIGTERM", *argv]
    resumed = job("resumed", *saved, "--resume", "auto")
    run_ranks([job("alone", *saved), stopped, resumed], 1)
    off = ["--self_check", "off"]
    layer = ["--zero_stage", 3, "--rollout_gather", "layer", *off]
    run_ranks([job("stage 0", *off), job("stage 3", *layer)], 3)
    folders = {out: tmp_path / out for out in ("alone", "stage 0", "stage 3")}
    names = ["score", "kl", "turns", "reply_tokens", "response_length", "eos_share"]
    assert_same_path(folders, [*names, "policy_loss", "actor_grad_norm", "value_loss"])
    assert 1.2 < metrics_of(tmp_path / "alone", "turns")[0] < 3
    assert 0 < metrics_of(tmp_path / "alone", "eos_share")[0] < 1
    weights = [tmp_path / out / "actor/model.safetensors" for out in ("alone", "resumed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_a_policy_learns_to_ask_the_calculator(tmp_path):
    """The share of right held-out answers doubles."""
    done = subprocess.run(
        ["bash", ROOT / "run_all.sh", "calculator"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == 0, done.stdout
    out = tmp_path / "output/calculator"
    methods = json.loads((out / "summary.json").read_text())["methods"]
    before, after = methods["sft"]["score"], methods["grpo"]["score"]
    assert 0.05 < before < 0.2 and after >= max(2 * before, 0.3), f"{before} → {after}"
    assert f"{before:.3f} ± " in done.stdout and f"{after:.3f} ± " in done.stdout
    turns = metrics_of(out / "step3_grpo", "turns")
    assert turns[0] < 1.5 and turns[-1] > 1.75
