"""What the self-check's checks share: what they are given, how they measure, how they judge.

A check is a function registered by `@check(when, name)`. It takes a Probe or FirstSteps, returns
what it measured, or raises Fault or Doubt; see utils/verdicts.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from step3_ppo.experience import Experience
from step3_ppo.models import Models
from step3_ppo.rollout import Prompt, Rollout
from utils.distributed import process_group
from utils.models import language_model, scorer
from utils.verdicts import Fault

COPIES, MOST_TOKENS, NOISE = 4, 32, 2**31 + 7  # answers a prompt and rank; a noise of its own
LOGITS_AT_ONCE = 2**26  # numbers; 256 MiB in fp32


BEFORE: dict[str, Callable] = {}  # given a Probe, before the first optimizer step
AT_START: dict[str, Callable] = {}  # the same, true of untrained weights alone: no resumed run's
AFTER: dict[str, Callable] = {}  # given FirstSteps, after the first rollout's optimizer steps


def check(when: dict[str, Callable], name: str) -> Callable:
    """Decorator: registers a check in `when` under the name that it is reported by."""

    def register(function: Callable) -> Callable:
        when[name] = function
        return function

    return register


@dataclass(frozen=True)
class Probe:
    """The run, and answers by which it is checked."""

    models: Models
    config: object  # the run's PPOConfig
    device: torch.device
    tolerance: float  # of a mean difference relative to 1 + |x|; one token may have ten times it
    train: Sequence[Prompt]
    held: Sequence[Prompt]  # held-out prompts
    rollout: Rollout  # of a few of them: `COPIES` answers a rank each
    asked: list[Prompt]  # the prompt of each row of the rollout
    seconds_score: float  # what scoring the rollout took

    def own_rows(self) -> Rollout:
        """The rows that this rank has drawn, as many on every rank. A check that runs a model runs
        it on these, so that its cost does not grow with the ranks."""
        rank, world = process_group.rank(), process_group.world_size()
        return self.rollout.select(list(range(rank, len(self.rollout.scores), world)))

    def must_agree(self, a, b, what: str, cause: str) -> str:
        """Raises Fault where `a` and `b` differ by more than the tolerance on any rank."""
        mean, most = worst(*apart(a, b))
        if mean > self.tolerance or most > 10 * self.tolerance:
            raise Fault(
                f"{what} differ by {mean:.2g} on average and {most:.2g} at most (allowed "
                f"{self.tolerance:.0e} and {10 * self.tolerance:.0e}): {cause}"
            )
        return f"{what} within {most:.1e}"


@dataclass(frozen=True)
class FirstSteps:
    """The first rollout that was trained on and the optimizer steps on it."""

    probe: Probe  # as it was before them
    experience: Experience
    asked: list[Prompt]  # the prompt of each row
    metrics: dict[str, float]
    trace: object  # alignment.LossTrace of the first optimizer step
    weights: object  # updates.WeightsBefore

    def as_probe(self) -> Probe:
        """Checks of answers, asked of the rollout's."""
        seconds = self.metrics["seconds_score"]
        rollout = self.experience.rollout
        return replace(self.probe, rollout=rollout, asked=self.asked, seconds_score=seconds)


def apart(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """(mean, maximum) of |a − b| relative to 1 + |a|; infinite where either is not finite."""
    gap = ((a.float() - b.float()).abs() / (1 + a.float().abs())).nan_to_num(torch.inf, torch.inf)
    return (float(gap.mean()), float(gap.max())) if gap.numel() else (0.0, 0.0)


def worst(*gaps: float) -> list[float]:
    """The largest of each over the ranks: one that stopped alone would leave the others waiting."""
    return [max(gap) for gap in zip(*process_group.gather_objects(gaps), strict=True)]


@torch.no_grad()
def _read(probe: Probe, rollout: Rollout, read: Callable, rows: int) -> list[torch.Tensor]:
    """read(ids (b,P+R), mask, R) → tensors of b rows; for a few rows at a time → of all rows."""
    ids, mask = (x.to(probe.device) for x in rollout.joined())
    length = rollout.response_ids.shape[1]
    parts = zip(ids.split(rows), mask.split(rows), strict=True)
    pieces = [read(i, m, length) for i, m in parts]
    return [torch.cat(column) for column in zip(*pieces, strict=True)]


def train_forward(probe: Probe, rollout: Rollout, name: str = "actor") -> torch.Tensor:
    """(B,R) by the forward pass that training takes, in the mode that the model is in: the actor's
    or reference's log-probabilities, the critic's values, or the reward model's score of a row."""
    models = probe.models

    def read(ids, mask, length: int) -> tuple[torch.Tensor]:
        if name == "critic":
            return (models.critic(ids, mask)[:, -length - 1 : -1],)
        if name == "reward model":
            scores = scorer.sequence_scores(models.reward.model, ids, mask)
            return (scores[:, None].expand(-1, length),)
        asked = (getattr(models, name), ids, mask, length)
        settings = {"temperature": probe.config.temperature}
        if name == "actor":
            settings["nucleus"] = models.nucleus
        return language_model.response_logprobs(*asked, **settings)[:1]

    return _read(probe, rollout, read, probe.config.micro_batch_size)[0]


class Distributions(NamedTuple):
    """What a model says of each response position: (B,R) fp32 each, in nats."""

    logprobs: torch.Tensor  # of the token that stands there
    best: torch.Tensor  # of the likeliest token
    entropies: torch.Tensor
    variances: torch.Tensor  # of −log p under p


def distributions(probe: Probe, rollout: Rollout, model=None) -> Distributions:
    """Of the actor in train mode, or of `model`, at --temperature."""
    model = model or probe.models.actor

    def read(ids, mask, length: int) -> tuple[torch.Tensor, ...]:
        logits = language_model.response_logits(model, ids, mask, length).float()
        # Impossible tokens (−∞) add 0 to the sums, where 0 × −∞ would be no number.
        logs = (logits / probe.config.temperature).log_softmax(-1).clamp(min=-1e4)
        own = logs.gather(-1, ids[:, -length:, None]).squeeze(-1)
        p = logs.exp()
        entropy = -torch.linalg.vecdot(p, logs)
        variance = torch.linalg.vecdot(p, logs.square()) - entropy.square()
        return own, logs.amax(-1), entropy, variance.clamp(min=0)

    # All logits together would be gigabytes. By the limit and not by this rank's length, so that
    # all ranks take as many forward passes.
    row = MOST_TOKENS * probe.models.actor.module.config.vocab_size
    rows = max(1, min(probe.config.micro_batch_size, LOGITS_AT_ONCE // row))
    return Distributions(*_read(probe, rollout, read, rows))
