"""Losses beside the clipped token ratio, what their sums are divided by, and the KL in the loss:
against float64 loops, finite differences and sums over small vocabularies."""

import math

import pytest
import torch

from step3_ppo import algorithm
from tests.step3_ppo.test_algorithm import (
    GAPS,
    assert_close,
    autograd,
    central_difference,
    normal,
    policy_case,
    prefix_mask,
)
from tests.step3_ppo.test_algorithm_kl import gradient_of, kl

LOW, HIGH, LONGEST = 0.2, 0.28, 9


def by_loop(x, old, advantages, mask, weights, of_answers: bool):
    """Zheng et al. 2025 (GSPO), equations 5 to 7, or Schulman et al. 2017, with any weights."""
    total = 0.0
    for b, acts in enumerate(mask.tolist()):
        at = [t for t in range(len(acts)) if acts[t]]
        moves = [x[b, t].item() - old[b, t].item() for t in at]
        for t, move in zip(at, moves, strict=True):
            ratio = math.exp(sum(moves) / len(moves) if of_answers else move)
            a = advantages[b, t].item()
            least = min(ratio * a, min(max(ratio, 1 - LOW), 1 + HIGH) * a)
            total -= weights[b, t].item() * least
    return total


@pytest.fixture(params=["prefix", "gaps"])
def case(request):
    """New and old log-probabilities, an advantage for each answer, mask and weights of actions."""
    new, old, _, lengths = policy_case()
    mask = prefix_mask(lengths, 7) if request.param == "prefix" else GAPS[:3, :7]
    new = torch.cat([new, old[:1] + 0.5, old[:1] - 0.6])  # two answers that have moved as a whole
    old, mask = torch.cat([old, old[:1], old[:1]]), torch.cat([mask, mask[1:3]])
    advantages = torch.tensor([1.5, -0.7, 0.4, 2.0, 1.0], dtype=torch.float64)[:, None] * mask
    weights = normal(5, 7, seed=3).abs() * mask
    return new, old, advantages, mask, weights


@pytest.mark.parametrize("of_answers", [False, True])
def test_weighted_loss_of_tokens_and_of_answers(case, of_answers):
    new, old, advantages, mask, weights = case

    def ours(x):
        more = (LOW, HIGH, 0.0, weights, of_answers)
        return algorithm.policy_loss(x, old, advantages, mask, *more)

    def loop(x):
        return by_loop(x, old, advantages, mask, weights, of_answers)

    loss, stats = ours(new)
    assert loss.item() == pytest.approx(loop(new), rel=1e-12)
    gradient = autograd(lambda x: ours(x)[0], new)
    assert_close(gradient, central_difference(loop, new), 1e-7)
    assert (gradient[~mask] == 0).all()
    cut_off = (gradient == 0).all(1) if of_answers else (gradient == 0) & mask
    assert cut_off.any() and not cut_off.all(), "both sides of the clip"
    moved = [(new - old)[b][mask[b]].mean().item() for b in range(5)]
    if of_answers:
        count = [int(mask[b].sum()) for b in range(5)]
        ratios = [math.exp(m) for m in moved]
        expected = sum(n * r for n, r in zip(count, ratios, strict=True))
        assert stats["ratio"].item() == pytest.approx(expected, rel=1e-12)
        outside = sum(n for n, r in zip(count, ratios, strict=True) if not 0.8 <= r <= 1.28)
        assert int(stats["clip_fraction"]) == outside > 0


def test_the_gradient_of_gspo_at_ratio_1_is_the_policy_gradient_by_length(case):
    """Zheng et al. 2025, equation 10: of the mean over each answer's tokens."""
    _, old, advantages, mask, _ = case
    weights = algorithm.loss_weights(mask, "sequence", LONGEST).double()
    more = (3e-4, 4e-4, 0.0, weights, True)
    found = autograd(lambda x: algorithm.policy_loss(x, old, advantages, mask, *more)[0], old)
    assert_close(found, -advantages / mask.sum(1, keepdim=True), 1e-6)


def test_cispo_weighs_tokens_beyond_the_clip_and_does_not_cut_them_off(case):
    """MiniMax-M1, equations 4 and 5. The clipped ratio is no function of the weights."""
    new, old, advantages, mask, weights = case
    low, high = 0.3, 0.4

    def clipped(b, t):
        ratio = math.exp(new[b, t].item() - old[b, t].item())
        return min(max(ratio, 1 - low), 1 + high)

    places = [tuple(x) for x in mask.nonzero().tolist()]

    def loop(x):
        terms = [weights[p].item() * clipped(*p) * advantages[p].item() * x[p] for p in places]
        return -float(sum(terms))

    def ours(x):
        return algorithm.clipped_weight_loss(x, old, advantages, mask, low, high, weights)

    loss, stats = ours(new)
    assert loss.item() == pytest.approx(loop(new), rel=1e-12)
    gradient = autograd(lambda x: ours(x)[0], new)
    assert_close(gradient, central_difference(loop, new), 1e-7)
    assert (gradient[mask] != 0).all() and (gradient[~mask] == 0).all()
    ratios = [math.exp((new - old)[p].item()) for p in places]
    outside = sum(not 1 - low <= r <= 1 + high for r in ratios)
    assert int(stats["clip_fraction"]) == outside > 0
    assert stats["policy_loss"].item() == loss.item()


def test_cispo_without_a_lower_clip_lets_every_small_ratio_be():
    """As it is set by default: ε = 1, and 1 + ε' = 5."""
    low, high = algorithm.ALGORITHMS["cispo"].clips
    old, new = torch.zeros(1, 4), torch.tensor([[-9.0, -1.0, 1.5, 3.0]]).requires_grad_()
    ones = torch.ones(1, 4)
    loss, stats = algorithm.clipped_weight_loss(new, old, ones, ones.bool(), low, high, ones)
    (gradient,) = torch.autograd.grad(loss, new)
    expected = [-math.exp(-9), -math.exp(-1), -math.exp(1.5), -5.0]
    assert gradient[0].tolist() == pytest.approx(expected)
    assert int(stats["clip_fraction"]) == 1


# What the sum is divided by.


@pytest.mark.parametrize("how", algorithm.NORMALISATIONS)
@pytest.mark.parametrize("mask", [GAPS, prefix_mask([4, 0, 1, 7], 7)], ids=["gaps", "one is empty"])
def test_normalisations_by_their_definitions(how, mask):
    x = normal(*mask.shape, seed=5)
    rows = [row[acts].tolist() for row, acts in zip(x, mask, strict=True)]
    flat = [number for row in rows for number in row]
    expected = {
        "token": sum(flat) / len(flat),
        "sequence": sum(sum(row) / len(row) for row in rows if row) / sum(map(bool, rows)),
        "constant": sum(flat) / (LONGEST * len(rows)),
    }[how]
    weights = algorithm.loss_weights(mask, how, LONGEST)
    assert weights.dtype == torch.float32 and (weights[~mask] == 0).all()
    found = (x * weights).sum().item() / algorithm.loss_normaliser(mask, how)
    assert found == pytest.approx(expected, rel=1e-6)


def test_of_no_action_at_all_there_is_nothing_to_divide():
    mask = torch.zeros(3, 4, dtype=torch.bool)
    for how in algorithm.NORMALISATIONS:
        assert (algorithm.loss_weights(mask, how, LONGEST) == 0).all()
        assert algorithm.loss_normaliser(mask, how) >= 1


# The KL in the loss.


@pytest.mark.parametrize("vocabulary", [2, 5, 11])
@pytest.mark.parametrize("scale", [0.2, 1.0, 2.5])
def test_the_gradient_of_each_estimator_in_the_loss(vocabulary, scale):
    """Its expectation over the policy's own samples, each held fixed while it is differentiated."""
    logits = scale * normal(vocabulary, seed=1)
    log_q = (scale * normal(vocabulary, seed=2)).log_softmax(-1)
    p, mask = logits.softmax(-1), torch.ones(vocabulary, 1, dtype=torch.bool)

    def mean(log_p, estimator):
        of_each = algorithm.kl_loss(log_p[:, None], log_q[:, None], mask, estimator)
        return (p * of_each[:, 0]).sum()

    found = {e: gradient_of(lambda x, e=e: mean(x, e), logits) for e in algorithm.KL_ESTIMATORS}
    to_reference = gradient_of(lambda log_p: kl(log_p, log_q), logits)
    from_reference = gradient_of(lambda log_p: kl(log_q, log_p), logits)
    assert to_reference.abs().max() > 1e-2 * scale
    if scale >= 1:
        assert (to_reference - from_reference).abs().max() > 1e-3, "the two are not one"
    assert_close(found["k1"], torch.zeros_like(logits))
    assert_close(found["k2"], to_reference)
    assert_close(found["k3"], from_reference)
    value = mean(logits.log_softmax(-1), "k3")
    assert value.item() == pytest.approx(kl(logits.log_softmax(-1), log_q).item(), rel=1e-9)


@pytest.mark.parametrize("estimator", algorithm.KL_ESTIMATORS)
def test_kl_loss_by_loop_and_what_stands_off_the_mask_is_nothing(estimator):
    new, ref = -normal(4, 8, seed=6).abs(), -normal(4, 8, seed=7).abs()
    dirty = new.where(GAPS, -1e4), ref.where(GAPS, 3e4)
    found = algorithm.kl_loss(*dirty, GAPS, estimator)
    gradient = autograd(lambda x: algorithm.kl_loss(x, dirty[1], GAPS, estimator).sum(), dirty[0])
    for b, t in [(b, t) for b in range(4) for t in range(8)]:
        move = (new - ref)[b, t].item()
        value, slope = {
            "k1": (move, 1.0),
            "k2": (move**2 / 2, move),
            "k3": (math.exp(-move) - 1 + move, 1 - math.exp(-move)),
        }[estimator]
        acts = bool(GAPS[b, t])
        assert found[b, t].item() == pytest.approx(value if acts else 0.0, abs=1e-12)
        assert gradient[b, t].item() == pytest.approx(slope if acts else 0.0, abs=1e-12)
