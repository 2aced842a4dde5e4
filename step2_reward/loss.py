"""Ranking loss of the reward model: pure functions of scores. Source: InstructGPT, section 3.5."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F


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
