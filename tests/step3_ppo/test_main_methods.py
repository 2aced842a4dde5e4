"""Algorithms without a critic through step 3's main: one path on any ranks and under ZeRO-3, and a
run that crashed ends as one that did not, bit for bit."""

import pytest

from step3_ppo.algorithm import ALGORITHMS
from tests.helpers.jobs import ppo
from tests.helpers.running import assert_same_path, metrics_of, run_ranks
from tests.utils.checkpoints.test_checkpoints import assert_same_end, stopped

# Two values only, so that answers to one prompt are often alike.
COARSE = """def score(prompts, responses, rows):
    return [float(len(r) % 2) for r in responses]
"""
DAPO = ["--dynamic_sampling", 2, "--overlong_penalty", 0.5, "--overlong_buffer", 6]
DAPO += ["--mask_cut_answers", "--clip_ratio_high", 0.28, "--loss_normalisation", "token"]
METHODS = {name: ["--algorithm", name] for name, m in ALGORITHMS.items() if not m.critic}
METHODS["dapo"] = ["--algorithm", "grpo", *DAPO]
METHODS["another engine"] = ["--algorithm", "grpo", "--importance_cap", 2.0]
METHODS["another engine"] += ["--logprobs_from", "forward", "--kl_target", 0.5]
METHODS["bandit"] = ["--algorithm", "rloo", "--action_level", "sequence"]
ONE_STEP = ["--ppo_epochs", 1, "--global_batch_size", 16]
PATH = ["score", "kl", "policy_loss", "actor_grad_norm", "response_length", "advantage_std"]


def jobs_of(tiny, chain, folder):
    """(method, folder, *flags) → its job of three small rollouts: 4 prompts, 4 answers each."""
    (folder / "coarse.py").write_text(COARSE)

    def job(method, out, *flags):
        given = ["--reward_function", f"{folder / 'coarse.py'}:score", "--seed", 3]
        given += ["--prompts_per_rollout", 4, "--samples_per_prompt", 4, *METHODS[method]]
        given += ONE_STEP if getattr(ALGORITHMS.get(method), "one_step", False) else []
        return ppo(tiny, chain / "sft", "", folder / out, *given, *flags)

    return job


def crashed_and_resumed(job, method, out, *flags):
    saving = (*flags, "--save_every", 1)
    first = stopped(job(method, out, *saving), 2, "crash")
    return [first, job(method, out, *saving, "--resume", "auto")]


def test_groups_under_zero_3_and_after_a_crash(tiny, chain, tmp_path):
    """On two ranks, with what draws most at once: groups drawn again, masked and penalised."""
    job = jobs_of(tiny, chain, tmp_path)
    off = ("--self_check", "off")
    jobs = [job("dapo", "zero0"), job("dapo", "zero3", "--zero_stage", 3, *off)]
    run_ranks([*jobs, *crashed_and_resumed(job, "dapo", "crashed", *off)], 2)
    assert_same_path({f"ZeRO-{n}": tmp_path / f"zero{n}" for n in (0, 3)}, PATH)
    assert_same_end(tmp_path / "crashed", tmp_path / "zero0")
    drawn, alike = (metrics_of(tmp_path / "zero0", n) for n in ("groups_drawn", "groups_alike"))
    assert len(drawn) == 3 and all(4 <= n <= 12 for n in drawn) and max(drawn) > 4
    # Answers all 0 or all 1 may still be of different lengths, and so pay different penalties.
    assert all(0 <= share < 1 for share in alike)
    assert min(metrics_of(tmp_path / "zero0", "overlong")) > 0
    assert metrics_of(tmp_path / "zero0", "kl") == metrics_of(tmp_path / "zero0", "kl_k3")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_one_path_and_resumes(tiny, chain, tmp_path, method):
    job = jobs_of(tiny, chain, tmp_path)
    run_ranks([job(method, "0_1"), *crashed_and_resumed(job, method, "crashed")], 1)
    off = ("--self_check", "off")
    jobs = [job(method, "0_2", *off), job(method, "3_2", "--zero_stage", 3, *off)]
    run_ranks([*jobs, *crashed_and_resumed(job, method, "crashed_3", "--zero_stage", 3, *off)], 2)
    assert_same_path({name: tmp_path / name for name in ("0_1", "0_2", "3_2")}, PATH)
    assert_same_end(tmp_path / "crashed", tmp_path / "0_1")
    assert_same_end(tmp_path / "crashed_3", tmp_path / "3_2")
    assert min(metrics_of(tmp_path / "0_1", "actor_grad_norm")) > 0
    assert not (tmp_path / "0_1/critic").exists()
