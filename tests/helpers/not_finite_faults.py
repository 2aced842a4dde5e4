"""Faults for planted_faults.py: numbers that are not finite."""

from step3_ppo import algorithm, rollout
from tests.helpers.planting import around
from utils.distributed import process_group
from utils.models import language_model, scorer


def _bad_scores(patch, bad: dict[int, float]):
    def collect(real, *args, **kwargs):
        found, seconds = real(*args, **kwargs)
        if kwargs.get("noise_step") in bad:  # a rollout's; evaluations give theirs by position
            found.scores[3] = bad[kwargs["noise_step"]]
        return found, seconds

    around(patch, rollout, "collect", collect)


def nan_and_inf_scores_now_and_then(patch):
    _bad_scores(patch, {0: float("nan"), 2: float("-inf")})


def nan_scores_from_the_second_rollout_on(patch):
    _bad_scores(patch, dict.fromkeys(range(1, 99), float("nan")))


def nan_losses_on_the_last_rank(patch):
    """Of the third micro-batch and the two after it."""
    calls = iter(range(10**6))

    def loss(real, *args):
        total, stats = real(*args)
        last = process_group.rank() == process_group.world_size() - 1
        return total * (float("nan") if next(calls) in (2, 3, 4) and last else 1.0), stats

    around(patch, algorithm, "policy_loss", loss)


def nan_logprobs_in_training(patch):
    """Of step 1: every loss, not those of evaluations."""

    def logprobs(real, *args, **settings):
        found, entropies = real(*args, **settings)
        return found * (float("nan") if found.requires_grad else 1.0), entropies

    around(patch, language_model, "wanted_logprobs", logprobs)


def nan_values_in_training(patch):
    """Of step 2."""

    def values(real, *args):
        found = real(*args)
        return found * (float("nan") if found.requires_grad else 1.0)

    around(patch, scorer, "sequence_scores", values)
