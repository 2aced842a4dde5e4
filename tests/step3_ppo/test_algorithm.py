"""PPO's arithmetic against float64 loops written from the papers' formulas."""

import itertools
import math

import pytest
import torch

from step3_ppo import algorithm
from step3_ppo.advantages import explained_variance, gae, whiten

CLIP = 0.2


def prefix_mask(lengths, width):
    return torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def central_difference(function, x, step=1e-6):
    """d function / dx, entry by entry."""
    gradient = torch.zeros_like(x)
    for index in itertools.product(*map(range, x.shape)):
        moved = []
        for sign in (1, -1):
            other = x.clone()
            other[index] += sign * step
            moved.append(float(function(other)))
        gradient[index] = (moved[0] - moved[1]) / (2 * step)
    return gradient


def autograd(function, x):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x), x)
    return gradient


def assert_close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


# Actions that are no neighbours: an environment's turns between the policy's.

GAPS = torch.tensor(
    [
        [1, 1, 0, 0, 1, 1, 1, 0],  # a gap in the middle, padding after the last action
        [0, 0, 1, 0, 1, 1, 0, 1],  # it leads, and comes twice more
        [0, 0, 0, 0, 0, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1],
    ]
).bool()


def test_the_last_action_earns_the_score_wherever_it_stands():
    logprobs, reference = -normal(4, 8, seed=33).abs(), -normal(4, 8, seed=34).abs()
    scores = normal(4, seed=35)
    rewards, kl = algorithm.token_rewards(scores, logprobs, reference, GAPS, 0.3)
    for b, acts in enumerate(GAPS.tolist()):
        last = max(t for t in range(8) if acts[t])
        for t in range(8):
            k1 = (logprobs[b, t] - reference[b, t]).item() if acts[t] else 0.0
            expected = -0.3 * k1 + (scores[b].item() if t == last else 0.0)
            assert rewards[b, t].item() == pytest.approx(expected, abs=1e-12)
            assert kl[b, t].item() == pytest.approx(k1, abs=1e-12)


def test_the_first_action_is_found_behind_a_gap():
    x = normal(4, 8, seed=36)
    first = algorithm.first_action(x, GAPS)
    assert first.tolist() == [[x[0, 0]], [x[1, 2]], [x[2, 5]], [x[3, 0]]]


# Token rewards and KL.


def test_token_rewards_by_hand():
    lengths, kl_coef = [4, 1, 2, 3], 0.07
    mask = prefix_mask(lengths, 4)
    logprobs, reference = -normal(4, 4, seed=6).abs(), -normal(4, 4, seed=7).abs()
    scores = torch.tensor([1.5, -2.0, 0.25, 10.0], dtype=torch.float64)
    rewards, kl = algorithm.token_rewards(scores, logprobs, reference, mask, kl_coef)
    for b, n in enumerate(lengths):
        for t in range(4):
            k1 = (logprobs[b, t] - reference[b, t]).item() if t < n else 0.0
            assert kl[b, t].item() == pytest.approx(k1, abs=1e-12)
            expected = -kl_coef * k1 + (scores[b].item() if t == n - 1 else 0.0)
            assert rewards[b, t].item() == pytest.approx(expected, abs=1e-12)


def test_token_rewards_leaves_its_inputs_alone():
    logprobs, reference, scores = torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2)
    algorithm.token_rewards(scores, logprobs, reference, prefix_mask([3, 2], 3), 0.1)
    assert (logprobs == 0).all() and (reference == 1).all() and (scores == 1).all()


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_k1_and_k3_are_unbiased(seed, scale):
    """Expectations by summing over a vocabulary of 7, nothing sampled."""
    logits = scale * normal(2, 7, seed=seed)
    log_p, log_q = logits.log_softmax(-1)
    p, q = log_p.exp().tolist(), log_q.exp().tolist()
    exact = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    k1, k2, k3 = algorithm.kl_estimates(log_p, log_q)
    assert sum(a * k for a, k in zip(p, k1.tolist(), strict=True)) == pytest.approx(exact, rel=1e-9)
    assert sum(a * k for a, k in zip(p, k3.tolist(), strict=True)) == pytest.approx(exact, rel=1e-9)
    assert (k3 >= 0).all() and (k1 < 0).any()
    for a, b, got in zip(p, q, k2.tolist(), strict=True):
        assert got == pytest.approx(math.log(a / b) ** 2 / 2, rel=1e-9, abs=1e-15)


def test_kl_estimates_of_equal_policies_are_zero():
    logprobs = torch.tensor([-0.5, -2.0, -9.0])
    assert all((k == 0).all() for k in algorithm.kl_estimates(logprobs, logprobs.clone()))


# Policy loss.

# Below, inside and above the clip range; each with both signs of advantage.
LOG_RATIOS = [-0.7, -0.3, -0.1, 0.05, 0.15, 0.3, 0.8]


def policy_case():
    log_ratio = torch.tensor([LOG_RATIOS, LOG_RATIOS[::-1], LOG_RATIOS], dtype=torch.float64)
    advantages = normal(3, 7, seed=8).abs() + 0.1
    advantages[1] *= -1
    advantages[2] *= torch.tensor([1, -1, 1, -1, 1, -1, 1])
    logprobs = -normal(3, 7, seed=9).abs() - 0.2
    return logprobs + log_ratio, logprobs, advantages, [7, 7, 4]


def policy_loss_by_loop(new_logprobs, logprobs, advantages, lengths):
    """L^CLIP of Schulman et al. 2017, equation 7, negated and summed."""
    total = 0.0
    for b, n in enumerate(lengths):
        for t in range(n):
            ratio = math.exp(new_logprobs[b, t].item() - logprobs[b, t].item())
            a = advantages[b, t].item()
            total -= min(ratio * a, min(max(ratio, 1 - CLIP), 1 + CLIP) * a)
    return total


def test_policy_loss_value_and_statistics():
    new, old, advantages, lengths = policy_case()
    loss, stats = algorithm.policy_loss(new, old, advantages, prefix_mask(lengths, 7), CLIP)
    assert loss.item() == pytest.approx(
        policy_loss_by_loop(new, old, advantages, lengths), rel=1e-12
    )
    assert stats["policy_loss"].item() == loss.item() and not stats["policy_loss"].requires_grad
    log_ratios = [(new - old)[b, t].item() for b, n in enumerate(lengths) for t in range(n)]
    ratios = [math.exp(x) for x in log_ratios]
    assert stats["ratio"].item() == pytest.approx(sum(ratios), rel=1e-12)
    assert int(stats["clip_fraction"]) == sum(r < 0.8 or r > 1.2 for r in ratios)
    assert 0 < int(stats["clip_fraction"]) < len(ratios)
    # KL(old ‖ new) by k3 from samples of old: new/old − 1 − log(new/old).
    expected = sum(r - 1 - x for r, x in zip(ratios, log_ratios, strict=True))
    assert stats["approx_kl"].item() == pytest.approx(expected, rel=1e-12)


def test_policy_loss_gradient():
    new, old, advantages, lengths = policy_case()
    mask = prefix_mask(lengths, 7)
    actual = autograd(lambda x: algorithm.policy_loss(x, old, advantages, mask, CLIP)[0], new)
    numeric = central_difference(lambda x: policy_loss_by_loop(x, old, advantages, lengths), new)
    assert_close(actual, numeric, 1e-7)
    # The clip stops only moves that already went far in the direction of the advantage.
    seen = set()
    for b, n in enumerate(lengths):
        for t in range(n):
            ratio, a = math.exp((new - old)[b, t].item()), advantages[b, t].item()
            stopped = (a > 0 and ratio > 1 + CLIP) or (a < 0 and ratio < 1 - CLIP)
            assert actual[b, t].item() == pytest.approx(0 if stopped else -a * ratio, abs=1e-12)
            seen.add((a > 0, ratio > 1 + CLIP, ratio < 1 - CLIP))
    assert len(seen) == 6, "every region with both signs of advantage"
    assert (actual[~mask] == 0).all()


def test_policy_loss_gradient_at_ratio_1_is_the_policy_gradient():
    _, old, advantages, lengths = policy_case()
    mask = prefix_mask(lengths, 7)
    gradient = autograd(lambda x: algorithm.policy_loss(x, old, advantages, mask, CLIP)[0], old)
    assert_close(gradient, -advantages * mask)


def test_policy_loss_at_ratio_1():
    _, old, advantages, lengths = policy_case()
    mask = prefix_mask(lengths, 7)
    loss, stats = algorithm.policy_loss(old.clone(), old, advantages, mask, CLIP)
    total = sum(advantages[b, t].item() for b, n in enumerate(lengths) for t in range(n))
    assert loss.item() == pytest.approx(-total, rel=1e-12)
    assert stats["clip_fraction"] == 0 and stats["approx_kl"] == 0
    assert stats["ratio"].item() == sum(lengths)


# Value loss.


def value_case():
    values, returns = normal(3, 6, seed=10), normal(3, 6, seed=11)
    moves = torch.tensor([[-0.9, -0.35, -0.1, 0.07, 0.4, 1.1]] * 3, dtype=torch.float64)
    return values + moves, values, returns, [6, 3, 5]


def value_loss_by_loop(new_values, values, returns, lengths):
    total = 0.0
    for b, n in enumerate(lengths):
        for t in range(n):
            v, old, target = (x[b, t].item() for x in (new_values, values, returns))
            clipped = min(max(v, old - CLIP), old + CLIP)
            total += 0.5 * max((v - target) ** 2, (clipped - target) ** 2)
    return total


def test_value_loss_value_and_statistics():
    new, values, returns, lengths = value_case()
    loss, stats = algorithm.value_loss(new, values, returns, prefix_mask(lengths, 6), CLIP)
    assert loss.item() == pytest.approx(
        value_loss_by_loop(new, values, returns, lengths), rel=1e-12
    )
    assert stats["value_loss"].item() == loss.item() and not stats["value_loss"].requires_grad
    count = 0
    for b, n in enumerate(lengths):
        for t in range(n):
            v, old, target = (x[b, t].item() for x in (new, values, returns))
            count += (min(max(v, old - CLIP), old + CLIP) - target) ** 2 > (v - target) ** 2
    assert int(stats["value_clip_fraction"]) == count > 0


def test_value_loss_gradient():
    new, values, returns, lengths = value_case()
    mask = prefix_mask(lengths, 6)
    actual = autograd(lambda x: algorithm.value_loss(x, values, returns, mask, CLIP)[0], new)
    assert_close(
        actual,
        central_difference(lambda x: value_loss_by_loop(x, values, returns, lengths), new),
        1e-7,
    )
    assert (actual[~mask] == 0).all()
    assert (actual[mask] == 0).any() and (actual[mask] != 0).any(), "both sides of the clip"


def test_value_loss_inside_the_clip_is_half_the_squared_error():
    values, returns = normal(2, 4, seed=12), normal(2, 4, seed=13)
    loss, stats = algorithm.value_loss(values, values, returns, prefix_mask([4, 4], 4), CLIP)
    assert loss.item() == pytest.approx(0.5 * ((values - returns) ** 2).sum().item(), rel=1e-12)
    assert stats["value_clip_fraction"] == 0


# What stands off the mask.


@pytest.mark.parametrize("garbage", [-1e4, -3.0, 1e4])
def test_values_off_the_mask_change_nothing(garbage):
    lengths, width = [5, 1, 3], 5
    mask = prefix_mask(lengths, width)
    names = ["new_logprobs", "logprobs", "ref_logprobs", "values", "new_values", "rewards"]
    clean = {n: normal(3, width, seed=20 + i).float() * mask for i, n in enumerate(names)}
    noise = normal(3, width, seed=40).float()
    dirty = {
        n: torch.where(mask, x, garbage * (1 + i) + noise) for i, (n, x) in enumerate(clean.items())
    }
    scores = torch.tensor([1.0, 2.0, -1.0])

    def everything(x):
        rewards, kl = algorithm.token_rewards(scores, x["logprobs"], x["ref_logprobs"], mask, 0.05)
        yield from (rewards, kl)
        advantages, returns = gae(x["rewards"], x["values"], mask, 0.99, 0.95)
        yield from (advantages, returns, whiten(x["rewards"], mask))
        new = x["new_logprobs"].clone().requires_grad_()
        loss, stats = algorithm.policy_loss(new, x["logprobs"], x["rewards"], mask, CLIP)
        yield from (loss.detach(), *stats.values(), *torch.autograd.grad(loss, new))
        new = x["new_values"].clone().requires_grad_()
        loss, stats = algorithm.value_loss(new, x["values"], x["rewards"], mask, CLIP)
        yield from (loss.detach(), *stats.values(), *torch.autograd.grad(loss, new))
        yield explained_variance(x["values"], x["rewards"], mask)

    for i, (a, b) in enumerate(zip(everything(clean), everything(dirty), strict=True)):
        assert torch.equal(a, b), f"result {i}: {a} is not {b}"


def test_the_kl_coefficient_holds_the_kl_at_its_target():
    """Ziegler et al. 2019, by hand, and in closed loop on a policy whose KL falls as it rises."""
    adapt = algorithm.adapted_kl_coef
    assert adapt(0.1, 6.0, 6.0, 512, 10_000) == 0.1
    assert adapt(0.1, 6.6, 6.0, 500, 10_000) == pytest.approx(0.1 * (1 + 0.1 * 0.05))
    assert adapt(0.1, 60.0, 6.0, 500, 10_000) == pytest.approx(0.1 * (1 + 0.2 * 0.05))
    assert adapt(0.1, 0.0, 6.0, 500, 10_000) == pytest.approx(0.1 * (1 - 0.2 * 0.05))
    coef = 0.01
    for _ in range(2000):
        coef = adapt(coef, 1.0 / coef, 6.0, 256, 10_000)
    assert 1.0 / coef == pytest.approx(6.0, rel=1e-3)
