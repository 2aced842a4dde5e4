"""Statistics of comparisons: by loops, closed forms and other libraries; what their intervals cover
in simulation."""

import math

import numpy as np
import pytest

from evaluation import estimates
from utils.confidence import interval_by_prompt

RUNS = 400


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def games(generator, prompts: int, strengths=(0.0, 0.5, 1.2), same: float = 0.5):
    """(first, second, points, prompts): each pair of models once a prompt, a share `same` of the
    noise in a model's answer common to its games there."""
    m = len(strengths)
    first, second, points, owner = [], [], [], []
    for prompt in range(prompts):
        luck = same * generator.logistic(size=m)
        for a in range(m):
            for b in range(a + 1, m):
                gap = strengths[a] - strengths[b] + luck[a] - luck[b] + generator.logistic()
                first.append(a), second.append(b), owner.append(prompt)
                points.append(0.5 if abs(gap) < 0.2 else float(gap > 0))
    return tuple(map(np.array, (first, second, points, owner)))


# Bootstrap.


def test_the_bootstrap_of_a_mean_by_its_definition(monkeypatch):
    """Copies rows where the module weighs them."""
    monkeypatch.setattr(estimates, "RESAMPLES", 20000)
    generator = np.random.default_rng(1)
    values, prompts = generator.normal(size=90), np.repeat(np.arange(30), 3)
    estimate, low, high = estimates.bootstrap(
        lambda w: (w @ values) / w.sum(1), prompts.astype(str), seed=3
    )
    assert estimate == pytest.approx(values.mean())
    groups, means = [values[prompts == p] for p in range(30)], []
    for _ in range(6000):
        means.append(np.concatenate([groups[p] for p in generator.integers(0, 30, 30)]).mean())
    # Moved outwards: √(30/29) · 2.045 = 2.08 where the normal has 1.96.
    tail = 50 * math.erfc(2.08 / math.sqrt(2))
    expected = np.percentile(means, [tail, 100 - tail])
    assert (low, high) == pytest.approx(expected, abs=0.12 * np.std(means))
    assert high - low > 1.04 * np.ptp(np.percentile(means, [2.5, 97.5]))


def test_more_rows_than_are_weighed_at_once(monkeypatch):
    played = games(np.random.default_rng(3), 40)
    whole = estimates.bradley_terry(*played, 3)
    monkeypatch.setattr(estimates, "AT_ONCE", 7 * len(played[0]))  # seven resamples
    for found, expected in zip(estimates.bradley_terry(*played, 3), whole, strict=True):
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("freedom, quantile", [(5, 2.570582), (9, 2.262157), (100, 1.983972)])
def test_quantiles_of_t(freedom, quantile):
    assert estimates._t_quantile(freedom) == pytest.approx(quantile, rel=1.2e-3)


def test_a_single_prompt_has_no_interval():
    with pytest.raises(ValueError, match="two prompts"):
        estimates.bootstrap(lambda w: w.sum(1), ["a"] * 9)


# Regressions.


def ascent(x, points, weights) -> np.ndarray:
    """The maximum of the penalised likelihood by plain gradient steps, a game at a time."""
    beta = np.zeros(x.shape[1])
    for _ in range(5000):
        gradient = 0.5 - sigmoid(beta)
        for row, point, weight in zip(x, points, weights, strict=True):
            gradient = gradient + weight * (point - sigmoid(row @ beta)) * row
        beta += 0.1 * gradient
        if np.abs(gradient).max() < 1e-10:
            return beta
    raise AssertionError("no maximum")


def test_the_logistic_regression_is_the_maximum_of_its_likelihood():
    generator = np.random.default_rng(0)
    x, weights = generator.normal(size=(25, 3)), generator.integers(0, 3, (2, 25)).astype(float)
    points = generator.choice([0.0, 0.5, 1.0], 25)
    found = estimates.logistic(x, points, weights)
    for got, w in zip(found, weights, strict=True):
        assert got == pytest.approx(ascent(x, points, w), abs=1e-7)


@pytest.mark.parametrize("n", [1, 50, 100000])
def test_who_wins_every_game_has_a_finite_strength(n):
    """n wins and a tie: σ(θ) = (n + ½) / (n + 1)."""
    found = estimates.logistic(np.ones((1, 1)), np.ones(1), np.full((1, 1), float(n)))
    assert found[0, 0] == pytest.approx(math.log((n + 0.5) / 0.5), abs=1e-6)


def test_two_models_ratings_in_closed_form():
    """θ = log(points won / points lost), a tie added."""
    points = np.repeat([1.0, 0.0, 0.5], [70, 20, 10])
    rating, low, high = estimates.bradley_terry(
        np.ones(100, int), np.zeros(100, int), points, np.arange(100), 2
    )
    assert rating[0] == low[0] == high[0] == 1000
    assert rating[1] == pytest.approx(1000 + 400 * math.log10(75.5 / 25.5))
    assert low[1] < rating[1] < high[1]
    # Ten to one is 400.
    assert estimates.ELO * math.log(10) == pytest.approx(400)


def test_without_an_effect_of_length_the_win_rate_stays():
    generator = np.random.default_rng(0)
    points, longer = np.tile([1.0, 1.0, 0.0], 100), np.repeat([-50, 50], 150)
    won, low, high = estimates.length_controlled_win_rate(points, longer, np.arange(300))
    assert won == pytest.approx(200.5 / 301, abs=1e-6) and low < won < high
    # One who only wins by length: at equal length there is nothing left.
    longer = generator.normal(size=2000) + 1.0
    points = (generator.random(2000) < sigmoid(3 * np.tanh(longer / longer.std()))).astype(float)
    won, low, high = estimates.length_controlled_win_rate(points, longer, np.arange(2000))
    assert points.mean() > 0.75 and low < 0.5 < high and won == pytest.approx(0.5, abs=0.04)


def test_regressions_by_statsmodels():
    api = pytest.importorskip("statsmodels.api", reason="statsmodels: requirements-eval.txt")
    generator = np.random.default_rng(2)
    first, second, points, owner = games(generator, 60)
    rating, _, _ = estimates.bradley_terry(first, second, points, owner, 3)
    every = np.eye(3)
    x = np.concatenate([(every[first] - every[second])[:, 1:], np.eye(2)])
    y = np.concatenate([points, [0.5, 0.5]])
    fit = api.GLM(y, x, family=api.families.Binomial()).fit()
    assert rating[1:] == pytest.approx(1000 + estimates.ELO * fit.params, abs=1e-4)

    longer = generator.normal(size=len(points)) * 30
    won, _, _ = estimates.length_controlled_win_rate(points, longer, owner)
    x = np.stack([np.ones(len(points)), np.tanh(longer / longer.std())], 1)
    fit = api.GLM(y, np.concatenate([x, np.eye(2)]), family=api.families.Binomial()).fit()
    assert won == pytest.approx(sigmoid(fit.params[0]), abs=1e-6)


def test_the_interval_of_a_mean_by_scipy(monkeypatch):
    stats = pytest.importorskip("scipy.stats", reason="scipy: requirements-eval.txt")
    for freedom in (9, 29, 200):
        assert estimates._t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), 2e-4)
    values = np.random.default_rng(0).normal(size=40)
    monkeypatch.setattr(estimates, "RESAMPLES", 20000)
    _, low, high = estimates.bootstrap(lambda w: (w @ values) / w.sum(1), np.arange(40))
    expected = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
    assert (low, high) == pytest.approx(expected, abs=0.03 * (high - low))


# Agreement and calibration.

# Krippendorff (2011), section E: four observers, twelve units.
NONE = math.nan
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
    [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
]


@pytest.mark.parametrize(
    "level, alpha", [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_agreement_as_in_krippendorffs_own_example(level, alpha):
    assert estimates.krippendorff_alpha(OBSERVERS, level) == pytest.approx(alpha, abs=5e-4)


def alpha_by_pairs(ratings, distance) -> float:
    """1 − D_o / D_e, pair after pair of ratings."""
    units = [[x for x in column if not math.isnan(x)] for column in np.transpose(ratings)]
    units = [u for u in units if len(u) > 1]
    every = [x for u in units for x in u]
    seen = sum(
        distance(a, b, every) / (len(u) - 1)
        for u in units
        for i, a in enumerate(u)
        for j, b in enumerate(u)
        if i != j
    )
    chance = sum(distance(a, b, every) for a in every for b in every) / (len(every) - 1)
    return 1 - seen / chance


def between(a, b, every) -> float:
    low, high = sorted((a, b))
    inside = sum(low <= x <= high for x in every)
    return (inside - (every.count(a) + every.count(b)) / 2) ** 2 if a != b else 0.0


DISTANCES = {
    "nominal": lambda a, b, _: a != b,
    "interval": lambda a, b, _: (a - b) ** 2,
    "ordinal": between,
}


@pytest.mark.parametrize("level", DISTANCES)
def test_agreement_by_its_definition(level):
    generator = np.random.default_rng(4)
    ratings = generator.choice([-1.0, 0.0, 2.0, 7.0], (3, 15))
    ratings[generator.random((3, 15)) < 0.3] = math.nan
    found = estimates.krippendorff_alpha(ratings, level)
    assert found == pytest.approx(alpha_by_pairs(ratings, DISTANCES[level]))
    assert abs(found) < 0.6


def test_agreement_at_its_ends():
    alike = [[1, 2, 3, 1], [1, 2, 3, 1]]
    assert estimates.krippendorff_alpha(alike) == 1
    assert estimates.krippendorff_alpha([[1, 2, 1, 2], [2, 1, 2, 1]]) < -0.5
    assert math.isnan(estimates.krippendorff_alpha([[1, 1], [1, 1]]))
    assert math.isnan(estimates.krippendorff_alpha([[1, NONE], [NONE, 2]]))


def test_calibration_by_hand():
    """Two bins of two pairs: claims σ(1), σ(1) with one right; σ(3), σ(3) with both right."""
    found = estimates.calibration([1.0, -1.0, 3.0, 3.0], bins=2)
    sure, surer = sigmoid(1.0), sigmoid(3.0)
    assert found["expected_error"] == pytest.approx((abs(sure - 0.5) + abs(surer - 1)) / 2)
    assert found["bins"][0] == pytest.approx({"claim": sure, "right": 0.5, "pairs": 2})
    assert found["bins"][1] == pytest.approx({"claim": surer, "right": 1.0, "pairs": 2})
    assert estimates.calibration([0.0], bins=10)["expected_error"] == 0, "a tie claims nothing"


def test_a_model_that_says_what_it_knows_is_calibrated():
    generator = np.random.default_rng(0)
    gap = generator.normal(size=20000) * 2
    better = np.where(generator.random(20000) < sigmoid(gap), gap, -gap)
    assert estimates.calibration(better)["expected_error"] < 0.012
    assert estimates.calibration(3 * better)["expected_error"] > 0.1, "three times too sure"


# What the intervals cover.


def covered(interval, truth) -> np.ndarray:
    _, low, high = interval
    return (low <= truth) & (truth <= high)


@pytest.mark.slow
def test_intervals_of_ratings_cover_the_truth():
    generator = np.random.default_rng(11)
    many = games(generator, 60000)
    every = np.eye(3)
    x = (every[many[0]] - every[many[1]])[:, 1:]
    truth = 1000 + estimates.ELO * estimates.logistic(x, many[2], np.ones((1, len(x))))[0]
    hits = np.mean(
        [
            covered(estimates.bradley_terry(*games(generator, 80), 3), np.r_[1000, truth])[1:]
            for _ in range(RUNS)
        ],
        axis=0,
    )
    assert (hits >= 0.93).all() and (hits <= 0.97).all(), hits


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [30, 200])
def test_intervals_of_length_controlled_win_rates_cover_the_truth(prompts):
    generator, hits = np.random.default_rng(13), 0
    for _ in range(2 * RUNS):
        longer = generator.normal(20, 40, prompts)
        chance = sigmoid(0.4 + 0.8 * np.tanh(longer / longer.std()))
        points = (generator.random(prompts) < chance).astype(float)
        found = estimates.length_controlled_win_rate(points, longer, np.arange(prompts))
        hits += covered(found, sigmoid(0.4))
    assert 0.93 <= hits / (2 * RUNS) <= 0.97, hits


@pytest.mark.slow
def test_intervals_of_what_pairs_are_chosen_by_cover_the_truth():
    """Three pairs a prompt, of which each prompt's are alike: 80 prompts."""
    generator, hits, prompts = np.random.default_rng(17), [], np.repeat(np.arange(80), 3)
    effects = np.array([0.5, -0.2])
    for _ in range(2 * RUNS):
        x = generator.normal(size=(80, 2))[prompts] + 0.5 * generator.normal(size=(240, 2))
        points = (generator.random(240) < sigmoid(x @ effects)).astype(float)
        found = estimates.bootstrap(
            lambda w, x=x, points=points: estimates.logistic(x, points, w), prompts
        )
        hits.append(covered(found, effects))
    share = np.mean(hits, axis=0)
    assert (share >= 0.93).all() and (share <= 0.97).all(), share


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [40, 400])
def test_intervals_of_win_rates_cover_the_truth_and_a_null_is_rarely_called_different(prompts):
    """A model against itself with another seed: a tie on 30 % of the prompts, else by chance."""
    generator, hits, different = np.random.default_rng(19), 0, 0
    for run in range(1000):
        points = generator.choice([0.0, 0.5, 1.0], prompts, p=[0.35, 0.3, 0.35])
        low, high = interval_by_prompt(points, np.arange(prompts))
        hits += low <= 0.5 <= high
        if run == 199:
            different = 200 - hits
    assert 0.93 <= hits / 1000 <= 0.97, hits
    assert different <= 10
