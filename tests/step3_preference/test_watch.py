"""Warnings: a history that must give each, and one just on the other side that must not."""

import pytest

from step3_preference.config import PreferenceConfig
from step3_preference.watch import WARNINGS, Watch

SOUND = {
    "loss": 0.5,
    "accuracy": 0.8,
    "chosen_reward": 0.3,
    "rejected_reward": -0.2,
    "chosen_logprob": -20.0,
    "rejected_logprob": -22.0,
    "chosen_length": 10.0,
    "rejected_length": 11.0,
}


def steps(count: int, of="dpo", **values):
    """(--loss, steps of such metrics, of which the first one's loss is 0.69)."""
    return of, [SOUND | {"loss": 0.69}, *[SOUND | values] * (count - 1)]


def evaluated(losses, prefers=0.5, longer=0.5, pairs=60):
    more = {"eval/prefers_longer": prefers, "eval/accuracy_longer_answer": longer}
    more["eval/pairs"] = pairs
    history = [{"eval/loss": losses[0], **more}]
    trained = [SOUND | {"eval/loss": x, **more} for x in losses[1:]]
    return "dpo", [*history, SOUND | {"loss": 0.69}, *trained]


def judged(margins, verdicts, name="eval/verifier", **more):
    shown = zip(margins, verdicts, strict=True)
    seen = [{"eval/loss": 0.5, "eval/margin": m, name: v, **more} for m, v in shown]
    return "dpo", [SOUND | m for m in seen]


def valued(low, pairs=60):
    seen = {"eval/loss": 1.0, "eval/ilql_q": 0.1, "eval/pairs": pairs}
    return "ilql", [SOUND | seen | {"eval/accuracy_low": x, "eval/accuracy": 0.6} for x in (0, low)]


# Chosen answers had −16 nats under the reference: 0.2 of that is 3.2, at β 0.1 a reward of −0.32.
BEFORE = {"chosen_logprob": -19.3, "rejected_reward": -0.9}
FALLS, STAYS = (0.6, 0.7, 0.65), (0.6, 0.7, 0.67)
CASES = [
    (
        "both log-probabilities fall",
        steps(11, **BEFORE, chosen_reward=-0.33),
        steps(11, **BEFORE, chosen_reward=-0.31),
    ),
    (
        "both log-probabilities fall",
        steps(11, **BEFORE, chosen_reward=-0.5),
        steps(9, **BEFORE, chosen_reward=-0.5),
    ),
    (  # a mean over 10 tokens: 0.2 × 16 nats are 0.32 a token, at β 5 a reward of −1.6
        "both log-probabilities fall",
        steps(11, "dpo_norm", chosen_logprob=-19.3, chosen_reward=-1.7, rejected_reward=-3.0),
        steps(11, "dpo_norm", chosen_logprob=-19.3, chosen_reward=-1.5, rejected_reward=-3.0),
    ),
    (
        "both log-probabilities fall",
        steps(11, **BEFORE, chosen_reward=-0.5),
        steps(11, "simpo", **BEFORE, chosen_reward=-0.5),
    ),
    (
        "margins are saturated",
        steps(11, accuracy=1.0, loss=0.034),
        steps(11, accuracy=1.0, loss=0.035),
    ),
    (
        "margins are saturated",
        steps(11, accuracy=0.996, loss=0.01),
        steps(11, accuracy=0.994, loss=0.01),
    ),
    ("held-out loss rises", evaluated([0.69, 0.5, 0.511]), evaluated([0.69, 0.5, 0.509])),
    ("held-out loss rises", evaluated([0.69, 0.5, 0.6]), evaluated([0.69, 0.6])),
    (
        "longer answers are preferred",
        evaluated([0.69, 0.5], prefers=0.71, longer=0.6),
        evaluated([0.69, 0.5], prefers=0.69, longer=0.6),
    ),
    (
        "longer answers are preferred",
        evaluated([0.69, 0.5], prefers=0.71, longer=0.6),
        evaluated([0.69, 0.5], prefers=0.71, longer=0.6, pairs=49),
    ),
    (
        "the score rises and the judge falls",
        judged((0.0, 1.0, 2.0), FALLS),
        judged((0.0, 1.0, 2.0), STAYS),
    ),
    (
        "the score rises and the judge falls",
        judged((0.0, 1.0, 2.0), FALLS, "eval/judge", **{"eval/judge_std": 1.0}),
        judged((0.0, 2.0, 1.0), FALLS, "eval/judge", **{"eval/judge_std": 1.0}),
    ),
    ("values tell nothing", valued(0.5), valued(0.51)),
    ("values tell nothing", valued(0.5), valued(0.5, pairs=49)),
    ("values run away", steps(2, "ilql", ilql_q=0.2, ilql_v=-1.6), steps(2, "ilql", ilql_v=-1.4)),
]


def warned(loss, history) -> list[str]:
    said = []
    watch = Watch(PreferenceConfig(loss=loss), said.append)
    for step, metrics in enumerate(history):
        watch.warn(step, metrics)
    return [name for name in WARNINGS if any(f": {name}: " in line for line in said)]


@pytest.mark.parametrize("name, given, not_given", CASES)
def test_a_warning_is_given_at_its_limit_and_no_other(name, given, not_given):
    assert warned(*given) == [name]
    assert warned(*not_given) == []


def test_every_warning_has_a_case():
    assert {name for name, *_ in CASES} == set(WARNINGS)


def test_a_resumed_run_remembers(tmp_path):
    said, (loss, history) = [], CASES[3][1]
    watch = Watch(PreferenceConfig(loss=loss), said.append)
    for step, metrics in enumerate(history[:6]):
        watch.warn(step, metrics)
    other = Watch(PreferenceConfig(loss=loss), said.append)
    other.load_state_dict(watch.state_dict())
    for step, metrics in enumerate(history[6:], 6):
        other.warn(step, metrics)
    assert len(said) == 1
    again = Watch(PreferenceConfig(loss=loss), said.append)
    again.load_state_dict(other.state_dict())
    again.warn(11, history[-1])
    assert len(said) == 1, "said once"
