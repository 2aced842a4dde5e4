"""Estimators of the advantage: by how much an action was better than what to expect.

Imports torch only. One function an estimator, with its paper. Per-token tensors are (B,A), where
A is R, or 1 where a whole answer is one action; `mask` (B,A) bool is True on actions. Estimators
without a critic compare whole answers: `totals` (B,) are their rewards summed over actions, and
`group` (B,) int64 says which rows answer the same prompt, wherever they stand. They compute in
fp64: answers of one score must have differences of exactly 0, which rounding to fp32 and a division
by a small deviation would turn into noise.
"""

from dataclasses import dataclass

import torch


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of x where mask is True: a scalar."""
    return (x * mask).sum() / mask.sum()


def whiten(x: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """x with mean 0 (or, without `shift_mean`, its own) and variance 1 over the masked tokens,
    0 elsewhere."""
    if not mask.any():
        return torch.zeros_like(x)
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def explained_variance(values, returns, mask) -> torch.Tensor:
    """1 − Var(returns − values) / Var(returns) over the masked tokens; 1 is perfect, 0 useless."""
    error = returns - values

    def variance(x):
        return masked_mean((x - masked_mean(x, mask)).square(), mask)

    return 1 - variance(error) / variance(returns).clamp(min=1e-12)


@dataclass
class Earned:
    """What a rollout's actions have earned: all that an estimator may look at."""

    rewards: torch.Tensor  # (B,A)
    values: torch.Tensor  # (B,A) of the critic, 0 without one
    mask: torch.Tensor  # (B,A) bool
    group: torch.Tensor  # (B,) int64
    lengths: torch.Tensor  # (B,) int64, actions of the answer in tokens
    baseline: torch.Tensor | None = None  # (B,) score of the greedy answer to the prompt, if known

    def totals(self) -> torch.Tensor:
        """(B,) fp64: what each answer has earned."""
        return (self.rewards.double() * self.mask).sum(1)

    def at_every_action(self, of_answers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) advantages of answers → (B,A) advantages of their actions, all the same; and the
        returns (B,A): what the answer has earned in all."""
        both = of_answers, self.totals()
        return tuple((x.to(self.rewards.dtype)[:, None] * self.mask) for x in both)


# With a critic, or none and its values 0.


def gae(rewards, values, mask, gamma: float, lam: float):
    """Generalised advantage estimation → advantages (B,A), returns (B,A), 0 off the mask.

    δ_t = r_t + γ V_{t+1} − V_t and A_t = δ_t + γλ A_{t+1}, with V and A 0 past the last action.
    t counts actions alone: what an environment says in between is no step, and costs no discount.
    Schulman et al. 2015. With λ = 1 and values of 0 the advantage is the return itself: Williams
    1992 (REINFORCE), and Hu 2025 (REINFORCE++), who whitens it over the rollout.
    """
    advantages = torch.zeros_like(rewards)
    next_value = following = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        is_action = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(is_action, delta + gamma * lam * following, following)
        next_value = torch.where(is_action, values[:, t], next_value)
        advantages[:, t] = following.where(is_action, 0.0)
    return advantages, (advantages + values) * mask


# Of the answers to one prompt.


def _sum_of_group(x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """(B,) → (B,): for each row the sum over its group, itself included."""
    _, place = group.unique(return_inverse=True)
    sums = x.new_zeros(int(place.max()) + 1).index_add(0, place, x)
    return sums[place]


def alike(totals: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """(B,) bool: do all answers of the row's group have one and the same total?"""
    _, place = group.unique(return_inverse=True)
    size = int(place.max()) + 1
    least, most = (
        totals.new_zeros(size).scatter_reduce(0, place, totals, how, include_self=False)
        for how in ("amin", "amax")
    )
    return (least == most)[place]


def group_differences(totals: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """r − mean of the group: Liu et al. 2025 (Dr. GRPO), and the baseline of REINFORCE++ (Hu 2025),
    which whitens it over the rollout. 0 in a group whose answers have all earned the same."""
    mean = _sum_of_group(totals, group) / _sum_of_group(torch.ones_like(totals), group)
    return (totals - mean).where(~alike(totals, group), 0.0)


def grpo(totals: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """(r − mean) / deviation of the group: Shao et al. 2024 (DeepSeekMath).

    The deviation's divisor is n − 1, and 10⁻⁴ is added to it, as in TRL; it is 0 where all answers
    of a group have earned the same, and their advantage is 0.
    """
    differences = group_differences(totals, group)
    others = (_sum_of_group(torch.ones_like(totals), group) - 1).clamp(min=1)
    deviation = (_sum_of_group(differences.square(), group) / others).sqrt()
    return differences / (deviation + 1e-4)


def rloo(totals: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """r − mean of the group's other answers: Ahmadian et al. 2024 (RLOO), a baseline that does not
    depend on the answer itself. It is group_differences × n / (n − 1)."""
    count = _sum_of_group(torch.ones_like(totals), group)
    return group_differences(totals, group) * count / (count - 1).clamp(min=1)


def opo(totals: torch.Tensor, group: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """r − Σ l r / Σ l over the group, l the lengths: Hao et al. 2025 (OPO). The baseline of least
    variance weighs each answer by the square of its gradient's norm, for which its length stands.
    """
    weights = lengths.to(totals.dtype)
    baseline = _sum_of_group(weights * totals, group) / _sum_of_group(weights, group)
    return (totals - baseline).where(~alike(totals, group), 0.0)


def remax(totals: torch.Tensor, baseline: torch.Tensor) -> torch.Tensor:
    """r − the score of the policy's greedy answer to the same prompt: Li et al. 2023 (ReMax). It
    needs no other answers, and costs one more to generate and to score for each prompt."""
    return totals - baseline.double()
