"""Which settings of step 3 cannot be together: each function yields what is wrong with a PPOConfig,
with the values and the flag that mends it."""

from collections.abc import Iterator

from step3_ppo.algorithm import ALGORITHMS
from utils.errors import UserError
from utils.generation import vllm_server
from utils.settings.fields import default_of


def of_rewards(config) -> Iterator[str]:
    """What scores the answers."""
    sources = config.reward_sources()
    if not config.reward_model and not sources:
        yield (
            "reward_model is empty; set --reward_model (step 2's output), --reward_function or "
            "--reward_url"
        )
    for name, default in (("reward_weights", []), ("reward_function_coef", 1.0)):
        if not sources and getattr(config, name) != default:
            yield (
                f"{name}={getattr(config, name)} is read only with --reward_function or "
                f"--reward_url; set one, or leave out --{name}"
            )
    if sources and config.reward_weights and len(config.reward_weights) != len(sources):
        yield (
            f"reward_weights={config.reward_weights} has {len(config.reward_weights)} numbers for "
            f"{len(sources)} of --reward_function and --reward_url; give --reward_weights one "
            "each"
        )


def of_rollouts(config) -> Iterator[str]:
    """Sizes, engines and memory."""
    rollout, size = config.rollout_size(), config.global_batch_size
    if rollout % max(size, 1):
        yield (
            f"prompts_per_rollout × samples_per_prompt = {config.prompts_per_rollout} × "
            f"{config.samples_per_prompt} = {rollout} is not divisible by global_batch_size="
            f"{size}; set --prompts_per_rollout to a multiple, or lower --global_batch_size"
        )
    if config.rollout_ahead and config.rollout_engine != "vllm":
        yield (
            f"rollout_ahead={config.rollout_ahead} needs an engine in processes of its own; set "
            "--rollout_engine vllm, or leave it out"
        )
    if config.rollout_ahead and (config.environment or config.dynamic_sampling):
        yield (
            f"rollout_ahead={config.rollout_ahead}: with --environment or --dynamic_sampling what "
            "is sampled follows from earlier answers of the same rollout; leave it out"
        )
    if config.rollout_engine == "vllm" and not config.rollout_url:
        try:
            vllm_server.python_named(config.vllm_python)
        except UserError as error:
            yield str(error)
    by_layer = config.zero_stage == 3 and config.rollout_gather == "layer"
    if by_layer and config.decode in ("static", "graph"):
        yield (
            f"decode={config.decode} and rollout_gather=layer: ranks that gather each layer "
            "together cannot replay a step apart; set --decode eager"
        )
    if config.offload_frozen and config.stage_of_reference() == 3:
        yield (
            "offload_frozen moves whole models and these are sharded by ZeRO-3; set "
            "--reference_zero_stage 0, or --offload all for shards in CPU memory"
        )
    for name in ("vllm_python", "rollout_devices", "rollout_memory"):
        value = getattr(config, name)
        if config.rollout_url and value != default_of(config.__dataclass_fields__[name]):
            yield (
                f"{name}={value} is of a server that the run starts, and rollout_url="
                f"{config.rollout_url} stands already; leave out --{name}"
            )
    shared = config.share_backbone.split(",")
    there = {"critic": config.has_critic(), "reward": bool(config.reward_model)}
    for name in (n for n, found in there.items() if n in shared and not found):
        yield (
            f"share_backbone={config.share_backbone}: this run has no {name} model; leave {name} "
            "out of --share_backbone"
        )
    for name, used in (("reference", config.lora_rank), ("critic", "critic" in shared)):
        stage = getattr(config, f"{name}_zero_stage")
        if used and stage >= 0 and (stage == 3) != (config.zero_stage == 3):
            yield (
                f"{name}_zero_stage={stage}: with adapters the {name} stands on the actor's base, "
                f"which is under ZeRO-{config.zero_stage}; leave out --{name}_zero_stage"
            )
    if config.rollout_engine == "deepspeed" and config.rollout_gather == "rollout":
        yield (
            "rollout_engine=deepspeed generates with the sharded module under ZeRO-3; set "
            "--rollout_gather auto, or --rollout_engine native"
        )


def of_algorithm(config) -> Iterator[str]:
    """What --algorithm asks for, and what it does not read."""
    rollout, size = config.rollout_size(), config.global_batch_size
    if ALGORITHMS[config.algorithm].one_step and (config.ppo_epochs, rollout) != (1, size):
        yield (
            f"algorithm={config.algorithm} has no ratio that would mend samples of an older "
            f"policy: set --ppo_epochs 1 (now {config.ppo_epochs}) and --global_batch_size "
            f"{rollout} (now {size}), one step a rollout"
        )
    for name in config.unread():
        yield f"algorithm={config.algorithm} does not read {name}; leave out --{name}"
    if config.algorithm == "nlpo" and config.rollout_engine in ("deepspeed", "vllm"):
        yield (
            "algorithm=nlpo draws among some tokens only, which rollout_engine="
            f"{config.rollout_engine} does not know; set --rollout_engine native"
        )
    if config.load_in_4bit or config.load_in_8bit:
        wants = {"algorithm": ("nlpo",), "rollout_engine": ("deepspeed",)}
        for name in (n for n, values in wants.items() if getattr(config, n) in values):
            yield (
                f"{name}={getattr(config, name)} copies the policy's weights, and those of "
                "--load_in_4bit and --load_in_8bit are packed; leave these out, or set "
                f"--{name} {'ppo' if name == 'algorithm' else 'native'}"
            )
    if config.algorithm == "trpo" and config.optimizer != "adamw":
        yield (
            f"algorithm=trpo takes steps back and keeps moments in fp32 for that, which optimizer="
            f"{config.optimizer} has not; leave out --optimizer"
        )
    if config.algorithm == "gspo" and config.action_level == "sequence":
        yield (
            "action_level=sequence: gspo's ratio is by the mean over the answer's tokens, not "
            "by their sum; leave out --action_level, or set --algorithm grpo"
        )
    if config.place_of_kl() == "loss" and config.estimator_of_kl() == "k1":
        yield (
            "kl_estimator=k1 with kl_in=loss: its gradient is 0 on average and holds nothing "
            "back; set --kl_estimator k3 or k2, or --kl_in reward"
        )
    if config.dynamic_sampling and not config.compares_groups():
        yield (
            f"dynamic_sampling={config.dynamic_sampling} is for algorithms that compare the "
            f"answers to a prompt, and {config.algorithm} does not; leave it out"
        )
    if config.overlong_penalty and not 0 < config.overlong_buffer <= config.max_response_length:
        yield (
            f"overlong_penalty needs 0 < overlong_buffer={config.overlong_buffer} ≤ "
            f"max_response_length={config.max_response_length}; set --overlong_buffer"
        )
    if config.compares_groups() and config.samples_per_prompt < 2:
        yield (
            f"algorithm={config.algorithm} compares the answers to one prompt and "
            f"samples_per_prompt={config.samples_per_prompt} gives none to compare with; set "
            "--samples_per_prompt 8"
        )


def of_loss(config) -> Iterator[str]:
    """Numbers of the loss, and the self-check."""
    if config.lora_dropout:
        yield (
            f"lora_dropout={config.lora_dropout}: PPO's ratio compares two passes, and noise "
            "between them is a silent fault; leave it out, or give --sft.lora_dropout to run_all.sh"
        )
    if 0 < config.dual_clip <= 1:
        yield f"dual_clip={config.dual_clip} must be above 1 (3 is usual), or 0 for off"
    if bool(config.ptx_coef) != bool(config.ptx_data):
        yield f"ptx_coef={config.ptx_coef} and ptx_data={config.ptx_data} need each other; set both"
    if config.kl_target > 0 and config.kl_coef == 0:
        yield "kl_target multiplies kl_coef=0, which stays 0; set --kl_coef above 0"
    if config.kl_target > 0 and config.kl_horizon <= config.rollout_size() * 0.2:
        yield (
            f"kl_horizon={config.kl_horizon} is too short for rollouts of {config.rollout_size()} "
            "sequences: kl_coef would jump; set --kl_horizon well above the rollout"
        )
    if config.check_only and config.self_check == "off":
        yield "check_only asks for the self-check and self_check=off refuses it; drop one"
