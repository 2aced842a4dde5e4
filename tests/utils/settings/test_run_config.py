"""What ranks, batches and rates must agree on."""

import pytest

from step1_sft.config import SFTConfig
from step3_ppo.config import PPOConfig
from tests.utils.settings.test_command_line import NEEDED, problems_of
from utils.settings.command_line import build


@pytest.mark.parametrize(
    "world_size, fine", [(1, True), (2, True), (4, True), (3, False), (8, False)]
)
def test_the_batch_must_divide_among_the_ranks(world_size, fine):
    argv = [*NEEDED[SFTConfig], "--global_batch_size", "8", "--micro_batch_size", "2"]
    if fine:
        build(SFTConfig, argv, world_size)
        return
    (problem,) = problems_of(SFTConfig, argv, world_size)
    ranks_micro = 2 * world_size
    assert f"2 × {world_size} = {ranks_micro}" in problem
    # Following the advice works.
    advised = problem.split("e.g. ")[1].split(",")[0]
    build(SFTConfig, [*argv, "--global_batch_size", advised], world_size)


def test_the_rollout_must_divide_into_minibatches():
    argv = [*NEEDED[PPOConfig], "--prompts_per_rollout", "24", "--samples_per_prompt", "2"]
    argv += ["--micro_batch_size", "4"]
    (problem,) = problems_of(PPOConfig, [*argv, "--global_batch_size", "32"])
    assert "24 × 2 = 48 is not divisible by global_batch_size=32" in problem
    config = build(PPOConfig, [*argv, "--global_batch_size", "16", "--ppo_epochs", "2"], 1)
    assert (config.rollout_size(), config.minibatches()) == (48, 3)
    assert config.optimizer_steps() == 100 * 2 * 3


@pytest.mark.parametrize(
    "argv, actor, critic",
    [
        ([], 1e-6, 5e-6),  # what 7B models bear; 1e-5 for both is ten times too much for the actor
        (["--learning_rate", "1e-4"], 1e-4, 5e-4),
        (["--critic_learning_rate", "9e-6"], 1e-6, 9e-6),
    ],
)
def test_rates_of_actor_and_critic(argv, actor, critic):
    config = build(PPOConfig, [*NEEDED[PPOConfig], *argv], 1)
    assert (config.learning_rate, config.rate_of_critic()) == pytest.approx((actor, critic))
