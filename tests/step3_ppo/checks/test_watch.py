"""What step 3 watches while it trains: the known ways to go wrong, and numbers not finite."""

import dataclasses
import json

import pytest
import torch

from step3_ppo.checks.watch import WARNINGS, Watch
from step3_ppo.config import PPOConfig
from step3_ppo.rollout import Rollout
from tests.helpers.jobs import ppo, reward, sft
from tests.helpers.known_metrics import KnownMetrics
from tests.helpers.running import metrics_of, run_ranks

SOUND = {
    "kl": 1.0,
    "score": 0.0,
    "score_std": 1.0,
    "response_length": 30.0,
    "eos_share": 0.9,
    "explained_variance": 0.3,
    "clip_fraction": 0.1,
    "entropy": 2.0,
}


def rollouts(count: int, **series) -> list[dict]:
    """`count` rollouts' metrics; a list is one value a rollout, a number the value of all."""
    return [
        KnownMetrics(
            SOUND
            | {
                name.replace("__", "/"): v[i] if isinstance(v, list) else v
                for name, v in series.items()
            }
        )
        for i in range(count)
    ]


def evaluated(judge: str, scores, judged, spread=1.0, score_std=1.0) -> list[dict]:
    found = {"eval__score": scores, "eval__score_std": score_std}
    found |= {f"eval__{judge}": judged, f"eval__{judge}_std": spread}
    return rollouts(len(scores), **found)


def ramp(first: float, last: float) -> list[float]:
    """20 values, of which the first five and the last five are these."""
    return [first] * 5 + [(first + last) / 2] * 10 + [last] * 5


# warning: (a history that must give it, one just on the other side that must not), several times
HISTORIES = [
    ("kl above its limit", rollouts(1, kl=5.1), rollouts(1, kl=5.0)),
    (
        "reward flat while kl grows",
        rollouts(20, kl=ramp(0.0, 1.01), score=ramp(1.0, 1.19), score_std=2.0),
        rollouts(20, kl=ramp(0.0, 1.01), score=ramp(1.0, 1.21), score_std=2.0),
    ),
    (
        "reward flat while kl grows",
        rollouts(20, kl=ramp(2.0, 3.01), score=ramp(1.0, 0.0)),
        rollouts(20, kl=ramp(2.0, 2.99), score=ramp(1.0, 0.0)),
    ),
    (
        "reward flat while kl grows",
        rollouts(20, kl=ramp(0.0, 2.0)),
        rollouts(19, kl=ramp(0.0, 2.0), score=ramp(0.0, 0.0)),
    ),
    (
        "response length collapses or spikes",
        rollouts(4, response_length=[30.0, 9.9, 9.9, 9.9]),
        rollouts(4, response_length=[30.0, 10.1, 10.1, 10.1]),
    ),
    (
        "response length collapses or spikes",
        rollouts(4, response_length=[30.0, 90.3, 90.3, 90.3]),
        rollouts(4, response_length=[30.0, 89.7, 89.7, 89.7]),
    ),
    (
        "eos_share at an end",
        rollouts(3, eos_share=[0.03, 0.02, 0.01]),
        rollouts(3, eos_share=[0.03, 0.02, 0.011]),
    ),
    (
        "eos_share at an end",
        rollouts(3, eos_share=1.0, response_length=2.0),
        rollouts(3, eos_share=1.0, response_length=2.1),
    ),
    (
        "eos_share at an end",
        rollouts(3, eos_share=0.991, response_length=1.5),
        rollouts(3, eos_share=0.989, response_length=1.5),
    ),
    (
        "the critic explains nothing",
        rollouts(10, explained_variance=-0.01),
        rollouts(10, explained_variance=[-0.01] * 9 + [0.0]),
    ),
    (
        "the critic explains nothing",
        rollouts(11, explained_variance=[0.9] + [-0.01] * 10),
        rollouts(9, explained_variance=-0.01),
    ),
    (
        "updates are clipped",
        rollouts(3, clip_fraction=[0.3, 0.5, 0.41]),
        rollouts(3, clip_fraction=[0.3, 0.5, 0.39]),
    ),
    (
        "scores are clipped",
        rollouts(3, score_clipped=[0.1, 0.1, 0.11]),
        rollouts(3, score_clipped=[0.1, 0.1, 0.09]),
    ),
    (
        "entropy collapses",
        rollouts(4, entropy=[2.0, 0.19, 0.19, 0.19]),
        rollouts(4, entropy=[2.0, 0.21, 0.21, 0.21]),
    ),
    (
        "the score rises and the judge falls",
        evaluated("verifier", [1.0, 2.0, 3.0], [0.30, 0.50, 0.45]),
        evaluated("verifier", [1.0, 2.0, 3.0], [0.30, 0.50, 0.47]),
    ),
    (
        "the score rises and the judge falls",
        # By the judge's own deviation, which has nothing to do with the reward model's.
        evaluated("judge", [1.0, 2.0], [4.0, 3.5], spread=10.0, score_std=100.0),
        evaluated("judge", [1.0, 2.0], [4.0, 3.7], spread=10.0, score_std=1.0),
    ),
    (
        "the score rises and the judge falls",
        evaluated("verifier", [1.0, 1.01], [0.5, 0.1]),
        evaluated("verifier", [1.0, 1.00], [0.5, 0.1]),
    ),
]


def warned(history) -> list[str]:
    said = []
    watch = Watch(PPOConfig(kl_limit=5.0), said.append, None)
    for step, metrics in enumerate(history):
        watch.warn(step, metrics)
    return said


@pytest.mark.parametrize("name, over, under", HISTORIES)
def test_a_warning_is_given_on_one_side_of_its_threshold(name, over, under):
    assert warned(under) == []
    said = warned(over)
    assert len(said) == 1 and said[0].startswith(f"warning at rollout {len(over)}: {name}: ")
    # Once: what goes on is not told again.
    assert warned([*over, *over[-1:] * 5]) == said


def test_what_is_advised_where_scores_are_clipped():
    for how, mend in (("none", "set --score_normalisation running"), ("fixed", "raise --score_c")):
        watch = Watch(PPOConfig(score_clip=5.0, score_normalisation=how), None, None)
        watch.history = rollouts(3, score_clipped=0.4)
        said = WARNINGS["scores are clipped"](watch)
        assert "40.0% of the scores lie beyond ± 5.0 (--score_clip)" in said and mend in said


def test_every_warning_has_its_histories():
    assert {name for name, _, _ in HISTORIES} == set(WARNINGS)


def test_sound_rollouts_give_no_warning():
    assert warned(rollouts(50)) == []
    # Metrics that a run does not have: no critic, no ratio, no evaluations.
    lacking = [
        {k: v for k, v in m.items() if k not in ("explained_variance", "clip_fraction")}
        for m in rollouts(50)
    ]
    assert warned(lacking) == []


# Numbers that are not finite.


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_engines_pass_over_gradients_that_are_not_finite(tiny, ranks):
    """On all ranks, where one rank's last micro-batch holds a NaN (see bad_step_checks.py)."""
    output = run_ranks([("tests/helpers/bad_step_checks.py", [tiny / "base_model"])], ranks)
    assert output.count("held: stage") == 8 * ranks, output


def planted(out, faults, job):
    out.mkdir(parents=True, exist_ok=True)
    program, argv = job
    return ("tests/helpers/planted_faults.py", [faults, out / "outcome.json", program, *argv])


def outcome(out) -> dict:
    return json.loads((out / "outcome.json").read_text())


def dump(path) -> dict:
    found = torch.load(path, weights_only=True)
    assert {f.name for f in dataclasses.fields(Rollout)} < set(found)
    assert found["response_ids"].shape == found["logprobs"].shape and len(found["scores"]) == 16
    assert found["config"]["global_batch_size"] == 8
    return found


def test_rollouts_and_updates_that_are_not_finite(tiny, chain, tmp_path):
    def job(name, faults, *flags):
        run = ppo(tiny, chain / "sft", chain / "reward", tmp_path / name, *flags)
        return planted(tmp_path / name, faults, run)

    jobs = [
        job("scores", "nan_and_inf_scores_now_and_then", "--max_steps", 4, "--max_bad_steps", 1),
        job(
            "ends", "nan_scores_from_the_second_rollout_on", "--max_steps", 9, "--max_bad_steps", 2
        ),
    ]
    run_ranks(jobs, 1)
    assert_skipped_rollouts_are_told_and_kept(tmp_path / "scores")
    assert_too_many_in_a_row_end_the_run(tmp_path / "ends")


def assert_skipped_rollouts_are_told_and_kept(out):
    """Rollouts 1 and 3 of 4: with --max_bad_steps 1 the good one between them resets the count."""
    found = outcome(out)
    assert found["stopped"] is None and (out / "actor/model.safetensors").exists()
    assert found["said"].count("skipped on all ranks") == 2
    assert "rollout 3: not finite: 1 of 16 scores (1 in a row, 2 in all)" in found["said"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "policy_loss" in r] == [2, 4], "trained on, or not"
    assert json.loads((out / "state.json").read_text())["rollouts"] == 4
    kls = [rows[step]["kl"] for step in (1, 2)]
    assert rows[1]["score"] is None and kls == pytest.approx([0.0, 0.0], abs=1e-5), (
        "step 1 was taken"
    )
    # The self-check's second part waits for a rollout that was trained on.
    assert "FAULT" not in found["said"] and "  passed  gradients" in found["said"]
    kept = sorted(p.name for p in (out / "bad_steps").iterdir())
    assert kept == ["rollout1_1.pt", "rollout3_2.pt"]
    first, second = (dump(out / "bad_steps" / name) for name in kept)
    assert first["scores"][3].isnan() and second["scores"][3] == float("-inf")
    assert first["rows"] == [] and first["reason"] == "rollout 1: not finite: 1 of 16 scores"


def assert_too_many_in_a_row_end_the_run(out):
    """Rollouts 2, 3 and 4 with --max_bad_steps 2."""
    found = outcome(out)
    assert found["kind"] == "StopRun" and "3 optimizer steps in a row" in found["stopped"]
    assert "rollout 4: not finite" in found["stopped"]
    assert (out / "actor/model.safetensors").exists() and (out / "critic").exists()
    assert not (out / "result.json").exists()
    assert len(metrics_of(out, "policy_loss")) == 1


def test_a_nan_on_one_rank_skips_the_step_on_all(tiny, chain, tmp_path):
    """Of 4 optimizer steps a rollout with 2 micro-batches a rank, the second and third."""
    flags = ("--max_steps", 1, "--micro_batch_size", 2)
    run = ppo(tiny, chain / "sft", chain / "reward", tmp_path, *flags)
    run_ranks([planted(tmp_path, "nan_losses_on_the_last_rank", run)], 2)
    found = outcome(tmp_path)
    assert found["stopped"] is None and found["said"].count("skipped on all ranks") == 2
    assert "loss or gradient of the actor not finite (2 in a row, 2 in all)" in found["said"]
    assert metrics_of(tmp_path, "actor_skipped") == [0.5]
    assert metrics_of(tmp_path, "critic_skipped") == [0.0]
    kept = [dump(path) for path in sorted((tmp_path / "bad_steps").iterdir())]
    assert len(kept) == 2 and sorted(set(kept[0]["rows"])) == sorted(kept[0]["rows"])
    assert len(kept[0]["rows"]) == 8 and max(kept[0]["rows"]) < 16
    assert kept[0]["rows"] != kept[1]["rows"] and kept[0]["advantages"].shape[0] == 16
    # What was skipped leaves no NaN in means, nor in what is saved.
    assert len(metrics_of(tmp_path, "policy_loss")) == 1 != metrics_of(tmp_path, "policy_loss")[0]


def test_steps_1_and_2_end_too(tiny, chain, tmp_path):
    limit = ("--max_bad_steps", 2)
    jobs = [
        planted(tmp_path / "sft", "nan_logprobs_in_training", sft(tiny, tmp_path / "sft", *limit)),
        planted(
            tmp_path / "rm",
            "nan_values_in_training",
            reward(tiny, chain / "sft", tmp_path / "rm", *limit),
        ),
    ]
    run_ranks(jobs, 1)
    for name in ("sft", "rm"):
        found = outcome(tmp_path / name)
        assert found["kind"] == "StopRun" and "3 optimizer steps in a row" in found["stopped"]
        assert (tmp_path / name / "model.safetensors").exists()
        assert not (tmp_path / name / "result.json").exists()


def test_stop_at_kl_ends_a_run_as_its_last_step_would(tiny, chain, tmp_path):
    flags = ("--max_steps", 9, "--stop_at_kl", 1e-6)
    program, argv = ppo(tiny, chain / "sft", chain / "reward", tmp_path, *flags)
    said = run_ranks([(program, argv)], 1)  # which asserts exit code 0
    kls = metrics_of(tmp_path, "kl")
    assert len(kls) < 9 and kls[-1] > 1e-6 and all(kl <= 1e-6 for kl in kls[:-1])
    assert f"stopped after {len(kls)} rollouts: kl " in said and "--stop_at_kl" in said
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["rollouts"] == len(kls) and len(metrics_of(tmp_path, "eval/score")) == 2
    for name in ("actor", "critic", "actor_ema"):
        assert (tmp_path / name / "model.safetensors").exists()
