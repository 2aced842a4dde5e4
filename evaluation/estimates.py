"""Statistics of comparisons: bootstrap by prompt, Bradley–Terry ratings, win rates without the
effect of length, agreement of people, calibration.

What is drawn again is always the prompt: answers to one prompt are good or bad together. A
bootstrap does not copy rows; it weighs them, so that every statistic is a function of weights and
all resamples are computed at once.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

RESAMPLES, AT_ONCE = 1000, 2**23  # of the bootstrap; weights in memory at a time
ELO = 400 / math.log(10)  # units a nat: 400 more are ten to one
FIRST_ELO = 1000.0
NEWTON_STEPS = 50


def bootstrap(statistic: Callable, prompts: Sequence, seed: int = 0):
    """(estimate, low, high), 95 % interval, of a statistic of rows that belong to `prompts` (N,).

    statistic: weights (R,N) of the rows → (R,…). Percentiles of a seeded bootstrap over prompts
    (Efron 1979), moved outwards for few prompts as a t interval is (Hesterberg 2015, The American
    Statistician 69:4, "expanded percentile"). ValueError where there are fewer than two prompts.
    """
    names, owner = np.unique(np.asarray(prompts), return_inverse=True)
    n = len(names)
    if n < 2:
        raise ValueError("an interval needs two prompts at least")
    drawn = np.random.default_rng(seed).multinomial(n, [1 / n] * n, RESAMPLES)
    counts = np.concatenate([np.ones((1, n)), drawn])
    parts = np.array_split(counts, -(-len(counts) * len(owner) // AT_ONCE))
    values = np.concatenate([statistic(part[:, owner]) for part in parts])
    tail = 100 * NormalDist().cdf(-math.sqrt(n / (n - 1)) * _t_quantile(n - 1))
    low, high = np.percentile(values[1:], [tail, 100 - tail], axis=0)
    return values[0], low, high


def _t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by its expansion about the normal one (Abramowitz and
    Stegun 26.7.5): 0.1 % off at 5 degrees of freedom."""
    z, f = NormalDist().inv_cdf(0.975), freedom
    return (
        z
        + (z**3 + z) / (4 * f)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * f**3)
    )


def logistic(x: np.ndarray, points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coefficients (R,K) of P(point) = σ(x·β) for x (N,K), points (N,) in [0, 1], weights (R,N).

    Maximum likelihood by Newton's steps. Each coefficient is drawn to 0 as by one game that ended
    in a tie (the log-F(1,1) prior of Greenland and Mansournia 2015): without it one that only wins
    would have no finite strength. RuntimeError where the steps do not settle.
    """
    x = np.concatenate([x, np.eye(x.shape[1])])
    points = np.concatenate([points, np.full(x.shape[1], 0.5)])
    weights = np.concatenate([weights, np.ones((len(weights), x.shape[1]))], axis=1)
    products = (x[:, :, None] * x[:, None, :]).reshape(len(x), -1)
    beta = np.zeros((len(weights), x.shape[1]))
    for _ in range(NEWTON_STEPS):
        p = _sigmoid(beta @ x.T)
        gradient = (weights * (points - p)) @ x
        hessian = ((weights * p * (1 - p)) @ products).reshape(*beta.shape, -1)
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        # Where almost all is won the first steps would shoot over the maximum.
        beta += step / np.maximum(1, np.abs(step).max(1, keepdims=True) / 2)
        if np.abs(step).max() < 1e-9:
            return beta
    raise RuntimeError(f"logistic regression did not settle in {NEWTON_STEPS} steps")


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))


def bradley_terry(first, second, points, prompts, models: int):
    """Ratings (estimate, low, high), (M,) each, in Elo units, of M models by their games.

    first, second (N,): numbers of the two models; points (N,): 1 where the first won, 0.5 for a
    tie. The ratings are strengths θ with P(first wins) = σ(θ_first − θ_second) (Bradley and Terry
    1952), the model of number 0 at 1000, so that every interval is of the difference to it.
    """
    every = np.eye(models)
    x = (every[np.asarray(first)] - every[np.asarray(second)])[:, 1:]
    points = np.asarray(points, float)

    def ratings(weights: np.ndarray) -> np.ndarray:
        theta = logistic(x, points, weights)
        return FIRST_ELO + ELO * np.pad(theta, ((0, 0), (1, 0)))

    return bootstrap(ratings, prompts)


def length_controlled_win_rate(points, longer, prompts):
    """(estimate, low, high): the share that would be won were all answers as long as the other's.

    points (N,): 1 won, 0.5 tie, 0 lost; longer (N,): length less that of the other's answer. The
    regression of AlpacaEval 2 (Dubois et al. 2024, eq. 1), P(win) = σ(θ + φ tanh(Δ / std Δ)), is
    read at Δ = 0. Its term of a prompt's difficulty is left out: its values are fitted to
    AlpacaEval's own prompts and leaderboard.
    """
    longer = np.asarray(longer, float)
    spread = longer.std() or 1.0
    x = np.stack([np.ones(len(longer)), np.tanh(longer / spread)], 1)
    points = np.asarray(points, float)
    return bootstrap(lambda weights: _sigmoid(logistic(x, points, weights)[:, 0]), prompts)


def krippendorff_alpha(ratings, level: str = "ordinal") -> float:
    """Krippendorff's alpha of `ratings` (people, units), NaN where one has not rated.

    level: nominal, ordinal or interval. 1: all agree; 0: as by chance; NaN where nothing was rated
    twice, or everything alike, so that there is no chance to agree by. Krippendorff, Computing
    Krippendorff's Alpha-Reliability (2011).
    """
    ratings = np.asarray(ratings, float)
    values = np.unique(ratings[~np.isnan(ratings)])
    counts = (ratings[:, :, None] == values).sum(0)  # (units, values)
    counts = counts[counts.sum(1) > 1]
    raters = counts.sum(1, keepdims=True)
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(len(values))
    coincidences = (pairs / (raters - 1)[:, :, None]).sum(0)
    totals = coincidences.sum(1)
    if level == "nominal":
        distance = 1 - np.eye(len(values))
    else:
        # Ordinal: values are as far apart as there are ratings between them, half of each end.
        place = np.cumsum(totals) - totals / 2 if level == "ordinal" else values
        distance = (place[:, None] - place[None, :]) ** 2
    expected = (np.outer(totals, totals) * distance).sum()
    if not expected:
        return math.nan
    return float(1 - (totals.sum() - 1) * (coincidences * distance).sum() / expected)


def calibration(margins, bins: int = 10) -> dict:
    """How sure a reward model is of pairs, and how often it is right.

    margins (N,): score of the better answer less that of the worse one. Its claim is that the
    answer with the higher score is better with probability σ(|margin|). Returns `expected_error`,
    the mean distance of claim and share over bins of equally many pairs (Naeini et al. 2015), and
    the `bins`: their mean claim, share right and number of pairs. A tie counts as half right.
    """
    margins = np.asarray(margins, float)
    order = np.argsort(np.abs(margins), kind="stable")
    claims, right = _sigmoid(np.abs(margins)), (margins > 0) + 0.5 * (margins == 0)
    parts = [part for part in np.array_split(order, bins) if len(part)]
    rows = [
        {"claim": float(claims[p].mean()), "right": float(right[p].mean()), "pairs": len(p)}
        for p in parts
    ]
    error = sum(row["pairs"] * abs(row["claim"] - row["right"]) for row in rows) / len(margins)
    return {"expected_error": error, "bins": rows}
