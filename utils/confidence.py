"""Held-out measures of a reward model, as `evaluate` metrics that need no hub."""

import math

import datasets
import evaluate
import numpy as np

RESAMPLES, AT_ONCE = 2000, 2**22  # of the bootstrap; numbers drawn at a time
FEW = 10  # prompts; a bootstrap of fewer is too sure of itself


class PairAccuracy(evaluate.Metric):
    """Share of pairs whose better answer scores higher; a tie counts half.

    predictions: score of the better answer; references: score of the worse one; prompts: what they
    answer. Returns `accuracy`, its 95 % interval by prompt `low`, `high`, and the mean `margin`.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="better answers' scores, worse answers', and their prompts",
            features=datasets.Features(
                predictions=datasets.Value("float64"),
                references=datasets.Value("float64"),
                prompts=datasets.Value("string"),
            ),
        )

    def _compute(self, predictions, references, prompts):
        better, worse = np.array(predictions), np.array(references)
        right = (better > worse) + 0.5 * (better == worse)
        low, high = interval_by_prompt(right, prompts)
        return {
            "accuracy": float(right.mean()),
            "low": low,
            "high": high,
            "margin": float((better - worse).mean()),
            "pairs": len(right),
        }


def interval_by_prompt(right, prompts) -> tuple[float, float]:
    """95 % interval of the mean of `right` (N,), of pairs that share their `prompts` (N,).

    Pairs of one prompt share answers and are right or wrong together, so prompts are drawn again
    and not pairs (percentiles of a seeded bootstrap, Efron 1979). Where all prompts are equally
    right, or there are fewer than FEW, drawing them says too little, and each counts as one trial
    of Wilson's.
    """
    _, group = np.unique(np.asarray(prompts), return_inverse=True)
    counts = np.bincount(group)
    sums = np.bincount(group, weights=right)
    if np.ptp(sums / counts) < 1e-12 or len(counts) < FEW:
        return wilson_interval(float(np.mean(right)), len(counts))
    generator, means = np.random.default_rng(0), []
    for size in np.diff([*range(0, RESAMPLES, max(1, AT_ONCE // len(counts))), RESAMPLES]):
        drawn = generator.integers(0, len(counts), (size, len(counts)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share seen in n independent trials (Wilson, 1927)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


def ranking_accuracy(labels, scores, lengths, prompts) -> dict[str, float]:
    """Measures of a reward model on every pair of answers to one prompt of which one is better.

    labels[p][k]: how good answer k to prompts[p] is; scores and lengths: alike, the model's and the
    text's. Pairs of equal `prompts` are drawn together by the interval.
    """
    pairs = [
        (p, i, j)
        for p, group in enumerate(labels)
        for i, better in enumerate(group)
        for j, worse in enumerate(group)
        if better > worse
    ]
    owners = [str(prompts[p]) for p, _, _ in pairs]

    def measured(values) -> dict[str, float]:
        better, worse = [values[p][i] for p, i, _ in pairs], [values[p][j] for p, _, j in pairs]
        return pair_accuracy(better, worse, owners)

    model, longer = measured(scores), measured(lengths)
    return {
        "accuracy": model["accuracy"],
        "accuracy_low": model["low"],
        "accuracy_high": model["high"],
        "margin": model["margin"],
        "accuracy_longer_answer": longer["accuracy"],
        "pairs": model["pairs"],
    }


def pair_accuracy(better: list[float], worse: list[float], prompts: list[str]) -> dict[str, float]:
    metric = PairAccuracy(keep_in_memory=True)
    return metric.compute(predictions=better, references=worse, prompts=prompts)
