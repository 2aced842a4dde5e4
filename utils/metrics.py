"""Held-out measures of a reward model, as `evaluate` metrics that need no hub."""

import math

import datasets
import evaluate


class PairAccuracy(evaluate.Metric):
    """Share of pairs whose better answer scores higher; a tie counts half.

    predictions: score of the better answer; references: score of the worse one. Returns
    `accuracy`, its 95 % Wilson interval `low`, `high`, and the mean `margin`.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: better answers' scores; references: worse answers'",
            features=datasets.Features(
                predictions=datasets.Value("float64"), references=datasets.Value("float64")
            ),
        )

    def _compute(self, predictions, references):
        n = len(predictions)
        right = sum(
            (better > worse) + 0.5 * (better == worse)
            for better, worse in zip(predictions, references, strict=True)
        )
        low, high = wilson_interval(right / n, n)
        margin = sum(b - w for b, w in zip(predictions, references, strict=True)) / n
        return {"accuracy": right / n, "low": low, "high": high, "margin": margin, "pairs": n}


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share seen in n trials (Wilson, 1927)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


def pair_accuracy(better: list[float], worse: list[float]) -> dict[str, float]:
    metric = PairAccuracy(keep_in_memory=True)
    return metric.compute(predictions=better, references=worse)
