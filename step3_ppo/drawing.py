"""The answers of one rollout: to its prompts, to others where a group teaches nothing, and greedy.

What is drawn is a function of the number of the rollout alone (and of the weights), so that a
resumed run draws the same.
"""

import torch

from step3_ppo import advantages
from step3_ppo import rollout as rollouts
from step3_ppo.algorithm import ALGORITHMS
from step3_ppo.rollout import Rollout
from utils.data import batches
from utils.data.prompts import Prompt

# Numbers of noise and order of prompts drawn again, beyond those of rollouts and evaluations.
AGAIN = 2**32


def draw(models, prompts, config, device, step: int):
    """Rollout number `step` → (Rollout, the prompt of each row, the Rollout of greedy answers whose
    row g is that of group g, or None, and metrics)."""
    asked = asked_in(prompts, config, step)
    copies = dict(copies=config.samples_per_prompt)
    found, metrics = rollouts.collect(models, asked, config, device, noise_step=step, **copies)
    if config.dynamic_sampling:
        metrics["groups_drawn"] = float(config.prompts_per_rollout)
    for again in range(1, config.dynamic_sampling + 1):
        # Not what is no number: the watch has to see it.
        same = advantages.alike(found.scores, found.group) & found.scores.isfinite()
        slots = found.group[same].unique().tolist()
        if not slots:
            break
        number = step * config.dynamic_sampling + again - 1
        others = batches.rows_of_step(
            number, config.prompts_per_rollout, len(prompts), config.seed + AGAIN
        )[: len(slots)]
        new_asked = [prompts[i] for i in others for _ in range(config.samples_per_prompt)]
        noise = AGAIN * again + step
        new, more = rollouts.collect(models, new_asked, config, device, noise_step=noise, **copies)
        found, asked = in_place_of(found, asked, slots, new, new_asked)
        metrics = added(metrics, more, len(slots) / (metrics["groups_drawn"] + len(slots)))
        metrics["groups_drawn"] += len(slots)
    if not ALGORITHMS[config.algorithm].greedy:
        return found, asked, None, metrics
    once = asked[:: config.samples_per_prompt]
    greedy, more = rollouts.collect(models, once, config, device, noise_step=step, greedy=True)
    return found, asked, greedy, added(metrics, more, 0.0)


def asked_in(prompts, config, step: int) -> list[Prompt]:
    """The prompt of each row of rollout number `step`."""
    chosen = batches.rows_of_step(step, config.prompts_per_rollout, len(prompts), config.seed)
    return [prompts[i] for i in chosen for _ in range(config.samples_per_prompt)]


def begin(models, prompts, config, step: int) -> None:
    """Let rollout number `step` be sampled by the policy of now, in the background."""
    if step < config.max_steps:
        rollouts.begin(models, asked_in(prompts, config, step), config, noise_step=step)


def added(metrics: dict[str, float], more: dict[str, float], share: float) -> dict[str, float]:
    """Both calls' seconds, and the means of their scores, in which the second has this share."""
    both = {}
    for name, value in metrics.items():
        other = more.get(name, 0.0)
        sums = name.startswith("seconds_") or name not in more
        both[name] = value + other if sums else (1 - share) * value + share * other
    return both


def in_place_of(
    old: Rollout, asked: list[Prompt], slots: list[int], new: Rollout, new_asked: list[Prompt]
) -> tuple[Rollout, list[Prompt]]:
    """`old` with the rows of its groups `slots` taken from the groups 0, 1, … of `new`, which have
    as many rows; and the prompts of all rows."""
    new.group = torch.tensor(slots)[new.group]
    rows = list(range(len(asked)))
    for slot in slots:
        ours, theirs = ((r.group == slot).nonzero().flatten().tolist() for r in (old, new))
        for row, other in zip(ours, theirs, strict=True):
            rows[row] = len(asked) + other
    both = asked + new_asked
    return rollouts.stacked([old, new]).select(rows), [both[row] for row in rows]
