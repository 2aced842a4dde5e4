"""A run in the planner's terms: stages, rows and micro-batches."""

import dataclasses

from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig
from utils.planner.workload import Role

PPO = PPOConfig(
    model_name_or_path="sft",
    reward_model="rm",
    prompts_per_rollout=20,
    global_batch_size=10,
    micro_batch_size=5,
    max_prompt_length=30,
    max_response_length=20,
).workload()


def stages(**settings) -> dict[str, int]:
    work = dataclasses.replace(PPO, **settings)
    return {role.name: work.stage(role) for role in work.roles}


def test_stages_follow_the_actor_unless_they_are_set():
    assert stages(zero_stage=2) == {"actor": 2, "critic": 2, "reference": 0, "reward model": 0}
    assert stages(zero_stage=3) == {"actor": 3, "critic": 3, "reference": 3, "reward model": 3}
    own = stages(zero_stage=0, critic_zero_stage=1, reference_zero_stage=3)
    assert own == {"actor": 0, "critic": 1, "reference": 3, "reward model": 3}


def test_models_start_where_the_settings_say():
    assert [role.path for role in PPO.roles] == ["sft", "rm", "sft", "rm"]
    others = {"critic_model": "c", "reference_model": "r", "judge_model": "j"}
    work = PPOConfig(model_name_or_path="sft", reward_model="rm", **others).workload()
    assert [role.path for role in work.roles] == ["sft", "c", "r", "rm", "j"]
    assert work.roles[-1] == Role(
        "judge", "j", scalar=True, held_out_only=True, stage_setting="reference_zero_stage"
    )


def test_rows_of_a_rank():
    assert PPO.length == 50 and PPO.predicted == 20
    assert PPO.rows(3) == 7 and PPO.rows_decoded(3) == 7
    few = dataclasses.replace(PPO, generation_tokens=120)
    assert few.rows_decoded(3) == 2, "two of 50 tokens fit 120"
    assert dataclasses.replace(PPO, generation_tokens=10).rows_decoded(3) == 1
    assert PPO.micro_batch_rows() == 5 and PPO.micro_batch_sizes(1) == [10, 5, 2, 1]
    assert dataclasses.replace(PPO, micro_batch_tokens=160).micro_batch_rows() == 3


def test_a_comparison_is_two_rows():
    work = RewardConfig(model_name_or_path="m", global_batch_size=8, micro_batch_size=2).workload()
    assert work.micro_batch_rows() == 4 and work.rows(2) == 8 and work.rollout_rows == 0
