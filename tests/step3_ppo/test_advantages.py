"""Estimators of the advantage, against loops in float64 written from their papers."""

import ast
import math
import sys
from pathlib import Path

import pytest
import torch

from step3_ppo import advantages, algorithm
from step3_ppo.advantages import explained_variance, gae, masked_mean, whiten
from tests.step3_ppo.test_algorithm import GAPS, assert_close, normal, prefix_mask


@pytest.mark.parametrize("module, beside", [(algorithm, {"step3_ppo"}), (advantages, set())])
def test_arithmetic_imports_torch_and_the_standard_library(module, beside):
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or "").split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch"} | beside


def test_masked_mean_by_hand():
    x = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    assert masked_mean(x, prefix_mask([2, 1], 3)).item() == pytest.approx(11 / 3)
    assert masked_mean(x, prefix_mask([0, 1], 3)).item() == 8.0


# Generalised advantage estimation.


def gae_by_sums(rewards, values, lengths, gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t, over each row's own tokens."""
    rows, width = rewards.shape
    advantages = torch.zeros(rows, width, dtype=torch.float64)
    returns = torch.zeros(rows, width, dtype=torch.float64)
    for b in range(rows):
        n = lengths[b]
        r, v = rewards[b].tolist(), [*values[b, :n].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            total = sum((gamma * lam) ** k * delta[t + k] for k in range(n - t))
            advantages[b, t], returns[b, t] = total, total + v[t]
    return advantages, returns


@pytest.mark.parametrize("gamma", [1.0, 0.99, 0.5, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.5, 0.0])
@pytest.mark.parametrize(
    "lengths, width", [([1, 1], 1), ([3, 3, 3], 3), ([7, 1, 4, 6], 7), ([2, 5], 9), ([4, 0], 4)]
)
def test_gae_is_the_double_sum(gamma, lam, lengths, width):
    rewards = normal(len(lengths), width, seed=1)
    values = normal(len(lengths), width, seed=2)
    actual = gae(rewards, values, prefix_mask(lengths, width), gamma, lam)
    for got, expected in zip(
        actual, gae_by_sums(rewards, values, lengths, gamma, lam), strict=True
    ):
        assert_close(got, expected)


def test_gae_worked_case():
    values = torch.tensor([[0, 0.8, 0.6, 0.4, 0.2], [0, 0.7, 0.5, 0.3, 0.1]])
    rewards = torch.tensor([[0, -0.01, -0.02, -0.03, 1.2], [0, -0.005, -0.015, -0.025, 0.8]])
    mask = torch.ones(2, 5, dtype=torch.bool)
    advantages, returns = gae(rewards, values, mask, 0.99, 0.95)
    expected = [[0.9801, 0.2000, 0.4423, 0.7085, 1.0], [0.6623, -0.0326, 0.1886, 0.4323, 0.7]]
    assert_close(advantages, torch.tensor(expected), 5.1e-5)
    expected = [[0.9801, 1.0, 1.0423, 1.1085, 1.2], [0.6623, 0.6674, 0.6886, 0.7323, 0.8]]
    assert_close(returns, torch.tensor(expected), 5.1e-5)


def test_gae_with_lambda_one_returns_the_discounted_rewards():
    rewards, values = normal(1, 6, seed=3), normal(1, 6, seed=4)
    _, returns = gae(rewards, values, prefix_mask([6], 6), 0.9, 1.0)
    expected = [sum(0.9**k * rewards[0, t + k].item() for k in range(6 - t)) for t in range(6)]
    assert_close(returns[0], torch.tensor(expected, dtype=torch.float64))


# Actions that are no neighbours.


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.95), (0.5, 0.0), (1.0, 0.3)])
def test_gae_passes_over_what_is_not_an_action(gamma, lam):
    """As on the row's actions alone, written side by side."""
    rewards, values = normal(4, 8, seed=31), normal(4, 8, seed=32)
    actual = gae(rewards, values, GAPS, gamma, lam)
    for b, acts in enumerate(GAPS.tolist()):
        at = [t for t, is_action in enumerate(acts) if is_action]
        alone = [x[b, at][None] for x in (rewards, values)]
        expected = gae_by_sums(*alone, [len(at)], gamma, lam)
        for got, want in zip(actual, expected, strict=True):
            assert_close(got[b, at], want[0])
            others = [t for t in range(8) if t not in at]
            assert (got[b, others] == 0).all()


def test_gae_worked_case_with_a_gap():
    """Actions at 1 and 4; γ = 0.5, λ = 0.5. δ₄ = 3 − 2 = 1, δ₁ = 1 + 0.5·2 − 4 = −2, and
    A₁ = −2 + 0.25·1 = −1.75."""
    mask = torch.tensor([[False, True, False, False, True, False]])
    rewards = torch.tensor([[9.0, 1.0, 9.0, 9.0, 3.0, 9.0]])
    values = torch.tensor([[7.0, 4.0, 7.0, 7.0, 2.0, 7.0]])
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5)
    assert advantages.tolist() == [[0.0, -1.75, 0.0, 0.0, 1.0, 0.0]]
    assert returns.tolist() == [[0.0, 2.25, 0.0, 0.0, 3.0, 0.0]]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.0), (0.5, 1.0)])
def test_gae_of_one_action_is_reward_minus_value(gamma, lam):
    """No step follows the only one, so neither γ nor λ counts."""
    rewards, values = normal(5, 1, seed=2), normal(5, 1, seed=3)
    advantages, returns = gae(rewards, values, prefix_mask([1] * 5, 1), gamma, lam)
    assert_close(advantages, rewards - values)
    assert_close(returns, rewards)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.99, 0.9)])
def test_gae_of_long_rows_solves_the_definition(gamma, lam):
    """(1 − λ) Σ_n λ^(n−1) A^(n) over n-step advantages: Schulman et al. 2015, equation 16."""
    lengths, width = [40, 1, 23], 40
    rewards, values = normal(3, width, seed=4), normal(3, width, seed=5)
    actual, _ = gae(rewards, values, prefix_mask(lengths, width), gamma, lam)
    for b, n in enumerate(lengths):
        r, v = rewards[b].tolist(), values[b].tolist()
        for t in range(n):
            left, found, discounted = n - t, 0.0, 0.0
            for k in range(1, left + 1):
                discounted += gamma ** (k - 1) * r[t + k - 1]
                k_steps = discounted + (gamma**k * v[t + k] if k < left else 0.0) - v[t]
                # After the end all further n-step advantages are the last one.
                weight = (1 - lam) * lam ** (k - 1) if k < left else lam ** (k - 1)
                found += weight * k_steps
            assert actual[b, t].item() == pytest.approx(found, abs=1e-11)


# Whitening.


@pytest.mark.parametrize("lengths, width", [([5, 2, 4], 5), ([3, 3], 3), ([9, 0, 1], 12)])
def test_whiten_gives_mean_0_and_variance_1_over_the_mask(lengths, width):
    mask = prefix_mask(lengths, width)
    x = 7 + 3 * normal(len(lengths), width, seed=5)
    white = whiten(x, mask)
    kept = [white[b, t].item() for b, n in enumerate(lengths) for t in range(n)]
    mean = sum(kept) / len(kept)
    assert mean == pytest.approx(0, abs=1e-12)
    assert sum((k - mean) ** 2 for k in kept) / len(kept) == pytest.approx(1, abs=1e-6)
    assert (white[~mask] == 0).all()
    # The order of the values stays, and so do their distances.
    a, b = white[0, 0] - white[0, 1], white[0, 0] - white[0, 2]
    assert_close(a / b, (x[0, 0] - x[0, 1]) / (x[0, 0] - x[0, 2]), 1e-9)
    assert torch.sign(a) == torch.sign(x[0, 0] - x[0, 1])


def test_whiten_of_equal_values_is_zero():
    assert (whiten(torch.full((2, 3), 4.0), prefix_mask([3, 1], 3)) == 0).all()


@pytest.mark.parametrize("lengths, width", [([5, 2, 4], 5), ([3, 3], 3), ([9, 0, 1], 12)])
def test_whiten_can_keep_the_mean(lengths, width):
    mask = prefix_mask(lengths, width)
    x = 7 + 3 * normal(len(lengths), width, seed=6)
    white = whiten(x, mask, shift_mean=False)
    places = [(b, t) for b, n in enumerate(lengths) for t in range(n)]
    mean = sum(x[p].item() for p in places) / len(places)
    deviation = math.sqrt(sum((x[p].item() - mean) ** 2 for p in places) / len(places))
    for p in places:
        expected = (x[p].item() - mean) / deviation + mean
        assert white[p].item() == pytest.approx(expected, rel=1e-7)
    assert (white[~mask] == 0).all()


# Explained variance.


def test_explained_variance():
    mask = prefix_mask([5, 3], 5)
    returns, values = normal(2, 5, seed=14), normal(2, 5, seed=15)

    def of(predicted):
        return explained_variance(predicted, returns, mask).item()

    assert of(returns) == 1.0
    assert of(returns + 3) == pytest.approx(1.0, abs=1e-12)  # a constant offset is no variance
    assert of(torch.full_like(returns, 2.5)) == pytest.approx(0.0, abs=1e-12)
    assert of(returns / 2) == pytest.approx(0.75, abs=1e-12)
    assert of(-returns) == pytest.approx(-3.0, abs=1e-12)
    kept = [
        (returns[b, t].item(), values[b, t].item()) for b, n in ((0, 5), (1, 3)) for t in range(n)
    ]

    def variance(xs):
        return sum((x - sum(xs) / len(xs)) ** 2 for x in xs) / len(xs)

    expected = 1 - variance([r - v for r, v in kept]) / variance([r for r, _ in kept])
    assert of(values) == pytest.approx(expected, abs=1e-12)


# Groups: rows of one prompt, which need not be neighbours, nor as many for each.

GROUPS = [7, 2, 7, 0, 2, 7, 7, 0, 2, 5]
EQUAL = [0.1, 0.3, 0.1, -1.7, 0.3, 0.1, 0.1, -1.7, 0.3, 0.0]  # alike in each group
LENGTHS = [3, 1, 9, 4, 2, 2, 6, 1, 8, 5]


def members(row):
    return [i for i, group in enumerate(GROUPS) if group == GROUPS[row]]


def mean(values):
    return sum(values) / len(values)


def grpo_by_loop(r, row):
    own = [r[i] for i in members(row)]
    if len(own) == 1:
        return 0.0
    deviation = math.sqrt(sum((x - mean(own)) ** 2 for x in own) / (len(own) - 1))
    return (r[row] - mean(own)) / (deviation + 1e-4)


def difference_by_loop(r, row):
    return r[row] - mean([r[i] for i in members(row)])


def rloo_by_loop(r, row):
    others = [r[i] for i in members(row) if i != row]
    return r[row] - mean(others) if others else 0.0


def opo_by_loop(r, row):
    own = members(row)
    return r[row] - sum(LENGTHS[i] * r[i] for i in own) / sum(LENGTHS[i] for i in own)


ESTIMATORS = {
    "grpo": (advantages.grpo, grpo_by_loop),
    "dr_grpo": (advantages.group_differences, difference_by_loop),
    "rloo": (advantages.rloo, rloo_by_loop),
    "opo": (lambda r, g: advantages.opo(r, g, torch.tensor(LENGTHS)), opo_by_loop),
}
BY_NAME = pytest.mark.parametrize("estimator, by_loop", ESTIMATORS.values(), ids=ESTIMATORS)


@BY_NAME
def test_estimators_of_groups_are_their_papers_loops(estimator, by_loop):
    totals = 3 * normal(len(GROUPS), seed=41) + 5
    found = estimator(totals, torch.tensor(GROUPS))
    expected = [by_loop(totals.tolist(), row) for row in range(len(GROUPS))]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert found.abs().max() > 0.5 and found[9] == 0, "one answer alone teaches nothing"


@BY_NAME
@pytest.mark.parametrize("count", [2, 3, 7, 16])
def test_answers_that_have_earned_the_same_teach_nothing_exactly(estimator, by_loop, count):
    """Not by rounding, which a deviation near 0 would blow up."""
    found = estimator(torch.tensor(EQUAL).double(), torch.tensor(GROUPS))
    assert (found == 0).all()
    if estimator is not ESTIMATORS["opo"][0]:
        found = estimator(torch.full((count,), 0.1).double(), torch.zeros(count).long())
        assert (found == 0).all()


@BY_NAME
def test_rows_may_stand_anywhere_and_groups_have_any_number(estimator, by_loop):
    """Other rows between, and other numbers for the groups, change nothing."""
    totals, order = normal(len(GROUPS), seed=42), torch.randperm(len(GROUPS)).tolist()
    if by_loop is opo_by_loop:
        lengths = torch.tensor(LENGTHS)
        one = advantages.opo(totals, torch.tensor(GROUPS), lengths)
        other = advantages.opo(totals[order], torch.tensor(GROUPS)[order] + 90, lengths[order])
    else:
        one = estimator(totals, torch.tensor(GROUPS))
        other = estimator(totals[order], torch.tensor(GROUPS)[order] + 90)
    assert_close(other, one[order])


def test_the_baseline_of_opo_has_the_least_variance():
    """Of Σ l (r − b)², over b: where the square of a gradient's norm is the length."""
    r, lengths = normal(6, seed=43), torch.tensor([1.0, 7, 2, 5, 3, 9], dtype=torch.float64)
    found = advantages.opo(r, torch.zeros(6).long(), lengths)
    baseline = (r - found)[0]

    def variance(b):
        return float((lengths * (r - b) ** 2).sum())

    assert all(variance(baseline) < variance(baseline + e) for e in (-1e-3, 1e-3))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "opo"])
def test_every_action_of_an_answer_has_its_advantage(name, level):
    """Actions with gaps between; what an answer has earned is summed over them alone."""
    rewards, mask = normal(4, 8, seed=44), GAPS
    group, lengths = torch.tensor([1, 0, 1, 0]), GAPS.sum(1)
    if level == "sequence":
        rewards, mask = algorithm.one_action(rewards, GAPS), GAPS.any(1, keepdim=True)
    earned = advantages.Earned(rewards, torch.zeros_like(rewards), mask, group, lengths)
    found, returns = algorithm.ALGORITHMS[name].advantages(earned, None)
    totals = [sum(row[acts].tolist()) for row, acts in zip(rewards, mask, strict=True)]
    for i, j in ((0, 2), (2, 0), (1, 3), (3, 1)):
        a, b, n, m = totals[i], totals[j], int(lengths[i]), int(lengths[j])
        expected = {
            "grpo": (a - b) / 2 / (abs(a - b) / math.sqrt(2) + 1e-4),
            "dr_grpo": (a - b) / 2,
            "rloo": a - b,
            "opo": a - (n * a + m * b) / (n + m),
        }[name]
        assert found[i][mask[i]].tolist() == pytest.approx([expected] * int(mask[i].sum()))
        assert returns[i][mask[i]].tolist() == pytest.approx([a] * int(mask[i].sum()))
        assert (found[i][~mask[i]] == 0).all()
