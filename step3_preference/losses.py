"""Losses of preference learning: functions of summed log-probabilities, torch only.

Each answer has a score s, made of its log-probability under the policy and, for most losses, under
the frozen reference; β·s is the reward that the policy implies (Rafailov et al. 2023). A loss
compares the scores w, l (P,) of P pairs of a better and a worse answer, or judges answers one by
one (KTO), or a whole ranking (Plackett–Luce). LOSSES is the table of them.

Sources: Rafailov et al. 2023 (DPO, and Plackett–Luce in its appendix A.3); Mitchell 2023, "A note
on DPO with noisy preferences" (cDPO); Chowdhury et al. 2024 (robust DPO); Azar et al. 2023 (IPO);
Lambert et al. 2024, Tülu 3 (DPO normalised by length); Meng et al. 2024 (SimPO); Hong et al. 2024
(ORPO); Zhao et al. 2023 (SLiC-HF); D'Oosterlinck et al. 2024 (APO); Ethayarajh et al. 2024 (KTO);
Pang et al. 2024 (the SFT term beside DPO's). ILQL's loss is of tokens, see ilql.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch.nn import functional as F

from step3_preference import ilql
from utils.data.comparisons import ranked_pairs


@dataclass(frozen=True)
class Logprobs:
    """Of N answers: policy, reference (N,) fp64 summed log-probabilities in nats, stop token
    included where the answer has one; lengths (N,) fp64, how many tokens were summed. terms: of
    ILQL alone, (N,6) fp64 sums of ilql.TERMS."""

    policy: torch.Tensor
    reference: torch.Tensor
    lengths: torch.Tensor
    terms: torch.Tensor | None = None


@dataclass(frozen=True)
class How:
    """The numbers that losses take; see PreferenceConfig."""

    beta: float
    margin: float = 0.0
    label_smoothing: float = 0.0
    sft_coef: float = 0.0
    desirable_weight: float = 0.0
    undesirable_weight: float = 0.0
    gamma: float = 0.0
    tau: float = 0.0
    cql_coef: float = 0.0
    awac_coef: float = 0.0
    awac_beta: float = 0.0
    target_rate: float = 0.0


NUMBERS = tuple(field.name for field in fields(How))


# Scores of answers.


def ratio(x: Logprobs) -> torch.Tensor:
    return x.policy - x.reference


def mean_ratio(x: Logprobs) -> torch.Tensor:
    return ratio(x) / x.lengths


def logprob(x: Logprobs) -> torch.Tensor:
    return x.policy


def mean_logprob(x: Logprobs) -> torch.Tensor:
    return x.policy / x.lengths


def mean_q(x: Logprobs) -> torch.Tensor:
    return x.terms[:, ilql.TERMS.index("q")] / x.lengths


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


# Losses of answers one by one, and of rankings.


def kto(scores: torch.Tensor, good: bool, z0: float, how: How) -> torch.Tensor:
    """λ·(1 − σ(±β(s − z0))) (N,): + and λ_D for desirable answers, − and λ_U for others."""
    weight = how.desirable_weight if good else how.undesirable_weight
    above = how.beta * (scores - z0)
    return weight * (1 - torch.sigmoid(above if good else -above))


def plackett_luce(scores: torch.Tensor, labels: torch.Tensor, how: How) -> torch.Tensor:
    """−log probability of a ranking of K answers: scores, labels (K,) → a scalar.

    Each answer is chosen by softmax of β·s among itself and those below it. Ties claim nothing of
    each other: equally good answers are each chosen before those below, in no order.
    """
    among = (labels[None] < labels[:, None]) | torch.eye(len(labels), dtype=torch.bool)
    rewards = how.beta * scores
    chances = rewards[None].masked_fill(~among.to(scores.device), -torch.inf).logsumexp(1)
    return (chances - rewards).sum()


class Labels:
    """How good the answers of some rows are, laid end to end (N,), and what follows from it.

    winners, losers, weights (P,): pairs, as ranked_pairs makes them. good, bad (N,): how often an
    answer is the better or worse one of a pair, or 1 where it is judged by itself.
    """

    def __init__(self, labels: Sequence[Sequence[float]], device: torch.device):
        self.rows = labels
        winners, losers, weights = ranked_pairs(labels)
        self.winners, self.losers = (
            torch.tensor(i, dtype=torch.int64, device=device) for i in (winners, losers)
        )
        self.weights = torch.tensor(weights, dtype=torch.float64, device=device)
        alone = [len(row) == 1 for row in labels for _ in row]
        flat = [label for row in labels for label in row]
        sides = [
            torch.tensor([x * y for x, y in zip(alone, side, strict=True)], dtype=torch.float64)
            for side in ([label > 0 for label in flat], [label <= 0 for label in flat])
        ]
        self.good = sides[0].to(device).index_add(0, self.winners, self.weights)
        self.bad = sides[1].to(device).index_add(0, self.losers, self.weights)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """beta and so on: what a run takes that does not set them; those that are None are not read,
    and setting one is refused."""

    meaning: str
    score: Callable[[Logprobs], torch.Tensor]
    beta: float = 0.1
    margin: float | None = None
    label_smoothing: float | None = None
    sft_coef: float | None = 0.0
    desirable_weight: float | None = None
    undesirable_weight: float | None = None
    gamma: float | None = None
    tau: float | None = None
    cql_coef: float | None = None
    awac_coef: float | None = None
    awac_beta: float | None = None
    target_rate: float | None = None

    takes_single = False  # rows of one answer that is judged by itself?
    reads_mismatched = False  # and answers to other prompts?

    @property
    def reads_reference(self) -> bool:
        return self.score in (ratio, mean_ratio)

    def count(self, labels: Sequence[Sequence[float]], lengths: torch.Tensor | None = None):
        """What the sum over these rows is divided by. lengths: (N,) tokens of their answers."""
        return len(labels)

    def total(self, x: Logprobs, scores, labels: Labels, z0: float, how: How) -> torch.Tensor:
        """Σ over rows, in fp64. scores: (N,)."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PairLoss(Loss):
    """The pairs of a row weigh 1 together."""

    compare: Callable[[torch.Tensor, torch.Tensor, How], torch.Tensor]

    def total(self, x, scores, labels, z0, how):
        return (
            labels.weights * self.compare(scores[labels.winners], scores[labels.losers], how)
        ).sum()


@dataclass(frozen=True, kw_only=True)
class KTO(Loss):
    """Answers one by one. A comparison counts as two: its better and its worse answers, each side
    weighing 1 together, as its pairs name them."""

    takes_single = reads_mismatched = True

    def count(self, labels, lengths=None):
        return sum(2 if len(row) > 1 else 1 for row in labels)

    def total(self, x, scores, labels, z0, how):
        good, bad = (kto(scores, side, z0, how) for side in (True, False))
        return (labels.good * good + labels.bad * bad).sum()


@dataclass(frozen=True, kw_only=True)
class RankingLoss(Loss):
    def total(self, x, scores, labels, z0, how):
        parts = scores.split([len(row) for row in labels.rows])
        rows = (torch.tensor(row, dtype=torch.float64) for row in labels.rows)
        ranked = zip(parts, rows, strict=True)
        return sum(plackett_luce(part, row, how) for part, row in ranked)


@dataclass(frozen=True, kw_only=True)
class ILQL(Loss):
    """Tokens one by one, and a mean over them."""

    takes_single = True

    def count(self, labels, lengths=None):
        return lengths.sum()

    def total(self, x, scores, labels, z0, how):
        return x.terms[:, : ilql.LOSSES].sum()


def _pairs(meaning: str, score: Callable, compare: Callable, **numbers) -> PairLoss:
    return PairLoss(meaning=meaning, score=score, compare=compare, **numbers)


LOSSES: dict[str, Loss] = {
    "dpo": _pairs("−log σ of the difference of log-ratios to the reference", ratio, logistic),
    "cdpo": _pairs("dpo, labels wrong at a rate", ratio, conservative, label_smoothing=0.1),
    "robust_dpo": _pairs("dpo, that rate taken back", ratio, robust, label_smoothing=0.1),
    "dpo_norm": _pairs("dpo on means over tokens", mean_ratio, logistic, beta=5.0),
    "ipo": _pairs("squared distance of the mean log-ratios to a margin", mean_ratio, squared),
    "simpo": _pairs(
        "mean log-probabilities a margin apart; no reference",
        mean_logprob,
        logistic,
        beta=2.0,
        margin=1.0,
    ),
    "orpo": _pairs("SFT and an odds ratio; no reference", mean_logprob, odds_ratio, sft_coef=1.0),
    "slic": _pairs(
        "hinge of log-probabilities, and SFT; no reference",
        logprob,
        hinge,
        beta=1.0,
        margin=1.0,
        sft_coef=0.1,
    ),
    "apo_zero": _pairs("chosen up, rejected down", ratio, apo_zero),
    "apo_down": _pairs("both down, rejected further", ratio, apo_down),
    "kto": KTO(
        meaning="answers judged one by one, against the KL to the reference",
        score=ratio,
        desirable_weight=1.0,
        undesirable_weight=1.0,
    ),
    "plackett_luce": RankingLoss(meaning="the whole ranking of K answers", score=ratio),
    "ilql": ILQL(
        meaning="values of tokens learned offline, which sampling follows; no reference",
        score=mean_q,
        beta=1.0,
        sft_coef=None,
        gamma=0.99,
        tau=0.7,
        cql_coef=0.1,
        awac_coef=1.0,
        awac_beta=0.0,
        target_rate=0.005,
    ),
}


def batch_loss(
    loss: Loss, x: Logprobs, labels: Sequence[Sequence[float]], how: How, z0: float = 0.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Summed loss of whole rows, and statistics (sums, see `means`).

    labels: of each row's answers, higher is better; x has these answers laid end to end. z0: KTO's
    KL of the whole optimizer step, in nats an answer.
    """
    made, scores = Labels(labels, x.policy.device), loss.score(x)
    total = loss.total(x, scores, made, z0, how)
    if how.sft_coef:
        total = total - how.sft_coef * (made.good * mean_logprob(x)).sum()
    with torch.no_grad():
        rewards = how.beta * scores
        ahead = (rewards[made.winners] - rewards[made.losers]).sign()
        stats = {"loss": total, "count": loss.count(labels, x.lengths), "pairs": made.weights.sum()}
        stats["accuracy"] = (made.weights * (1 + ahead) / 2).sum()
        measured = (("reward", rewards), ("logprob", x.policy), ("length", x.lengths))
        for who, weights in (("chosen", made.good), ("rejected", made.bad)):
            stats[who] = weights.sum()
            stats |= {f"{who}_{what}": (weights * value).sum() for what, value in measured}
        if x.terms is not None:
            sums = zip(ilql.TERMS, x.terms.sum(0), strict=True)
            stats |= {"ilql": x.lengths.sum()} | {f"ilql_{name}": value for name, value in sums}
    return total.float(), stats


def means(sums: dict[str, float]) -> dict[str, float]:
    """Statistics of `batch_loss`, summed over any rows → metrics; NaN where no row has them."""
    found = {}
    for name, value in sums.items():
        over = {"loss": "count", "accuracy": "pairs"}.get(name, name.split("_")[0])
        if over != name and name != "count":
            found[name] = value / sums[over] if sums[over] else float("nan")
    return found | {"margin": found["chosen_reward"] - found["rejected_reward"]}
