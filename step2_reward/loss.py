"""Ranking loss of the reward model: pure functions of scores. Source: InstructGPT, section 3.5."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def ranked_pairs(labels: Sequence[Sequence[float]]) -> tuple[list[int], list[int], list[float]]:
    """Indices of (winner, loser) over all prompts' answers laid end to end, and pair weights.

    labels[p][k]: how good answer k of prompt p is. Ties make no pair. The pairs of one prompt
    weigh 1 together (1/C(K,2) each without ties): were they separate examples, each answer would
    be trained on K−1 times an epoch and overfit.
    """
    winners, losers, weights = [], [], []
    start = 0
    for group in labels:
        pairs = [(i, j) for i, a in enumerate(group) for j, b in enumerate(group) if a > b]
        winners += [start + i for i, _ in pairs]
        losers += [start + j for _, j in pairs]
        weights += [1.0 / max(len(pairs), 1)] * len(pairs)
        start += len(group)
    return winners, losers, weights


def ranking_loss(
    scores: torch.Tensor,
    winners: Sequence[int],
    losers: Sequence[int],
    weights: Sequence[float],
    *,
    margins: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    centring: float = 0.0,
) -> torch.Tensor:
    """Σ weight · (−log σ(s_w − s_l − margin)) over the pairs: a scalar, in fp32.

    scores: (N,) of all answers. Divide by the number of prompts for the mean.
    label_smoothing ε: the label is taken to be wrong with probability ε.
    centring c: adds c · (s_w + s_l)², which keeps scores near 0 without changing differences.
    """
    scores = scores.float()
    s_w, s_l = scores[list(winners)], scores[list(losers)]
    difference = s_w - s_l if margins is None else s_w - s_l - margins
    loss = -F.logsigmoid(difference)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-difference)
    if centring:
        loss = loss + centring * (s_w + s_l) ** 2
    return (loss * torch.tensor(weights, dtype=loss.dtype, device=loss.device)).sum()
