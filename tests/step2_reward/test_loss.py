"""Ranking loss against enumerated pairs; accuracy against hand counts."""

import ast
import math
from itertools import combinations
from pathlib import Path

import pytest
import torch

from step2_reward import loss as ranking
from utils.data.comparisons import ranked_pairs


def softplus(x):
    """−log σ(−x), in float64 and without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def loss_by_enumeration(scores, labels, smoothing=0.0, margin=0.0, centring=0.0):
    """InstructGPT, equation 1: each prompt's unordered pairs, weight 1 over their number."""
    total, start = 0.0, 0
    for group in labels:
        mine = list(zip(scores[start : start + len(group)], group, strict=True))
        start += len(group)
        losses = []
        for (s_a, a), (s_b, b) in combinations(mine, 2):
            if a == b:
                continue
            s_w, s_l = (s_a, s_b) if a > b else (s_b, s_a)
            d = s_w - s_l - margin * abs(a - b)
            value = (1 - smoothing) * softplus(-d) + smoothing * softplus(d)
            losses.append(value + centring * (s_w + s_l) ** 2)
        if losses:
            total += sum(losses) / len(losses)
    return total


def loss_of(scores, labels, margin=0.0, **kwargs):
    winners, losers, weights = ranked_pairs(labels)
    flat = [label for group in labels for label in group]
    margins = None
    if margin:
        margins = torch.tensor(
            [margin * (flat[w] - flat[k]) for w, k in zip(winners, losers, strict=True)]
        )
    return ranking.ranking_loss(scores, winners, losers, weights, margins=margins, **kwargs)


def draw_scores(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 2


LABELS = {
    "pair": [[1, 0]],
    "pair, worse first": [[0, 1]],
    "four answers": [[3, 1, 2, 0]],
    "nine answers": [[4, 8, 1, 0, 7, 3, 2, 6, 5]],
    "ties": [[1, 1, 0], [2, 0, 0, 2]],
    "mixed K": [[1, 0], [0, 1, 2, 3], [5.5, -1, 2]],
}


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"margin": 0.7},
        {"centring": 0.01},
        {"label_smoothing": 0.2, "margin": 0.3, "centring": 0.05},
    ],
    ids=lambda o: "+".join(o) or "plain",
)
def test_loss_and_gradient_by_enumeration(name, options):
    labels = LABELS[name]
    scores = draw_scores(sum(map(len, labels))).requires_grad_()
    loss = loss_of(scores, labels, **options)
    (gradient,) = torch.autograd.grad(loss, scores)
    spelled = {k.replace("label_smoothing", "smoothing"): v for k, v in options.items()}

    def expected(values):
        return loss_by_enumeration(values, labels, **spelled)

    values, step = scores.tolist(), 1e-6
    assert loss.item() == pytest.approx(expected(values), rel=2e-6, abs=1e-7)
    for i in range(len(values)):
        ends = [expected(values[:i] + [values[i] + e] + values[i + 1 :]) for e in (step, -step)]
        assert gradient[i].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=2e-6)


@pytest.mark.parametrize("k", range(2, 10))
def test_pairs_of_k_answers_weigh_one_over_k_choose_2(k):
    order = torch.randperm(k, generator=torch.Generator().manual_seed(k)).tolist()
    winners, losers, weights = ranked_pairs([[0, 1], order])
    pairs = set(zip(winners[1:], losers[1:], strict=True))
    assert (winners[0], losers[0], weights[0]) == (1, 0, 1.0)
    # The second prompt's answers begin at 2.
    assert pairs == {(2 + i, 2 + j) for i in range(k) for j in range(k) if order[i] > order[j]}
    assert weights[1:] == [pytest.approx(1 / math.comb(k, 2))] * math.comb(k, 2)


def test_ties_make_no_pair():
    winners, losers, weights = ranked_pairs([[1, 1, 0]])
    assert set(zip(winners, losers, strict=True)) == {(0, 2), (1, 2)} and weights == [0.5, 0.5]


def test_no_pair_is_no_loss():
    assert ranked_pairs([[1, 1, 1], [0, 0]]) == ([], [], [])
    scores = draw_scores(3).requires_grad_()
    loss = loss_of(scores, [[1, 1, 1]])
    loss.backward()
    assert loss.item() == 0 and (scores.grad == 0).all()


@pytest.mark.parametrize("difference", [-3.0, -0.5, 0.0, 0.5, 3.0])
def test_two_answers_are_the_log_sigmoid_loss(difference):
    loss = loss_of(torch.tensor([0.25 + difference, 0.25]), [[1, 0]])
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-difference))), rel=1e-6)


def test_loss_is_computed_in_fp32_and_does_not_overflow():
    scores = torch.tensor([1.0, 1.0078125, 0.5, 300.0, 100.0], dtype=torch.bfloat16)
    expected = loss_by_enumeration(scores.tolist(), [[2, 1, 0], [0, 1]])
    loss = loss_of(scores, [[2, 1, 0], [0, 1]])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6) and loss.item() > 200
    assert loss_of(torch.tensor([500.0, -500.0]), [[1, 0]]).item() == 0


def test_smoothing_is_least_where_the_label_is_as_sure_as_it_claims():
    """σ(d) = 1 − ε minimises the smoothed loss: its gradient vanishes there."""
    scores = torch.tensor([math.log(0.9 / 0.1), 0.0]).requires_grad_()
    loss_of(scores, [[1, 0]], label_smoothing=0.1).backward()
    assert scores.grad.abs().max().item() < 1e-6


def test_loss_imports_torch_only():
    tree = ast.parse(Path(ranking.__file__).read_text(encoding="utf-8"))
    modules = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    modules += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert {m.split(".")[0] for m in modules} - {"collections"} == {"torch"}
