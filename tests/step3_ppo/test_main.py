"""Step 3's options through its main: the same path on 1 and 2 ranks, with ZeRO 0 and 3."""

import itertools
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from step3_ppo.checks import self_check, updates
from step3_ppo.checks.probe import Fault
from tests.helpers.jobs import ppo
from tests.helpers.running import CLOSE, ROOT, assert_same_path, metrics_of, run_ranks
from tests.helpers.small_models import config_of
from utils.distributed.process_group import free_port

FUNCTION = "from step3_ppo.rewards.shipped import length_target as score\n"
ONE_STEP = ["--ppo_epochs", 1, "--global_batch_size", 16]


def options(tiny, chain, folder):
    """Flags by name: every option in one of them, so that few runs try them all."""
    (folder / "own.py").write_text(FUNCTION)
    texts = [json.dumps({"text": f"The number after {n} is {n + 1}."}) for n in range(40)]
    (folder / "texts.jsonl").write_text("\n".join(texts))
    return {
        "a2c": ["--algorithm", "a2c", *ONE_STEP]
        + ["--score_normalisation", "running", "--score_clip", 1.5, "--whiten_rewards"],
        "reinforce": ["--algorithm", "reinforce", *ONE_STEP, "--reward_model", ""]
        + ["--reward_function", f"{folder / 'own.py'}:score"]
        + ["step3_ppo.rewards.shipped:count_of_numbers", "--reward_weights", 1, -0.5]
        + ["--ptx_coef", 1.5, "--ptx_data", folder / "texts.jsonl"],
        "sequence": ["--action_level", "sequence", "--score_normalisation", "fixed"]
        + ["--missing_eos_penalty", 1.0, "--ptx_coef", 0.5, "--ptx_data", tiny / "data/sft.jsonl"],
        "added": ["--reward_function", "step3_ppo.rewards.shipped:length_target"]
        + ["--reward_function_coef", 0.5, "--judge_model", chain / "reward"]
        + ["--kl_estimator", "k3", "--clip_ratio_high", 0.28, "--dual_clip", 3.0],
    }


def test_every_option_takes_one_path(tiny, chain, tmp_path):
    chosen = options(tiny, chain, tmp_path)

    # A seed under which no draw falls between two tokens so closely that rounding decides.
    seed = ["--seed", 3]

    def job(name, out, *flags):
        given = [*chosen[name], *seed, *flags]
        return ppo(tiny, chain / "sft", chain / "reward", tmp_path / out, *given)

    off = ["--self_check", "off"]
    jobs = [job(name, f"{name}_0_1") for name in chosen]
    run_ranks([*jobs, job("a2c", "as_ppo", "--algorithm", "ppo", *off)], 1)
    jobs = [job(name, f"{name}_0_2", *off) for name in chosen]
    run_ranks(jobs + [job(name, f"{name}_3_2", "--zero_stage", 3, *off) for name in chosen], 2)
    for name in chosen:
        folders = {
            f"{name}, ZeRO-{stage}, {ranks} ranks": tmp_path / f"{name}_{stage}_{ranks}"
            for stage, ranks in ((0, 1), (0, 2), (3, 2))
        }
        names = ["score", "kl", "reward", "policy_loss", "actor_grad_norm", "response_length"]
        if name != "reinforce":
            names += ["value_loss", "critic_grad_norm"]
        if name in ("reinforce", "sequence"):
            names.append("ptx_loss")
        assert_same_path(folders, names)
        results = [json.loads((f / "result.json").read_text()) for f in folders.values()]
        for other in results[1:]:
            assert other["score_after"] == pytest.approx(results[0]["score_after"], **CLOSE)
        for folder in folders.values():
            assert (folder / "actor/config.json").exists()
            assert (folder / "critic").exists() == (name != "reinforce")
    # A2C is PPO with one epoch and one minibatch (Huang et al. 2022).
    names = ["score", "kl", "actor_grad_norm", "critic_grad_norm", "value_loss"]
    assert_same_path({"a2c": tmp_path / "a2c_0_1", "ppo": tmp_path / "as_ppo"}, names)
    # Some answers pay for being cut, measured by the finished ones of both ranks.
    assert 0 < metrics_of(tmp_path / "sequence_0_2", "eos_share")[0] < 1
    rates = (metrics_of(tmp_path / "added_0_1", f"{w}_learning_rate") for w in ("critic", "actor"))
    assert next(rates) == pytest.approx([5 * rate for rate in next(rates)])
    scores_add_up(*(tmp_path / f"{name}_0_1" for name in chosen))
    states_are_saved(*(tmp_path / f"{name}_0_1" for name in chosen))


def scores_add_up(a2c, reinforce, sequence, added):
    """The first rollout's answers are the same in all runs; who scores them differs."""
    parts = [f"score_function/{name}" for name in ("score", "count_of_numbers")]
    for where in ("", "eval/"):
        length, numbers = (metrics_of(reinforce, where + part) for part in parts)
        weighted = [a - 0.5 * b for a, b in zip(length, numbers, strict=True)]
        assert len(weighted) > 1
        assert metrics_of(reinforce, f"{where}score_function") == pytest.approx(weighted, rel=1e-5)
    model, function = metrics_of(sequence, "score")[0], metrics_of(reinforce, parts[0])[0]
    assert not metrics_of(added, "score_function/length_target")
    assert metrics_of(reinforce, "score") == metrics_of(reinforce, "score_function")
    assert metrics_of(a2c, "score")[0] == pytest.approx(model, rel=1e-6)
    assert metrics_of(added, "score_function")[0] == pytest.approx(0.5 * function, rel=1e-6)
    assert metrics_of(added, "score_model")[0] == pytest.approx(model, rel=1e-4)
    assert metrics_of(added, "score")[0] == pytest.approx(model + 0.5 * function, rel=1e-4)
    # The judge is the same reward model here, asked about held-out answers only.
    judged, scored = metrics_of(added, "eval/judge"), metrics_of(added, "eval/score_model")
    assert judged == pytest.approx(scored, abs=1e-5) and len(judged) == 2
    assert not metrics_of(added, "judge") and not metrics_of(a2c, "eval/judge")
    assert metrics_of(added, "kl") == metrics_of(added, "kl_k3") != metrics_of(added, "kl_k1")
    assert metrics_of(a2c, "kl") == metrics_of(a2c, "kl_k1")


def states_are_saved(a2c, reinforce, sequence, added):
    states = [json.loads((f / "state.json").read_text()) for f in (a2c, reinforce, sequence, added)]
    assert all(s["rollouts"] == 3 and s["kl_coef"] == 0.05 for s in states)
    assert states[0]["score_count"] == 48
    scores = metrics_of(a2c, "score")
    assert states[0]["score_mean"] == pytest.approx(sum(scores) / 3, rel=1e-5)
    assert states[2]["score_mean"] == pytest.approx(metrics_of(sequence, "eval/score")[0])
    deviation = metrics_of(sequence, "eval/score_std")[0]
    assert states[2]["score_variance"] == pytest.approx(deviation**2)
    assert [s["score_mean"] for s in (states[1], states[3])] == [0.0, 0.0]


# Refusals.

BY_HAND = {"rollout_engine": "vllm", "rollout_url": "http://127.0.0.1:8200"}


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"reward_model": ""}, "reward_model is empty; set --reward_model (step 2's output)"),
        (
            {"top_p": 0.9},
            "top_p=0.9 must be at least 1; set --top_p (1 only, as PPO",
        ),
        ({"top_k": 50}, "top_k=50 must be at most 0; set --top_k (0 only, as PPO"),
        ({"algorithm": "a2c", "ppo_epochs": 2}, "set --ppo_epochs 1 (now 2) and --global_batch"),
        (
            {"algorithm": "reinforce", "prompts_per_rollout": 128},
            "--global_batch_size 128 (now 64), one step a rollout",
        ),
        ({"dynamic_sampling": 2}, "dynamic_sampling=2 is for algorithms that compare the answers"),
        ({"overlong_penalty": 1.0}, "needs 0 < overlong_buffer=0 ≤ max_response_length=512"),
        ({"overlong_buffer": 9}, "overlong_buffer=9 is read only with --overlong_penalty"),
        ({"kl_in": "loss", "kl_estimator": "k1"}, "its gradient is 0 on average and holds nothing"),
        (
            {"algorithm": "gspo", "action_level": "sequence", "samples_per_prompt": 4},
            "gspo's ratio is by the mean over the answer's tokens",
        ),
        ({"algorithm": "grpo"}, "samples_per_prompt=1 gives none to compare with; set --samples"),
        (
            {"algorithm": "reinforce++", "lam": 0.9},
            "reinforce++ does not read lam; leave out --lam",
        ),
        (
            {"algorithm": "opo", "gamma": 0.9, "samples_per_prompt": 2},
            "algorithm=opo does not read gamma; leave out --ga",
        ),
        ({"algorithm": "reinforce++", "clip_value": 0.2}, "reinforce++ does not read clip_value"),
        ({"dual_clip": 1.0}, "dual_clip=1.0 must be above 1 (3 is usual), or 0 for off"),
        ({"dual_clip": 0.5}, "dual_clip=0.5 must be above 1"),
        ({"dual_clip": -3.0}, "dual_clip=-3.0 must be at least 0; set --dual_clip"),
        ({"ptx_coef": 27.8}, "ptx_coef=27.8 and ptx_data=[] need each other; set both"),
        ({"ptx_data": ["a.jsonl"]}, "ptx_coef=0.0 and ptx_data=['a.jsonl'] need each other"),
        ({"check_only": True, "self_check": "off"}, "check_only asks for the self-check and self"),
        ({"clip_ratio_high": -0.1}, "clip_ratio_high=-0.1 must be at least 0"),
        ({"score_clip": -1.0}, "score_clip=-1.0 must be at least 0; set --score_clip"),
        ({"reward_function_timeout": -1.0}, "reward_function_timeout=-1.0 must be at least 0"),
        ({"stop_at_kl": -1.0}, "stop_at_kl=-1.0 must be at least 0"),
        ({"kl_limit": 0.0}, "kl_limit=0.0 must be above 0"),
        ({"generation_tokens": -1}, "generation_tokens=-1 must be at least 0"),
        (
            {"decode": "static", "zero_stage": 3, "rollout_gather": "layer"},
            "decode=static and rollout_gather=layer: ranks that gather each layer together",
        ),
        ({**BY_HAND, "rollout_devices": "4,5"}, "stands already; leave out --rollout_devices"),
        ({**BY_HAND, "rollout_memory": 0.8}, "stands already; leave out --rollout_memory"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_options_that_cannot_work(settings, said):
    (problem,) = config_of(**settings).problems(1)
    assert said in problem


@pytest.mark.parametrize(
    "settings",
    [
        {"reward_model": "", "reward_function": ["own.py:score"]},
        {"algorithm": "a2c"},
        BY_HAND,
        {**BY_HAND, "lora_rank": 4},
        {"algorithm": "reinforce", "samples_per_prompt": 2, "prompts_per_rollout": 32},
        {"dual_clip": 1.01, "clip_ratio_high": 0.28},
        {"ptx_coef": 27.8, "ptx_data": ["a.jsonl"]},
        {"check_only": True, "self_check": "warn"},
    ],
    ids="+".join,
)
def test_options_that_can_work(settings):
    assert config_of(**settings).problems(1) == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("level, tokens", [("token", 1), ("sequence", 30), ("sequence", 500)])
def test_rounding_is_no_fault_at_the_first_update_and_another_policy_is(dtype, level, tokens):
    """Tokens' log-probabilities differ by as much as the self-check allows, those of whole answers
    by the sum; and then by half a nat in each of the answers."""
    tolerance = self_check.TOLERANCE[dtype]
    generator = torch.Generator().manual_seed(tokens)
    gaps = tolerance * torch.randn(4096, tokens, generator=generator, dtype=torch.float64).sum(1)

    def ask(gaps):
        metrics = {
            "first_ratio": gaps.exp().mean().item(),
            "first_approx_kl": (torch.expm1(gaps) - gaps).mean().item(),
            "first_value_gap": tolerance,
            "response_length": float(max(tokens, 30)),
        }
        probe = SimpleNamespace(config=config_of(action_level=level), tolerance=tolerance)
        steps = SimpleNamespace(probe=probe, metrics=metrics)
        return updates.on_policy_at_the_first_update(steps)

    assert "first minibatch: ratio" in ask(gaps)
    with pytest.raises(Fault, match="does not see the policy that sampled"):
        ask(gaps + max(0.5, 8 * tolerance * tokens**0.5))


# A reward function that fails.

FAILING = """
import time

training = False  # rollouts hold 16 answers, evaluations 8

def score(prompts, responses, rows):
    global training
    training = training or len(prompts) == 16
    for prompt in prompts:
        if training and any(c.isdigit() for c in prompt):
            {what}
    return [0.5 * len(r) for r in responses]
"""


def test_a_reward_function_that_fails_ends_the_run_on_every_rank(tiny, tmp_path):
    """In the first rollout, with the row, its text and the flag to set."""
    kinds = {"raises": 'raise ValueError(f"no score for {prompt}")', "hangs": "time.sleep(600)"}
    processes = []
    for kind, what in kinds.items():
        (tmp_path / f"{kind}.py").write_text(FAILING.format(what=what))
        flags = ["--reward_function", f"{tmp_path / kind}.py:score", "--self_check", "off"]
        flags += ["--reward_function_timeout", 1.5]
        program, argv = ppo(tiny, tiny / "base_model", "", tmp_path / kind, *flags)
        port = str(free_port())
        for rank in "01":
            environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_PORT=port)
            environment |= dict(MASTER_ADDR="127.0.0.1")
            processes.append(
                subprocess.Popen(
                    [sys.executable, ROOT / program, *map(str, argv)],
                    env=os.environ | environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
    said = [p.communicate(timeout=600)[1] for p in processes]
    assert [p.returncode for p in processes] == [1, 1, 1, 1], "\n---\n".join(said)
    for i, rank in itertools.product((0, 2), (0, 1)):
        text = said[i + rank]
        assert f"error on rank {rank}: reward" in text if rank else "error: reward" in text
        assert "Traceback" not in text and "prompt:   '" in text and "response: '" in text
    assert re.search(r"failed on row \d+ of 16: ValueError: no score for .*\d", said[0])
    assert "raise ValueError" in said[0] and "set another --reward_function" in said[0]
    assert re.search(r"took longer than 1.5 s for 16 responses\n  row \d+ alone", said[2])
    assert "raise --reward_function_timeout" in said[2]
    # What was measured before stays, and no weights pretend to be trained.
    for kind in kinds:
        assert len(metrics_of(tmp_path / kind, "eval/score")) == 1
        assert not (tmp_path / kind / "actor").exists()
