"""Accuracy on pairs, and its interval by prompt."""

import math
from itertools import combinations

import numpy as np
import pytest

from utils.confidence import (
    interval_by_prompt,
    pair_accuracy,
    ranking_accuracy,
    wilson_interval,
)


def test_pair_accuracy_by_hand():
    better, worse = [1.0, 2.0, 0.0, -1.0, 5.0], [0.0, 3.0, 0.0, -1.5, 5.0]
    result = pair_accuracy(
        better, worse, ["a", "b", "c", "d", "e"]
    )  # right, wrong, tie, right, tie
    assert result["accuracy"] == pytest.approx((1 + 0 + 0.5 + 1 + 0.5) / 5)
    assert result["margin"] == pytest.approx((1 - 1 + 0 + 0.5 + 0) / 5)
    assert result["pairs"] == 5
    assert 0 <= result["low"] < result["accuracy"] < result["high"] <= 1


def drawn(generator, prompts: int, answers: int) -> np.ndarray:
    """(prompts, pairs) bool: does a score s·quality + noise rank each pair of answers right? The
    reward model understands half of the prompts (s = 2) and hardly the others (s = 0.3)."""
    slopes = generator.choice(SLOPES, (prompts, 1))
    quality = generator.normal(size=(prompts, answers))
    scores = slopes * quality + generator.normal(size=(prompts, answers))
    first, second = np.array(list(combinations(range(answers), 2))).T
    gaps = [x[:, first] - x[:, second] for x in (quality, scores)]
    return gaps[0] * gaps[1] > 0


SLOPES = (0.3, 2.0)
# A pair's two gaps are bivariate normal: the share of equal signs is 1/2 + arctan(s)/π.
TRUE_ACCURACY = sum(0.5 + math.atan(s) / math.pi for s in SLOPES) / len(SLOPES)


def test_interval_covers_the_truth_where_prompts_differ():
    """K = 6 answers, 60 prompts: 95 % by prompt, where Wilson's on 900 pairs covers 78 %."""
    generator, runs = np.random.default_rng(5), 400
    covered = {"by prompt": 0, "Wilson": 0}
    for _ in range(runs):
        right = drawn(generator, 60, 6)
        prompts = np.repeat(np.arange(60), right.shape[1])
        low, high = interval_by_prompt(right.ravel().astype(float), prompts)
        covered["by prompt"] += low <= TRUE_ACCURACY <= high
        share, n = right.mean(), right.size
        # Wilson's interval holds the p with |share − p| ≤ z √(p (1 − p) / n).
        error = 1.96 * math.sqrt(TRUE_ACCURACY * (1 - TRUE_ACCURACY) / n)
        covered["Wilson"] += abs(share - TRUE_ACCURACY) <= error
    assert 0.92 <= covered["by prompt"] / runs <= 0.98
    assert 0.72 <= covered["Wilson"] / runs <= 0.84


def test_one_pair_a_prompt_is_as_wide_as_wilsons():
    """A prompt with one pair is one trial, as the pairs of UltraFeedback."""
    right = np.arange(426) % 8 > 0
    low, high = interval_by_prompt(right.astype(float), np.arange(426))
    assert (low, high) == pytest.approx(wilson_interval(right.mean(), 426), abs=0.005)


def test_few_prompts_do_not_call_a_sound_model_worse_than_chance():
    """Two prompts of 6 pairs whose shares happen to be near each other say nothing."""
    right = np.repeat([2 / 6, 2.5 / 6], 6)
    low, high = interval_by_prompt(right, np.repeat([0, 1], 6))
    assert low < 0.1 and high > 0.85


def test_pairs_said_again_make_it_no_narrower():
    right = (np.arange(80) % 4 > 0).astype(float)
    once = interval_by_prompt(right, np.arange(80))
    assert interval_by_prompt(np.tile(right, 15), np.tile(np.arange(80), 15)) == pytest.approx(once)
    assert interval_by_prompt(right, np.arange(80)) == once, "seeded"


@pytest.mark.parametrize("prompts", [1, 4, 60])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_prompts_that_are_all_alike_count_as_one_trial_each(prompts, share):
    """All right, all wrong, one prompt: drawing prompts again says nothing of what others do."""
    right = np.tile(np.arange(5) < 5 * share, prompts).astype(float)
    found = interval_by_prompt(right, np.repeat(np.arange(prompts), 5))
    assert found == pytest.approx(wilson_interval(share, prompts))
    assert found[1] - found[0] > 0.05


def test_more_prompts_than_are_drawn_at_once(monkeypatch):
    right = np.random.default_rng(0).random(500) < 0.8
    whole = interval_by_prompt(right, np.arange(500))
    monkeypatch.setattr("utils.confidence.AT_ONCE", 700)  # one resample of 500 at a time
    assert interval_by_prompt(right, np.arange(500)) == pytest.approx(whole, abs=0.01)


@pytest.mark.parametrize("right, n", [(0, 10), (8, 10), (10, 10), (1, 3), (512, 1000)])
def test_wilson_bounds_solve_their_equation(right, n):
    """The bounds are the p with |share − p| = z √(p (1 − p) / n)."""
    share = right / n
    low, high = wilson_interval(share, n)
    for p in (low, high):
        assert abs(share - p) == pytest.approx(1.96 * math.sqrt(max(p * (1 - p), 0) / n), abs=1e-7)
    assert low <= share + 1e-12 and share <= high + 1e-12 and low < high
    assert (low == pytest.approx(0, abs=1e-12)) == (right == 0)
    assert (high == pytest.approx(1, abs=1e-12)) == (right == n)


def test_a_ranking_is_all_its_pairs_that_differ():
    """By hand: 3 answers with a tie make 2 pairs, 2 equal ones none, 2 others one."""
    labels, prompts = [(1.0, 0.0, 0.0), (2.0, 2.0), (0.5, 1.5)], ["a", "b", "c"]
    scores, lengths = [(3.0, 1.0, 4.0), (7.0, 9.0), (1.0, 1.5)], [(5, 9, 2), (1, 2), (8, 8)]
    found = ranking_accuracy(labels, scores, lengths, prompts)
    assert found["pairs"] == 3 and found["accuracy"] == pytest.approx(2 / 3)
    assert found["margin"] == pytest.approx((2.0 - 1.0 + 0.5) / 3)
    assert found["accuracy_longer_answer"] == pytest.approx((0 + 1 + 0.5) / 3)
    by_prompt = interval_by_prompt(np.array([1.0, 0.0, 1.0]), ["a", "a", "c"])
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx(by_prompt)
