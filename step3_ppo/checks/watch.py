"""What is watched while PPO runs: numbers that are not finite, and the known ways to go wrong.

A warning is given once, with its likely cause and what mends it. Every rank sees the same metrics
and so takes the same turn.
"""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import torch

from utils import metrics, whole_files
from utils.distributed import process_group

MOST_DUMPS = 10  # a run that goes on skipping would fill the disk
WARNINGS: dict[str, Callable[["Watch"], str]] = {}  # name → what to say; empty: nothing


def warning(name: str):
    """Adds the decorated function to WARNINGS."""

    def add(function):
        WARNINGS[name] = function
        return function

    return add


class Watch:
    """Sees every rollout, update and step of the main loop. bad_steps: utils.run.BadSteps."""

    def __init__(self, config, say, bad_steps):
        self.config, self.say, self.bad_steps = config, say, bad_steps
        self.history: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []
        self.warned: set[str] = set()

    def state_dict(self) -> dict:
        return {"history": self.history, "warned": sorted(self.warned)}

    def load_state_dict(self, saved: dict) -> None:
        self.history, self.warned = saved["history"], set(saved["warned"])
        self.evaluations = [m for m in self.history if "eval/score" in m]

    def may_train_on(self, rollout, step: int) -> bool:
        """False where the rollout holds a number that is not finite: no step may be taken on it."""
        problems = rollout.not_finite()
        if problems:
            reason = f"rollout {step + 1}: not finite: {', '.join(problems)}"
            self.dump(rollout, reason, step)
            self.bad_steps.note(True, reason)
        return not problems

    def after_update(self, metrics: dict, experience, rows: list[int], step: int) -> None:
        """Count an optimizer step that was skipped, and keep what it was to learn from."""
        who = [w for w in ("actor", "critic") if metrics.get(f"{w}_skipped")]
        reason = f"rollout {step + 1}: loss or gradient of the {' and the '.join(who)} not finite"
        if who:
            self.dump(experience.rollout, reason, step, rows, experience)
        self.bad_steps.note(bool(who), reason)

    def dump(self, rollout, reason: str, step: int, rows=(), experience=None) -> None:
        """Write tensors, row numbers and reason to OUTPUT/bad_steps, for a repro."""
        folder = Path(self.config.output_dir) / "bad_steps"
        if not process_group.is_main() or self.bad_steps.total >= MOST_DUMPS:
            return
        path = folder / f"rollout{step + 1}_{self.bad_steps.total + 1}.pt"
        kept = {"rows": list(rows), "reason": reason, "config": dataclasses.asdict(self.config)}
        kept |= {f.name: getattr(rollout, f.name) for f in dataclasses.fields(rollout)}
        if experience is not None:
            kept |= {n: getattr(experience, n) for n in ("advantages", "returns")}
        content = io.BytesIO()  # torch would tell of a full disk as an internal error
        torch.save(kept, content)
        with whole_files.placing(path) as beside:
            beside.write_bytes(content.getbuffer())
        self.say(f"kept for a repro: {path}")

    def reason_to_stop(self, metrics: dict[str, float]) -> str:
        """Why the run should save and end here; empty where it should not."""
        if 0 < self.config.stop_at_kl < metrics["kl"]:
            return f"kl {metrics['kl']:.2f} is above --stop_at_kl {self.config.stop_at_kl}"
        return ""

    def warn(self, step: int, metrics: dict[str, float]) -> None:
        """Say what this rollout shows for the first time."""
        self.history.append(metrics)
        if "eval/score" in metrics:
            self.evaluations.append(metrics)
        for name, test in WARNINGS.items():
            text = "" if name in self.warned else test(self)
            if text:
                self.warned.add(name)
                self.say(f"warning at rollout {step + 1}: {name}: {text}")

    def last(self, name: str, count: int) -> list[float]:
        """The metric's last `count` values; empty before there are so many."""
        values = [m[name] for m in self.history if name in m]
        return values[-count:] if len(values) >= count else []

    def mean(self, name: str, count: int) -> float | None:
        values = self.last(name, count)
        return sum(values) / len(values) if values else None


@warning("kl above its limit")
def kl_above_limit(watch: Watch) -> str:
    kl, limit = watch.history[-1]["kl"], watch.config.kl_limit
    if kl <= limit:
        return ""
    return (
        f"{kl:.1f} nats a response (--kl_limit {limit}): the policy is far from the reference, "
        "where the reward model was never asked. Raise --kl_coef, set --kl_target, lower "
        "--learning_rate, or end the run there with --stop_at_kl"
    )


@warning("reward flat while kl grows")
def reward_flat_while_kl_grows(watch: Watch) -> str:
    scores, kls = watch.last("score", 20), watch.last("kl", 20)
    if not scores:
        return ""
    rise = (sum(scores[-5:]) - sum(scores[:5])) / 5
    grown = (sum(kls[-5:]) - sum(kls[:5])) / 5
    if grown < 1.0 or rise > 0.1 * watch.history[-1]["score_std"]:
        return ""
    return (
        f"over 20 rollouts score {rise:+.3f} and kl {grown:+.2f}: the policy drifts for nothing. "
        "Lower --learning_rate, raise --prompts_per_rollout, and look whether "
        "explained_variance is above 0 and the reward model separates your answers"
    )


@warning("response length collapses or spikes")
def length_collapses_or_spikes(watch: Watch) -> str:
    first, now = watch.history[0]["response_length"], watch.mean("response_length", 3)
    if now is None or first / 3 <= now <= 3 * first:
        return ""
    return (
        f"{first:.1f} tokens in the first rollout, {now:.1f} in the last three: the reward likely "
        "pays for length itself. Look at what a reward function pays for; compare a reward model's "
        "accuracy with that of always choosing the longer answer (step 2 prints both); raise "
        "--kl_coef, or balance the comparisons"
    )


@warning("eos_share at an end")
def eos_share_at_an_end(watch: Watch) -> str:
    eos, length = watch.mean("eos_share", 3), watch.mean("response_length", 3)
    if eos is not None and eos <= 0.02:
        return (
            f"{eos:.1%} of the responses end by themselves: raise --max_response_length, look "
            "whether step 1's answers stop (its samples show it), and set --missing_eos_penalty 1 "
            "with --score_normalisation running"
        )
    # All ending is as it should be, unless they end before they begin.
    if eos is not None and eos >= 0.99 and length <= 2.0:
        return (
            f"{eos:.1%} of the responses end, after {length:.1f} tokens: the policy has learned to "
            "say nothing. Raise --kl_coef; see whether the reward model scores empty answers high"
        )
    return ""


@warning("the critic explains nothing")
def critic_explains_nothing(watch: Watch) -> str:
    values = watch.last("explained_variance", 10)
    if not values or max(values) >= 0:
        return ""
    return (
        f"explained_variance below 0 for 10 rollouts (now {values[-1]:.2f}): advantages are noise. "
        "Raise --critic_learning_rate or --ppo_epochs, leave --clip_value at 0, or normalise the "
        "scores (--score_normalisation running)"
    )


@warning("updates are clipped")
def updates_are_clipped(watch: Watch) -> str:
    share = watch.mean("clip_fraction", 3)
    if share is None or share <= 0.4:
        return ""
    return (
        f"clip_fraction {share:.2f} over 3 rollouts: most of what is learned is cut off. Lower "
        "--learning_rate or --ppo_epochs, or raise --global_batch_size"
    )


@warning("scores are clipped")
def scores_are_clipped(watch: Watch) -> str:
    share, normalised = watch.mean("score_clipped", 3), watch.config.score_normalisation != "none"
    if share is None or share <= 0.1:
        return ""
    mend = "raise --score_clip" if normalised else "set --score_normalisation running"
    return (
        f"{share:.1%} of the scores lie beyond ± {watch.config.score_clip} (--score_clip) over 3 "
        f"rollouts, where one answer is as good as another: {mend}"
    )


@warning("entropy collapses")
def entropy_collapses(watch: Watch) -> str:
    first, now = watch.history[0]["entropy"], watch.mean("entropy", 3)
    if now is None or now >= 0.1 * first:
        return ""
    return (
        f"{first:.3f} nats a token in the first rollout, {now:.3f} in the last three: the policy "
        "says the same always and no longer explores. Raise --kl_coef, lower --learning_rate"
    )


@warning("the score rises and the judge falls")
def proxy_rises_while_the_judge_falls(watch: Watch) -> str:
    found = metrics.over_optimised(watch.evaluations, "eval/score")
    if found is None:
        return ""
    name, best, now = found
    return (
        f"held-out score {best['eval/score']:.3f} → {now['eval/score']:.3f} while "
        f"{name.removeprefix('eval/')} {best[name]:.3f} → {now[name]:.3f}: the reward "
        "model is over-optimised. Stop earlier (--max_steps, --stop_at_kl), raise "
        "--kl_coef, or train it on new comparisons of this policy (--rounds)"
    )
