"""Small jobs of the steps for running.run_ranks: (program, arguments).

Each has the flags that make it small; flags that a test gives come later and so win.
"""

# dtype auto means bf16 on some CPUs, which rounds three digits away.
TRAINING = {"tensorboard": "false", "dtype": "fp32", "packing": "off"}


def job(program: str, settings: dict, *flags) -> tuple[str, list]:
    """settings: flags by name without dashes; None: a flag without a value."""
    argv = []
    for name, value in settings.items():
        argv += [f"--{name}"] if value is None else [f"--{name}", value]
    return program, [*argv, *flags]


def sft(tiny, out, *flags):
    settings = {
        "model_name_or_path": tiny / "base_model",
        "sft_data": tiny / "data/sft.jsonl",
        "output_dir": out,
        "max_steps": 6,
        "global_batch_size": 16,
        "micro_batch_size": 4,
        "learning_rate": 3e-3,
        "max_length": 96,
        "eval_fraction": 0.1,
    }
    return job("step1_sft/main.py", settings | TRAINING, *flags)


def collect(tiny, policy, *flags):
    settings = {
        "policy": policy,
        "prompt_data": tiny / "data/prompts.jsonl",
        "output_file": tiny / "data/comparisons.jsonl",
        "max_response_length": 12,
        "num_prompts": 100,
        "overwrite": None,
        "dtype": "fp32",
    }
    return job("step2_reward/collect.py", settings, *flags)


def reward(tiny, policy, out, *flags, program="step2_reward/main.py"):
    settings = {
        "model_name_or_path": policy,
        "preference_data": tiny / "data/comparisons.jsonl",
        "output_dir": out,
        "max_steps": 5,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "learning_rate": 1e-3,
        "max_length": 96,
        "eval_fraction": 0.2,
    }
    return job(program, settings | TRAINING, *flags)


def preference(tiny, policy, out, *flags):
    return reward(tiny, policy, out, *flags, program="step3_preference/main.py")


def ppo(tiny, policy, reward_model, out, *flags):
    settings = {
        "model_name_or_path": policy,
        "reward_model": reward_model,
        "prompt_data": tiny / "data/prompts.jsonl",
        "output_dir": out,
        "max_steps": 3,
        "prompts_per_rollout": 16,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "ppo_epochs": 2,
        "learning_rate": 1e-3,
        "max_prompt_length": 48,
        "max_response_length": 12,
        "max_eval_rows": 8,
    }
    return job("step3_ppo/main.py", settings | TRAINING, *flags)
