"""ILQL's losses by a loop over tokens in plain floats, by finite differences, and what they come to
rest at: the values of a small chain of states, worked out by hand."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from step3_preference import ilql
from step3_preference.losses import LOSSES, How, Logprobs, batch_loss, means
from utils.models.value_heads import NUMBERS

HOW = SimpleNamespace(gamma=0.9, tau=0.8, cql_coef=0.3, awac_coef=0.7, awac_beta=1.5)
LENGTHS, REWARDS = (4, 1, 3), (1.0, -1.0, 0.25)  # of three answers


def tokens(seed=0):
    """(numbers (8,7) fp64, rewards (8,), goes_on (8,))"""
    drawn = torch.randn(sum(LENGTHS), len(NUMBERS), generator=torch.Generator().manual_seed(seed))
    last = [n == length - 1 for length in LENGTHS for n in range(length)]
    rewards = [r * (n == k - 1) for k, r in zip(LENGTHS, REWARDS, strict=True) for n in range(k)]
    return drawn.double(), torch.tensor(rewards), ~torch.tensor(last)


def by_loop(rows, fixed):
    """The four losses, summed over all tokens. rows: NUMBERS of each. fixed: the same, of which
    what has no gradient is read: V of the next state, Q of the targets, AWAC's advantage."""
    sums, i = [0.0] * 4, 0
    for length, reward in zip(LENGTHS, REWARDS, strict=True):
        for n in range(length):
            row, still = (dict(zip(NUMBERS, r[i], strict=True)) for r in (rows, fixed))
            after = dict(zip(NUMBERS, fixed[i + 1], strict=True))["v"] if n + 1 < length else 0.0
            aim = (reward if n + 1 == length else 0.0) + 0.9 * after
            sums[0] += (row["q1"] - aim) ** 2 + (row["q2"] - aim) ** 2
            u = still["target"] - row["v"]
            sums[1] += (0.8 if u > 0 else 0.2) * u * u
            sums[2] += -0.3 * row["log_softmax_q1"] - 0.3 * row["log_softmax_q2"]
            sums[3] += -0.7 * math.exp(1.5 * (still["target"] - still["v"])) * row["logprob"]
            i += 1
    return sums


def test_each_term_is_the_loops():
    numbers, rewards, goes_on = tokens()
    terms = ilql.token_losses(numbers, rewards, goes_on, HOW)
    rows = numbers.tolist()
    assert terms.sum(0)[:4].tolist() == pytest.approx(by_loop(rows, rows), rel=1e-12)
    assert terms[:, 4:].tolist() == numbers[:, [5, 6]].tolist()


def test_gradients_are_the_slopes_of_what_is_not_held_fast():
    numbers, rewards, goes_on = tokens(1)
    numbers.requires_grad_()
    terms = ilql.token_losses(numbers, rewards, goes_on, HOW)
    (slope,) = torch.autograd.grad(terms.sum(0)[:4].sum(), numbers)
    rows = numbers.tolist()
    for i, k in itertools.product(range(len(rows)), range(len(NUMBERS))):
        values = []
        for step in (1e-5, -1e-5):
            moved = [list(row) for row in rows]
            moved[i][k] += step
            values.append(sum(by_loop(moved, rows)))
        measured = (values[0] - values[1]) / 2e-5
        assert slope[i, k].item() == pytest.approx(measured, rel=1e-6, abs=1e-8), (i, NUMBERS[k])
    assert slope[:, NUMBERS.index("target")].abs().max() == 0


def test_rewards_lie_between_the_worst_and_the_best():
    assert ilql.rewards_of([3.0, 1.0]) == [1.0, -1.0]
    assert ilql.rewards_of([10.0, 4.0, 5.5, 10.0]) == [1.0, -1.0, -0.5, 1.0]
    assert [ilql.rewards_of([x]) for x in (1.0, 0.0)] == [[1.0], [-1.0]]


def test_the_whole_is_a_mean_over_tokens_and_q_tells_the_answers_apart():
    numbers, rewards, goes_on = tokens(2)
    terms = ilql.token_losses(numbers, rewards, goes_on, HOW)
    owner = torch.tensor([0] * 4 + [1] + [2] * 3)
    sums = torch.zeros(3, 6, dtype=torch.float64).index_add(0, owner, terms)
    lengths = torch.tensor(LENGTHS, dtype=torch.float64)
    x = Logprobs(-lengths, torch.zeros(3), lengths, sums)
    how = How(beta=2.0, **vars(HOW))
    loss, stats = batch_loss(LOSSES["ilql"], x, [[1.0, 0.0], [1.0]], how)
    found = means({name: float(value) for name, value in stats.items()})
    rows = numbers.tolist()
    assert float(loss) == pytest.approx(sum(by_loop(rows, rows)), rel=1e-6)
    assert found["loss"] == pytest.approx(sum(by_loop(rows, rows)) / 8)
    assert LOSSES["ilql"].count([], lengths) == 8
    q = [row[NUMBERS.index("target")] for row in rows]
    means_of = [sum(q[:4]) / 4, q[4], sum(q[5:]) / 3]
    assert found["margin"] == pytest.approx(
        2 * ((means_of[0] + means_of[2]) / 2 - means_of[1]), rel=1e-9
    )
    assert found["accuracy"] == (means_of[0] > means_of[1])
    assert found["ilql_q"] == pytest.approx(sum(q) / 8)
    losses = [found[f"ilql_{name}"] for name in ilql.TERMS[:4]]
    assert losses == pytest.approx([x / 8 for x in by_loop(rows, rows)])


def expectile(values: list[tuple[float, int]], tau: float) -> float:
    """Of numbers that come so often: Σ n·|τ − [x < v]|·(x − v) = 0, by bisection."""
    low, high = -2.0, 2.0
    for _ in range(60):
        v = (low + high) / 2
        pull = sum(n * (tau if x > v else 1 - tau) * (x - v) for x, n in values)
        low, high = (v, high) if pull > 0 else (low, v)
    return v


# Answers in a chain of three states, as (state, action) pairs, their reward, how often they come.
CHAIN = [
    ([(0, 0), (1, 0), (2, 0)], 1.0, 3),
    ([(0, 0), (1, 0), (2, 1)], -1.0, 2),
    ([(0, 0), (1, 1)], -0.5, 1),
    ([(0, 1)], 0.2, 2),
]


@pytest.mark.parametrize("cql_coef", [0.0, 0.1])
def test_what_they_come_to_rest_at_in_a_chain(cql_coef):
    """Without CQL Q and V are those worked out by hand; with it an action that no answer takes has
    the least Q, and the best action still the highest. Expectiles are above means, so V(0) finds
    the way to the best end worth more than the sure 0.2, which the mean does not."""
    how = SimpleNamespace(gamma=0.9, tau=0.9, cql_coef=cql_coef, awac_coef=0.0, awac_beta=0.0)
    answers = [(steps, r) for steps, r, count in CHAIN for _ in range(count)]
    at = torch.tensor([step for steps, _ in answers for step in steps])
    goes_on = torch.tensor([n + 1 < len(s) for s, _ in answers for n in range(len(s))])
    ends = [r * (n + 1 == len(s)) for s, r in answers for n in range(len(s))]
    rewards = torch.tensor(ends, dtype=torch.float64)
    q = torch.zeros(2, 3, 3, dtype=torch.float64, requires_grad=True)  # action 2: never taken
    v = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    target = q.detach().clone()
    adam = torch.optim.Adam([q, v], lr=0.05)
    fall = torch.optim.lr_scheduler.ExponentialLR(adam, 0.994)
    for _ in range(800):
        state, action = at[:, 0], at[:, 1]
        logs, values = q.log_softmax(-1), q[:, state, action]
        columns = [torch.zeros(len(at)), values[0], logs[0, state, action]]
        columns += [values[1], logs[1, state, action]]
        columns += [target.amin(0)[state, action], v[state]]
        adam.zero_grad()
        ilql.token_losses(torch.stack(columns, -1), rewards, goes_on, how)[:, :4].mean(
            0
        ).sum().backward()
        adam.step()
        fall.step()
        target.lerp_(q.detach(), 0.1)
    least = q.detach().amin(0)
    if cql_coef:
        assert (least[:2, 2] < least[:2, :2].min(1).values - 0.5).all()
        assert least[2].argmax() == 0 and least[0].argmax() == 0
        return
    v2 = expectile([(1.0, 3), (-1.0, 2)], 0.9)
    v1 = expectile([(0.9 * v2, 5), (-0.5, 1)], 0.9)
    v0 = expectile([(0.9 * v1, 6), (0.2, 2)], 0.9)
    assert v.tolist() == pytest.approx([v0, v1, v2], abs=1e-3)
    assert least[:, :2].flatten().tolist() == pytest.approx(
        [0.9 * v1, 0.2, 0.9 * v2, -0.5, 1.0, -1.0], abs=1e-3
    )
    mean_of_end = (3 * 1.0 - 2 * 1.0) / 5
    assert 0.9**2 * mean_of_end < 0.2 < 0.9 * v1
