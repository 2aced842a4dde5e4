"""Each loss against its paper's formula, written out for one pair in plain floats; gradients
against finite differences and, by hand, their signs."""

import itertools
import math

import pytest
import torch

from step3_preference import losses
from step3_preference.losses import LOSSES, NUMBERS, How, Logprobs, PairLoss

# Answers of one prompt: policy and reference log-probability, tokens, label.
PAIRS = [name for name, loss in LOSSES.items() if isinstance(loss, PairLoss)]
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
    return How(**({n: getattr(LOSSES[name], n) or 0.0 for n in NUMBERS} | given))


def loss_of(name, rows, labels, how, z0=0.0):
    """rows: (log π, log π_ref, tokens) of all answers laid end to end, log π perhaps a tensor."""
    policy, reference, lengths = (
        torch.stack([torch.as_tensor(row[i], dtype=torch.float64) for row in rows])
        for i in range(3)
    )
    return losses.batch_loss(LOSSES[name], Logprobs(policy, reference, lengths), labels, how, z0)


@pytest.mark.parametrize("pair", [(CHOSEN, REJECTED), (REJECTED, CHOSEN)], ids=["ahead", "behind"])
@pytest.mark.parametrize("name", PAIRS)
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


@pytest.mark.parametrize("name", PAIRS)
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


@pytest.mark.parametrize("name", PAIRS)
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


# KTO.


def kto_by_paper(rows, good, z0, beta, desirable, undesirable):
    """λ_y − v(x, y) of each answer, eq. 8 of the paper; rows: (log π, log π_ref, tokens)."""
    found = []
    for (p, r, _), is_good in zip(rows, good, strict=True):
        reward = p - r
        if is_good:
            found.append(desirable - desirable * sigmoid(beta * (reward - z0)))
        else:
            found.append(undesirable - undesirable * sigmoid(beta * (z0 - reward)))
    return found


@pytest.mark.parametrize("z0", [0.0, 0.9])
def test_kto_judges_each_answer_by_itself(z0):
    rows, labels = [CHOSEN, REJECTED, CHOSEN], [[1.0], [0.0], [0.0]]
    how = how_of("kto", beta=0.4, desirable_weight=1.3, undesirable_weight=0.8)
    expected = kto_by_paper(rows, [True, False, False], z0, 0.4, 1.3, 0.8)
    _, sums = loss_of("kto", rows, labels, how, z0)
    assert float(sums["loss"]) == pytest.approx(sum(expected), rel=1e-12)
    assert LOSSES["kto"].count(labels) == 3
    found = losses.means({k: float(v) for k, v in sums.items()})
    assert found["loss"] == pytest.approx(sum(expected) / 3) and math.isnan(found["accuracy"])
    assert found["chosen_reward"] == pytest.approx(0.4 * (-12.3 + 14.1))
    assert found["rejected_logprob"] == pytest.approx((-20.2 - 12.3) / 2)


def test_kto_reads_a_comparison_as_good_and_bad_answers():
    """As its pairs taken apart: of three answers the middle one is as often good as bad."""
    middle, how = (-15.0, -15.5, 7), how_of("kto", beta=0.4)
    rows, labels = [CHOSEN, middle, REJECTED, CHOSEN], [[3.0, 2.0, 1.0], [0.0]]
    good = kto_by_paper(rows, [True] * 4, 0.3, 0.4, 1.0, 1.0)
    bad = kto_by_paper(rows, [False] * 4, 0.3, 0.4, 1.0, 1.0)
    expected = (2 * good[0] + good[1] + bad[1] + 2 * bad[2]) / 3 + bad[3]
    _, sums = loss_of("kto", rows, labels, how, 0.3)
    assert float(sums["loss"]) == pytest.approx(expected, rel=1e-12)
    assert LOSSES["kto"].count(labels) == float(sums["count"]) == 3


def test_kto_raises_good_answers_and_lowers_bad_ones():
    p = torch.tensor([-12.3, -20.2], dtype=torch.float64, requires_grad=True)
    rows, how = [(p[0], -14.1, 5), (p[1], -18.9, 9)], how_of("kto")
    (slope,) = torch.autograd.grad(loss_of("kto", rows, [[1.0], [0.0]], how, 0.5)[1]["loss"], p)
    for i, sign in enumerate((-1, 1)):
        # λβσ(1 − σ) of each answer alone: z0 has no gradient.
        s = sigmoid(0.1 * ((1.8, -1.3)[i] - 0.5))
        assert slope[i].item() == pytest.approx(sign * 0.1 * s * (1 - s), rel=1e-9)


# Plackett–Luce.


def chance_of_order(rewards, order) -> float:
    chance, left = 1.0, list(order)
    for i in order:
        chance *= math.exp(rewards[i]) / sum(math.exp(rewards[j]) for j in left)
        left.remove(i)
    return chance


def test_a_ranking_costs_the_logarithm_of_its_chance():
    rows = [(-3.0, -2.5, 4), (-6.0, -7.5, 6), (-4.0, -4.0, 3), (-9.0, -8.0, 9)]
    labels, how = [2.0, 5.0, 1.0, 4.0], how_of("plackett_luce", beta=0.7)
    rewards = [0.7 * (p - r) for p, r, _ in rows]
    chances = [chance_of_order(rewards, order) for order in itertools.permutations(range(4))]
    assert sum(chances) == pytest.approx(1.0)
    expected = -math.log(chance_of_order(rewards, [1, 3, 0, 2]))
    _, sums = loss_of("plackett_luce", rows, [labels], how)
    assert float(sums["loss"]) == pytest.approx(expected, rel=1e-12)
    # Two answers are DPO's pair; several rows add up.
    pair = by_paper("dpo", CHOSEN, REJECTED, 0.7, 0, 0)
    both = [*rows, REJECTED, CHOSEN]
    _, sums = loss_of("plackett_luce", both, [labels, [0, 1]], how)
    assert float(sums["loss"]) == pytest.approx(expected + pair, rel=1e-12)
    # Scores that are one number in fp32 are no tie.
    _, sums = loss_of("plackett_luce", [CHOSEN, REJECTED], [[2.0**24 + 1, 2.0**24]], how)
    assert float(sums["loss"]) == pytest.approx(pair, rel=1e-12)


def test_ties_of_a_ranking_claim_nothing_of_each_other():
    rows = [(-3.0, -2.5, 4), (-6.0, -7.5, 6), (-4.0, -4.4, 3), (-9.0, -8.0, 9)]
    p = torch.tensor([row[0] for row in rows], dtype=torch.float64, requires_grad=True)
    given = [(p[i], *row[1:]) for i, row in enumerate(rows)]
    _, sums = loss_of("plackett_luce", given, [[1, 1, 0, 0]], how_of("plackett_luce", beta=0.7))
    e = [math.exp(0.7 * (q - r)) for q, r, _ in rows]
    expected = -sum(math.log(e[i] / (e[i] + e[2] + e[3])) for i in (0, 1))
    assert sums["loss"].item() == pytest.approx(expected, rel=1e-12)
    (slope,) = torch.autograd.grad(sums["loss"], p)
    assert slope.sign().tolist() == [-1, -1, 1, 1]
