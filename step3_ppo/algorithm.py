"""PPO's arithmetic on (B,R) tensors of response tokens. Imports torch only.

Every per-token tensor is (B,R) fp32; `mask` (B,R) bool is True on response tokens through the
stop token. Losses are sums over tokens: the caller divides by the token count of the whole
optimizer step, over all ranks and micro-batches.

Sources: Schulman et al. 2017 (PPO), 2015 (GAE); Ziegler et al. 2019; Stiennon et al. 2020
(summarize-from-feedback); Ouyang et al. 2022 (InstructGPT); Schulman 2020, "Approximating KL
divergence" (k1, k2, k3).
"""

import torch


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of x where mask is True: a scalar."""
    return (x * mask).sum() / mask.sum()


def kl_estimates(logprobs: torch.Tensor, ref_logprobs: torch.Tensor):
    """Per-token estimates (k1, k2, k3) of KL(policy ‖ reference) from the policy's own samples.

    k1 = log p − log q is unbiased and may be negative on a token; k2 = k1²/2 is biased and small
    in variance; k3 = q/p − 1 + k1 is unbiased and never negative.
    """
    k1 = logprobs - ref_logprobs
    return k1, k1.square() / 2, torch.exp(-k1) - 1 + k1


def adapted_kl_coef(kl_coef: float, kl: float, target: float, sequences: int, horizon: float):
    """The KL coefficient after a rollout of `sequences` whose mean KL was `kl` nats a response.

    β ← β (1 + clip(KL/target − 1, ±0.2) · n/horizon): up where the policy strays further than
    `target`, down where it stays nearer (Ziegler et al. 2019, horizon 10,000 sequences).
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * sequences / horizon)


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef: float):
    """(B,) scores → rewards (B,R) and kl (B,R), k1 a token.

    Every response token pays kl_coef × k1; the last one earns the score.
    """
    kl = (logprobs - ref_logprobs) * mask
    rewards = -kl_coef * kl
    last = mask.long().sum(1) - 1
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards, kl


def gae(rewards, values, mask, gamma: float, lam: float):
    """Generalised advantage estimation → advantages (B,R), returns (B,R), 0 off the mask.

    δ_t = r_t + γ V_{t+1} − V_t and A_t = δ_t + γλ A_{t+1}, with V and A 0 past the last token.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    values = values * mask
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        advantages[:, t] = following
    return advantages, (advantages + values) * mask


def whiten(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """x with mean 0 and variance 1 over the masked tokens, 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def policy_loss(new_logprobs, logprobs, advantages, mask, clip_ratio: float):
    """Clipped surrogate, summed over tokens, and its statistics (sums over tokens too).

    −Σ min(ρ A, clip(ρ, 1−ε, 1+ε) A) with ρ = exp(new − old).
    """
    log_ratio = (new_logprobs - logprobs) * mask
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    loss = -(torch.minimum(ratio * advantages, clipped * advantages) * mask).sum()
    with torch.no_grad():
        stats = {
            "policy_loss": loss.detach(),
            "ratio": (ratio * mask).sum(),
            "clip_fraction": (((ratio - 1).abs() > clip_ratio) & mask).sum(),
            # KL(old ‖ new) by k3: how far this update has moved.
            "approx_kl": ((ratio - 1 - log_ratio) * mask).sum(),
        }
    return loss, stats


def value_loss(new_values, values, returns, mask, clip_value: float):
    """Clipped squared error ½ Σ max((V−R)², (clip(V, V_old±ε)−R)²), and its statistics."""
    clipped = values + (new_values - values).clamp(-clip_value, clip_value)
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
