"""Settings of step 3."""

import dataclasses
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

from step3_ppo import contradictions
from step3_ppo.algorithm import ALGORITHMS, KL_ESTIMATORS, NORMALISATIONS, NOT_FOR_ALL
from utils.data.chat_template import READ_AT, READ_AT_HELP
from utils.generation import engines
from utils.planner.workload import Role, Workload
from utils.pretrained import base_of
from utils.settings.fields import check_url, default_of, free, rounding, setting
from utils.settings.run_config import RunConfig


def check_reward_functions(names: list[str]) -> None:
    old, new = "step3_ppo.reward_functions:", "step3_ppo.rewards.shipped:"
    for name in names:
        if name.startswith(old):
            raise ValueError(f"the module is called otherwise now: {name.replace(old, new)}")
        if names.count(name) > 1:
            raise ValueError(f"{name} stands there twice; give it a weight instead")


def check_backbone(roles: str) -> None:
    named = set(roles.split(","))
    if not {"actor"} < named <= {"actor", "critic", "reward"}:
        raise ValueError("not actor with critic, reward or both, as actor,critic,reward")


@dataclass
class PPOConfig(RunConfig):
    """`model_name_or_path` is the SFT model: the actor starts from it and the reference stays it.

    One step of the main loop is one rollout and the optimizer steps on it: sequences a rollout =
    prompts_per_rollout × samples_per_prompt = minibatches × global_batch_size.
    """

    sections = ("all", "ppo")
    weighted = "prompt_data"
    reward_model: str = setting("", "folder written by step2_reward/main.py")
    reward_read_at: str = setting(
        "auto", READ_AT_HELP, choices=("auto", *READ_AT), only_with="reward_model"
    )
    reward_function: list[str] = setting(
        [],
        "package.module:name or FILE.py:name of callables (prompts, responses, rows) → scores, in "
        "place of the reward model or added to it",
        check=check_reward_functions,
    )
    reward_url: str = setting(
        "",
        "http(s)://… of a server that scores answers (docs/rewards.md), as one function more; its "
        "token is read from the environment variable REWARD_TOKEN",
        check=check_url,
    )
    reward_weights: list[float] = setting(
        [],
        "what each function's scores, and then the server's, are multiplied by (default 1); below "
        "0: what it measures costs",
        at_least=-math.inf,
    )
    reward_function_coef: float = setting(
        1.0,
        "what their weighted sum is multiplied by, beside the reward model",
        at_least=-math.inf,
    )
    reward_function_timeout: float = free(60.0, "seconds each of them may take a rollout; 0: any")
    environment: str = setting(
        "",
        "package.module:name or FILE.py:name of a callable (conversations, rows) → texts that the "
        "policy's turns are replied with, or None where the episode ends (docs/environments.md)",
    )
    environment_role: str = setting(
        "auto",
        "whose turn its text is in the chat template; auto: a tool's where it has such, else a "
        "user's",
        ("auto", "tool", "user"),
        only_with="environment",
    )
    environment_timeout: float = free(
        60.0, "seconds it may take for the turns of a rollout; 0: any", only_with="environment"
    )
    max_turns: int = setting(
        4,
        "turns of the policy in an episode; all turns and replies share --max_response_length",
        at_least=1,
        only_with="environment",
    )
    judge_model: str = setting("", "another reward model that only judges held-out answers")
    reference_model: str = setting("", "what the KL is measured to (default: the SFT model)")
    critic_model: str = setting(
        "", "where the critic starts (default: the reward model; without one the SFT model)"
    )
    share_backbone: str = rounding(
        "",
        "models that stand as adapters and heads on one frozen base, beside the reference, which "
        "always does: actor,critic,reward or two of them",
        check=check_backbone,
        only_with="lora_rank",
    )
    prompt_data: list[str] = setting([], "prompts: files, folders or hub names", needed=True)
    preference_data: list[str] = setting(
        [], "comparisons on whose held-out pairs the self-check tries the reward model"
    )
    max_prompt_length: int = setting(512, "tokens (see --long_prompts)", at_least=1)
    max_response_length: int = setting(512, "tokens sampled at most", at_least=1)

    max_steps: int = setting(100, "rollouts", at_least=1)
    prompts_per_rollout: int = setting(64, "prompts a rollout, over all ranks", at_least=1)
    samples_per_prompt: int = setting(1, "responses sampled for each of them", at_least=1)
    global_batch_size: int = setting(
        64, "sequences an optimizer step (a minibatch), over all ranks", at_least=1
    )
    rollout_engine: str = rounding(
        "auto",
        "who samples: our decode loop (native, auto), vLLM in an environment of its own (vllm, "
        "docs/vllm.md), DeepSpeed's rollout class (deepspeed), or our loop on the module as it "
        "stands (off, for debugging)",
        choices=engines.CHOICES,
        formerly="hybrid_engine",
    )
    vllm_python: str = free(
        "", "Python of vLLM's environment; empty: $VLLM_PYTHON", only_with="rollout_engine=vllm"
    )
    rollout_url: str = free(
        "",
        "http://… of a vLLM server started by hand; empty: the run starts its own",
        check=check_url,
        only_with="rollout_engine=vllm",
    )
    rollout_devices: str = rounding(
        "",
        "GPUs that are vLLM's alone, e.g. 4,5: the model is split over them; empty: it takes turns "
        "with the training. On a CPU cores: one or a range for each part, e.g. 0-7,8-15",
        only_with="rollout_engine=vllm",
    )
    rollout_memory: float = rounding(
        0.4,
        "share of the memory of a GPU that vLLM fills with weights, keys and values",
        above=0,
        below=1,
        only_with="rollout_engine=vllm",
    )
    rollout_timeout: float = free(
        45.0,
        "seconds without a new token after which vLLM is started again",
        above=0,
        only_with="rollout_engine=vllm",
    )
    rollout_ahead: int = setting(
        0,
        "1: the next rollout is sampled while this one is trained on, by the policy of before",
        choices=(0, 1),
    )
    engine_gap_limit: float = free(
        0.1,
        "nats a token that vLLM's log-probabilities may be off from the trainer's, mean over a "
        "rollout; beyond it the run saves and ends; 0: any",
        only_with="rollout_engine=vllm",
    )
    offload_frozen: bool = rounding(
        False, "reference and reward models in CPU memory between their uses (CUDA)"
    )
    generation_tokens: int = rounding(
        0, "tokens of prompts and room for answers decoded at once on a rank; 0: all"
    )
    decode: str = rounding(
        "auto",
        "eager; static: fixed shapes; graph: those, each step as one CUDA graph; auto: graph on "
        "GPUs where it can be",
        choices=("auto", "eager", "static", "graph"),
    )
    release_decode_memory: bool = rounding(
        False, "keys, values and graphs make room for training after each rollout"
    )
    logprobs_from: str = rounding(
        "auto",
        "where the old log-probabilities come from: the decode loop, or another forward "
        "pass; auto: decode where both agreed on the first batch sampled",
        choices=("auto", "decode", "forward"),
    )
    importance_cap: float = setting(
        0.0,
        "for engines whose log-probabilities differ from the trainer's: a token counts min(π / "
        "π_engine, this) in the policy's loss (2 is usual); 0: 1",
    )
    dynamic_sampling: int = setting(
        0,
        "prompts whose answers all score alike give way to others, at most so many times a "
        "rollout (DAPO)",
    )
    ppo_epochs: int = setting(1, "passes over each rollout", at_least=1)
    temperature: float = setting(1.0, "of sampling and of the log-probabilities", above=0)
    # A rollout that leaves out tokens is not drawn from the policy whose log-probabilities PPO
    # compares: its ratio would be wrong.
    top_p: float = setting(
        1.0, "1 only, as PPO compares whole distributions", at_least=1, at_most=1
    )
    top_k: int = setting(0, "0 only, as PPO compares whole distributions", at_most=0)

    algorithm: str = setting(
        "ppo",
        "; ".join(f"{name}: {entry.meaning}" for name, entry in ALGORITHMS.items()),
        choices=tuple(ALGORITHMS),
    )
    action_level: str = setting(
        "token",
        "what one action is: a token, or the whole answer as in InstructGPT's text",
        ("token", "sequence"),
    )

    learning_rate: float = setting(
        1e-6,
        "peak, of the actor: for billions of weights (one of a million: 1e-4)",
        above=0,
        at_most=1,
    )
    critic_learning_rate: float = setting(
        0.0, "peak learning rate of the critic; 0: five times the actor's", at_most=1
    )
    critic_zero_stage: int = rounding(
        -1, "ZeRO stage of the critic; -1: the actor's", choices=(-1, 0, 1, 2, 3)
    )
    reference_zero_stage: int = rounding(
        -1, "3: reference and reward model sharded; -1: where the actor is", (-1, 0, 3)
    )
    loss_normalisation: str = setting(
        "auto",
        "the policy's loss is the mean over all tokens (token), the mean over answers of the mean "
        "over their tokens (sequence), or the sum over tokens divided by answers × "
        "max_response_length (constant); auto: as the algorithm's paper",
        ("auto", *NORMALISATIONS),
    )
    kl_coef: float = setting(0.05, "cost of one nat of KL to the reference, on every token")
    kl_in: str = setting(
        "auto",
        "where it is charged; auto: as the algorithm's paper",
        choices=("auto", "reward", "loss"),
    )
    kl_estimator: str = setting(
        "auto",
        "of what is charged; in the reward only k1's policy gradient is that of the KL, in the "
        "loss k2's, while k3's is that of KL(reference ‖ policy); auto: k1 in the reward, k3 in "
        "the loss (k2 with reinforce++_baseline)",
        choices=("auto", *KL_ESTIMATORS),
    )
    kl_target: float = setting(0.0, "nats a response that kl_coef is adapted to; 0: it stays fixed")
    kl_horizon: float = setting(10_000.0, "sequences over which kl_coef adapts", above=0)
    gamma: float = setting(1.0, "discount", at_most=1)
    lam: float = setting(0.95, "λ of generalised advantage estimation", at_most=1)
    clip_ratio: float = setting(
        0.0,
        "PPO's ε: how far the probability ratio may move; 0: as the algorithm's paper, which is "
        "0.2, of gspo 3e-4 down and 4e-4 up, of cispo 4 up and not limited down",
    )
    clip_ratio_high: float = setting(0.0, "the upper limit of the ratio is 1 + this; 0: clip_ratio")
    mask_top_p: float = setting(
        0.9,
        "nlpo: tokens may be drawn that are among the likeliest of an earlier policy, as many as "
        "hold this share of its probability",
        above=0,
        at_most=1,
    )
    mask_every: int = setting(10, "nlpo: rollouts after which that policy is renewed", at_least=1)
    trust_region: float = setting(
        0.01,
        "trpo: how far a step may take the policy from the one that sampled, nats an action",
        above=0,
    )
    dual_clip: float = setting(0.0, "a token of advantage A < 0 counts at most as this × A; 0: off")
    clip_value: float = setting(
        0.0,
        "how far a value may move in one rollout's updates, in the unit of the scores: with the "
        "usual 0.2 and scores that span ± 5 the critic is behind for 25 rollouts; 0: anywhere",
    )
    whiten_advantages: bool = setting(True, "advantages to mean 0 and variance 1 over the rollout")
    whiten_rewards: bool = setting(False, "token rewards to variance 1 over the rollout, mean kept")
    score_normalisation: str = setting(
        "none",
        "scores to mean 0 and deviation 1; running: of all so far; fixed: of the held-out answers "
        "before training",
        choices=("none", "running", "fixed"),
    )
    score_clip: float = setting(0.0, "scores limited to ± this, once normalised; 0: not")
    missing_eos_penalty: float = setting(
        0.0,
        "a response cut at the limit gets min(its own score, mean of the rollout's finished ones) "
        "− this, after normalisation and clip: in deviations where scores are normalised; 0: off",
    )
    overlong_penalty: float = setting(
        0.0,
        "what an answer of max_response_length pays, in the unit of the shaped scores: rising from "
        "0 where the last overlong_buffer tokens before the limit begin (DAPO)",
    )
    overlong_buffer: int = setting(0, "tokens; see there", only_with="overlong_penalty")
    mask_cut_answers: bool = setting(
        False, "answers cut at the limit are compared with the others, and not learned from"
    )
    ptx_coef: float = setting(
        0.0, "weight of the language-model loss on --ptx_data in the actor's (InstructGPT: 27.8)"
    )
    ptx_data: list[str] = setting(
        [], "demonstrations, or rows of `text`: files, folders, hub names"
    )
    ema_decay: float = setting(0.992, "of the averaged actor, an optimizer step; 0: none", below=1)
    sample_answers: int = free(3, "held-out prompts whose answers are shown at evaluations")

    self_check: str = free(
        "on", "what must hold before training; warn: say and go on", choices=("on", "warn", "off")
    )
    check_only: bool = free(False, "stop after the self-check; nothing is saved")
    kl_limit: float = free(20.0, "nats a response above which a warning is given", above=0)
    stop_at_kl: float = free(0.0, "nats a response above which the run saves and ends; 0: never")

    def contradictions(self, world_size: int) -> Iterator[str]:
        yield from super().contradictions(world_size)
        yield from contradictions.of_rewards(self)
        yield from contradictions.of_rollouts(self)
        yield from contradictions.of_algorithm(self)
        yield from contradictions.of_loss(self)

    def shortened(self) -> "PPOConfig":
        """The same run with a first rollout of one optimizer step, for --check_only."""
        samples = self.samples_per_prompt if self.compares_groups() else 1
        prompts = -(-self.global_batch_size // samples)
        one = dict(samples_per_prompt=samples, ppo_epochs=1, sample_answers=0)
        one |= dict(prompts_per_rollout=prompts, global_batch_size=prompts * samples)
        return dataclasses.replace(self, **one)

    def reward_sources(self) -> list[str]:
        """What scores answers beside the reward model, as the flags name it."""
        return [*self.reward_function, *([self.reward_url] if self.reward_url else [])]

    def rollout_size(self) -> int:
        return self.prompts_per_rollout * self.samples_per_prompt

    def decoded_at_once(self, world_size: int) -> int:
        """Sequences that one rank decodes together, at most."""
        rows = -(-max(self.rollout_size(), self.max_eval_rows) // world_size)
        if not self.generation_tokens:
            return rows
        longest = self.max_prompt_length + self.max_response_length
        return min(max(self.generation_tokens // longest, 1), rows)

    def minibatches(self) -> int:
        return self.rollout_size() // max(self.global_batch_size, 1)

    def optimizer_steps(self) -> int:
        return self.max_steps * self.ppo_epochs * self.minibatches()

    def compares_engine(self) -> bool:
        """Are the log-probabilities of the engine that samples kept beside the trainer's?"""
        return self.importance_cap > 0 or self.rollout_engine == "vllm"

    def has_critic(self) -> bool:
        return ALGORITHMS[self.algorithm].critic

    def compares_groups(self) -> bool:
        return ALGORITHMS[self.algorithm].groups

    def unread(self) -> list[str]:
        """Settings that this algorithm makes no use of, and that are not at their defaults."""
        names = [x for x in NOT_FOR_ALL if x not in ALGORITHMS[self.algorithm].reads]
        fields = self.__dataclass_fields__
        return [x for x in names if getattr(self, x) != default_of(fields[x])]

    def clips(self) -> tuple[float, float]:
        """How far the ratio may move down and up."""
        low, high = ALGORITHMS[self.algorithm].clips
        return self.clip_ratio or low, self.clip_ratio_high or self.clip_ratio or high

    def normalisation(self) -> str:
        own = ALGORITHMS[self.algorithm].loss_normalisation
        return own if self.loss_normalisation == "auto" else self.loss_normalisation

    def place_of_kl(self) -> str:
        return ALGORITHMS[self.algorithm].kl_in if self.kl_in == "auto" else self.kl_in

    def estimator_of_kl(self) -> str:
        """Of the KL that is charged, and told as `kl`."""
        if self.kl_estimator != "auto":
            return self.kl_estimator
        return ALGORITHMS[self.algorithm].kl_in_loss if self.place_of_kl() == "loss" else "k1"

    def rate_of_critic(self) -> float:
        return self.critic_learning_rate or 5 * self.learning_rate

    def on_actors_base(self, role: str, path: str, bases: dict | None) -> dict | None:
        """`bases` where the model of `path` is to take the weights of the actor's base. Raises
        SystemExit where it stands on another one."""
        if role not in self.share_backbone.split(","):
            return None
        actors, own = base_of(self.model_name_or_path), base_of(path)
        actors, own = actors or self.model_name_or_path, own or path
        if os.path.realpath(actors) != os.path.realpath(own):
            raise SystemExit(
                f"share_backbone={self.share_backbone}: the {role} starts from {path!r}, which "
                f"stands on {own!r}, and the actor on {actors!r}; train it with --lora_rank on "
                f"that one (step 2), or leave {role} out of --share_backbone"
            )
        return bases

    def stage_of_critic(self) -> int:
        return self.zero_stage if self.critic_zero_stage < 0 else self.critic_zero_stage

    def stage_of_reference(self) -> int:
        if self.reference_zero_stage >= 0:
            return self.reference_zero_stage
        return 3 if self.zero_stage == 3 else 0

    def workload(self) -> Workload:
        """What the planner computes memory and time from."""
        policy, shared = self.model_name_or_path, self.share_backbone.split(",")
        roles = [Role("actor", policy, trained=True)]
        if self.has_critic():
            start = self.critic_model or self.reward_model or policy
            own = dict(stage_setting="critic_zero_stage", on_first="critic" in shared)
            roles.append(Role("critic", start, True, trained=True, **own))
        reference = self.reference_model or policy
        # With adapters the reference stands on the actor's base, see models.build.
        frozen = [Role("reference", reference, on_first=self.lora_rank > 0 and reference == policy)]
        if self.reward_model:
            on_first = "reward" in shared
            frozen.append(Role("reward model", self.reward_model, scalar=True, on_first=on_first))
        if self.judge_model:
            frozen.append(Role("judge", self.judge_model, scalar=True, held_out_only=True))
        roles += [dataclasses.replace(r, stage_setting="reference_zero_stage") for r in frozen]
        return self.pick(
            Workload,
            roles=tuple(roles),
            length=self.max_prompt_length + self.max_response_length,
            predicted=self.max_response_length,
            rollout_rows=self.rollout_size(),
            several_turns=bool(self.environment),
            earlier_policy=self.algorithm == "nlpo",
        )
