"""Losses of preference learning: functions of summed log-probabilities, torch only.

Each answer has a score s, made of its log-probability under the policy and, for most losses, under
the frozen reference; β·s is the reward that the policy implies (Rafailov et al. 2023). A loss
compares the scores w, l (P,) of P pairs of a better and a worse answer, or judges answers one by
one (KTO), or a whole ranking (Plackett–Luce).

Sources: Rafailov et al. 2023 (DPO, and Plackett–Luce in its appendix A.3); Mitchell 2023, "A note
on DPO with noisy preferences" (cDPO); Chowdhury et al. 2024 (robust DPO); Azar et al. 2023 (IPO);
Lambert et al. 2024, Tülu 3 (DPO normalised by length); Meng et al. 2024 (SimPO); Hong et al. 2024
(ORPO); Zhao et al. 2023 (SLiC-HF); D'Oosterlinck et al. 2024 (APO); Ethayarajh et al. 2024 (KTO);
Pang et al. 2024 (the SFT term beside DPO's).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from utils.data.comparisons import ranked_pairs


@dataclass(frozen=True)
class Logprobs:
    """Of N answers: policy, reference (N,) fp64 summed log-probabilities in nats, stop token
    included where the answer has one; lengths (N,) fp64, how many tokens were summed."""

    policy: torch.Tensor
    reference: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True)
class How:
    """The numbers that losses take; see PreferenceConfig."""

    beta: float
    margin: float = 0.0
    label_smoothing: float = 0.0
    sft_coef: float = 0.0


# Scores of answers.


def ratio(x: Logprobs) -> torch.Tensor:
    return x.policy - x.reference


def mean_ratio(x: Logprobs) -> torch.Tensor:
    return ratio(x) / x.lengths


def logprob(x: Logprobs) -> torch.Tensor:
    return x.policy


def mean_logprob(x: Logprobs) -> torch.Tensor:
    return x.policy / x.lengths


# Losses of pairs: scores w of the better and l of the worse answers → (P,).


def logistic(w: torch.Tensor, l: torch.Tensor, how: How) -> torch.Tensor:  # noqa: E741
    """−log σ(β(w − l) − γ)."""
    return -F.logsigmoid(how.beta * (w - l) - how.margin)


def conservative(w, l, how: How) -> torch.Tensor:  # noqa: E741
    """The label is wrong with probability ε: (1 − ε)·L(w, l) + ε·L(l, w)."""
    e = how.label_smoothing
    return (1 - e) * logistic(w, l, how) + e * logistic(l, w, how)


def robust(w, l, how: How) -> torch.Tensor:  # noqa: E741
    """The same noise taken back: over labels that are wrong with probability ε the mean of
    ((1 − ε)·L(w, l) − ε·L(l, w)) / (1 − 2ε) is L of the right ones."""
    e = how.label_smoothing
    return ((1 - e) * logistic(w, l, how) - e * logistic(l, w, how)) / (1 - 2 * e)


def squared(w, l, how: How) -> torch.Tensor:  # noqa: E741
    """(w − l − 1/(2β))², the paper's eq. 17 with τ = β."""
    return (w - l - 1 / (2 * how.beta)).square()


def hinge(w, l, how: How) -> torch.Tensor:  # noqa: E741
    """max(0, δ − β(w − l))."""
    return F.relu(how.margin - how.beta * (w - l))


def odds_ratio(w, l, how: How) -> torch.Tensor:  # noqa: E741
    """−β·log σ(log odds(w) − log odds(l)), odds p/(1 − p) of the mean probability of a token."""

    def log_odds(x):
        # Where the model is certain the odds are infinite; the gradient 1/(1 − p) stays finite.
        return x - torch.log(-torch.expm1(x.clamp(max=-1e-6)))

    return -how.beta * F.logsigmoid(log_odds(w) - log_odds(l))


def apo_zero(w, l, how: How) -> torch.Tensor:  # noqa: E741
    """Chosen answers up, rejected ones down: for answers better than the policy's own."""
    return 1 - torch.sigmoid(how.beta * w) + torch.sigmoid(how.beta * l)


def apo_down(w, l, how: How) -> torch.Tensor:  # noqa: E741
    """Both down, rejected ones further: for answers worse than the policy's own."""
    return torch.sigmoid(how.beta * w) + 1 - torch.sigmoid(how.beta * (w - l))


@dataclass(frozen=True)
class Loss:
    """compare: see above. beta and so on: what a run takes that does not set them; those that are
    None are not read, and setting one is refused."""

    meaning: str
    score: Callable[[Logprobs], torch.Tensor]
    compare: Callable[[torch.Tensor, torch.Tensor, How], torch.Tensor]
    beta: float = 0.1
    margin: float | None = None
    label_smoothing: float | None = None
    sft_coef: float = 0.0

    @property
    def reads_reference(self) -> bool:
        return self.score in (ratio, mean_ratio)


LOSSES = {
    "dpo": Loss("−log σ of the difference of log-ratios to the reference", ratio, logistic),
    "cdpo": Loss("dpo, labels wrong at a rate", ratio, conservative, label_smoothing=0.1),
    "robust_dpo": Loss("dpo, that rate taken back", ratio, robust, label_smoothing=0.1),
    "dpo_norm": Loss("dpo on means over tokens", mean_ratio, logistic, beta=5.0),
    "ipo": Loss("squared distance of the mean log-ratios to a margin", mean_ratio, squared),
    "simpo": Loss(
        "mean log-probabilities a margin apart; no reference",
        mean_logprob,
        logistic,
        beta=2.0,
        margin=1.0,
    ),
    "orpo": Loss("SFT and an odds ratio; no reference", mean_logprob, odds_ratio, sft_coef=1.0),
    "slic": Loss(
        "hinge of log-probabilities, and SFT; no reference",
        logprob,
        hinge,
        beta=1.0,
        margin=1.0,
        sft_coef=0.1,
    ),
    "apo_zero": Loss("chosen up, rejected down", ratio, apo_zero),
    "apo_down": Loss("both down, rejected further", ratio, apo_down),
}


def batch_loss(
    loss: Loss, x: Logprobs, labels: Sequence[Sequence[float]], how: How
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Summed loss of whole rows, each of which weighs 1, and statistics (sums, see `means`).

    labels: of each row's answers, higher is better; x has these answers laid end to end.
    """
    pairs = ranked_pairs(labels)
    winners, losers = (torch.tensor(i, dtype=torch.int64) for i in pairs[:2])
    winners, losers = winners.to(x.policy.device), losers.to(x.policy.device)
    weights = torch.tensor(pairs[2], dtype=torch.float64, device=x.policy.device)
    scores = loss.score(x)
    total = (weights * loss.compare(scores[winners], scores[losers], how)).sum()
    if how.sft_coef:
        total = total - how.sft_coef * (weights * mean_logprob(x)[winners]).sum()
    with torch.no_grad():
        rewards = how.beta * scores
        ahead = (rewards[winners] - rewards[losers]).sign()
        stats = {"loss": total, "pairs": weights.sum()}
        stats["accuracy"] = (weights * (1 + ahead) / 2).sum()
        for who, rows in (("chosen", winners), ("rejected", losers)):
            for what, value in (
                ("reward", rewards),
                ("logprob", x.policy),
                ("length", x.lengths),
            ):
                stats[f"{who}_{what}"] = (weights * value[rows]).sum()
    return total.float(), stats


def means(sums: dict[str, float]) -> dict[str, float]:
    """Statistics of `batch_loss`, summed over any rows → metrics."""
    pairs = sums["pairs"] or float("nan")
    found = {name: value / pairs for name, value in sums.items() if name != "pairs"}
    return found | {"margin": found["chosen_reward"] - found["rejected_reward"]}
