"""Labellers: how often their labels agree with the truth."""

import random

import pytest

from step2_reward.labellers import agreeing_scores, share_agreeing


@pytest.mark.parametrize("rate", [0.6, 0.73, 0.9])
def test_a_labeller_agrees_as_often_as_asked(rate):
    draw = random.Random(0)
    truth = [[draw.choice([0.0, 0.1, 0.3, 1.0]) for _ in range(4)] for _ in range(800)]
    labels = agreeing_scores(truth, rate, seed=1)
    same = pairs = 0
    for t, o in zip(truth, labels, strict=True):
        for i in range(4):
            for j in range(4):
                if t[i] > t[j]:
                    pairs, same = pairs + 1, same + (o[i] > o[j])
    assert same / pairs == pytest.approx(rate, abs=0.005)
    assert share_agreeing(truth, labels) == pytest.approx(same / pairs)
    assert agreeing_scores(truth, 1.0, seed=1) == truth
