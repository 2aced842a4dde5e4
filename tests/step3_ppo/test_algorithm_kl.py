"""KL estimates, and what they do as a reward, by sums over small vocabularies: nothing sampled."""

import itertools
import math

import pytest
import torch

from step3_ppo import algorithm
from tests.step3_ppo.test_algorithm import assert_close, normal, prefix_mask

ESTIMATORS = algorithm.KL_ESTIMATORS


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum()


def gradient_of(function, logits):
    logits = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(logits.log_softmax(-1)), logits)
    return gradient


def penalty(estimator, logits, log_q):
    """E_p[kl · ∇log p] as token_rewards charges it: one answer of one token for each x."""
    vocabulary = len(logits)
    log_p = logits.log_softmax(-1)
    rewards, _ = algorithm.token_rewards(
        torch.zeros(vocabulary, dtype=torch.float64),
        log_p[:, None],
        log_q[:, None],
        torch.ones(vocabulary, 1, dtype=torch.bool),
        1.0,
        estimator,
    )
    total = torch.zeros_like(logits)
    for x in range(vocabulary):
        score = gradient_of(lambda log_p, x=x: log_p[x], logits)
        total -= log_p[x].exp() * rewards[x, 0] * score
    return total


@pytest.mark.parametrize("vocabulary", [2, 5, 11])
@pytest.mark.parametrize("scale", [0.2, 1.0, 2.5])
def test_the_penalty_of_each_estimator_in_the_policy_gradient(vocabulary, scale):
    logits = scale * normal(vocabulary, seed=1)
    log_q = (scale * normal(vocabulary, seed=2)).log_softmax(-1)
    forward = gradient_of(lambda log_p: kl(log_p, log_q), logits)
    backward = gradient_of(lambda log_p: kl(log_q, log_p), logits)
    assert forward.abs().max() > 1e-2 * scale, "the case must have something to pull at"
    assert_close(penalty("k1", logits, log_q), forward)
    assert_close(penalty("k3", logits, log_q), forward - backward)
    p, spelled = logits.softmax(-1).tolist(), torch.zeros(vocabulary, dtype=torch.float64)
    for x, j in itertools.product(range(vocabulary), repeat=2):
        k2 = (math.log(p[x]) - log_q[x].item()) ** 2 / 2
        spelled[j] += p[x] * k2 * ((x == j) - p[j])  # ∂ log softmax(x) / ∂ logit j
    assert_close(penalty("k2", logits, log_q), spelled)


def test_the_order_of_each_estimator_s_penalty_near_the_reference():
    """Ten times nearer, k1's pull is a tenth, k2's and k3's a hundredth."""
    reference, direction = normal(6, seed=3), normal(6, seed=4)
    log_q = reference.log_softmax(-1)

    def pulls(distance):
        k1, k2, k3 = (penalty(e, reference + distance * direction, log_q) for e in ESTIMATORS)
        return [x.norm().item() for x in (k1, k2, k3, k2 - k3)]

    falls = [math.log10(far / near) for far, near in zip(pulls(1e-2), pulls(1e-3), strict=True)]
    assert falls == pytest.approx([1, 2, 2, 3], abs=0.03)


def test_k1_charged_to_tokens_is_the_kl_of_answers():
    """Answers of up to two tokens, the second drawn by what the first was: Σ_t k1 of each of the
    seven, times ∇log p of the answer, adds up to ∇KL of the two distributions over answers."""
    tables, others = normal(4, 3, seed=5), normal(4, 3, seed=6)  # row 0 first, 1 + x after x
    # Token 2 ends an answer, and so do two tokens.
    answers = [(2,)] + [(x, y) for x in (0, 1) for y in range(3)]

    def log_probability(table, answer):
        rows = [0, *[1 + x for x in answer]]
        return [table[rows[t]].log_softmax(-1)[x] for t, x in enumerate(answer)]

    table = tables.clone().requires_grad_()
    logs = [log_probability(table, a) for a in answers]
    refs = [log_probability(others, a) for a in answers]
    exact = sum(sum(own).exp() * (sum(own) - sum(ref)) for own, ref in zip(logs, refs, strict=True))
    (expected,) = torch.autograd.grad(exact, table, retain_graph=True)

    def padded(rows):
        rows = [[x.item() for x in row] + [7.0] * (2 - len(row)) for row in rows]
        return torch.tensor(rows, dtype=torch.float64)

    mask = prefix_mask([len(a) for a in answers], 2)
    scores = torch.zeros(len(answers), dtype=torch.float64)
    rewards, charged = algorithm.token_rewards(scores, padded(logs), padded(refs), mask, 1.0)
    mean = sum(sum(own).exp().item() * charged[i].sum().item() for i, own in enumerate(logs))
    assert mean == pytest.approx(exact.item(), rel=1e-12)
    actual = torch.zeros_like(expected)
    for i, own in enumerate(logs):
        (score,) = torch.autograd.grad(sum(own), table, retain_graph=True)
        actual -= sum(own).exp().item() * rewards[i].sum().item() * score
    assert_close(actual, expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_token_rewards_charge_the_estimator_that_was_asked_for(estimator):
    lengths, kl_coef = [4, 1, 2, 3], 0.3
    logprobs, reference = -normal(4, 4, seed=7).abs(), -normal(4, 4, seed=8).abs()
    scores = torch.tensor([1.5, -2.0, 0.25, 10.0], dtype=torch.float64)
    rewards, charged = algorithm.token_rewards(
        scores, logprobs, reference, prefix_mask(lengths, 4), kl_coef, estimator
    )
    for b, n in enumerate(lengths):
        for t in range(4):
            log_ratio = (logprobs[b, t] - reference[b, t]).item()
            spelled = {
                "k1": log_ratio,
                "k2": log_ratio**2 / 2,
                "k3": math.exp(-log_ratio) - 1 + log_ratio,
            }[estimator]
            expected = spelled if t < n else 0.0
            assert charged[b, t].item() == pytest.approx(expected, abs=1e-12)
            last = scores[b].item() if t == n - 1 else 0.0
            assert rewards[b, t].item() == pytest.approx(last - kl_coef * expected, abs=1e-12)


def test_k2_is_biased_in_the_third_order_and_varies_less_than_k1():
    reference, direction = normal(6, seed=9), normal(6, seed=10)
    log_q = reference.log_softmax(-1)

    def moments(distance):
        log_p = (reference + distance * direction).log_softmax(-1)
        p = log_p.exp().tolist()
        exact = sum(a * (x - y) for a, x, y in zip(p, log_p.tolist(), log_q.tolist(), strict=True))
        means, variances = [], []
        for k in algorithm.kl_estimates(log_p, log_q):
            mean = sum(a * x for a, x in zip(p, k.tolist(), strict=True))
            means.append(mean - exact)
            variances.append(sum(a * (x - mean) ** 2 for a, x in zip(p, k.tolist(), strict=True)))
        return exact, means, variances

    (far, far_bias, _), (near, near_bias, variance) = moments(1e-1), moments(1e-2)
    assert math.log10(far / near) == pytest.approx(2, abs=0.05)
    assert math.log10(far_bias[1] / near_bias[1]) == pytest.approx(3, abs=0.1)
    assert near_bias[0] == pytest.approx(0, abs=1e-15) and near_bias[2] == pytest.approx(
        0, abs=1e-15
    )
    assert variance[1] < 0.01 * variance[0] and variance[2] < 0.01 * variance[0]


@pytest.mark.parametrize("distance", [1e-6, 1e-4, 1e-2, 1.0])
def test_k3_in_fp32_is_never_negative_and_is_no_rounding(distance):
    """log p − log q of 1e-4 makes a k3 of 5e-9, far below what fp32 rounds 1 to."""
    k1 = distance * normal(10_000, seed=11).float()
    _, _, k3 = algorithm.kl_estimates(k1, torch.zeros_like(k1))
    assert (k3 >= 0).all()
    exact = sum(math.expm1(-x) + x for x in k1.tolist()) / len(k1)
    assert k3.double().mean().item() == pytest.approx(exact, rel=2e-2)
    mask = torch.ones(1, len(k1), dtype=torch.bool)
    _, stats = algorithm.policy_loss(-k1[None], torch.zeros(1, len(k1)), k1[None], mask, 0.2)
    assert stats["approx_kl"].item() / len(k1) == pytest.approx(exact, rel=2e-2)
