"""Rewards, losses and KL estimates on (B,R) tensors of response tokens, and the algorithms made of
them and of the estimators in advantages.py.

Imports torch only.

Every per-token tensor is (B,R) fp32; `mask` (B,R) bool is True on actions: the tokens that the
policy chose, which need not be neighbours. Losses are sums over actions, of which each counts by
its `weights` (B,R) fp32, 1 where they are not given: the caller divides by what they add up to in
the whole optimizer step, over all ranks and micro-batches. Where a whole answer is one action
(`one_action`), R is 1.

Sources: Schulman et al. 2017 (PPO), Ziegler et al. 2019; Stiennon et al. 2020
(summarize-from-feedback); Ouyang et al. 2022 (InstructGPT); Schulman 2020, "Approximating KL
divergence" (k1, k2, k3); Williams 1992 (REINFORCE); Mnih et al. 2016 (A2C); Ye et al. 2020 (dual
clip); Yu et al. 2025, DAPO (a wider upper clip); Zheng et al. 2025 (GSPO); MiniMax 2025,
MiniMax-M1 (CISPO).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from step3_ppo.advantages import gae, group_differences, grpo, opo, remax, rloo

KL_ESTIMATORS = ("k1", "k2", "k3")
NORMALISATIONS = ("token", "sequence", "constant")


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


def overlong(lengths: torch.Tensor, longest: int, buffer: int) -> torch.Tensor:
    """(B,) lengths in tokens → (B,) 0 up to longest − buffer, then rising to 1 at `longest`: the
    soft penalty of DAPO, equation 13, as a share of its most."""
    return ((lengths - (longest - buffer)) / buffer).clamp(0.0, 1.0)


def importance_weights(logprobs, engine_logprobs, mask, cap: float) -> torch.Tensor:
    """(B,R) min(π / π_engine, cap), what an action counts whose engine drew it from another
    distribution than the policy that is trained; 1 where they agree, and off the mask. Yao et al.
    2025 (truncated importance sampling)."""
    return ((logprobs - engine_logprobs) * mask).exp().clamp(max=cap)


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


def loss_weights(mask: torch.Tensor, normalisation: str, longest: int) -> torch.Tensor:
    """(B,R) fp32, what each action counts in the loss: 1; 1 / its answer's actions; or 1 / longest,
    the limit of an answer. 0 off the mask."""
    if normalisation == "sequence":
        return mask / mask.sum(1, keepdim=True).clamp(min=1)
    return mask / (longest if normalisation == "constant" else 1.0)


def loss_normaliser(mask: torch.Tensor, normalisation: str) -> int:
    """What the weighted sum over the rows of an optimizer step is divided by: actions (the mean
    over all of them); answers that have any (the mean over answers of the mean over each one's
    actions: Shao et al. 2024); or all answers (Liu et al. 2025: how long an answer is changes what
    its actions count no more, nor do the other answers' lengths)."""
    of_each = {"token": mask.sum(), "sequence": mask.any(1).sum(), "constant": len(mask)}
    return max(int(of_each[normalisation]), 1)  # where nothing is learned from


def policy_loss(
    new_logprobs,
    logprobs,
    advantages,
    mask,
    clip_ratio: float,
    clip_ratio_high: float = 0.0,
    dual_clip: float = 0.0,
    weights=None,
    of_answers: bool = False,
):
    """Clipped surrogate, summed over tokens, and its statistics (sums over tokens too).

    −Σ min(ρ A, clip(ρ, 1−ε, 1+ε') A) with ρ = exp(new − old); ε' is `clip_ratio_high`, or ε where
    that is 0. With dual_clip c > 1 a token with A < 0 counts at most as c·A: without it a ratio
    that has exploded makes the loss unbounded there. of_answers: ρ is GSPO's, exp of the mean of
    new − old over the answer's actions, the same for all of them.
    """
    ratio, stats = _ratio_statistics(new_logprobs, logprobs, mask, of_answers)
    high = clip_ratio_high or clip_ratio
    clipped = ratio.clamp(1 - clip_ratio, 1 + high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip:
        floor = torch.maximum(objective, dual_clip * advantages)
        objective = torch.where(advantages < 0, floor, objective)
    loss = -(objective * (mask if weights is None else weights)).sum()
    outside = (ratio < 1 - clip_ratio) | (ratio > 1 + high)
    return loss, stats | {"policy_loss": loss.detach(), "clip_fraction": (outside & mask).sum()}


def clipped_weight_loss(
    new_logprobs, logprobs, advantages, mask, clip_ratio: float, clip_ratio_high: float, weights
):
    """CISPO: −Σ clip(ρ, 1−ε, 1+ε') A log p, where the clipped ratio is a constant: a token beyond
    the clip counts less and still learns, while in PPO's loss its gradient is cut off."""
    ratio, stats = _ratio_statistics(new_logprobs, logprobs, mask)
    clipped = ratio.detach().clamp(1 - clip_ratio, 1 + clip_ratio_high)
    loss = -(clipped * advantages * new_logprobs * weights).sum()
    outside = (ratio < 1 - clip_ratio) | (ratio > 1 + clip_ratio_high)
    return loss, stats | {"policy_loss": loss.detach(), "clip_fraction": (outside & mask).sum()}


def policy_gradient_loss(new_logprobs, logprobs, advantages, mask, weights=None):
    """−Σ A log p, the loss of REINFORCE and A2C, and its statistics. It has no ratio, so it holds
    for one optimizer step on samples of this very policy; there its gradient is PPO's."""
    _, stats = _ratio_statistics(new_logprobs, logprobs, mask)
    loss = -(new_logprobs * advantages * (mask if weights is None else weights)).sum()
    return loss, stats | {"policy_loss": loss.detach()}


def kl_loss(new_logprobs, ref_logprobs, mask, kl_estimator: str) -> torch.Tensor:
    """(B,R), the estimate of each token as a loss that is differentiated, 0 off the mask.

    On samples of the policy as it is, which the first optimizer step has, the mean gradient E[∇kl]
    is: for k3 that of KL(reference ‖ policy), as E[(1 − q/p) ∇log p] = −Σ q ∇log p, although its
    value is KL(policy ‖ reference); GRPO's term (Shao et al. 2024). For k2 it is that of KL(policy
    ‖ reference), as E[k1 ∇log p] is. For k1 it is 0: noise that holds nothing back. Later steps
    go on with samples of the policy as it was, which are not weighed by the ratio, as in GRPO.
    """
    new_logprobs = new_logprobs.where(mask, 0.0)
    estimates = kl_estimates(new_logprobs, ref_logprobs.where(mask, 0.0))
    return estimates[KL_ESTIMATORS.index(kl_estimator)]


def _ratio_statistics(new_logprobs, logprobs, mask, of_answers: bool = False):
    """ρ (B,R), and sums over tokens of ρ and of KL(old ‖ new) by k3: how far an update moved."""
    log_ratio = (new_logprobs - logprobs) * mask
    # Beyond e^88 fp32 is infinite, and the gradient of a ratio that a clip cuts off 0 × ∞ = NaN.
    log_ratio = log_ratio.clamp(max=80.0)
    with torch.no_grad():
        moved = ((torch.expm1(log_ratio) - log_ratio) * mask).sum()
    if of_answers:
        mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = mean * mask
    ratio = log_ratio.exp()
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


# An algorithm's estimator takes (advantages.Earned, config), its loss (new_logprobs (B,A), the
# experience.Experience of these rows, config), where config has the fields of PPOConfig.


def with_critic(earned, config):
    return gae(earned.rewards, earned.values, earned.mask, config.gamma, config.lam)


def returns_alone(earned, config):
    return gae(earned.rewards, earned.values, earned.mask, config.gamma, 1.0)


def of_group(estimator: Callable) -> Callable:
    """An estimator of (totals, group) as an algorithm's."""
    return lambda earned, config: earned.at_every_action(estimator(earned.totals(), earned.group))


def of_lengths(earned, config):
    return earned.at_every_action(opo(earned.totals(), earned.group, earned.lengths))


def of_greedy(earned, config):
    return earned.at_every_action(remax(earned.totals(), earned.baseline))


def clipped_ratio(new_logprobs, part, config, of_answers: bool = False):
    numbers = new_logprobs, part.logprobs, part.advantages, part.action_mask
    clips = *config.clips(), config.dual_clip
    return policy_loss(*numbers, *clips, part.weights, of_answers)


def clipped_ratio_of_answers(new_logprobs, part, config):
    return clipped_ratio(new_logprobs, part, config, of_answers=True)


def clipped_weight(new_logprobs, part, config):
    numbers = new_logprobs, part.logprobs, part.advantages, part.action_mask
    return clipped_weight_loss(*numbers, *config.clips(), part.weights)


def no_ratio(new_logprobs, part, config):
    numbers = new_logprobs, part.logprobs, part.advantages, part.action_mask
    return policy_gradient_loss(*numbers, part.weights)


@dataclass(frozen=True)
class Algorithm:
    """An --algorithm: what it learns from a rollout and how. A new one is a line in ALGORITHMS, and
    one in checks/alignment.py, DEFINITIONS."""

    meaning: str
    advantages: Callable  # gives advantages and returns (B,A), 0 off the mask, not whitened
    loss: Callable = clipped_ratio  # gives the weighted sum over actions, and its statistics
    critic: bool = False  # is there one to train?
    groups: bool = False  # does it compare several answers to a prompt?
    trust_region: bool = False  # is each step shortened until it stays within --trust_region?
    greedy: bool = False  # does it compare them with the greedy answer?
    one_step: bool = False  # does its loss hold for one optimizer step a rollout only?
    reads: tuple[str, ...] = ()  # settings that not every algorithm makes use of
    # What settings are where the user leaves them to the algorithm.
    clips: tuple[float, float] = (0.2, 0.2)  # ε, ε'
    loss_normalisation: str = "token"
    kl_in: str = "reward"
    kl_in_loss: str = "k3"  # the estimator there

    def value_loss(self, new_values, values, returns, mask, config):
        clip = math.inf if self.one_step else config.clip_value or math.inf
        return value_loss(new_values, values, returns, mask, clip)


CRITIC = ("critic_model", "critic_learning_rate", "critic_zero_stage", "clip_value", "lam")
CLIPS = ("clip_ratio", "clip_ratio_high")
PPO_CLIPS = (*CLIPS, "dual_clip")
OF_TOKENS = ("gamma", "whiten_advantages")

_PPO = dict(critic=True, reads=(*CRITIC, *OF_TOKENS, *PPO_CLIPS))
_TRPO = dict(
    critic=True,
    trust_region=True,
    reads=("trust_region", *CRITIC, *OF_TOKENS),
    clips=(math.inf, math.inf),  # the trust region stands in their place
)
_NLPO = dict(critic=True, reads=("mask_top_p", "mask_every", *CRITIC, *OF_TOKENS, *PPO_CLIPS))
_A2C = dict(critic=True, one_step=True, reads=(*CRITIC, *OF_TOKENS))
_REINFORCE = dict(one_step=True, reads=OF_TOKENS)
_GROUP = dict(groups=True, reads=PPO_CLIPS)
_GRPO = dict(groups=True, loss_normalisation="sequence", kl_in="loss")
_BASELINE = dict(reads=("whiten_advantages", *PPO_CLIPS), kl_in="loss", kl_in_loss="k2")
_CISPO = dict(loss_normalisation="token", reads=CLIPS, clips=(1.0, 4.0))  # 1 − ε = 0: no lower one
_GSPO = dict(reads=PPO_CLIPS, clips=(3e-4, 4e-4))
_DIFFERENCES = of_group(group_differences)
ALGORITHMS = {
    "ppo": Algorithm("the clipped ratio of PPO, with a critic", with_critic, **_PPO),
    "trpo": Algorithm(
        "ppo with a limit of the KL, kept by a line search, in place of the clip",
        with_critic,
        **_TRPO,
    ),
    "nlpo": Algorithm(
        "ppo among the likeliest tokens of the policy of some rollouts ago", with_critic, **_NLPO
    ),
    "a2c": Algorithm("no ratio, one optimizer step a rollout", with_critic, no_ratio, **_A2C),
    "reinforce": Algorithm("a2c without a critic", returns_alone, no_ratio, **_REINFORCE),
    "reinforce++": Algorithm("ppo without a critic", returns_alone, reads=(*OF_TOKENS, *PPO_CLIPS)),
    "reinforce++_baseline": Algorithm(
        "score − mean of the prompt's answers, whitened over the rollout",
        _DIFFERENCES,
        **_GROUP | _BASELINE,
    ),
    "grpo": Algorithm(
        "(score − mean) / deviation of the prompt's answers", of_group(grpo), **_GROUP | _GRPO
    ),
    "dr_grpo": Algorithm(
        "score − mean of the prompt's answers, over a constant length",
        _DIFFERENCES,
        **_GROUP | _GRPO | {"loss_normalisation": "constant"},
    ),
    "rloo": Algorithm("score − mean of the prompt's other answers", of_group(rloo), **_GROUP),
    "remax": Algorithm(
        "score − score of the greedy answer", of_greedy, greedy=True, reads=PPO_CLIPS
    ),
    "opo": Algorithm("score − mean weighted by length", of_lengths, **_GROUP),
    "gspo": Algorithm(
        "grpo with one ratio for an answer",
        of_group(grpo),
        clipped_ratio_of_answers,
        **_GRPO | _GSPO,
    ),
    "cispo": Algorithm(
        "grpo with the clipped ratio as a weight", of_group(grpo), clipped_weight, **_GRPO | _CISPO
    ),
}
NOT_FOR_ALL = sorted({name for method in ALGORITHMS.values() for name in method.reads})
