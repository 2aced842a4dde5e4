"""The self-check's questions about rows, on models small enough to calculate with."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from step3_ppo import algorithm, update
from step3_ppo.algorithm import ALGORITHMS
from step3_ppo.checks import alignment
from step3_ppo.checks.probe import Fault, Probe
from step3_ppo.experience import make_experience
from step3_ppo.rollout import Prompt
from step3_ppo.state import State
from tests.helpers.small_models import Engine, TableActor, config_of, drawn_rows, rollout_of
from utils.rewards.sums import Function, WeightedSum

VOCABULARY, ROWS = 12, 24
SETTINGS = {
    "defaults": {},
    "no whitening": {"whiten_advantages": False, "gamma": 0.9},
    "whitened rewards": {"whiten_rewards": True},
    "a2c, k2": {"algorithm": "a2c", "kl_estimator": "k2"},
    "reinforce": {"algorithm": "reinforce", "lam": 0.5},
    "sequences": {"action_level": "sequence", "whiten_rewards": True},
    "sequences of a2c": {"algorithm": "a2c", "action_level": "sequence"},
    "shaped, k3": {"score_normalisation": "running", "score_clip": 0.4, "kl_estimator": "k3"},
    "grpo": {"algorithm": "grpo"},
    "dr_grpo, k3": {"algorithm": "dr_grpo", "kl_estimator": "k3"},
    "rloo": {"algorithm": "rloo"},
    "sequences of rloo": {"algorithm": "rloo", "action_level": "sequence"},
    "opo": {"algorithm": "opo"},
    "grpo, KL in the reward": {"algorithm": "grpo", "kl_in": "reward", "kl_estimator": "k1"},
    "grpo, k2, by tokens": {
        "algorithm": "grpo",
        "kl_estimator": "k2",
        "loss_normalisation": "token",
    },
    "sequences of grpo": {"algorithm": "grpo", "action_level": "sequence"},
    "gspo": {"algorithm": "gspo"},
    "cispo": {"algorithm": "cispo"},
    "ppo, KL in the loss": {"kl_in": "loss", "loss_normalisation": "constant"},
    "remax": {"algorithm": "remax"},
    "sequences of remax": {"algorithm": "remax", "action_level": "sequence"},
    "grpo, overlong": {"algorithm": "grpo", "overlong_penalty": 0.7, "overlong_buffer": 3},
    "grpo, cut answers masked": {"algorithm": "grpo", "mask_cut_answers": True},
    "dr_grpo, cut answers masked": {"algorithm": "dr_grpo", "mask_cut_answers": True},
    "ppo, cut answers masked": {"mask_cut_answers": True},
    "grpo, another engine": {"algorithm": "grpo", "importance_cap": 1.2},
    "sequences of a2c, another engine": {
        "algorithm": "a2c",
        "action_level": "sequence",
        "importance_cap": 1.2,
    },
    "reinforce++": {"algorithm": "reinforce++", "gamma": 0.9},
    "reinforce++_baseline": {"algorithm": "reinforce++_baseline"},
    "cut answers": {"missing_eos_penalty": 2.0, "dual_clip": 3.0, "clip_ratio_high": 0.3},
}
RULES = [pytest.param(settings, id=name) for name, settings in SETTINGS.items()]


def experience_of(**settings):
    """(config, Experience of a rollout by a TableActor of zeros, metrics)"""
    rows = drawn_rows(ROWS, VOCABULARY, seed=3)
    for i, row in enumerate(rows):  # what a table of zeros says of each token
        row["group"] = i % 7
        row["logprobs"] = [-float(np.log(VOCABULARY))] * len(row["response"])
        if settings.get("importance_cap"):
            row["engine"] = [x + 0.3 * ((t + i) % 5 - 2) for t, x in enumerate(row["logprobs"])]
        if not ALGORITHMS[settings.get("algorithm", "ppo")].critic:
            row["values"] = [0.0] * len(row["response"])
    config = config_of(
        prompts_per_rollout=ROWS,
        global_batch_size=ROWS,
        micro_batch_size=5,
        max_response_length=7,
        **settings,
    )
    greedy = rollout_of(drawn_rows(7, VOCABULARY, seed=4)) if config.algorithm == "remax" else None
    return config, *make_experience(rollout_of(rows), config, State(kl_coef=0.3), greedy)


def trained(config, experience, metrics, learned_from=None):
    """FirstSteps after one real optimizer step on `learned_from`."""
    models = SimpleNamespace(
        actor=Engine(TableActor(VOCABULARY, VOCABULARY)), nucleus=None, ptx=None
    )
    trace = alignment.LossTrace()
    device = torch.device("cpu")
    rows = list(range(ROWS))
    update.step_actor(models, learned_from or experience, rows, config, device, trace)
    probe = SimpleNamespace(config=config)
    return SimpleNamespace(probe=probe, experience=experience, metrics=metrics, trace=trace)


@pytest.mark.parametrize("settings", RULES)
def test_definitions_and_training_agree_on_every_advantage(settings):
    config, experience, metrics = experience_of(**settings)
    found, _ = alignment.advantages_by_definition(experience, config, metrics["kl_coef"])
    mask = experience.rollout.response_mask.numpy()
    trained = experience.advantages.expand(found.shape).numpy()
    if config.mask_cut_answers:
        assert not trained[~experience.rollout.finished.numpy()].any()
    assert np.abs(trained[mask]).max() > 0.1
    np.testing.assert_allclose(found[mask], trained[mask], rtol=1e-4, atol=1e-5)
    assert not found[~mask].any()
    if settings.get("importance_cap"):
        assert metrics["engine_gap"] > 0.2 and 0 < metrics["importance_capped"] < 1


@pytest.mark.parametrize("settings", RULES)
def test_each_token_is_followed_to_the_loss(settings):
    steps = trained(*experience_of(**settings))
    learned = steps.experience.rollout.finished | (not settings.get("mask_cut_answers"))
    tokens = int(steps.experience.rollout.response_mask[learned].sum())
    said = alignment.advantages_reach_their_tokens(steps)
    assert said.startswith(f"{tokens} tokens of the first minibatch")


def out_of_step(experience, what: str):
    """(what the check looks at, what the update learns from): one of them a row or token off."""
    if what == "scores":
        scores = experience.rollout.scores.roll(1)
        other = dataclasses.replace(experience.rollout, scores=scores)
        return dataclasses.replace(experience, rollout=other), experience
    if what == "old log-probabilities":
        shifts = 0.05 * torch.arange(ROWS)[:, None] * experience.action_mask
        return experience, dataclasses.replace(experience, logprobs=experience.logprobs + shifts)
    advantages = experience.advantages.roll(1, ("rows", "tokens").index(what))
    return experience, dataclasses.replace(experience, advantages=advantages)


def possible(settings, what: str) -> bool:
    """An answer that is one action has no second token; only PPO's loss has a ratio."""
    if what == "tokens":
        return settings.get("action_level") != "sequence"
    if what == "tokens" and ALGORITHMS[settings.get("algorithm", "ppo")].groups:
        return False  # an answer's tokens all have its advantage
    return what != "old log-probabilities" or settings.get("algorithm") not in ("a2c", "reinforce")


@pytest.mark.parametrize(
    "settings, what",
    [
        pytest.param(settings, what, id=f"{name}: {what}")
        for name, settings in SETTINGS.items()
        for what in ("rows", "tokens", "old log-probabilities", "scores")
        if possible(settings, what)
    ],
)
def test_what_is_out_of_step_is_a_fault(settings, what):
    config, experience, metrics = experience_of(**settings)
    looked_at, learned_from = out_of_step(experience, what)
    with pytest.raises(Fault, match="out of step|another row's"):
        alignment.advantages_reach_their_tokens(trained(config, looked_at, metrics, learned_from))


@pytest.mark.parametrize("normalisation", ["token", "sequence", "constant"])
def test_a_loss_that_is_divided_by_another_count_is_a_fault(normalisation, monkeypatch):
    settings = dict(algorithm="grpo", loss_normalisation=normalisation)
    real = algorithm.loss_normaliser
    monkeypatch.setattr(algorithm, "loss_normaliser", lambda *args: real(*args) + 1)
    with pytest.raises(Fault, match="the loss of the first minibatch is multiplied by"):
        alignment.advantages_reach_their_tokens(trained(*experience_of(**settings)))


def test_answers_drawn_twice_are_each_found():
    config, experience, _ = experience_of()
    twice = experience.rollout.select(list(range(0, ROWS, 2)) * 2)
    experience, metrics = make_experience(twice, config, State(kl_coef=0.3))
    assert alignment.advantages_reach_their_tokens(trained(config, experience, metrics))


@pytest.mark.parametrize("score", [5.3, 0.7])
def test_rounding_of_whitened_rewards_that_are_all_alike_is_no_fault(score):
    """A reward of 0 or 1 at the start: what is whitened is the rounding of the mean."""
    config, experience, _ = experience_of(
        action_level="sequence", whiten_rewards=True, whiten_advantages=False
    )
    alike = torch.full_like(experience.rollout.scores, score)
    before = experience.rollout
    rollout = dataclasses.replace(before, scores=alike, ref_logprobs=before.logprobs)
    experience, metrics = make_experience(rollout, config, State(kl_coef=0.3))
    assert alignment.advantages_reach_their_tokens(trained(config, experience, metrics))


# Reward functions.


def scored(function, seconds=0.1, copies=1) -> Probe:
    """Answers that a function has scored once."""
    prompts = [Prompt(({"role": "user", "content": f"{i // copies}"},), "", {}) for i in range(8)]
    decode = lambda ids, skip_special_tokens: ["".join(map(chr, row)) for row in ids]  # noqa: E731
    tokenizer = SimpleNamespace(batch_decode=decode, pad_token_id=0)
    scores = function([p.messages[0]["content"] for p in prompts], [""] * 8, [])
    scores = 0.5 * torch.tensor(scores)
    rollout = rollout_of(drawn_rows(8, VOCABULARY, seed=1))
    return Probe(
        SimpleNamespace(
            reward=None,
            reward_function=WeightedSum({"f": Function(function, "own.py:score", 5.0)}, [1.0]),
            tokenizer=tokenizer,
        ),
        config_of(reward_function=["own.py:score"], reward_function_coef=0.5),
        torch.device("cpu"),
        tolerance=5e-5,
        train=[],
        held=[],
        rollout=dataclasses.replace(rollout, scores=scores, function_scores=scores),
        asked=prompts,
        seconds_score=seconds,
    )


def numbers(prompts, responses, rows):
    return [float(p) ** 2 for p in prompts]


def of_the_row_before(prompts, responses, rows):
    return np.roll(numbers(prompts, responses, rows), 1).tolist()


def over_the_batch(prompts, responses, rows):
    scores = np.array(numbers(prompts, responses, rows))
    return ((scores - scores.mean()) / scores.std()).tolist()


def among_the_answers_to_a_prompt(prompts, responses, rows):
    scores = np.add(numbers(prompts, responses, rows), np.arange(len(prompts)) % 2)
    pairs = scores.reshape(-1, 2)
    return (pairs - pairs.mean(1, keepdims=True)).ravel().tolist()


def at_random(prompts, responses, rows):
    return np.random.default_rng().normal(size=len(prompts)).tolist()


def that_fails_the_second_time(prompts, responses, rows):
    if responses[0]:
        raise ValueError("no more")
    return numbers(prompts, responses, rows)


@pytest.mark.parametrize("function", [numbers, over_the_batch])
def test_scores_of_a_function_that_follow_their_rows_pass(function):
    said = alignment.scores_belong(scored(function))
    assert "follow their 8 rows" in said and "rolled by one row" in said


def test_a_function_may_compare_the_answers_to_one_prompt():
    said = alignment.scores_belong(scored(among_the_answers_to_a_prompt, copies=2))
    assert "follow their 8 rows" in said


@pytest.mark.parametrize(
    "function, said",
    [(of_the_row_before, "another row's"), (that_fails_the_second_time, "ValueError: no more")],
)
def test_scores_of_a_function_that_are_another_rows_are_a_fault(function, said):
    with pytest.raises(Fault, match=said):
        alignment.scores_belong(scored(function))


def by_place(prompts, responses, rows):
    return [float(i) for i in range(len(prompts))]


def test_answers_to_one_prompt_alone_are_shuffled_too():
    with pytest.raises(Fault, match="another row's"):
        alignment.scores_belong(scored(by_place, copies=8))


def test_what_could_not_be_checked_of_a_function_is_said():
    said = alignment.scores_belong(scored(at_random))
    assert "not checked" in said and "own.py:score gives the same rows other scores" in said
    said = alignment.scores_belong(scored(of_the_row_before, seconds=31.0))
    assert said.startswith("not checked: scoring took 31 s")
    said = alignment.scores_belong(scored(lambda p, r, rows: [1.0] * len(p)))
    assert said.endswith("(all are alike)")
