"""A step's models, lengths and batches put together: bytes in each phase, seconds an iteration."""

from dataclasses import dataclass

from utils.distributed import zero
from utils.planner import memory as plan_memory
from utils.planner import shapes as plan_shapes
from utils.planner import time as plan_time
from utils.planner.memory import ModelBytes
from utils.planner.shapes import Shape

ANSWERS = 2  # to a comparison of step 2; K-wise rankings have more


@dataclass(frozen=True)
class Role:
    """One model of a step: where its config is, and what becomes of it."""

    name: str
    path: str
    scalar: bool
    trained: bool
    stage: int


@dataclass
class Plan:
    """Bytes a rank. phases: what happens → device bytes at the most meanwhile. parts: model →
    part → bytes that stay on the device. host: bytes that stay in CPU memory."""

    step: str
    phases: dict[str, int]
    parts: dict[str, dict[str, int]]
    host: dict[str, dict[str, int]]
    shapes: dict[str, Shape]
    device: str

    @property
    def worst(self) -> str:
        return max(self.phases, key=self.phases.get)

    @property
    def host_bytes(self) -> int:
        return sum(sum(part.values()) for part in self.host.values())

    @property
    def peak(self) -> int:
        """Device bytes at the most; on a CPU all bytes."""
        return self.phases[self.worst] + (self.host_bytes if self.device == "cpu" else 0)


def roles_of(step: str, config) -> list[Role]:
    name, stage = config.model_name_or_path, config.zero_stage
    if step != "ppo":
        return [Role("model", name, step == "reward", True, stage)]
    found = [Role("actor", name, False, True, stage)]
    if config.has_critic():
        start = config.critic_model or config.reward_model or name
        found.append(Role("critic", start, True, True, config.stage_of_critic()))
    stage = config.stage_of_reference()
    found.append(Role("reference", config.reference_model or name, False, False, stage))
    for role, path in (("reward model", config.reward_model), ("judge", config.judge_model)):
        if path:
            found.append(Role(role, path, True, False, stage))
    return found


def row_length(step: str, config) -> int:
    if step == "ppo":
        return config.max_prompt_length + config.max_response_length
    return config.max_length


def rows_at_once(step: str, config) -> int:
    """Rows of a micro-batch, all of full length."""
    if config.micro_batch_tokens:
        return max(1, config.micro_batch_tokens // row_length(step, config))
    return config.micro_batch_size * (ANSWERS if step == "reward" else 1)


def plan(step: str, config, dtype: str, ranks: int, device: str) -> Plan:
    """The Plan of `step` with these settings on that many ranks. dtype: fp32, bf16 or fp16."""
    found = Plan(step, {}, {}, {}, {}, device)
    models: dict[str, ModelBytes] = {}
    for role in roles_of(step, config):
        shape = plan_shapes.read(role.path, role.scalar, config.trust_remote_code)
        if role.trained:
            on_gpu = device == "cuda"
            model = plan_memory.trained(shape, dtype, role.stage, ranks, config.offload, on_gpu)
        else:
            model = plan_memory.frozen(shape, dtype, role.stage, ranks, config.offload)
            if step == "ppo" and config.offload_frozen and device == "cuda" and role.stage < 3:
                # In CPU memory, and on the device while it scores.
                model.host, model.device = model.device, {}
                model.gathered = model.host["weights"]
        models[role.name], found.shapes[role.name] = model, shape
        found.parts[role.name], found.host[role.name] = model.device, model.host
    if step == "ppo" and config.ema_decay > 0:
        average = plan_memory.average(found.shapes["actor"], config.zero_stage, ranks)
        on_host = config.offload == "all" and config.zero_stage == 3
        (found.host if on_host else found.parts)["EMA"] = {"weights": average}
    if step == "ppo":
        _add_rollout(found, models, config, dtype, ranks)
    _add_training(found, models, config, dtype, ranks)
    return found


def _kept(found: Plan) -> int:
    return sum(sum(part.values()) for part in found.parts.values())


def _add_rollout(found: Plan, models: dict[str, ModelBytes], config, dtype: str, ranks: int):
    """The phases generate and score; the KV cache stays."""
    actor, length = found.shapes["actor"], row_length("ppo", config)
    rows = rows_decoded(config, ranks)
    decoding = plan_memory.generating(actor, rows, length, dtype)
    if not config.release_decode_memory:
        found.parts["rollout"] = {"KV cache": decoding.pop("KV cache")}
    gathered = 0
    if config.zero_stage == 3:
        whole = plan_memory.SIZE[dtype] * actor.parameters
        gathered = whole if config.rollout_gather != "layer" else models["actor"].gathered
    torch_dtype = zero.DTYPES[dtype]
    prompts = plan_shapes.activations(actor, 1, config.max_prompt_length, torch_dtype, False)
    packed = plan_memory.SIZE[dtype] * actor.multiplied if found.device == "cpu" else 0
    most = max(rows * prompts.inference, decoding["sampling"])
    cache = decoding.get("KV cache", 0)
    found.phases["generate"] = _kept(found) + gathered + packed + cache + most
    most = 0
    for name, shape in found.shapes.items():
        micro = rows_at_once("ppo", config)
        run = plan_shapes.activations(
            shape, micro, length, torch_dtype, config.gradient_checkpointing
        )
        tokens = micro * config.max_response_length
        head = plan_memory.logits(shape, tokens, dtype, found.device, training=False)
        extra = gathered if name == "actor" else models[name].gathered
        most = max(most, extra + max(run.inference, head))
    found.phases["score"] = _kept(found) + most


def rows_decoded(config, ranks: int) -> int:
    """Sequences that a rank decodes at once."""
    rows = -(-config.rollout_size() // ranks)
    if config.generation_tokens:
        rows = min(rows, max(1, config.generation_tokens // row_length("ppo", config)))
    return rows


def _add_training(found: Plan, models: dict[str, ModelBytes], config, dtype: str, ranks: int):
    """The phases train and step of each trained model."""
    length, rows = row_length(found.step, config), rows_at_once(found.step, config)
    predicted = config.max_response_length if found.step == "ppo" else length
    each = ANSWERS if found.step == "reward" else 1
    accumulation = each * config.global_batch_size // (rows * ranks)
    for role in roles_of(found.step, config):
        if not role.trained:
            continue
        shape = found.shapes[role.name]
        run = plan_shapes.activations(
            shape, rows, length, zero.DTYPES[dtype], config.gradient_checkpointing
        )
        head = plan_memory.logits(shape, rows * predicted, dtype, found.device, training=True)
        peaks = plan_memory.training_peak(models[role.name], run, head, accumulation, _kept(found))
        found.phases |= {f"{phase} {role.name}": n for phase, n in peaks.items()}


def seconds(found: Plan, config, dtype: str, ranks: int, speed: plan_time.Speed) -> dict:
    """Seconds of each part of an iteration: an optimizer step, in step 3 a rollout with all its
    optimizer steps."""
    shapes, length = found.shapes, row_length(found.step, config)
    checkpointing = config.gradient_checkpointing
    if found.step != "ppo":
        shape = shapes["model"]
        rows = config.global_batch_size / ranks * (ANSWERS if found.step == "reward" else 1)
        tokens = rows * length
        train = plan_time.training_seconds(shape, tokens, length, tokens, checkpointing, speed)
        step = plan_time.optimizer_seconds(shape, ranks, config.zero_stage, speed)
        return {"train": train + step}
    response = config.max_response_length
    rows = -(-config.rollout_size() // ranks)
    generate = plan_time.decoding_seconds(
        shapes["actor"],
        rows,
        rows_decoded(config, ranks),
        config.max_prompt_length,
        response,
        dtype,
        speed,
    )
    score = sum(
        plan_time.forward_flops(s, rows * length, length, rows * response) / speed.flops
        for name, s in shapes.items()
        if name != "judge"
    )
    train = 0.0
    for role in roles_of("ppo", config):
        if role.trained:
            shape = shapes[role.name]
            once = plan_time.training_seconds(
                shape, rows * length, length, rows * response, checkpointing, speed
            )
            step = plan_time.optimizer_seconds(shape, ranks, role.stage, speed)
            train += config.ppo_epochs * (once + config.minibatches() * step)
    return {"generate": generate, "score": score, "train": train}
