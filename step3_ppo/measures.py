"""What step 3 measures: each metric's row of the table (utils/metrics.py), and beside it how it is
computed from a rollout or from the experience made of it.

A new metric is one more entry here. Where its function returns None there is nothing to measure,
and the metric is left out.
"""

from step3_ppo import advantages, algorithm
from utils.metrics import Metric, register

PHASES = ("generate", "score", "train")


def kl_of(rollout, estimator: str) -> float:
    """KL to the reference, mean over the responses, nats a response. estimator: k1, k2 or k3."""
    estimates = algorithm.kl_estimates(rollout.logprobs, rollout.ref_logprobs)
    estimate = estimates[algorithm.KL_ESTIMATORS.index(estimator)]
    return (estimate * rollout.action_mask).sum(1).mean().item()


def mean_unless_zero(x) -> float | None:
    """Of scores that are all 0 where there are none."""
    return x.mean().item() if x.any() else None


def score_of_model(rollout) -> float | None:
    function = mean_unless_zero(rollout.function_scores)
    return None if function is None else rollout.scores.mean().item() - function


def explained_variance(experience, config) -> float | None:
    if not config.has_critic():
        return None
    values, returns, mask = experience.values, experience.returns, experience.action_mask
    return advantages.explained_variance(values, returns, mask).item()


def groups_alike(experience, config) -> float | None:
    if not config.compares_groups():
        return None
    alike, group = advantages.alike(experience.scores, experience.group), experience.group
    return len(group[alike].unique()) / len(group.unique())


def engine_moves(experience, config):
    """(actions,) log π − log π_engine, by the policy that is trained and by the engine."""
    if not config.compares_engine():
        return None
    rollout = experience.rollout
    return (rollout.logprobs - rollout.engine_logprobs)[rollout.action_mask]


def of_engine(experience, config, measure) -> float | None:
    moves = engine_moves(experience, config)
    return None if moves is None else measure(moves).float().mean().item()


# Of (rollout, kl_estimator).
ROLLOUT = {
    Metric(
        "score",
        "score",
        "mean over the responses, of reward model and reward function together, as they came",
        "flat while `kl` grows: the policy drifts for nothing; `eval/score` rises while "
        "`eval/verifier` falls: over-optimised, stop earlier or raise `--kl_coef`",
    ): lambda r, _: r.scores.mean().item(),
    Metric("score_std", "score", "standard deviation over the responses"): lambda r, _: (
        r.scores.std(correction=0).item()
    ),
    Metric(
        "kl",
        "nats a response",
        "KL to the reference by the estimate that is charged, in the reward or in the loss "
        "(`--kl_estimator`)",
        "above 10, or above `--kl_limit`: raise `--kl_coef` or set `--kl_target`",
    ): kl_of,
    Metric(
        "entropy",
        "nats a token",
        "mean entropy of the distributions that the responses were sampled from",
        "near 0: collapsed; raise `--kl_coef`, lower `--learning_rate`",
    ): lambda r, _: advantages.masked_mean(r.entropies, r.action_mask).item(),
    Metric(
        "response_length",
        "tokens",
        "mean length of the responses, stop token included",
        "a third or three times of the first rollout's: the reward model or a `--reward_function` "
        "pays for it (`score_model` and `score_function` tell which); longer, answers may also no "
        "longer end (`eos_share` falls), up to `--max_response_length`; shorter, "
        "`--missing_eos_penalty` or `--overlong_penalty` may outweigh the score",
    ): lambda r, _: r.action_mask.sum(1).float().mean().item(),
    Metric(
        "eos_share",
        "share",
        "responses that ended with the stop token",
        "near 0: raise `--max_response_length`; `--missing_eos_penalty 1` with "
        "`--score_normalisation running` makes a cut answer cost a deviation more than the mean "
        "finished one",
    ): lambda r, _: r.finished.float().mean().item(),
    Metric(
        "turns",
        "turns",
        "of the policy, mean over the episodes; where an environment has replied to any",
        "at `--max_turns`: the policy never ends; let the environment end, or raise it",
    ): lambda r, _: 1 + sum(map(len, r.earlier)) / 2 / len(r.earlier) if any(r.earlier) else None,
    Metric("reply_tokens", "tokens", "of the environment, mean over the episodes"): lambda r, _: (
        (r.response_mask & ~r.action_mask).sum(1).float().mean().item() if any(r.earlier) else None
    ),
    Metric("score_function", "score", "the part of `score` from `--reward_function`"): (
        lambda r, _: mean_unless_zero(r.function_scores)
    ),
    Metric("score_model", "score", "the part of `score` from the reward model"): (
        lambda r, _: score_of_model(r)
    ),
    Metric(
        "judge",
        "score",
        "mean score by `--judge_model`, of held-out answers only",
        "falls while `eval/score` rises: over-optimised",
    ): lambda r, _: mean_unless_zero(r.judge_scores),
    Metric("judge_std", "score", "standard deviation of the judge's scores"): lambda r, _: (
        r.judge_scores.std(correction=0).item() if r.judge_scores.any() else None
    ),
    Metric(
        "kl_k1",
        "nats a response",
        "KL to the reference by log p − log q, unbiased; below 0 by chance where the samples happen"
        " to be likelier to the reference, which is no bug",
    ): lambda r, _: kl_of(r, "k1"),
    Metric("kl_k2", "nats a response", "by (log p − log q)² / 2, biased, small in variance"): (
        lambda r, _: kl_of(r, "k2")
    ),
    Metric("kl_k3", "nats a response", "by q/p − 1 + log p − log q, unbiased, never negative"): (
        lambda r, _: kl_of(r, "k3")
    ),
}
# Of (experience, config, state), before the advantages are whitened.
EXPERIENCE = {
    Metric("kl_coef", "score a nat", "what a nat of KL costs; moves with `--kl_target`"): (
        lambda e, config, state: state.kl_coef
    ),
    Metric(
        "reward",
        "score",
        "mean over the responses of score − kl_coef × kl, as trained on; of the score alone where "
        "the KL is in the loss",
    ): (lambda e, *_: e.rewards.sum(1).mean().item()),
    Metric("advantage_std", "score", "standard deviation over the actions, before whitening"): (
        lambda e, *_: e.advantages[e.action_mask].std().item()
    ),
    Metric("return", "score", "mean over the actions"): lambda e, *_: advantages.masked_mean(
        e.returns, e.action_mask
    ).item(),
    Metric(
        "explained_variance",
        "",
        "of the returns by the critic: 1 is perfect, 0 useless",
        "below 0 for long: raise `--critic_learning_rate`",
    ): lambda e, config, state: explained_variance(e, config),
    Metric(
        "groups_alike",
        "share",
        "prompts whose answers all count the same score: they teach nothing",
        "above 0.5: easier or harder prompts, more `--samples_per_prompt`, `--dynamic_sampling`",
    ): lambda e, config, state: groups_alike(e, config),
    Metric(
        "engine_gap",
        "nats a token",
        "mean distance of the log-probabilities of the engine that sampled from the trainer's, "
        "with `--importance_cap` or `--rollout_engine vllm`",
        "above 0.1 (`--engine_gap_limit`): the engine's weights are old, or its dtype or "
        "temperature another",
    ): lambda e, config, state: of_engine(e, config, lambda moves: moves.abs()),
    Metric(
        "importance_capped", "share", "tokens that weigh `--importance_cap`, and not their ratio"
    ): lambda e, config, state: (
        of_engine(e, config, lambda moves: moves.exp() > config.importance_cap)
        if config.importance_cap
        else None
    ),
}
# Computed where they arise: in state.py, algorithm.py, update.py and main.py.
ELSEWHERE = (
    Metric(
        "score_clipped",
        "share",
        "scores beyond `--score_clip`",
        "above 0.1: normalise the scores, or raise `--score_clip`",
    ),
    Metric("overlong", "share", "of `--overlong_penalty` that an answer pays, mean over them"),
    Metric(
        "staleness",
        "steps",
        "optimizer steps that the actor has made since it sampled, with `--rollout_ahead`",
    ),
    Metric("groups_drawn", "prompts", "sampled for the rollout, with `--dynamic_sampling`"),
    Metric(
        "score_function/…",
        "score",
        "mean of each `--reward_function` by its name, without its weight, where there are several",
        "one rises while another falls: the first is bought with the second; change "
        "`--reward_weights`",
    ),
    Metric("ratio", "", "mean probability ratio of new and old policy over the actions"),
    Metric("approx_kl", "nats an action", "how far an update moved the policy: KL(old ‖ new)"),
    Metric(
        "clip_fraction",
        "share",
        "actions whose ratio is outside the clip range",
        "above 0.4: fewer `--ppo_epochs`, lower `--learning_rate`",
    ),
    Metric(
        "trust_region_step",
        "share",
        "trpo: how much of a step was taken, mean over the updates",
        "near 0: lower `--learning_rate`, or raise `--trust_region`",
    ),
    Metric("trust_region_kl", "nats an action", "trpo: KL(sampled ‖ new) after what was taken"),
    Metric("policy_loss", "", "mean over the actions, by `--loss_normalisation`"),
    Metric("kl_in_loss", "nats an action", "KL to the reference in the loss, mean as of the loss"),
    Metric("value_loss", "score²", "½ (V − return)², mean over the actions"),
    Metric("value_clip_fraction", "share", "actions whose value is held back by `--clip_value`"),
    Metric("value_gap", "score", "mean distance of the critic's values from the rollout's"),
    Metric("ptx_loss", "nats a token", "language-model loss on `--ptx_data`"),
    Metric(
        "verifier",
        "share",
        "correct held-out answers of the embedded task",
        "falls while `eval/score` rises: over-optimised",
    ),
    *(Metric(f"seconds_{x}", "s", f"of the phase {x}") for x in PHASES),
    *(Metric(f"tokens_per_second_{x}", "tokens/s", f"response tokens, phase {x}") for x in PHASES),
)
register("step 3", *ROLLOUT, *EXPERIENCE, *ELSEWHERE)


def measure_rollout(rollout, kl_estimator: str) -> dict[str, float]:
    """The metrics of a rollout that need no training on it."""
    return _measured(ROLLOUT, rollout, kl_estimator)


def measure_experience(experience, config, state) -> dict[str, float]:
    return _measured(EXPERIENCE, experience, config, state)


def _measured(table: dict, *arguments) -> dict[str, float]:
    values = {row.name: function(*arguments) for row, function in table.items()}
    return {name: value for name, value in values.items() if value is not None}


def speeds(rollout, seconds: dict[str, float]) -> dict[str, float]:
    """Response tokens a second of each phase that was timed."""
    tokens = int(rollout.action_mask.sum())
    return {
        f"tokens_per_second_{phase}": tokens / seconds[f"seconds_{phase}"]
        for phase in PHASES
        if f"seconds_{phase}" in seconds
    }
