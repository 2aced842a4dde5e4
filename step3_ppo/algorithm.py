"""Rewards, losses and KL estimates on (B,R) tensors of response tokens, and the algorithms made of
them and of the estimators in advantages.py.

Imports torch only.

Every per-token tensor is (B,R) fp32; `mask` (B,R) bool is True on actions: the tokens that the
policy chose, which need not be neighbours. Losses are sums over actions: the caller divides by
their count in the whole optimizer step, over all ranks and micro-batches. Where a whole answer is
one action (`one_action`), R is 1.

Sources: Schulman et al. 2017 (PPO), Ziegler et al. 2019; Stiennon et al. 2020
(summarize-from-feedback); Ouyang et al. 2022 (InstructGPT); Schulman 2020, "Approximating KL
divergence" (k1, k2, k3); Williams 1992 (REINFORCE); Mnih et al. 2016 (A2C); Ye et al. 2020 (dual
clip); Yu et al. 2025, DAPO (a wider upper clip).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from step3_ppo.advantages import gae, group_differences, grpo, opo, rloo

KL_ESTIMATORS = ("k1", "k2", "k3")


def kl_estimates(logprobs: torch.Tensor, ref_logprobs: torch.Tensor):
    """Per-token estimates (k1, k2, k3) of KL(policy ‖ reference) from the policy's own samples.

    k1 = log p − log q is unbiased and may be negative on a token; k2 = k1²/2 is biased and small
    in variance; k3 = q/p − 1 + k1 is unbiased and never negative.
    """
    k1 = logprobs - ref_logprobs
    # expm1: in fp32 exp(−k1) − 1 is rounding alone near 0, and half of the k3 came out negative.
    return k1, k1.square() / 2, torch.expm1(-k1) + k1


def adapted_kl_coef(kl_coef: float, kl: float, target: float, sequences: int, horizon: float):
    """The KL coefficient after a rollout of `sequences` whose mean KL was `kl` nats a response.

    β ← β (1 + clip(KL/target − 1, ±0.2) · n/horizon): up where the policy strays further than
    `target`, down where it stays nearer (Ziegler et al. 2019, horizon 10,000 sequences).
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * sequences / horizon)


def penalise_cut(scores, finished, penalty: float, stand_in: float = torch.inf):
    """(B,) scores, (B,) bool finished → (B,): an answer cut at the limit gets min(its own score,
    mean of the finished ones) − penalty, so that not to stop never pays, whatever the scale.

    stand_in: for that mean where none finished.
    """
    mean = scores[finished].mean().item() if finished.any() else stand_in
    return torch.where(finished, scores, scores.clamp(max=mean) - penalty)


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef: float, kl_estimator: str = "k1"):
    """(B,) scores → rewards (B,R) and kl (B,R), the estimate a token that they were charged for.

    Every action pays kl_coef × kl; a row's last one earns the score. Only k1 is a sound penalty
    here. A reward is not differentiated, so what pulls the policy back is E[kl · ∇log p]: for k1
    that is ∇KL(policy ‖ reference); for k3 it is ∇KL(policy ‖ reference) − ∇KL(reference ‖ policy),
    which cancel near the reference: what is left is of second order in the distance, where ∇KL is
    of first. For k2 it is the same but for terms of third order.
    """
    estimate = kl_estimates(logprobs, ref_logprobs)[KL_ESTIMATORS.index(kl_estimator)]
    kl = estimate.where(mask, 0.0)
    rewards = -kl_coef * kl
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return torch.where(is_last, rewards + scores[:, None], rewards), kl


def one_action(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B,R) log-probabilities or rewards of tokens → (B,1) of the whole answer, their sum: the
    bandit of InstructGPT's text, where a policy plays an answer and the episode ends."""
    return (x * mask).sum(1, keepdim=True)


def first_action(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B,R) → (B,1), at each row's first action: V(prompt), where x are values."""
    return x.gather(1, mask.long().argmax(1, keepdim=True))


def policy_loss(
    new_logprobs,
    logprobs,
    advantages,
    mask,
    clip_ratio: float,
    clip_ratio_high: float = 0.0,
    dual_clip: float = 0.0,
):
    """Clipped surrogate, summed over tokens, and its statistics (sums over tokens too).

    −Σ min(ρ A, clip(ρ, 1−ε, 1+ε') A) with ρ = exp(new − old); ε' is `clip_ratio_high`, or ε where
    that is 0. With dual_clip c > 1 a token with A < 0 counts at most as c·A: without it a ratio
    that has exploded makes the loss unbounded there.
    """
    ratio, stats = _ratio_statistics(new_logprobs, logprobs, mask)
    high = clip_ratio_high or clip_ratio
    clipped = ratio.clamp(1 - clip_ratio, 1 + high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip:
        floor = torch.maximum(objective, dual_clip * advantages)
        objective = torch.where(advantages < 0, floor, objective)
    loss = -(objective * mask).sum()
    outside = (ratio < 1 - clip_ratio) | (ratio > 1 + high)
    return loss, stats | {"policy_loss": loss.detach(), "clip_fraction": (outside & mask).sum()}


def policy_gradient_loss(new_logprobs, logprobs, advantages, mask):
    """−Σ A log p, the loss of REINFORCE and A2C, and its statistics. It has no ratio, so it holds
    for one optimizer step on samples of this very policy; there its gradient is PPO's."""
    _, stats = _ratio_statistics(new_logprobs, logprobs, mask)
    loss = -(new_logprobs * advantages * mask).sum()
    return loss, stats | {"policy_loss": loss.detach()}


def _ratio_statistics(new_logprobs, logprobs, mask):
    """ρ (B,R), and sums over tokens of ρ and of KL(old ‖ new) by k3: how far an update moved."""
    log_ratio = (new_logprobs - logprobs) * mask
    # Beyond e^88 fp32 is infinite, and the gradient of a ratio that a clip cuts off 0 × ∞ = NaN.
    log_ratio = log_ratio.clamp(max=80.0)
    ratio = log_ratio.exp()
    with torch.no_grad():
        moved = ((torch.expm1(log_ratio) - log_ratio) * mask).sum()
        return ratio, {"ratio": (ratio * mask).sum().detach(), "approx_kl": moved}


def value_loss(new_values, values, returns, mask, clip_value: float):
    """Clipped squared error ½ Σ max((V−R)², (clip(V, V_old±ε)−R)²), and its statistics."""
    # Not values + clamp(new − values): that is rounded, and would count as clipped what is not.
    clipped = new_values.clamp(values - clip_value, values + clip_value)
    error, clipped_error = (new_values - returns).square(), (clipped - returns).square()
    loss = 0.5 * (torch.maximum(error, clipped_error) * mask).sum()
    with torch.no_grad():
        stats = {
            "value_loss": loss.detach(),
            "value_clip_fraction": ((clipped_error > error) & mask).sum(),
        }
    return loss, stats


# The algorithms' estimators take (advantages.Earned, config), their losses (new_logprobs, logprobs,
# advantages, mask, config), where config has the fields of PPOConfig.


def with_critic(earned, config):
    return gae(earned.rewards, earned.values, earned.mask, config.gamma, config.lam)


def returns_alone(earned, config):
    return gae(earned.rewards, earned.values, earned.mask, config.gamma, 1.0)


def of_group(estimator: Callable) -> Callable:
    """An estimator of (totals, group) as an algorithm's."""
    return lambda earned, config: earned.at_every_action(estimator(earned.totals(), earned.group))


def of_lengths(earned, config):
    return earned.at_every_action(opo(earned.totals(), earned.group, earned.lengths))


def clipped_ratio(new_logprobs, logprobs, advantages, mask, config):
    clips = config.clip_ratio, config.clip_ratio_high, config.dual_clip
    return policy_loss(new_logprobs, logprobs, advantages, mask, *clips)


def no_ratio(new_logprobs, logprobs, advantages, mask, config):
    return policy_gradient_loss(new_logprobs, logprobs, advantages, mask)


@dataclass(frozen=True)
class Algorithm:
    """An --algorithm: what it learns from a rollout and how. A new one is a line in ALGORITHMS, and
    one in checks/alignment.py, DEFINITIONS."""

    meaning: str
    advantages: Callable  # gives advantages and returns (B,A), 0 off the mask, not whitened
    loss: Callable = clipped_ratio  # gives the sum over actions, and its statistics
    critic: bool = False  # is there one to train?
    groups: bool = False  # does it compare several answers to a prompt?
    one_step: bool = False  # does its loss hold for one optimizer step a rollout only?
    discounts: bool = False  # does it read --gamma?
    whitens: bool = False  # does it read --whiten_advantages?

    def value_loss(self, new_values, values, returns, mask, config):
        clip = math.inf if self.one_step else config.clip_value or math.inf
        return value_loss(new_values, values, returns, mask, clip)


_OF_TOKENS = dict(discounts=True, whitens=True)
ALGORITHMS = {
    "ppo": Algorithm(
        "the clipped ratio of PPO, with a critic", with_critic, critic=True, **_OF_TOKENS
    ),
    "a2c": Algorithm(
        "no ratio, one optimizer step a rollout",
        with_critic,
        no_ratio,
        critic=True,
        one_step=True,
        **_OF_TOKENS,
    ),
    "reinforce": Algorithm(
        "a2c without a critic", returns_alone, no_ratio, one_step=True, **_OF_TOKENS
    ),
    "reinforce++": Algorithm("ppo without a critic", returns_alone, **_OF_TOKENS),
    "reinforce++_baseline": Algorithm(
        "score − mean of the prompt's answers, whitened over the rollout",
        of_group(group_differences),
        groups=True,
        whitens=True,
    ),
    "grpo": Algorithm(
        "(score − mean) / deviation of the prompt's answers", of_group(grpo), groups=True
    ),
    "dr_grpo": Algorithm(
        "score − mean of the prompt's answers", of_group(group_differences), groups=True
    ),
    "rloo": Algorithm("score − mean of the prompt's other answers", of_group(rloo), groups=True),
    "opo": Algorithm("score − mean weighted by length", of_lengths, groups=True),
}
