"""Faults for planted_faults.py: scores, advantages and rates that are not what they should be."""

import dataclasses

from step3_ppo import algorithm, rollout, update
from step3_ppo import main as step3
from tests.helpers.planting import around
from utils.distributed import zero
from utils.models import scorer
from utils.rewards import functions as scoring


def scores_of_the_row_before(patch):
    around(patch, scorer.Scorer, "scores", lambda real, *args: real(*args).roll(1))


def function_scores_of_the_row_before(patch):
    def call(real, *args):
        found = real(*args)
        return found[-1:] + found[:-1]

    around(patch, scoring, "call", call)


def scores_rolled_once_collected(patch):
    def make(real, found, *args):
        found.scores = found.scores.roll(1)
        return real(found, *args)

    around(patch, step3, "make_experience", make)


def rewards_of_the_row_before(patch):
    around(patch, algorithm, "token_rewards", lambda real, s, *args: real(s.roll(1), *args))


def shaped_scores_of_the_row_before(patch):
    """As the line that clips them could, with all that follows from them."""

    def make(real, found, *args):
        other = dataclasses.replace(found, scores=found.scores.roll(1))
        experience, metrics = real(other, *args)
        return dataclasses.replace(experience, rollout=found), metrics

    around(patch, step3, "make_experience", make)


def advantages_of_the_token_before(patch):
    def micro_batches(real, *args):
        for ids, mask, actions, part in real(*args):
            rolled = part.advantages.roll(1, 1)
            yield ids, mask, actions, dataclasses.replace(part, advantages=rolled)

    around(patch, update, "micro_batches", micro_batches)


def advantages_of_the_row_before(patch):
    def step(real, built, experience, *args):
        rolled = dataclasses.replace(experience, advantages=experience.advantages.roll(1, 0))
        return real(built, rolled, *args)

    around(patch, update, "step_actor", step)


def actor_at_rate_0(patch, head="lm_head"):
    def train(real, engine, model, how, **more):
        still = dataclasses.replace(how, learning_rate=0.0)
        real(engine, model, still if hasattr(model, head) else how, **more)

    around(patch, zero.TrainEngine, "__init__", train)


def critic_at_rate_0(patch):
    actor_at_rate_0(patch, head="classifier")


def reference_at_another_temperature(patch):
    reference = []

    def build(real, *args):
        built = real(*args)
        reference.append(built.reference)
        return built

    def logprobs(real, ids, mask, actions, model, temperature, *nucleus):
        temperature *= 1.3 if model in reference else 1.0
        return real(ids, mask, actions, model, temperature, *nucleus)

    around(patch, step3, "build", build)
    around(patch, rollout, "logprobs_of", logprobs)
