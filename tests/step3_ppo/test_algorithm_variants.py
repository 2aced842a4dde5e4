"""Settings of PPO's losses beside the defaults, against formulas written token by token."""

import itertools
import math

import pytest
import torch

from step3_ppo import algorithm
from tests.step3_ppo.test_algorithm import (
    CLIP,
    assert_close,
    autograd,
    central_difference,
    normal,
    policy_case,
    prefix_mask,
    value_case,
)

HIGH, DUAL = 0.28, 3.0  # of DAPO, of Ye et al.
LOW_EDGE, HIGH_EDGE = 1 - CLIP, 1 + HIGH


def one(x):
    return torch.tensor([[x]], dtype=torch.float64)


def objective(ratio, advantage, high, dual):
    """Schulman et al. 2017, equation 7, with DAPO's upper limit, and Ye et al. 2020, equation 5."""
    clipped = min(max(ratio, 1 - CLIP), 1 + (high or CLIP))
    least = min(ratio * advantage, clipped * advantage)
    return max(least, dual * advantage) if dual and advantage < 0 else least


# The ratios of every region and the edges between them.
RATIOS = [0.01, 0.5, LOW_EDGE, 0.9, 1.0, 1.1, 1 + CLIP, 1.25, HIGH_EDGE, 1.6, DUAL, 8.0, 1e9]


@pytest.mark.parametrize("high, dual", [(0.0, 0.0), (HIGH, 0.0), (0.0, DUAL), (HIGH, DUAL)])
@pytest.mark.parametrize("advantage", [2.0, 0.3, 0.0, -0.3, -2.0])
def test_policy_loss_of_each_region_and_edge(advantage, high, dual):
    edges = {1 - CLIP, 1 + (high or CLIP)} | ({DUAL} if dual else set())
    for ratio in RATIOS:
        old, new = one(-1.3), one(-1.3 + math.log(ratio))

        def of(x, old=old):
            mask = torch.ones(1, 1, dtype=torch.bool)
            return algorithm.policy_loss(x, old, one(advantage), mask, CLIP, high, dual)

        loss, stats = of(new)
        expected = -objective(ratio, advantage, high, dual)
        assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12), ratio
        # exp(log(1.2)) may fall on either side of 1.2.
        if ratio not in edges:
            outside = not 1 - CLIP <= ratio <= 1 + (high or CLIP)
            assert int(stats["clip_fraction"]) == outside, ratio
        slopes = []
        for side in (-1, 1):  # d/d log ρ from the left and from the right
            moved = -objective(ratio * math.exp(side * 1e-7), advantage, high, dual)
            slopes.append(side * (moved - expected) / 1e-7)
        gradient = autograd(lambda x: of(x)[0], new).item()
        tolerance = 1e-5 * max(1.0, ratio)
        assert min(slopes) - tolerance <= gradient <= max(slopes) + tolerance, (ratio, slopes)
        if ratio not in edges:
            assert slopes[0] == pytest.approx(slopes[1], abs=tolerance)


def test_policy_loss_of_a_batch_with_every_setting():
    new, old, advantages, lengths = policy_case()
    new = torch.where(new - old > 0.7, new + 1, new)  # some beyond the dual clip
    mask = prefix_mask(lengths, 7)

    def by_loop(x):
        total = 0.0
        for b, n in enumerate(lengths):
            for t in range(n):
                ratio = math.exp(x[b, t].item() - old[b, t].item())
                total -= objective(ratio, advantages[b, t].item(), HIGH, DUAL)
        return total

    loss, stats = algorithm.policy_loss(new, old, advantages, mask, CLIP, HIGH, DUAL)
    assert loss.item() == pytest.approx(by_loop(new), rel=1e-12)
    ratios = [math.exp((new - old)[b, t].item()) for b, n in enumerate(lengths) for t in range(n)]
    assert int(stats["clip_fraction"]) == sum(r < LOW_EDGE or r > HIGH_EDGE for r in ratios) > 0
    assert stats["ratio"].item() == pytest.approx(sum(ratios), rel=1e-12)
    gradient = autograd(
        lambda x: algorithm.policy_loss(x, old, advantages, mask, CLIP, HIGH, DUAL)[0], new
    )
    assert_close(gradient, central_difference(by_loop, new), 1e-7)
    counts = [r > DUAL and advantages[b, t] < 0 for (b, t), r in _numbered(ratios, lengths)]
    assert any(counts), "no token is beyond the dual clip"


def _numbered(values, lengths):
    places = [(b, t) for b, n in enumerate(lengths) for t in range(n)]
    return zip(places, values, strict=True)


@pytest.mark.parametrize("log_ratio", [50.0, 90.0, 500.0])
@pytest.mark.parametrize("advantage, dual", [(1.0, 0.0), (1.0, DUAL), (-1.0, DUAL)])
def test_a_ratio_beyond_fp32_leaves_no_nan_where_it_is_clipped(log_ratio, advantage, dual):
    """One answer that ran away must not cost the others their gradient."""
    new = torch.tensor([[log_ratio - 600.0, -1.0]], requires_grad=True)
    old, advantages = torch.tensor([[-600.0, -1.0]]), torch.tensor([[advantage, 0.5]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, stats = algorithm.policy_loss(new, old, advantages, mask, CLIP, 0.0, dual)
    (gradient,) = torch.autograd.grad(loss, new)
    assert gradient.tolist() == [[0.0, -0.5]]
    assert loss.item() == pytest.approx(-(1 + CLIP) - 0.5 if advantage > 0 else DUAL - 0.5)
    assert all(torch.tensor(float(x)).isfinite() for x in stats.values())


# Without a ratio: REINFORCE and A2C.


def test_policy_gradient_loss_value_statistics_and_gradient():
    new, old, advantages, lengths = policy_case()
    mask = prefix_mask(lengths, 7)
    loss, stats = algorithm.policy_gradient_loss(new, old, advantages, mask)
    places = [(b, t) for b, n in enumerate(lengths) for t in range(n)]
    expected = -sum(advantages[p].item() * new[p].item() for p in places)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert stats["policy_loss"].item() == loss.item() and not stats["policy_loss"].requires_grad
    moves = [(new - old)[p].item() for p in places]
    assert stats["ratio"].item() == pytest.approx(sum(map(math.exp, moves)), rel=1e-12)
    moved = sum(math.exp(x) - 1 - x for x in moves)
    assert stats["approx_kl"].item() == pytest.approx(moved, rel=1e-12)
    assert "clip_fraction" not in stats
    gradient = autograd(lambda x: algorithm.policy_gradient_loss(x, old, advantages, mask)[0], new)
    for b, t in itertools.product(range(3), range(7)):
        assert gradient[b, t].item() == (-advantages[b, t].item() if t < lengths[b] else 0)


@pytest.mark.parametrize("high, dual", [(0.0, 0.0), (HIGH, DUAL)])
def test_at_ratio_1_ppo_s_gradient_is_that_of_a2c(high, dual):
    """A2C is PPO with one epoch and one minibatch (Huang et al. 2022), in both of its losses."""
    _, old, advantages, lengths = policy_case()
    mask = prefix_mask(lengths, 7)
    ppo = autograd(
        lambda x: algorithm.policy_loss(x, old, advantages, mask, CLIP, high, dual)[0], old
    )
    a2c = autograd(lambda x: algorithm.policy_gradient_loss(x, old, advantages, mask)[0], old)
    assert torch.equal(ppo, a2c) and a2c.abs().max() > 0
    _, values, returns, lengths = value_case()
    mask = prefix_mask(lengths, 6)
    clipped, plain = (
        autograd(lambda x, c=c: algorithm.value_loss(x, values, returns, mask, c)[0], values)
        for c in (CLIP, math.inf)
    )
    assert torch.equal(clipped, plain)


# One action an answer.


def test_one_action_sums_the_answer_s_own_tokens():
    lengths, x = [4, 1, 3], normal(3, 4, seed=1)
    summed = algorithm.one_action(x, prefix_mask(lengths, 4))
    assert summed.shape == (3, 1)
    for b, n in enumerate(lengths):
        assert summed[b, 0].item() == pytest.approx(sum(x[b, :n].tolist()), abs=1e-12)


# Values without a clip.


def test_value_loss_without_a_clip_is_half_the_squared_error():
    new, values, returns = (normal(100, 50, seed=s).float() for s in (7, 8, 9))
    lengths = [1 + b % 50 for b in range(100)]
    mask = prefix_mask(lengths, 50)
    loss, stats = algorithm.value_loss(new, values, returns, mask, math.inf)
    places = [(b, t) for b, n in enumerate(lengths) for t in range(n)]
    expected = sum((new[p].item() - returns[p].item()) ** 2 for p in places) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert stats["value_clip_fraction"] == 0, "rounding is no clip"
    gradient = autograd(lambda x: algorithm.value_loss(x, values, returns, mask, math.inf)[0], new)
    assert_close(gradient, (new - returns) * mask, 1e-5)
