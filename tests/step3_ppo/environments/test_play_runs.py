"""Runs with an environment: one path on any ranks and stages, exact resumes, what they learn."""

import json
import os
import shlex
import subprocess
import sys

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
    """By the commands of docs/environments.md: the share of right held-out answers doubles."""
    text = (ROOT / "docs/environments.md").read_text().split("```bash\n")[1].split("```")[0]
    for line in text.replace("\\\n", " ").splitlines():
        _, *words = shlex.split(line)
        words[0] = str(ROOT / words[0]) if words[0].endswith(".py") else words[0]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, check=True)
    out = tmp_path / "output/calculator/step3_ppo"
    result = json.loads((out / "result.json").read_text())
    before, after = result["verifier_before"], result["verifier_after"]
    assert before < 0.4 and after >= max(2 * before, 0.6), f"{before} → {after}"
    turns = metrics_of(out, "turns")
    assert turns[0] < 1.5 and turns[-1] > 1.75
