"""Step 3's measures, recomputed token by token in float64, and the table they stand in."""

import math
import statistics
from types import SimpleNamespace

import pytest
import torch

from step3_ppo import measures
from utils import metrics

LENGTHS = [3, 1, 5]


@pytest.fixture
def rollout():
    torch.manual_seed(0)
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    tokens = {name: torch.randn(3, 5) * mask for name in ("logprobs", "ref_logprobs", "entropies")}
    return SimpleNamespace(
        action_mask=mask,
        engine_logprobs=tokens["logprobs"] + 0.25 * mask,
        response_mask=mask,
        earlier=[()] * 3,
        finished=torch.tensor([True, False, True]),
        scores=torch.randn(3),
        function_scores=torch.randn(3),
        judge_scores=torch.zeros(3),
        **tokens,
    )


def rows_of(rollout, name) -> list[list[float]]:
    found = getattr(rollout, name).double().tolist()
    return [row[:n] for row, n in zip(found, LENGTHS, strict=True)]


def test_measures_of_a_rollout(rollout):
    entropies = [x for row in rows_of(rollout, "entropies") for x in row]
    scores, function = rollout.scores.tolist(), rollout.function_scores.tolist()
    kl = dict.fromkeys(("k1", "k2", "k3"), 0.0)
    for own, other in zip(
        rows_of(rollout, "logprobs"), rows_of(rollout, "ref_logprobs"), strict=True
    ):
        for p, q in zip(own, other, strict=True):
            kl["k1"] += (p - q) / 3
            kl["k2"] += (p - q) ** 2 / 2 / 3
            kl["k3"] += (math.exp(q - p) - 1 + p - q) / 3
    expected = {
        "score": statistics.fmean(scores),
        "score_std": statistics.pstdev(scores),
        "kl": kl["k2"],
        "entropy": statistics.fmean(entropies),
        "response_length": 3.0,
        "eos_share": 2 / 3,
        "score_function": statistics.fmean(function),
        "score_model": statistics.fmean(scores) - statistics.fmean(function),
        **{f"kl_{name}": value for name, value in kl.items()},
    }
    assert measures.measure_rollout(rollout, "k2") == pytest.approx(expected, rel=1e-5)


def test_what_is_not_asked_for_is_left_out(rollout):
    rollout.function_scores = torch.zeros(3)
    rollout.judge_scores = rollout.scores
    found = measures.measure_rollout(rollout, "k1")
    assert not {"score_function", "score_model"} & found.keys()
    assert found["judge"] == found["score"] and found["judge_std"] == found["score_std"]


def test_turns_and_replies_are_counted_where_there_are_any(rollout):
    rollout.earlier = [("call", "reply"), (), ("call", "reply", "call", "reply")]
    rollout.response_mask = torch.ones(3, 5, dtype=torch.bool)
    found = measures.measure_rollout(rollout, "k1")
    assert found["turns"] == 2.0 and found["reply_tokens"] == pytest.approx(6 / 3)
    assert found["response_length"] == 3.0


def test_measures_of_an_experience(rollout):
    torch.manual_seed(1)
    mask = rollout.action_mask
    rewards, values, advantages, returns = (torch.randn(3, 5) * mask for _ in range(4))
    experience = SimpleNamespace(
        action_mask=mask, rewards=rewards, values=values, advantages=advantages, returns=returns
    )
    flat = {name: x.double()[mask].tolist() for name, x in vars(experience).items()}
    experience.rollout, experience.group = rollout, torch.tensor([1, 0, 1])
    experience.scores = torch.tensor([2.0, 5.0, 2.0])
    errors = [r - v for r, v in zip(flat["returns"], flat["values"], strict=True)]
    expected = {
        "kl_coef": 0.3,
        "reward": sum(flat["rewards"]) / 3,
        "advantage_std": statistics.stdev(flat["advantages"]),
        "return": statistics.fmean(flat["returns"]),
        "explained_variance": 1
        - statistics.pvariance(errors) / statistics.pvariance(flat["returns"]),
    }
    for critic in (True, False):
        config = SimpleNamespace(
            has_critic=lambda critic=critic: critic,
            compares_groups=lambda: False,
            compares_engine=lambda: False,
            importance_cap=0,
        )
        state = SimpleNamespace(kl_coef=0.3)
        found = measures.measure_experience(experience, config, state)
        assert found == pytest.approx(expected, rel=1e-5)
        expected.pop("explained_variance", None)


def test_groups_that_teach_nothing_and_the_engine_s_distance(rollout):
    """Rows of one group need not be neighbours; the engine says 0.25 nats more of each token."""
    experience = SimpleNamespace(rollout=rollout, group=torch.tensor([4, 0, 4]))
    for scores, share in (([2.0, 5.0, 2.0], 1.0), ([2.0, 5.0, 2.1], 0.5)):
        experience.scores = torch.tensor(scores)
        config = SimpleNamespace(compares_groups=lambda: True, importance_cap=0.7)
        config.compares_engine = lambda: True
        assert measures.groups_alike(experience, config) == share
    assert measures.of_engine(experience, config, abs) == pytest.approx(0.25)
    named = {row.name: f for row, f in measures.EXPERIENCE.items()}
    for cap, share in ((0.77, 1.0), (0.79, 0.0)):  # e^−0.25 = 0.779
        config.importance_cap = cap
        assert named["importance_capped"](experience, config, None) == share


def test_a_new_metric_is_one_entry(rollout, monkeypatch):
    longest = metrics.Metric("longest", "tokens", "the longest response")
    measured = {longest: lambda rollout, _: float(rollout.action_mask.sum(1).max())}
    monkeypatch.setattr(measures, "ROLLOUT", measured)
    assert measures.measure_rollout(rollout, "k1") == {"longest": 5.0}


def test_speeds_are_of_phases_that_were_timed(rollout):
    found = measures.speeds(rollout, {"seconds_generate": 2.0, "seconds_train": 0.5, "kl": 1.0})
    assert found == {"tokens_per_second_generate": 4.5, "tokens_per_second_train": 18.0}
