"""Settings of step 3."""

from dataclasses import dataclass

from utils.config import RunConfig, setting


@dataclass
class PPOConfig(RunConfig):
    """`model_name_or_path` is the SFT model: the actor starts from it and the reference stays it.

    One step of the main loop is one rollout and the optimizer steps on it: sequences a rollout =
    prompts_per_rollout × samples_per_prompt = minibatches × global_batch_size.
    """

    reward_model: str = setting("", "folder written by step2_reward/main.py")
    reference_model: str = setting("", "whom the KL is measured to (default: the SFT model)")
    critic_model: str = setting("", "where the critic starts (default: the reward model)")
    prompt_data: list[str] = setting([], "prompts: files, folders or hub names")
    max_prompt_length: int = setting(256, "tokens; prompts are cut from the left")
    max_response_length: int = setting(256, "tokens sampled at most")

    max_steps: int = setting(100, "rollouts")
    prompts_per_rollout: int = setting(64, "prompts a rollout, over all ranks")
    samples_per_prompt: int = setting(1, "responses sampled for each of them")
    global_batch_size: int = setting(
        64, "sequences an optimizer step (a minibatch), over all ranks"
    )
    generation_batch_size: int = setting(0, "sequences decoded at once on a rank; 0: all")
    ppo_epochs: int = setting(1, "passes over each rollout")
    temperature: float = setting(1.0, "of sampling, and of the log-probabilities trained on")

    critic_learning_rate: float = setting(0.0, "peak learning rate of the critic; 0: the actor's")
    critic_zero_stage: int = setting(
        -1, "ZeRO stage of the critic; -1: the actor's", choices=(-1, 0, 1, 2, 3)
    )
    reference_zero_stage: int = setting(
        -1,
        "3 shards reference and reward model over the ranks; -1: only where the actor is sharded",
        choices=(-1, 0, 3),
    )
    kl_coef: float = setting(0.05, "cost of one nat of KL to the reference, on every token")
    kl_target: float = setting(0.0, "nats a response that kl_coef is adapted to; 0: it stays fixed")
    kl_horizon: float = setting(10_000.0, "sequences over which kl_coef adapts")
    gamma: float = setting(1.0, "discount")
    lam: float = setting(0.95, "λ of generalised advantage estimation")
    clip_ratio: float = setting(0.2, "PPO's ε: how far the probability ratio may move")
    clip_value: float = setting(0.2, "how far a value may move in one rollout's updates")
    whiten_advantages: bool = setting(True, "advantages to mean 0 and variance 1 over the rollout")
    score_clip: float = setting(0.0, "scores limited to ± this; 0: not")
    missing_eos_penalty: float = setting(0.0, "a response cut at the limit scores − this; 0: off")
    ema_decay: float = setting(0.992, "of the averaged actor, once an optimizer step; 0: none")
    sample_answers: int = setting(3, "held-out prompts whose answers are shown at evaluations")

    def problems(self, world_size: int) -> list[str]:
        found = super().problems(world_size)
        if not self.reward_model:
            found.append("reward_model is empty; set --reward_model to step 2's output folder")
        if not self.prompt_data:
            found.append("prompt_data is empty; name at least one data set with --prompt_data")
        if self.rollout_size() % max(self.global_batch_size, 1):
            found.append(
                f"prompts_per_rollout × samples_per_prompt = {self.prompts_per_rollout} × "
                f"{self.samples_per_prompt} = {self.rollout_size()} is not divisible by "
                f"global_batch_size={self.global_batch_size}; set --prompts_per_rollout to a "
                "multiple, or lower --global_batch_size"
            )
        for name in (
            "max_steps",
            "prompts_per_rollout",
            "samples_per_prompt",
            "ppo_epochs",
            "max_prompt_length",
            "max_response_length",
            "temperature",
            "clip_ratio",
            "clip_value",
        ):
            if getattr(self, name) <= 0:
                found.append(f"{name}={getattr(self, name)} must be above 0; set --{name}")
        for name in (
            "kl_coef",
            "kl_target",
            "score_clip",
            "missing_eos_penalty",
            "critic_learning_rate",
            "generation_batch_size",
        ):
            if getattr(self, name) < 0:
                found.append(f"{name}={getattr(self, name)} must not be negative; set --{name}")
        if self.kl_target > 0 and self.kl_horizon <= self.rollout_size() * 0.2:
            found.append(
                f"kl_horizon={self.kl_horizon} is too short for rollouts of {self.rollout_size()} "
                "sequences: kl_coef would jump; set --kl_horizon well above the rollout"
            )
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{name}={getattr(self, name)} must lie in [0, 1]; set --{name}")
        if not 0 <= self.ema_decay < 1:
            found.append(f"ema_decay={self.ema_decay} must lie in [0, 1); set --ema_decay")
        return found

    def rollout_size(self) -> int:
        return self.prompts_per_rollout * self.samples_per_prompt

    def minibatches(self) -> int:
        return self.rollout_size() // self.global_batch_size

    def optimizer_steps(self) -> int:
        return self.max_steps * self.ppo_epochs * self.minibatches()

    def stage_of_critic(self) -> int:
        return self.zero_stage if self.critic_zero_stage < 0 else self.critic_zero_stage

    def stage_of_reference(self) -> int:
        if self.reference_zero_stage >= 0:
            return self.reference_zero_stage
        return 3 if self.zero_stage == 3 else 0
