"""What is measured of a rollout and of the experience made from it: one function for each metric.

The decorator holds the metric's row of the table (utils/metrics.py), so a new metric is one more
function here. A function that returns None has nothing to measure, and its metric is left out.
"""

from step3_ppo import algorithm
from utils.metrics import Metric, register

STEP = "step 3"
_OF_ROLLOUT, _OF_EXPERIENCE = {}, {}


def _decorator(functions: dict, row: Metric):
    register(STEP, row)

    def add(function):
        functions[row.name] = function
        return function

    return add


def of_rollout(*row: str):
    """Decorates a function (rollout, kl_estimator) → float or None. row: as Metric's fields."""
    return _decorator(_OF_ROLLOUT, Metric(*row))


def of_experience(*row: str):
    """Decorates a function (experience, config, state) → float or None. The advantages are not
    whitened yet."""
    return _decorator(_OF_EXPERIENCE, Metric(*row))


def measure_rollout(rollout, kl_estimator: str) -> dict[str, float]:
    """What can be said of a rollout without training on it."""
    return _measured(_OF_ROLLOUT, rollout, kl_estimator)


def measure_experience(experience, config, state) -> dict[str, float]:
    return _measured(_OF_EXPERIENCE, experience, config, state)


def _measured(functions: dict, *arguments) -> dict[str, float]:
    values = {name: function(*arguments) for name, function in functions.items()}
    return {name: value for name, value in values.items() if value is not None}


@of_rollout(
    "score",
    "score",
    "mean over the responses, of reward model and reward function together, as they came",
    "flat while `kl` grows: the policy drifts for nothing; `eval/score` rises while `eval/verifier`"
    " falls: over-optimised, stop earlier or raise `--kl_coef`",
)
def score(rollout, _) -> float:
    return rollout.scores.mean().item()


@of_rollout("score_std", "score", "standard deviation over the responses")
def score_std(rollout, _) -> float:
    return rollout.scores.std(correction=0).item()


def _kl(rollout, estimator: str) -> float:
    estimates = algorithm.kl_estimates(rollout.logprobs, rollout.ref_logprobs)
    estimate = estimates[algorithm.KL_ESTIMATORS.index(estimator)]
    return (estimate * rollout.response_mask).sum(1).mean().item()


@of_rollout(
    "kl",
    "nats a response",
    "KL to the reference by the estimate that the reward is charged for (`--kl_estimator`)",
    "above 10, or above `--kl_limit`: raise `--kl_coef` or set `--kl_target`",
)
def kl(rollout, kl_estimator: str) -> float:
    return _kl(rollout, kl_estimator)


@of_rollout(
    "entropy",
    "nats a token",
    "mean entropy of the distributions that the responses were sampled from",
    "near 0: collapsed; raise `--kl_coef`, lower `--learning_rate`",
)
def entropy(rollout, _) -> float:
    return algorithm.masked_mean(rollout.entropies, rollout.response_mask).item()


@of_rollout(
    "response_length",
    "tokens",
    "mean length of the responses, stop token included",
    "a third or three times of the first rollout's: the reward model likely pays for length",
)
def response_length(rollout, _) -> float:
    return rollout.response_mask.sum(1).float().mean().item()


@of_rollout(
    "eos_share",
    "share",
    "responses that ended with the stop token",
    "near 0: raise `--max_response_length`; `--missing_eos_penalty 1` with `--score_normalisation "
    "running` makes a cut answer cost a deviation more than the mean finished one",
)
def eos_share(rollout, _) -> float:
    return rollout.finished.float().mean().item()


@of_rollout("score_function", "score", "the part of `score` from `--reward_function`")
def score_function(rollout, _) -> float | None:
    return rollout.function_scores.mean().item() if rollout.function_scores.any() else None


@of_rollout("score_model", "score", "the part of `score` from the reward model")
def score_model(rollout, _) -> float | None:
    function = score_function(rollout, _)
    return None if function is None else score(rollout, _) - function


@of_rollout(
    "judge",
    "score",
    "mean score by `--judge_model`, of held-out answers only",
    "falls while `eval/score` rises: over-optimised",
)
def judge(rollout, _) -> float | None:
    return rollout.judge_scores.mean().item() if rollout.judge_scores.any() else None


@of_rollout("judge_std", "score", "standard deviation of the judge's scores")
def judge_std(rollout, _) -> float | None:
    scores = rollout.judge_scores
    return scores.std(correction=0).item() if scores.any() else None


@of_rollout(
    "kl_k1",
    "nats a response",
    "KL to the reference by log p − log q, unbiased; below 0 by chance where the samples happen to "
    "be likelier to the reference, which is no bug",
)
def kl_k1(rollout, _) -> float:
    return _kl(rollout, "k1")


@of_rollout("kl_k2", "nats a response", "by (log p − log q)² / 2, biased and small in variance")
def kl_k2(rollout, _) -> float:
    return _kl(rollout, "k2")


@of_rollout("kl_k3", "nats a response", "by q/p − 1 + log p − log q, unbiased and never negative")
def kl_k3(rollout, _) -> float:
    return _kl(rollout, "k3")


@of_experience("kl_coef", "score a nat", "what a nat of KL costs; moves with `--kl_target`")
def kl_coef(experience, _, state) -> float:
    return state.kl_coef


@of_experience("reward", "score", "mean over the responses of score − kl_coef × kl, as trained on")
def reward(experience, *_) -> float:
    return experience.rewards.sum(1).mean().item()


@of_experience("advantage_std", "score", "standard deviation over the actions, before whitening")
def advantage_std(experience, *_) -> float:
    return experience.advantages[experience.mask].std().item()


@of_experience("return", "score", "mean over the actions")
def mean_return(experience, *_) -> float:
    return algorithm.masked_mean(experience.returns, experience.mask).item()


@of_experience(
    "explained_variance",
    "",
    "of the returns by the critic: 1 is perfect, 0 useless",
    "below 0 for long: raise `--critic_learning_rate`",
)
def explained_variance(experience, config, _) -> float | None:
    if config.algorithm == "reinforce":
        return None  # no critic
    values, returns, mask = experience.values, experience.returns, experience.mask
    return algorithm.explained_variance(values, returns, mask).item()


def speeds(rollout, seconds: dict[str, float]) -> dict[str, float]:
    """Response tokens a second of each phase that was timed."""
    tokens = int(rollout.response_mask.sum())
    return {
        f"tokens_per_second_{phase}": tokens / seconds[f"seconds_{phase}"]
        for phase in PHASES
        if f"seconds_{phase}" in seconds
    }


PHASES = ("generate", "score", "train")

# Computed in algorithm.py, state.py, update.py and main.py.
_FAR = "above 0.4: fewer `--ppo_epochs`, lower `--learning_rate`"
register(
    STEP,
    Metric(
        "score_clipped",
        "share",
        "scores beyond `--score_clip`",
        "above 0.1: normalise the scores, or raise `--score_clip`",
    ),
    Metric("ratio", "", "mean probability ratio of new and old policy over the actions"),
    Metric("approx_kl", "nats an action", "how far an update moved the policy: KL(old ‖ new)"),
    Metric("clip_fraction", "share", "actions whose ratio is outside the clip range", _FAR),
    Metric("policy_loss", "", "mean over the actions"),
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
    *(Metric(f"seconds_{phase}", "s", f"of the phase {phase}") for phase in PHASES),
    *(
        Metric(f"tokens_per_second_{phase}", "tokens/s", f"response tokens, phase {phase}")
        for phase in PHASES
    ),
)
