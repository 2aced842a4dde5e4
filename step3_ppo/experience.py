"""What the updates learn from: a rollout's scores → rewards → advantages, and its metrics."""

import dataclasses
from dataclasses import dataclass

import torch

from step3_ppo import advantages as estimators
from step3_ppo import algorithm, measures
from step3_ppo.algorithm import ALGORITHMS
from step3_ppo.rollout import Rollout


@dataclass
class Experience:
    """A rollout with what the updates need. A = R where an action is a token, A = 1 where it is
    the whole answer. (B,A) fp32 each, 0 where no action is."""

    rollout: Rollout
    action_mask: torch.Tensor  # (B,A) bool
    logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    weights: torch.Tensor  # what each action counts in the policy's loss
    kl_in_loss: float = 0.0  # the cost of a nat there; 0: it is charged in the rewards
    scores: torch.Tensor | None = None  # (B,) fp32 as rewards count them; none in a micro-batch
    rewards: torch.Tensor | None = None  # (B,A), of the whole rollout only too
    # (B,) fp32, as `scores`, of the greedy answer to the row's prompt; None where there is none.
    baseline: torch.Tensor | None = None

    @property
    def group(self) -> torch.Tensor:
        """(B,) int64: number of the row's prompt in the rollout."""
        return self.rollout.group


def make_experience(
    rollout: Rollout, config, state, greedy: Rollout | None = None
) -> tuple[Experience, dict[str, float]]:
    """Scores → rewards → advantages; and the rollout's metrics. greedy: row g answers the prompt of
    group g."""
    mask, logprobs, values = rollout.action_mask, rollout.logprobs, rollout.values
    scores, clipped = state.shape_scores(rollout, config)
    in_loss = config.place_of_kl() == "loss"
    price, estimator = 0.0 if in_loss else state.kl_coef, config.estimator_of_kl()
    rewards, _ = algorithm.token_rewards(
        scores, logprobs, rollout.ref_logprobs, mask, price, estimator
    )
    if config.action_level == "sequence":
        rewards, logprobs = (algorithm.one_action(x, mask) for x in (rewards, logprobs))
        values, mask = algorithm.first_action(values, mask), mask.any(1, keepdim=True)
    if config.whiten_rewards:
        rewards = estimators.whiten(rewards, mask, shift_mean=False)
    baseline = None if greedy is None else state.shaped(greedy, config)[0][rollout.group]
    lengths = rollout.action_mask.sum(1)
    earned = estimators.Earned(rewards, values, mask, rollout.group, lengths, baseline)
    advantages, returns = ALGORITHMS[config.algorithm].advantages(earned, config)
    learned = mask  # what the updates learn from
    if config.mask_cut_answers:
        learned = mask & rollout.finished[:, None]
    weights = algorithm.loss_weights(learned, config.normalisation(), config.max_response_length)
    experience = Experience(
        rollout,
        learned,
        logprobs,
        values,
        advantages,
        returns,
        weights,
        kl_in_loss=state.kl_coef if in_loss else 0.0,
        scores=scores,
        rewards=rewards,
        baseline=baseline,
    )
    metrics = measures.measure_rollout(rollout, estimator) | clipped
    of_all = dataclasses.replace(experience, action_mask=mask)
    metrics |= measures.measure_experience(of_all, config, state)
    experience.advantages = in_the_loss(experience, config)
    return experience, metrics


def in_the_loss(experience: Experience, config) -> torch.Tensor:
    """(B,A): the advantages as the policy's loss has them, 0 where nothing is learned from."""
    learned, rollout = experience.action_mask, experience.rollout
    advantages = experience.advantages * learned
    if "whiten_advantages" in ALGORITHMS[config.algorithm].reads and config.whiten_advantages:
        advantages = estimators.whiten(advantages, learned)
    if config.importance_cap:
        engine = rollout.engine_logprobs
        if config.action_level == "sequence":
            engine = algorithm.one_action(engine, rollout.action_mask)
        numbers = experience.logprobs, engine, learned
        advantages *= algorithm.importance_weights(*numbers, config.importance_cap)
    return advantages
