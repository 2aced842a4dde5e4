"""From scores to rewards: normalisation, penalty and clip in their order, and what is reported."""

import json

import numpy as np
import pytest
import torch

from step3_ppo.experience import make_experience
from step3_ppo.measures import measure_rollout
from step3_ppo.state import State
from tests.helpers.small_models import config_of, drawn_rows, rollout_of
from utils.distributed.process_group import StopRun


def batches_of_scores(count=7):
    generator = torch.Generator().manual_seed(0)
    return [
        30 + 5 * i + (1 + i) * torch.randn(2 + 9 * i % 11, generator=generator)
        for i in range(count)
    ]


def test_running_statistics_are_those_of_all_scores_so_far():
    state, seen = State(kl_coef=0.1), []
    for scores in batches_of_scores():
        state.see(scores)
        seen.append(scores.numpy().astype(np.float64))
        together = np.concatenate(seen)
        assert state.score_count == len(together)
        assert state.score_mean == pytest.approx(together.mean(), rel=1e-12)
        assert state.score_variance == pytest.approx(together.var(), rel=1e-10)
        expected = (scores.numpy() - together.mean()) / together.std()
        np.testing.assert_allclose(state.normalised(scores).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_one_score_or_equal_scores_are_normalised_to_zero():
    for scores in (torch.tensor([3.7]), torch.full((5,), 0.1)):
        state = State(kl_coef=0.1)
        state.see(scores)
        assert (state.normalised(scores) == 0).all()


def shaped_by_hand(rows, mean, deviation, penalty, clip, stand_in=None) -> list[float]:
    """One answer after the other; stand_in: the raw score for the finished ones' where none is."""

    def shape(score):
        score = (score - mean) / deviation
        return min(max(score, -clip), clip) if clip else score

    ended = [shape(row["score"]) for row in rows if row["finished"]]
    if not ended and stand_in is not None:
        ended = [shape(stand_in)]
    found = []
    for row in rows:
        score = shape(row["score"])
        if penalty and not row["finished"]:
            score = min([score] + ([sum(ended) / len(ended)] if ended else [])) - penalty
        found.append(score)
    return found


@pytest.mark.parametrize("how", ["none", "running", "fixed"])
@pytest.mark.parametrize("penalty", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("clip", [0.0, 0.8])
@pytest.mark.parametrize("shift", [-6.0, 0.0, 6.0])
def test_scores_are_normalised_then_clipped_then_penalised(how, penalty, clip, shift):
    rows = drawn_rows(9, 12, seed=1)
    for row in rows:
        row["score"] += shift
    raw = [row["score"] for row in rows]
    mean, deviation = {
        "none": (0.0, 1.0),
        "running": (np.mean(raw), np.std(raw)),
        "fixed": (0.5, 2.0),
    }[how]
    expected = shaped_by_hand(rows, mean, deviation, penalty, clip)

    state = State(kl_coef=0.0)
    if how == "fixed":
        state.fix(0.5, 2.0)
    config = config_of(
        gamma=1.0,
        lam=1.0,
        whiten_advantages=False,
        score_normalisation=how,
        missing_eos_penalty=penalty,
        score_clip=clip,
    )
    experience, metrics = make_experience(rollout_of(rows), config, state)
    # With γ = λ = 1 and no KL to pay the return at every token is the score.
    for b, row in enumerate(rows):
        found = experience.returns[b, : len(row["response"])].tolist()
        assert found == pytest.approx([expected[b]] * len(found), rel=1e-4, abs=1e-5)
    assert metrics["reward"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert metrics["score"] == pytest.approx(np.mean(raw), rel=1e-5), "reported as it came"
    assert metrics["score_std"] == pytest.approx(np.std(raw), rel=1e-5)
    assert state.score_count == (len(rows) if how == "running" else 0)
    if how == "running":  # of what was scored, not of what a penalty made of it
        assert (state.score_mean, state.score_variance) == pytest.approx((mean, deviation**2))
    beyond = [abs((score - mean) / deviation) > clip for score in raw]
    assert metrics.get("score_clipped") == (pytest.approx(np.mean(beyond)) if clip else None)


@pytest.mark.parametrize("clip", [0.0, 5.0])
@pytest.mark.parametrize("how", ["none", "running"])
def test_a_cut_answer_never_pays(how, clip):
    """Whatever the scale: below the mean finished answer by the penalty, and below itself ended."""
    for seed, shift in enumerate([-60.0, -6.0, -1.0, 0.0, 6.0]):
        rows = drawn_rows(12, 9, seed=seed)
        for row in rows:
            row["score"] += shift
        config = config_of(score_normalisation=how, missing_eos_penalty=1.0, score_clip=clip)
        given = rollout_of(rows)
        scores, _ = State(kl_coef=0.0).shape_scores(given, config)
        given.finished = torch.ones(len(rows), dtype=torch.bool)
        as_ended, _ = State(kl_coef=0.0).shape_scores(given, config)
        cut = torch.tensor([not row["finished"] for row in rows])
        assert cut.any() and (scores[cut] <= as_ended[cut] - 1.0 + 1e-5).all()
        assert scores[cut].max() <= scores[~cut].mean() - 1.0 + 1e-5
        assert torch.equal(scores[~cut], as_ended[~cut])


@pytest.mark.parametrize("clip", [0.0, 0.8])
def test_where_none_finished_the_last_ones_that_did_stand_in(clip):
    settings = dict(score_normalisation="running", missing_eos_penalty=0.5, score_clip=clip)
    config, state, raw, last = config_of(**settings), State(kl_coef=0.0), [], None
    for seed, ending in enumerate([False, True, True, False, False]):
        rows = drawn_rows(7, 12, seed=seed)
        for row in rows:
            row["score"] += seed
            row["finished"] &= ending
        raw += [row["score"] for row in rows]
        scores, _ = state.shape_scores(rollout_of(rows), config)
        expected = shaped_by_hand(rows, np.mean(raw), np.std(raw), 0.5, clip, last)
        assert scores.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5), seed
        last = np.mean([r["score"] for r in rows if r["finished"]]) if ending else last
    assert state.finished_score == pytest.approx(last, rel=1e-5)


def test_the_penalty_of_overlong_answers_is_dapo_s():
    """Yu et al. 2025, equation 13, with L_max = 6 and L_cache = 4, on the shaped scores."""
    rows = drawn_rows(9, 12, seed=1)
    lengths = [len(row["response"]) for row in rows]
    assert set(lengths) == {1, 2, 3, 4, 5, 6}
    settings = dict(max_response_length=6, overlong_penalty=0.5, overlong_buffer=4)
    plain, long = (
        State(kl_coef=0.0).shape_scores(
            rollout_of(rows), config_of(score_normalisation="running", **more)
        )
        for more in ({}, settings)
    )
    shares = {1: 0.0, 2: 0.0, 3: 0.25, 4: 0.5, 5: 0.75, 6: 1.0}
    expected = [x - 0.5 * shares[n] for x, n in zip(plain[0].tolist(), lengths, strict=True)]
    assert long[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert long[1]["overlong"] == pytest.approx(np.mean([shares[n] for n in lengths]))
    assert "overlong" not in plain[1]


def test_scores_that_do_not_differ_cannot_be_normalised_by_their_deviation():
    state = State(kl_coef=0.1)
    with pytest.raises(StopRun, match="all score 0.25.*--score_normalisation running"):
        state.fix(0.25, 0.0)
    state.fix(0.25, 1e-3)
    assert state.normalised(torch.tensor([0.251])).item() == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_that_is_reported_is_the_kl_that_is_charged(estimator):
    rows, kl_coef = drawn_rows(8, 12, seed=2), 0.7
    charged = []
    for row in rows:
        moves = [a - b for a, b in zip(row["logprobs"], row["ref_logprobs"], strict=True)]
        each = {"k1": lambda x: x, "k2": lambda x: x * x / 2, "k3": lambda x: np.exp(-x) - 1 + x}
        charged.append({name: sum(map(of, moves)) for name, of in each.items()})
    config = config_of(kl_estimator=estimator, kl_coef=123.0, gamma=1.0)
    rollout = rollout_of(rows)
    _, metrics = make_experience(rollout, config, State(kl_coef=kl_coef))
    for name in ("k1", "k2", "k3"):
        mean = np.mean([row[name] for row in charged])
        assert metrics[f"kl_{name}"] == pytest.approx(mean, rel=1e-5), "per answer, in nats"
    assert metrics["kl"] == metrics[f"kl_{estimator}"] == measure_rollout(rollout, estimator)["kl"]
    assert metrics["kl_coef"] == kl_coef, "of the state, which adapts it"
    mean_score = np.mean([row["score"] for row in rows])
    assert metrics["reward"] == pytest.approx(mean_score - kl_coef * metrics["kl"], rel=1e-4)


def test_whitened_rewards_keep_their_mean():
    rows = drawn_rows(6, 12, seed=3)
    rewards = []
    for row in rows:
        own = [-0.1 * (a - b) for a, b in zip(row["logprobs"], row["ref_logprobs"], strict=True)]
        rewards.append([*own[:-1], own[-1] + row["score"]])
    flat = np.concatenate(rewards)
    config = config_of(whiten_rewards=True, whiten_advantages=False, gamma=0.0, lam=0.0)
    experience, _ = make_experience(rollout_of(rows), config, State(kl_coef=0.1))
    for b, own in enumerate(rewards):
        # With γ = 0 the return at a token is its reward.
        expected = (np.array(own) - flat.mean()) / flat.std() + flat.mean()
        assert experience.returns[b, : len(own)].tolist() == pytest.approx(expected, abs=1e-5)


def test_advantages_are_whitened_over_the_rollout_and_returns_are_not():
    rows = drawn_rows(6, 12, seed=4)
    plain, white = (
        make_experience(rollout_of(rows), config_of(whiten_advantages=on), State(kl_coef=0.1))
        for on in (False, True)
    )
    assert torch.equal(plain[0].returns, white[0].returns) and plain[1] == white[1]
    kept = plain[0].advantages[plain[0].action_mask].double().numpy()
    expected = (kept - kept.mean()) / kept.std()
    assert white[0].advantages[white[0].action_mask].tolist() == pytest.approx(expected, abs=1e-4)


def test_the_state_is_saved_as_json(tmp_path):
    state = State(kl_coef=0.05, rollouts=7)
    state.see(torch.tensor([1.0, 2.0, 6.0]))
    state.adapt(12.0, 500, config_of(kl_target=6.0))
    state.snapshot(None)(tmp_path)
    assert json.loads((tmp_path / "state.json").read_text()) == {
        "kl_coef": 0.05 * (1 + 0.2 * 500 / 10_000),
        "rollouts": 7,
        "score_mean": 3.0,
        "score_variance": pytest.approx(14 / 3),
        "score_count": 3,
        "finished_score": None,
        "logprobs_from": "",
    }
    state.adapt(12.0, 500, config_of(kl_target=0.0))
    assert state.kl_coef == 0.05 * (1 + 0.2 * 500 / 10_000), "without a target it stays"
