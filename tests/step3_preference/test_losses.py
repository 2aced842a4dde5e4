"""Each loss against its paper's formula, written out for one pair in plain floats; gradients
against finite differences and, by hand, their signs."""

import math

import pytest
import torch

from step3_preference import losses
from step3_preference.losses import LOSSES, How, Logprobs

# Answers of one prompt: policy and reference log-probability, tokens, label.
CHOSEN, REJECTED = (-12.3, -14.1, 5), (-20.2, -18.9, 9)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > -30 else x


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_paper(name, w, l, beta, margin, epsilon):  # noqa: E741
    """Loss of one pair; w, l: (log π, log π_ref, tokens)."""
    (pw, rw, nw), (pl, rl, nl) = w, l
    h = beta * ((pw - rw) - (pl - rl))
    if name == "dpo":
        return -log_sigmoid(h)
    if name == "cdpo":
        return -(1 - epsilon) * log_sigmoid(h) - epsilon * log_sigmoid(-h)
    if name == "robust_dpo":
        lost = -(1 - epsilon) * log_sigmoid(h) + epsilon * log_sigmoid(-h)
        return lost / (1 - 2 * epsilon)
    if name == "dpo_norm":
        return -log_sigmoid(beta / nw * (pw - rw) - beta / nl * (pl - rl))
    if name == "ipo":
        return ((pw - rw) / nw - (pl - rl) / nl - 1 / (2 * beta)) ** 2
    if name == "simpo":
        return -log_sigmoid(beta / nw * pw - beta / nl * pl - margin)
    if name == "orpo":  # λ = β
        odds = [math.exp(p / n) / (1 - math.exp(p / n)) for p, n in ((pw, nw), (pl, nl))]
        return -pw / nw - beta * log_sigmoid(math.log(odds[0] / odds[1]))
    if name == "slic":  # its SFT term weighs 0.1 unless it is set
        return max(0.0, margin - beta * (pw - pl)) + 0.1 * -pw / nw
    if name == "apo_zero":
        return 1 - sigmoid(beta * (pw - rw)) + sigmoid(beta * (pl - rl))
    if name == "apo_down":
        return sigmoid(beta * (pw - rw)) + 1 - sigmoid(h)
    raise KeyError(name)


def how_of(name, **given) -> How:
    entry, names = LOSSES[name], ("beta", "margin", "label_smoothing", "sft_coef")
    return How(**({n: getattr(entry, n) or 0.0 for n in names} | given))


def loss_of(name, rows, labels, how):
    """rows: (log π, log π_ref, tokens) of all answers laid end to end, log π perhaps a tensor."""
    policy, reference, lengths = (
        torch.stack([torch.as_tensor(row[i], dtype=torch.float64) for row in rows])
        for i in range(3)
    )
    return losses.batch_loss(LOSSES[name], Logprobs(policy, reference, lengths), labels, how)


@pytest.mark.parametrize("pair", [(CHOSEN, REJECTED), (REJECTED, CHOSEN)], ids=["ahead", "behind"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_costs_what_the_paper_says(name, pair):
    for beta in (LOSSES[name].beta, 0.37):
        how = how_of(name, beta=beta)
        loss, sums = loss_of(name, pair, [[1, 0]], how)
        expected = by_paper(name, *pair, beta, how.margin, how.label_smoothing)
        assert float(sums["loss"]) == pytest.approx(expected, rel=1e-12)
        assert float(loss) == pytest.approx(expected, rel=1e-6) and loss.dtype == torch.float32


# What a pair that the policy gets right by a little does to (chosen, rejected): +1 where the loss
# falls as the log-probability rises.
SIGNS = {"apo_down": (-1, -1), "slic": (1, 0)}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_the_slopes_and_point_where_they_should(name):
    rows, how = (CHOSEN, (-21.0, -20.5, 9)), how_of(name)
    p = torch.tensor([row[0] for row in rows], dtype=torch.float64, requires_grad=True)

    def value(x):
        given = [(x[i], *row[1:]) for i, row in enumerate(rows)]
        return loss_of(name, given, [[1, 0]], how)[1]["loss"]

    (slope,) = torch.autograd.grad(value(p), p)
    for i in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[i] = 1e-5
        with torch.no_grad():
            measured = (value(p + step) - value(p - step)) / 2e-5
        assert slope[i].item() == pytest.approx(measured.item(), rel=1e-6, abs=1e-9)
    signs = SIGNS.get(name, (1, -1))
    assert [-(x > 1e-9) + (x < -1e-9) for x in slope.tolist()] == list(signs)


def test_the_noise_that_robust_dpo_takes_back():
    """Labels flipped with probability ε: the mean of its loss is DPO's with the right labels."""
    how, e = how_of("robust_dpo", label_smoothing=0.2), 0.2
    right, wrong = (
        float(loss_of("robust_dpo", pair, [[1, 0]], how)[1]["loss"])
        for pair in ((CHOSEN, REJECTED), (REJECTED, CHOSEN))
    )
    dpo = float(loss_of("dpo", (CHOSEN, REJECTED), [[1, 0]], how)[1]["loss"])
    assert (1 - e) * right + e * wrong == pytest.approx(dpo, rel=1e-12)


def test_ipo_rests_where_its_margin_is():
    """Half of 1/β nats a token apart: no gradient; further apart it pulls back."""
    how = how_of("ipo", beta=0.5)
    for apart, sign in ((0.5, -1), (1.0, 0), (1.5, 1)):
        p = torch.tensor(-10.0 + 5 * apart, dtype=torch.float64, requires_grad=True)
        loss = loss_of("ipo", ((p, -10.0, 5), (-8.0, -8.0, 4)), [[1, 0]], how)[1]["loss"]
        (slope,) = torch.autograd.grad(loss, p)
        assert math.copysign(sign, slope) == sign if sign else slope.item() == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_the_pairs_of_a_prompt_weigh_one_together(name):
    """Three answers, two of them tied, beside a plain pair: by enumeration; the sums likewise."""
    middle, how = (-15.0, -15.5, 7), how_of(name)
    rows = [CHOSEN, REJECTED, middle, REJECTED, CHOSEN]
    labels = [[2.0, 0.5, 0.5], [7.0, 3.0]]
    pairs = [(0, 1, 0.5), (0, 2, 0.5), (3, 4, 1.0)]
    numbers = how.beta, how.margin, how.label_smoothing
    expected = sum(w * by_paper(name, rows[i], rows[j], *numbers) for i, j, w in pairs)
    _, sums = loss_of(name, rows, labels, how)
    assert float(sums["loss"]) == pytest.approx(expected, rel=1e-12)
    found = losses.means({k: float(v) for k, v in sums.items()})

    def mean(values, side):
        return sum(w * values[(i, j)[side]] for i, j, w in pairs) / 2

    score = {
        "ratio": lambda p, r, n: p - r,
        "mean_ratio": lambda p, r, n: (p - r) / n,
        "logprob": lambda p, r, n: p,
        "mean_logprob": lambda p, r, n: p / n,
    }[LOSSES[name].score.__name__]
    rewards = [how.beta * score(*row) for row in rows]
    assert found["chosen_reward"] == pytest.approx(mean(rewards, 0))
    assert found["rejected_reward"] == pytest.approx(mean(rewards, 1))
    assert found["margin"] == pytest.approx(mean(rewards, 0) - mean(rewards, 1))
    assert found["chosen_logprob"] == pytest.approx(mean([r[0] for r in rows], 0))
    assert found["rejected_length"] == pytest.approx(mean([r[2] for r in rows], 1))
    right = sum(w * (rewards[i] > rewards[j]) for i, j, w in pairs) / 2
    assert found["accuracy"] == pytest.approx(right) and found["loss"] == pytest.approx(
        expected / 2
    )


def test_a_tie_of_rewards_is_half_right():
    _, sums = loss_of("dpo", (CHOSEN, CHOSEN), [[1, 0]], how_of("dpo"))
    found = losses.means({k: float(v) for k, v in sums.items()})
    assert found["accuracy"] == 0.5 and found["margin"] == 0.0
    assert found["loss"] == pytest.approx(math.log(2))


def test_orpo_stays_finite_where_the_model_is_certain():
    p = torch.tensor([0.0, -1e-9], dtype=torch.float64, requires_grad=True)
    loss = loss_of("orpo", ((p[0], 0.0, 5), (p[1], 0.0, 3)), [[1, 0]], how_of("orpo"))[1]["loss"]
    (slope,) = torch.autograd.grad(loss, p)
    assert loss.isfinite() and slope.isfinite().all()


def test_an_sft_term_may_be_added_to_any():
    how = how_of("dpo", sft_coef=0.7)
    _, sums = loss_of("dpo", (CHOSEN, REJECTED), [[1, 0]], how)
    expected = by_paper("dpo", CHOSEN, REJECTED, 0.1, 0, 0) + 0.7 * 12.3 / 5
    assert float(sums["loss"]) == pytest.approx(expected, rel=1e-12)
