"""The tables of docs/scaling.md: PPO of four models of one size, reckoned by the planner.

    python benchmarks/scaling_table.py --memory_gb 80 [--tflops 140] [--bandwidth 1300]
    python benchmarks/scaling_table.py --adapters --memory_gb 24 --ranks 1 --shapes 7b

The common work: 1,024 prompts of 1,024 tokens, 1,024 new tokens each, optimizer steps of 128
sequences, bf16, gradient checkpointing, no EMA. For each shape and number of GPUs the fastest of
SETTINGS that fits, each with the largest micro batch that fits (at most 16; four times as many are
decoded at once), and a floor of the time. --adapters: of rank 16 beside frozen weights, for each of
ADAPTED that fits, with its largest micro batch.
"""

import argparse
import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from step3_ppo.config import PPOConfig  # noqa: E402
from utils.distributed.program import quiet_libraries  # noqa: E402
from utils.planner import plan as planner
from utils.planner import time as plan_time  # noqa: E402

SHAPES = ("7b", "13b", "34b", "70b")
SETTINGS = [  # the least traffic first
    {"zero_stage": 1},
    {"zero_stage": 2},
    {"zero_stage": 3},
    {"zero_stage": 3, "offload": "optimizer"},
    {"zero_stage": 3, "offload": "all"},
    {"zero_stage": 3, "offload": "all", "rollout_gather": "layer"},
]
SHARED = {"share_backbone": "actor,critic,reward"}
ADAPTED = [
    {"zero_stage": 0},
    {"zero_stage": 0} | SHARED,
    {"zero_stage": 0, "load_in_4bit": True} | SHARED,
    {"zero_stage": 3, "rollout_gather": "layer"} | SHARED,
]
MICRO_BATCHES = (16, 8, 4, 2, 1)


def config_of(shape: str, at_once: int, **settings) -> PPOConfig:
    """The common work; at_once: sequences a rank decodes together."""
    folder = str(ROOT / "docs/shapes" / shape)
    return PPOConfig(
        output_dir="-",
        model_name_or_path=folder,
        reward_model=folder,
        prompt_data=["-"],
        prompts_per_rollout=1024,
        global_batch_size=128,
        max_prompt_length=1024,
        max_response_length=1024,
        gradient_checkpointing=True,
        ema_decay=0.0,
        generation_tokens=at_once * 2048,
        **settings,
    )


def fastest_that_fits(shape: str, machine: planner.Machine, speed: plan_time.Speed):
    """(settings, config, plan, seconds) with the largest micro batch of each setting that fits,
    the fastest of them; None where none does. Without a time where layers come one by one."""
    found = []
    for settings in SETTINGS:
        for micro in MICRO_BATCHES:
            if 128 % (micro * machine.ranks):
                continue
            config = config_of(shape, 4 * micro, micro_batch_size=micro, **settings)
            plan = planner.plan(config.workload(), "bf16", machine.ranks, "cuda")
            if machine.holds(plan):
                parts = planner.seconds(plan, config.workload(), "bf16", machine.ranks, speed)
                by_layer = config.rollout_gather == "layer"
                time = float("inf") if by_layer else sum(parts.values())
                found.append((settings, config, plan, time))
                break
    return min(found, key=lambda x: round(x[3], -1) if x[3] < 1e9 else x[3], default=None)


def those_that_fit(shape: str, machine: planner.Machine, speed: plan_time.Speed):
    """(config, plan, seconds) of those of ADAPTED that fit, each with its largest micro batch."""
    for settings in ADAPTED:
        for micro in MICRO_BATCHES:
            if 128 % (micro * machine.ranks):
                continue
            given = dict(lora_rank=16, release_decode_memory=True, micro_batch_size=micro)
            config = config_of(shape, 4 * micro, **settings, **given)
            plan = planner.plan(config.workload(), "bf16", machine.ranks, "cuda")
            if machine.holds(plan):
                parts = planner.seconds(plan, config.workload(), "bf16", machine.ranks, speed)
                yield config, plan, sum(parts.values())
                break


def show_adapted(shapes, ranks, machine_of, speed: plan_time.Speed) -> None:
    print("| model | GPUs | weights | on one base | ZeRO | micro batch | GB a GPU | s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape, n in itertools.product(shapes, ranks):
        found = list(those_that_fit(shape, machine_of(n), speed))
        if not found:
            print(f"| {shape} | {n} | does not fit | | | | | |", flush=True)
        for config, plan, seconds in found:
            weights = "4 bits" if config.load_in_4bit else "bf16"
            models = "all four" if config.share_backbone else "actor, reference"
            time = "not reckoned" if config.zero_stage == 3 else f"{seconds:.0f}"
            print(
                f"| {shape} | {n} | {weights} | {models} | {config.zero_stage} | "
                f"{config.micro_batch_size} | {plan.peak / 1e9:.0f} | {time} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory_gb", type=float, required=True, help="of one GPU")
    parser.add_argument("--host_gb", type=float, default=128.0, help="CPU memory a GPU")
    parser.add_argument("--tflops", type=float, default=140.0, help="reached in matrix products")
    parser.add_argument("--bandwidth", type=float, default=1300.0, help="GB/s reached in decoding")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--adapters", action="store_true", help="train adapters, not all weights")
    asked = parser.parse_args()
    quiet_libraries()
    speed = plan_time.Speed(asked.tflops * 1e12, asked.bandwidth * 1e9, measured=False)
    if asked.adapters:

        def machine_of(ranks: int) -> planner.Machine:
            return planner.Machine("cuda", ranks, asked.memory_gb * 1e9, asked.host_gb * 1e9)

        show_adapted(asked.shapes, asked.ranks, machine_of, speed)
        return
    print("| model | GPUs | ZeRO | offload | gather | micro batch | GB a GPU | CPU GB a GPU | s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape in asked.shapes:
        for ranks in asked.ranks:
            machine = planner.Machine("cuda", ranks, asked.memory_gb * 1e9, asked.host_gb * 1e9)
            found = fastest_that_fits(shape, machine, speed)
            if found is None:
                print(f"| {shape} | {ranks} | does not fit | | | | | | |", flush=True)
                continue
            settings, config, plan, seconds = found
            gather = settings.get("rollout_gather", "rollout" if config.zero_stage == 3 else "-")
            # A layer's weights come over the links for each token: no bandwidth of the GPU's says.
            time = "not reckoned" if gather == "layer" else f"{seconds:.0f}"
            print(
                f"| {shape} | {ranks} | {config.zero_stage} | {config.offload} | {gather} | "
                f"{config.micro_batch_size} | {plan.peak / 1e9:.0f} | "
                f"{plan.host_bytes / 1e9:.0f} | {time} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
