"""Does a run fit, in which phase does it need most, how long does an iteration take, and what is
the cheapest change that makes it fit? Reads each model's config.json, and no weight.

Rows are taken at their full length, so a run on shorter ones needs less.
"""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from utils.distributed import host_memory, process_group, zero
from utils.distributed.optimizers import OPTIMIZERS
from utils.generation.weights import BUCKET_BYTES
from utils.models.adapters import Lora
from utils.models.freezing import Freezing
from utils.planner import memory, shapes, time
from utils.planner.shapes import Shape
from utils.planner.workload import Workload

GB = 10**9
# Of a GPU's free memory: its allocator leaves gaps, NCCL and cuBLAS take their buffers.
USABLE = {"cpu": 0.95, "cuda": 0.92}


@dataclass
class Plan:
    """Bytes a rank. phases: what happens → device bytes at the most meanwhile. parts: model →
    part → bytes that stay on the device. host: bytes that stay in CPU memory."""

    device: str
    phases: dict[str, int] = field(default_factory=dict)
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    host: dict[str, dict[str, int]] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    vllm: memory.Vllm | None = None  # on GPUs; on a CPU it is a part like others

    @property
    def worst(self) -> str:
        return max(self.phases, key=self.phases.get)

    @property
    def kept(self) -> int:
        return sum(sum(part.values()) for part in self.parts.values())

    @property
    def host_bytes(self) -> int:
        return sum(sum(part.values()) for part in self.host.values())

    @property
    def peak(self) -> int:
        """Device bytes at the most; on a CPU all bytes."""
        return self.phases[self.worst] + (self.host_bytes if self.device == "cpu" else 0)


def plan(work: Workload, dtype: str, ranks: int, device: str) -> Plan:
    """dtype: fp32, bf16 or fp16. device: cpu or cuda."""
    result, models = Plan(device), {}
    on_gpu = device == "cuda"
    own = Freezing(tuple(work.freeze), work.freeze_bottom_layers, tuple(work.trainable_modules))
    lora = Lora(work.lora_rank, work.lora_alpha, 0.0, tuple(work.lora_target_modules))
    lora = replace(lora, lora_variant=work.lora_variant) if work.lora_rank else None
    few = shapes.FewBits(4 if work.load_in_4bit else 8 if work.load_in_8bit else 0)
    for role in work.roles:
        frozen = own if role is work.roles[0] else shapes.NOTHING
        trains = lora if role.trained else None
        asked = role.path, role.scalar, work.trust_remote_code, frozen, trains, few
        asked += (work.value_heads and role is work.roles[0],)
        shape, stage = shapes.read(*asked), work.stage(role)
        if role.trained:
            stepper = OPTIMIZERS[work.optimizer]
            model = memory.trained(shape, dtype, stage, ranks, work.offload, on_gpu, stepper)
        else:
            model = memory.frozen(shape, dtype, stage, ranks, work.offload)
            if work.offload_frozen and on_gpu and stage < 3:
                # In CPU memory, and on the device while it scores.
                model.host, model.device = model.device, {}
                model.gathered += model.host["weights"]
        if role.on_first:  # adapters and head are its own
            held = model.host if "weights" in model.host else model.device
            held["weights"] = memory.SIZE[dtype] * (shape.trained if role.trained else 0)
        models[role.name], result.shapes[role.name] = model, shape
        result.parts[role.name], result.host[role.name] = model.device, model.host
    if work.ema_decay > 0:
        first = result.shapes[work.roles[0].name]
        weights = first.trained if lora else first.parameters
        average = 4 * (-(-weights // ranks) if work.zero_stage == 3 else weights)
        on_host = work.offload == "all" and work.zero_stage == 3
        (result.host if on_host else result.parts)["EMA"] = {"weights": average}
    if work.rollout_rows:
        _add_rollout(result, models, work, dtype, ranks)
    rows = work.micro_batch_rows()
    accumulation = work.global_batch_size * work.rows_a_sample // (rows * ranks)
    for role in work.roles:
        if role.trained:
            shape = result.shapes[role.name]
            run = _activations(shape, rows, work.length, dtype, work)
            head = _logits(shape, rows, work, dtype, device, training=True)
            peaks = memory.training_peak(models[role.name], run, head, accumulation)
            result.phases |= {f"{phase} {role.name}": result.kept + n for phase, n in peaks.items()}
    return result


def _activations(shape: Shape, rows: int, length: int, dtype: str, work: Workload):
    which = work.gradient_checkpointing, work.checkpoint_layers
    return shapes.activations(shape, rows, length, zero.DTYPES[dtype], *which)


def _logits(shape: Shape, rows: int, work: Workload, dtype: str, device: str, training: bool):
    return memory.logits(shape, rows * work.predicted, dtype, device, training, work.earlier_policy)


def _add_rollout(result: Plan, models: dict, work: Workload, dtype: str, ranks: int) -> None:
    """The phases generate and score; the KV cache stays."""
    if work.rollout_engine == "vllm":
        _add_vllm(result, work, dtype, ranks)
    else:
        _add_decoding(result, models, work, dtype, ranks)
    most, rows = 0, work.micro_batch_rows()
    for name, shape in result.shapes.items():
        run = _activations(shape, rows, work.length, dtype, work)
        head = _logits(shape, rows, work, dtype, result.device, training=False)
        weights = models[name].gathered
        if name == work.roles[0].name and work.rollout_engine != "vllm":
            weights = _gathered(models, work, shape, dtype)
        most = max(most, weights + max(run.inference, head))
    result.phases["score"] = result.kept + most


def _gathered(models: dict, work: Workload, shape: Shape, dtype: str) -> int:
    """Bytes of the policy's whole weights while it samples and scores."""
    if work.zero_stage == 3 and work.rollout_gather != "layer":
        return memory.SIZE[dtype] * shape.parameters
    return models[work.roles[0].name].gathered


def _add_vllm(result: Plan, work: Workload, dtype: str, ranks: int) -> None:
    """The phase generate: a bucket of weights, as it is, merged and packed, on its way to vLLM. A
    server of the run's own, too: on a CPU it takes the same memory, and never sleeps."""
    shape, size = result.shapes[work.roles[0].name], memory.SIZE[dtype]
    weights = size * shape.parameters
    if work.starts_vllm() and result.device == "cpu":
        decoding = memory.generating(shape, work.rollout_rows, work.decoded_length(), dtype)
        server = {"weights": weights, "KV cache": decoding["KV cache"]}
        result.parts["vLLM"] = {part: n // ranks for part, n in server.items()}
    elif work.starts_vllm():
        in_turns, cards = not work.rollout_devices, len(work.rollout_devices.split(","))
        most = work.decoded_length(), dtype, work.rollout_memory
        result.vllm = memory.vllm(shape, ranks if in_turns else cards, *most, in_turns)
        if in_turns:
            result.parts["vLLM"] = {"asleep": memory.ASLEEP}
    result.phases["generate"] = result.kept + 3 * min(weights, BUCKET_BYTES)


def _add_decoding(result: Plan, models: dict, work: Workload, dtype: str, ranks: int) -> None:
    """The phase generate, by our own decode loop."""
    policy = work.roles[0].name
    shape, rows, size = result.shapes[policy], work.rows_decoded(ranks), memory.SIZE[dtype]
    length = work.decoded_length()
    decoding = memory.generating(shape, rows, length, dtype)
    if work.earlier_policy:
        # A module with whole weights, its own cache, and each rank's part in fp32 for checkpoints.
        share = -(-shape.parameters // ranks) if work.zero_stage == 3 else shape.parameters
        kept = {"weights": size * shape.parameters, "copy": 4 * share}
        result.parts["earlier policy"] = kept | {"KV cache": decoding["KV cache"]}
        decoding["sampling"] += rows * shape.vocabulary * (size + memory.NUCLEUS)
    if not work.release_decode_memory:
        result.parts["rollout"] = {"KV cache": decoding.pop("KV cache")}
    gathered = _gathered(models, work, shape, dtype)
    prefill = rows * _activations(shape, 1, length - work.predicted, dtype, work).inference
    # The weights of matrix products, packed for the CPU's kernels.
    packed = size * (shape.multiplied - shape.in_few_bits) if result.device == "cpu" else 0
    cache = decoding.get("KV cache", 0)
    most = max(prefill, decoding["sampling"])
    result.phases["generate"] = result.kept + gathered + packed + cache + most


def seconds(
    planned: Plan, work: Workload, dtype: str, ranks: int, speed: time.Speed
) -> dict[str, float]:
    """Seconds of each part of an iteration."""
    length, rows = work.length, work.rows(ranks)
    # Of a row's tokens those that the head reads, on all of an iteration's rows.
    tokens, read = rows * length, rows * work.predicted
    parts = {}
    if work.rollout_rows:
        decoded, prompt = work.rows_decoded(ranks), length - work.predicted
        policy = planned.shapes[work.roles[0].name]
        parts["generate"] = time.decoding_seconds(
            policy, rows, decoded, prompt, work.predicted, dtype, speed
        )
        parts["score"] = sum(
            time.forward_flops(planned.shapes[role.name], tokens, length, read) / speed.flops
            for role in work.roles
            if not role.held_out_only
        )
    parts["train"] = 0.0
    steps = max(1, work.rollout_rows // work.global_batch_size)
    for role in work.roles:
        if role.trained:
            shape, checkpointing = planned.shapes[role.name], work.gradient_checkpointing
            passes = time.training_seconds(shape, tokens, length, read, checkpointing, speed)
            moments = OPTIMIZERS[work.optimizer].state_bytes
            step = time.optimizer_seconds(shape, ranks, work.stage(role), moments, speed)
            parts["train"] += work.ppo_epochs * (passes + steps * step)
    return parts


# What fits.


@dataclass(frozen=True)
class Machine:
    """device: cpu or cuda. memory: device bytes a rank may take. host: CPU bytes a rank may."""

    device: str
    ranks: int
    memory: float
    host: float

    def holds(self, plan: Plan) -> bool:
        fits = plan.peak <= self.memory * USABLE[self.device] and not self.vllm_problem(plan)
        return fits and (self.device == "cpu" or plan.host_bytes <= self.host * USABLE["cpu"])

    def vllm_problem(self, plan: Plan) -> str:
        """Why vLLM has no room; empty where it has, or there is none. Its cards are like ours."""
        if plan.vllm is None:
            return ""
        share, least = plan.vllm.share * self.memory, plan.vllm.least
        beside = plan.phases["generate"] - plan.parts.get("vLLM", {}).get("asleep", 0)
        asked = f"vLLM fills {share / GB:.1f} GB of a card (--rollout_memory {plan.vllm.share:g})"
        if least > share:
            return (
                f"{asked}, and weights with the keys and values of one row take {least / GB:.1f} "
                "GB; raise --rollout_memory, or split the model over more --rollout_devices"
            )
        if plan.vllm.in_turns and beside + share > self.memory * USABLE[self.device]:
            return (
                f"{asked} while the training keeps {beside / GB:.1f} GB there; lower "
                "--rollout_memory, or give vLLM cards of its own (--rollout_devices)"
            )
        return ""


def here(device: torch.device, ranks: int) -> Machine:
    """This machine as it is now, its memory shared by the ranks that run on it."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ranks)
    host = host_memory.free_bytes() / local
    if device.type == "cuda":
        return Machine("cuda", ranks, torch.cuda.mem_get_info(device)[0], host)
    return Machine("cpu", ranks, host, host)


def largest_micro_batch(work: Workload, dtype: str, machine: Machine) -> int:
    """The largest micro batch that fits and divides the batch, 0 where none does."""
    for n in work.micro_batch_sizes(machine.ranks):
        tried = replace(work, micro_batch_size=n, micro_batch_tokens=0)
        if machine.holds(plan(tried, dtype, machine.ranks, machine.device)):
            return n
    return 0


def changes(work: Workload, ranks: int) -> list[dict]:
    """Settings that save memory, the cheapest in time first."""
    smaller = [n for n in work.micro_batch_sizes(ranks) if n < work.micro_batch_size]
    possible = [{"micro_batch_tokens": 0, "micro_batch_size": n} for n in smaller]
    if work.micro_batch_tokens:
        possible.insert(0, {"micro_batch_tokens": 0})
    if not work.gradient_checkpointing:
        possible.append({"gradient_checkpointing": True})
    critic = {"critic_zero_stage": -1} if work.critic_zero_stage >= 0 else {}
    possible += [{"zero_stage": n} | critic for n in (1, 2, 3) if n > work.zero_stage]
    if work.offload == "none":
        possible.append({"offload": "optimizer", "zero_stage": max(work.zero_stage, 2)})
    if work.offload != "all":
        possible.append({"offload": "all", "zero_stage": 3} | critic)
    if work.rollout_rows and work.rollout_gather != "layer":
        possible.append({"rollout_gather": "layer", "zero_stage": 3} | critic)
    return possible


def cheapest_change(work: Workload, dtype: str, machine: Machine) -> tuple[dict, int] | None:
    """({setting: value}, ranks) of the cheapest change that fits, each tried by planning again;
    None where nothing does. As few changes as possible, then all of them, then more ranks."""
    possible = changes(work, machine.ranks)
    everything = _joined(possible)
    some = [_joined(c) for n in (1, 2, 3) for c in itertools.combinations(possible, n)]
    tries = [(change, machine.ranks) for change in (*some, everything)]
    tries += [(c, machine.ranks * n) for n in (2, 4, 8, 16) for c in ({}, everything)]
    for change, ranks in tries:
        tried = replace(work, **change)
        if tried.global_batch_size % (tried.micro_batch_size * ranks) == 0:
            there = replace(machine, ranks=ranks)
            if there.holds(plan(tried, dtype, ranks, machine.device)):
                return change, ranks
    return None


def _joined(parts) -> dict:
    return {key: value for part in parts for key, value in part.items()}


# What people read.


def first_lines(
    work: Workload, dtype: str, device: torch.device, say: Callable[[str], None]
) -> None:
    """At most three lines: the peak a rank, whether it fits, and what to change if not."""
    if not process_group.is_main():
        return
    try:
        machine = here(device, process_group.world_size())
        lines = summary(work, dtype, machine)
    except Exception as error:  # whatever a family's code raises: an estimate must not end a run
        lines = [f"plan: not estimated: {type(error).__name__}: {error}".split("\n")[0][:200]]
    for line in lines:
        say(line)


def summary(work: Workload, dtype: str, machine: Machine) -> list[str]:
    planned = plan(work, dtype, machine.ranks, machine.device)
    where = "CPU memory" if machine.device == "cpu" else "GPU memory"
    line = f"plan: {planned.peak / GB:.2f} GB of {where} a rank at most ({planned.worst})"
    if machine.device != "cpu" and planned.host_bytes:
        line += f", {planned.host_bytes / GB:.2f} GB of CPU memory"
    line += f"; free: {machine.memory / GB:.1f} GB"
    if machine.holds(planned):
        return [line + ": fits"]
    if problem := machine.vllm_problem(planned):
        return [line, f"plan: WARNING: {problem}"]
    change = cheapest_change(work, dtype, machine)
    mend = (
        "no change of micro batch, checkpointing, ZeRO, offload or 16 × the ranks makes it fit"
        if change is None
        else "the cheapest change that fits: " + as_flags(*change, machine.ranks)
    )
    return [line, f"plan: WARNING: it will likely run out of memory; {mend}"]


def as_flags(change: dict, ranks: int, before: int) -> str:
    """A change as the command line that makes it."""
    words = [f"--{key} {str(value).lower()}" for key, value in change.items()]
    return " ".join(words) + (f" on {ranks} ranks" if ranks != before else "")
