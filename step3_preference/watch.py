"""The known ways in which preference learning goes wrong, watched while it runs.

A warning is given once, with its likely cause and what mends it. Every rank sees the same metrics.
"""

from collections.abc import Callable

from step3_preference import losses
from step3_preference.losses import LOSSES
from utils import metrics

FEW = 50  # pairs, whose shares are too noisy
STEPS = 10  # over which a mean is taken
WARNINGS: dict[str, Callable[["Watch"], str]] = {}  # name → what to say; empty: nothing


def warning(name: str):
    """Adds the decorated function to WARNINGS."""

    def add(function):
        WARNINGS[name] = function
        return function

    return add


class Watch:
    """Sees the metrics of every step. first: those of the first one; last: of the last STEPS;
    evaluations: of held-out rows, those before training in front."""

    def __init__(self, config, say):
        self.config, self.say = config, say
        self.first: dict[str, float] = {}
        self.last: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []
        self.warned: set[str] = set()

    def state_dict(self) -> dict:
        names = "first", "last", "evaluations"
        return {name: getattr(self, name) for name in names} | {"warned": sorted(self.warned)}

    def load_state_dict(self, saved: dict) -> None:
        vars(self).update(saved, warned=set(saved["warned"]))

    def warn(self, step: int, metrics: dict[str, float]) -> None:
        """Say what these metrics, after `step` steps, show for the first time."""
        if "loss" in metrics:
            self.first = self.first or metrics
            self.last = [*self.last, metrics][-STEPS:]
        if "eval/loss" in metrics:
            self.evaluations.append({n: x for n, x in metrics.items() if n.startswith("eval/")})
        for name, test in WARNINGS.items():
            text = "" if name in self.warned else test(self)
            if text:
                self.warned.add(name)
                self.say(f"warning at step {step}: {name}: {text}")

    def mean(self, name: str) -> float:
        """Over the last STEPS; NaN before there are so many, and where the metric was."""
        values = [m[name] for m in self.last]
        return sum(values) / len(values) if len(values) == STEPS else float("nan")


@warning("both log-probabilities fall")
def both_fall(watch: Watch) -> str:
    loss, beta = LOSSES[watch.config.loss], watch.config.how().beta
    if not loss.reads_reference:
        return ""
    of_token = loss.score is losses.mean_ratio
    fallen = {
        who: -watch.mean(f"{who}_reward") / beta * (watch.mean(f"{who}_length") if of_token else 1)
        for who in ("chosen", "rejected")
    }
    was = -watch.mean("chosen_logprob") - fallen["chosen"]  # under the reference
    if not (fallen["chosen"] > 0.2 * was and fallen["rejected"] > fallen["chosen"]):
        return ""
    return (
        f"chosen answers have lost {fallen['chosen']:.1f} nats of {-was:.1f}, rejected ones "
        f"{fallen['rejected']:.1f}: what is learned is to say neither. Add --sft_coef 0.1 or more, "
        "take --loss apo_zero, raise --beta, or lower --learning_rate"
    )


@warning("margins are saturated")
def margins_saturate(watch: Watch) -> str:
    accuracy, loss = watch.mean("accuracy"), watch.mean("loss")
    if not (accuracy >= 0.995 and loss <= 0.05 * watch.first["loss"]):
        return ""
    return (
        f"accuracy {accuracy:.3f} and loss {loss:.4f} (first {watch.first['loss']:.4f}) over "
        f"{STEPS} steps: the rows are known by heart and teach nothing more. Fewer --epochs, a "
        "lower --learning_rate, more comparisons, or --loss ipo or cdpo, which stop at a margin"
    )


@warning("held-out loss rises")
def held_out_loss_rises(watch: Watch) -> str:
    seen = [m["eval/loss"] for m in watch.evaluations]
    if len(seen) < 3 or not seen[-1] > min(seen) + 0.05 * abs(seen[0] - min(seen)) + 1e-6:
        return ""
    if not watch.last[-1]["loss"] < watch.first["loss"]:
        return ""
    return (
        f"from {min(seen):.4f} at its best to {seen[-1]:.4f}, while the training loss falls: "
        "overfitted. Fewer --epochs, a lower --learning_rate, --keep_best eval/loss:min"
    )


@warning("the score rises and the judge falls")
def margin_rises_while_the_judge_falls(watch: Watch) -> str:
    found = metrics.over_optimised(watch.evaluations, "eval/margin")
    if found is None:
        return ""
    name, best, now = found
    return (
        f"held-out margin {best['eval/margin']:.3f} → {now['eval/margin']:.3f} while "
        f"{name.removeprefix('eval/')} {best[name]:.3f} → {now[name]:.3f}: over-optimised. "
        f"--keep_best {name}:max, fewer --epochs, a higher --beta"
    )


@warning("longer answers are preferred")
def prefers_longer(watch: Watch) -> str:
    now = watch.evaluations[-1] if watch.evaluations else {}
    prefers, data = (
        now.get(f"eval/{n}", 0.0) for n in ("prefers_longer", "accuracy_longer_answer")
    )
    few = now.get("eval/pairs", 0) < FEW
    if few or len(watch.evaluations) < 2 or not prefers > max(data, 0.5) + 0.1:
        return ""
    return (
        f"of held-out pairs {prefers:.2f} have the higher reward on the longer answer, which is "
        f"the better one in {data:.2f}: answers will grow. --loss dpo_norm or simpo takes means "
        "over tokens; or balance the lengths of the comparisons"
    )


@warning("values tell nothing")
def values_tell_nothing(watch: Watch) -> str:
    now = watch.evaluations[-1] if len(watch.evaluations) > 1 else {}
    if "eval/ilql_q" not in now or now.get("eval/pairs", 0) < FEW:
        return ""
    if now["eval/accuracy_low"] > 0.5:
        return ""
    return (
        f"of held-out pairs Q is higher on the better answer in {now['eval/accuracy']:.2f}, no "
        "more than by chance: sampling that follows it gains nothing. More --epochs, a higher "
        "--learning_rate or --target_rate"
    )


@warning("values run away")
def values_run_away(watch: Watch) -> str:
    last = watch.last[-1] if watch.last else {}
    beyond = {n: last[n] for n in ("ilql_q", "ilql_v") if abs(last.get(n, 0.0)) > 1.5}
    if not beyond:
        return ""
    said = ", ".join(f"{name} {value:.2f}" for name, value in beyond.items())
    return (
        f"{said}, and no sum of rewards is beyond −1 or 1: they learn from each other. Lower "
        "--learning_rate, --target_rate or --gamma"
    )
