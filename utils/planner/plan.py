"""What a run needs before it starts: memory a rank, what fits, the cheapest change, the time.

    python -m utils.planner --step ppo --config run.yaml --ranks 8 --memory_gb 80
    python -m utils.planner --step sft --model_name_or_path docs/shapes/7b --ranks 1

Reads the step's own settings (flags win over --config) and each model's config.json, and no weight.
--memory_gb plans for GPUs of that size; without it for this machine. Rows are taken at their full
length, so a run on shorter ones needs less.
"""

import dataclasses
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from utils.distributed import host_memory, process_group, zero
from utils.planner import time as plan_time
from utils.planner.steps import Plan, plan, seconds

GB = 10**9
# Of a GPU's free memory: its allocator leaves gaps, NCCL and cuBLAS take their buffers.
USABLE = {"cpu": 0.95, "cuda": 0.92}
STEPS = {
    "sft": ("step1_sft.config", "SFTConfig", ["--sft_data", "-"]),
    "reward": ("step2_reward.config", "RewardConfig", ["--preference_data", "-"]),
    "ppo": ("step3_ppo.config", "PPOConfig", ["--prompt_data", "-", "--reward_function", "-"]),
}


@dataclass(frozen=True)
class Machine:
    """device: cpu or cuda. memory: device bytes a rank may take. host: CPU bytes a rank may."""

    device: str
    ranks: int
    memory: float
    host: float

    def holds(self, plan: Plan) -> bool:
        fits = plan.peak <= self.memory * USABLE[self.device]
        return fits and (self.device == "cpu" or plan.host_bytes <= self.host * USABLE["cpu"])


def here(device: torch.device, ranks: int) -> Machine:
    """This machine as it is now, its memory shared by the ranks that run on it."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ranks)
    host = host_memory.free_bytes() / local
    if device.type == "cuda":
        return Machine("cuda", ranks, torch.cuda.mem_get_info(device)[0], host)
    return Machine("cpu", ranks, host, host)


# What fits.


def micro_batches(config, ranks: int) -> list[int]:
    """Every --micro_batch_size that divides a rank's share of the global batch, largest first."""
    share = config.global_batch_size // ranks
    return [n for n in range(share, 0, -1) if share % n == 0]


def largest_micro_batch(step: str, config, dtype: str, machine: Machine) -> int:
    """The largest micro batch that fits and divides the batch, 0 where none does."""
    for n in micro_batches(config, machine.ranks):
        tried = dataclasses.replace(config, micro_batch_size=n, micro_batch_tokens=0)
        if machine.holds(plan(step, tried, dtype, machine.ranks, machine.device)):
            return n
    return 0


def changes(config, ranks: int) -> list[dict]:
    """Settings that save memory, the cheapest in time first."""
    found: list[dict] = []
    if config.micro_batch_tokens:
        found.append({"micro_batch_tokens": 0})
    smaller = [n for n in micro_batches(config, ranks) if n < config.micro_batch_size]
    found += [{"micro_batch_tokens": 0, "micro_batch_size": n} for n in smaller]
    if not config.gradient_checkpointing:
        found.append({"gradient_checkpointing": True})
    critic = {"critic_zero_stage": -1} if hasattr(config, "critic_zero_stage") else {}
    found += [{"zero_stage": n} | critic for n in (1, 2, 3) if n > config.zero_stage]
    if config.offload == "none":
        found.append({"offload": "optimizer", "zero_stage": max(config.zero_stage, 2)})
    if config.offload != "all":
        found.append({"offload": "all", "zero_stage": 3} | critic)
    if hasattr(config, "rollout_gather") and config.rollout_gather != "layer":
        found.append({"rollout_gather": "layer", "zero_stage": 3} | critic)
    return found


def cheapest_change(step: str, config, dtype: str, machine: Machine) -> tuple[dict, int] | None:
    """({setting: value}, ranks) of the cheapest change that fits, each tried by planning again;
    None where nothing does. One change alone is preferred, then as few as needed, then ranks."""
    ranks = machine.ranks

    def fits(change: dict, ranks: int) -> bool:
        tried = dataclasses.replace(config, **change)
        if tried.global_batch_size % (tried.micro_batch_size * ranks):
            return False
        there = dataclasses.replace(machine, ranks=ranks)
        return there.holds(plan(step, tried, dtype, ranks, machine.device))

    possible = changes(config, ranks)
    for change in possible:
        if fits(change, ranks):
            return change, ranks
    together: list[dict] = []
    for change in possible:
        together.append(change)
        if not fits(_joined(together), ranks):
            continue
        for one in list(together):
            rest = [c for c in together if c is not one]
            if fits(_joined(rest), ranks):
                together = rest
        return _joined(together), ranks
    for more in (2 * ranks, 4 * ranks, 8 * ranks, 16 * ranks):
        for change in ({}, _joined(possible)):
            if fits(change, more):
                return change, more
    return None


def _joined(parts: list[dict]) -> dict:
    return {key: value for part in parts for key, value in part.items()}


def as_flags(change: dict, ranks: int, before: int) -> str:
    """A change as the command line that makes it."""
    words = [f"--{key} {str(value).lower()}" for key, value in change.items()]
    return " ".join(words) + (f" on {ranks} ranks" if ranks != before else "")


# What people read.


def first_lines(step: str, config, device: torch.device, say: Callable[[str], None]) -> None:
    """At most three lines: the peak a rank, whether it fits, and what to change if not."""
    if not process_group.is_main():
        return
    try:
        ranks = process_group.world_size()
        dtype = zero.resolve_dtype(config.dtype, device)
        machine = here(device, ranks)
        lines = summary(step, config, dtype, machine)
    except Exception as error:  # whatever a family's code raises: an estimate must not end a run
        lines = [f"plan: not estimated: {type(error).__name__}: {error}".split("\n")[0][:200]]
    for line in lines:
        say(line)


def summary(step: str, config, dtype: str, machine: Machine) -> list[str]:
    found = plan(step, config, dtype, machine.ranks, machine.device)
    where = "CPU memory" if machine.device == "cpu" else "GPU memory"
    line = f"plan: {found.peak / GB:.2f} GB of {where} a rank at most ({found.worst})"
    if machine.device != "cpu" and found.host_bytes:
        line += f", {found.host_bytes / GB:.2f} GB of CPU memory"
    line += f"; free: {machine.memory / GB:.1f} GB"
    if machine.holds(found):
        return [line + ": fits"]
    change = cheapest_change(step, config, dtype, machine)
    mend = (
        "no change of micro batch, checkpointing, ZeRO, offload or 16 × the ranks makes it fit"
        if change is None
        else "the cheapest change that fits: " + as_flags(*change, machine.ranks)
    )
    return [line, f"plan: WARNING: it will likely run out of memory; {mend}"]


def table(found: Plan) -> str:
    """Bytes a rank in GB: what stays, model by model, then the most in each phase."""
    lines = [f"{'what stays':16} {'part':12} {'device GB':>10} {'host GB':>10}"]
    for name in {**found.parts, **found.host}:
        device, host = found.parts.get(name, {}), found.host.get(name, {})
        for part in {**device, **host}:
            numbers = [f"{d.get(part, 0) / GB:10.3f}" for d in (device, host)]
            lines.append(f"{name:16} {part:12} {' '.join(numbers)}")
    lines.append(f"{'phase':29} {'at most':>10}")
    for phase, n in found.phases.items():
        lines.append(f"{phase:29} {n / GB:10.3f}{'  ← peak' if phase == found.worst else ''}")
    return "\n".join(lines)


def main() -> None:
    import argparse

    from utils.settings import command_line
    from utils.settings.fields import ConfigError

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
    module, name, needed = STEPS[asked.step]
    config_class = getattr(importlib.import_module(module), name)
    try:
        config = command_line.build(
            config_class, ["--output_dir", "-", *needed, *flags], asked.ranks
        )
    except ConfigError as error:
        raise SystemExit(f"these settings cannot work:\n{error}") from None
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    if asked.memory_gb:
        machine = Machine("cuda", asked.ranks, asked.memory_gb * GB, (asked.host_gb or 10**6) * GB)
        dtype = "bf16" if config.dtype == "auto" else config.dtype
    else:
        machine = here(device, asked.ranks)
        dtype = zero.resolve_dtype(config.dtype, device)
    found = plan(asked.step, config, dtype, asked.ranks, machine.device)
    for role, shape in found.shapes.items():
        print(f"{role}: {shape.parameters:,} parameters")
    print(table(found))
    print("\n".join(summary(asked.step, config, dtype, machine)))
    most = largest_micro_batch(asked.step, config, dtype, machine)
    print(f"largest micro batch that fits: {most or 'none'}")
    if asked.tflops and asked.bandwidth:
        speed = plan_time.Speed(asked.tflops * 1e12, asked.bandwidth * GB, measured=False)
    else:
        speed = plan_time.measure(device, zero.DTYPES[dtype])
    parts = seconds(found, config, dtype, asked.ranks, speed)
    print(
        f"time an iteration: {sum(parts.values()):.1f} s at least ("
        + ", ".join(f"{name} {s:.1f}" for name, s in parts.items())
        + f") at {speed.flops / 1e12:.2f} TFLOP/s and {speed.bandwidth / GB:.0f} GB/s, "
        + ("measured on this device" if speed.measured else "as given")
    )
