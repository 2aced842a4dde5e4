"""What a run needs before it starts: memory a rank, what fits, the cheapest change, the time.

    python -m evaluation.plan --step ppo --config run.yaml --ranks 8 --memory_gb 80
    python -m evaluation.plan --step sft --model_name_or_path docs/shapes/7b --ranks 1

Reads the step's own settings (flags win over --config) and each model's config.json, and no weight.
--memory_gb plans for GPUs of that size; without it for this machine. Rows are taken at their full
length, so a run on shorter ones needs less.
"""

import argparse

import torch

from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig
from step3_preference.config import PreferenceConfig
from utils import report
from utils.distributed import program, zero
from utils.planner import plan as planner
from utils.planner.plan import GB, Machine, Plan
from utils.planner.time import Speed, measure
from utils.settings import command_line
from utils.settings.fields import ConfigError

# The flags stand for what a step must be told and no plan depends on.
STEPS = {
    "sft": (SFTConfig, ["--sft_data", "-"]),
    "reward": (RewardConfig, ["--preference_data", "-"]),
    "preference": (PreferenceConfig, ["--preference_data", "-"]),
    "ppo": (PPOConfig, ["--prompt_data", "-", "--reward_function", "-"]),
}


def table(plan: Plan) -> str:
    """Bytes a rank in GB: what stays, model by model, then the most in each phase."""
    kept = []
    for name in {**plan.parts, **plan.host}:
        device, host = plan.parts.get(name, {}), plan.host.get(name, {})
        for part in {**device, **host}:
            kept.append((name, part, *(f"{d.get(part, 0) / GB:.3f}" for d in (device, host))))
    phases = [
        (phase, f"{n / GB:.3f}", "← peak" if phase == plan.worst else "")
        for phase, n in plan.phases.items()
    ]
    return "\n".join(
        [
            report.table(kept, ("what stays", "part", "device GB", "host GB")),
            report.table(phases, ("phase", "at most GB", "")),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step", choices=STEPS, required=True)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--memory_gb", type=float, help="of one GPU; default: this machine")
    parser.add_argument("--host_gb", type=float, default=0.0, help="CPU memory a rank")
    parser.add_argument("--tflops", type=float, help="matrix products a rank; default: measured")
    parser.add_argument("--bandwidth", type=float, help="GB/s of its memory; default: measured")
    asked, flags = parser.parse_known_args()
    config_class, needed = STEPS[asked.step]
    try:
        config = command_line.build(
            config_class, ["--output_dir", "-", *needed, *flags], asked.ranks
        )
    except ConfigError as error:
        raise SystemExit(f"these settings cannot work:\n{error}") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked.memory_gb:
        machine = Machine("cuda", asked.ranks, asked.memory_gb * GB, (asked.host_gb or 10**6) * GB)
        dtype = "bf16" if config.dtype == "auto" else config.dtype
    else:
        machine = planner.here(device, asked.ranks)
        dtype = zero.resolve_dtype(config.dtype, device)
    work = config.workload()
    plan = planner.plan(work, dtype, asked.ranks, machine.device)
    for role, shape in plan.shapes.items():
        print(f"{role}: {shape.parameters:,} parameters")
    print(table(plan))
    print("\n".join(planner.summary(work, dtype, machine)))
    most = planner.largest_micro_batch(work, dtype, machine)
    print(f"largest micro batch that fits: {most or 'none'}")
    if asked.tflops and asked.bandwidth:
        speed = Speed(asked.tflops * 1e12, asked.bandwidth * GB, measured=False)
    else:
        speed = measure(device, zero.DTYPES[dtype])
    parts = planner.seconds(plan, work, dtype, asked.ranks, speed)
    print(
        f"time an iteration: {sum(parts.values()):.1f} s at least ("
        + ", ".join(f"{name} {s:.1f}" for name, s in parts.items())
        + f") at {speed.flops / 1e12:.2f} TFLOP/s and {speed.bandwidth / GB:.0f} GB/s, "
        + ("measured on this device" if speed.measured else "as given")
    )


if __name__ == "__main__":
    program.run(main)
