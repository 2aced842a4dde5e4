"""PPO's arithmetic on (B,R) tensors of response tokens, and the algorithms made of it.

Imports torch only.

Every per-token tensor is (B,R) fp32; `mask` (B,R) bool is True on actions: the tokens that the
policy chose, which need not be neighbours. Losses are sums over actions: the caller divides by
their count in the whole optimizer step, over all ranks and micro-batches. Where a whole answer is
one action (`one_action`), R is 1.

Sources: Schulman et al. 2017 (PPO), 2015 (GAE); Ziegler et al. 2019; Stiennon et al. 2020
(summarize-from-feedback); Ouyang et al. 2022 (InstructGPT); Schulman 2020, "Approximating KL
divergence" (k1, k2, k3); Williams 1992 (REINFORCE); Mnih et al. 2016 (A2C); Ye et al. 2020 (dual
clip); Yu et al. 2025, DAPO (a wider upper clip).
"""

import torch

KL_ESTIMATORS = ("k1", "k2", "k3")


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of x where mask is True: a scalar."""
    return (x * mask).sum() / mask.sum()


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


def gae(rewards, values, mask, gamma: float, lam: float):
    """Generalised advantage estimation → advantages (B,R), returns (B,R), 0 off the mask.

    δ_t = r_t + γ V_{t+1} − V_t and A_t = δ_t + γλ A_{t+1}, with V and A 0 past the last action.
    t counts actions alone: what an environment says in between is no step, and costs no discount.
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


def whiten(x: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """x with mean 0 (or, without `shift_mean`, its own) and variance 1 over the masked tokens,
    0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


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


def explained_variance(values, returns, mask) -> torch.Tensor:
    """1 − Var(returns − values) / Var(returns) over the masked tokens; 1 is perfect, 0 useless."""
    error = returns - values

    def variance(x):
        return masked_mean((x - masked_mean(x, mask)).square(), mask)

    return 1 - variance(error) / variance(returns).clamp(min=1e-12)


class PPO:
    """An --algorithm: what it learns from a rollout and how. A new one is a subclass here, and its
    line in ALGORITHMS. `config` has the fields of PPOConfig."""

    meaning = "the clipped ratio of PPO, with a critic"
    critic = True  # is there one to train?
    one_step = False  # does its loss hold for one optimizer step a rollout only?
    has_ratio = True  # does an action weigh in the loss advantage × ratio, or the advantage alone?
    lam: float | None = None  # of its generalised advantages; None: --lam
    # Whether the self-check may recompute its advantages as GAE's, from `lam` and `has_ratio`.
    advantages_are_gae = True

    def advantages(self, rewards, values, mask, config):
        """(B,R) each → advantages and returns (B,R), 0 off the mask, not whitened."""
        return gae(
            rewards, values, mask, config.gamma, config.lam if self.lam is None else self.lam
        )

    def policy_loss(self, new_logprobs, logprobs, advantages, mask, config):
        clips = config.clip_ratio, config.clip_ratio_high, config.dual_clip
        return policy_loss(new_logprobs, logprobs, advantages, mask, *clips)

    def value_loss(self, new_values, values, returns, mask, config):
        return value_loss(new_values, values, returns, mask, config.clip_value or torch.inf)


class A2C(PPO):
    meaning = "no ratio, one optimizer step a rollout"
    one_step, has_ratio = True, False

    def policy_loss(self, new_logprobs, logprobs, advantages, mask, config):
        return policy_gradient_loss(new_logprobs, logprobs, advantages, mask)

    def value_loss(self, new_values, values, returns, mask, config):
        return value_loss(new_values, values, returns, mask, torch.inf)


class Reinforce(A2C):
    meaning = "a2c without a critic"
    critic = False
    lam = 1.0  # values are 0: the advantage is the return itself


ALGORITHMS = {"ppo": PPO(), "a2c": A2C(), "reinforce": Reinforce()}
