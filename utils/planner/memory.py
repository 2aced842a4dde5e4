"""Bytes a rank holds for one model, by ZeRO stage, dtype and offload.

What DeepSpeed 0.19 keeps was read from its source and counted tensor by tensor on running engines
(tests/utils/planner/test_plan.py repeats the count), with the settings of zero.deepspeed_config.
"""

from dataclasses import dataclass, field

from utils.planner.shapes import Activations, Shape

SIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
BUCKET = int(5e7)  # numbers; zero.deepspeed_config's reduce_bucket_size
PLAIN_BUCKET = int(5e8)  # of the gradient reduction without a ZeRO optimizer (fixed in DeepSpeed)
GATHERED = int(1e9)  # numbers of whole weights at once under ZeRO-3: stage3_max_live_parameters
SUB_GROUP = int(1e9)  # numbers that ZeRO-3 steps on at once
# Logits at once, and how many of them are kept for the backward pass: those of
# utils/kernels/vocabulary_head.py, which this ground floor cannot import.
LOGITS_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
LOGITS_KEPT = 2**24


@dataclass
class ModelBytes:
    """One model on one rank. device, host: part → bytes that stay for the whole run. The rest
    comes and goes on the device while this model is trained."""

    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    gradients: int = 0  # of the whole backward pass, until the optimizer step
    first_gradient: int = 0  # of the head: there before the activations go
    gathered: int = 0  # whole weights under ZeRO-3
    buckets: int = 0  # for gradients, taken when the backward pass begins
    reducing: int = 0  # and when a bucket is full
    late: float = 1.0  # how much of the backward pass is done when the first bucket is full
    step: int = 0

    def kept(self) -> int:
        return sum(self.device.values())


def effective_stage(stage: int, dtype: str) -> int:
    """zero.deepspeed_config runs stage 0 as 1 where the weights are not fp32."""
    return 1 if stage == 0 and dtype != "fp32" else stage


def trained(shape: Shape, dtype: str, stage: int, ranks: int, offload: str, on_gpu: bool):
    """ModelBytes of a zero.TrainEngine around a model of this shape."""
    stage, size = effective_stage(stage, dtype), SIZE[dtype]
    n, share = shape.parameters, -(-shape.parameters // ranks)
    found = ModelBytes(first_gradient=0 if shape.scalar else size * shape.vocabulary * shape.hidden)
    if stage == 0:
        found.device = {"weights": size * n, "optimizer": 8 * n}
        found.gradients = size * n
        found.step = size * min(n, PLAIN_BUCKET)
        return found
    offloaded = offload != "none"
    optimizer = {"optimizer": 12 * share}  # fp32 weights and two moments
    bucket = size * max(min(n, BUCKET), shape.largest)
    # Buckets are taken whole, but on a CPU memory costs nothing until it is written.
    taken = size * BUCKET if on_gpu else 0
    found.late = min(1.0, BUCKET / n)
    accumulated = 2 if dtype == "fp16" else 4
    if stage < 3:
        found.device = {"weights": size * n}
        if stage == 1 and dtype == "bf16" and not offloaded:
            # DeepSpeed's BF16_Optimizer: whole gradients in fp32, kept, beside the bf16 ones.
            found.device["gradients"] = 4 * n
            found.gradients = size * n
            found.step = (size + 4) * min(n, PLAIN_BUCKET)
        elif stage == 1:
            found.gradients = (accumulated if dtype == "bf16" else size) * n
            found.buckets, found.reducing = taken, 2 * bucket - taken
            found.step = 4 * share
        else:
            found.gradients = accumulated * share
            # Two on a GPU, where one is reduced while the other fills.
            found.buckets = 2 * taken
            found.reducing = 2 * bucket + 4 * shape.largest - taken
            found.step = 8 * shape.largest  # norms are taken in fp64, a weight at a time
        if offloaded:
            found.device["buffers"] = 2 * size * shape.largest
            optimizer |= {"gradients": 4 * share, "weights": size * share}
    else:
        whole = size * shape.small if ranks > 1 else 0
        found.device = {"weights": size * share, "buffers": taken + whole}
        found.gathered = size * min(n, GATHERED)
        found.reducing = 3 * bucket - taken
        if offloaded:
            optimizer["gradients"] = 2 * 4 * share
            found.step = 4 * shape.largest
        else:
            found.device["gradients"] = accumulated * share
            found.step = 4 * min(share, SUB_GROUP)
        if offload == "all":
            optimizer["weights"] = found.device.pop("weights")
    if offloaded:
        found.host = optimizer
    else:
        found.device |= optimizer
    return found


def frozen(shape: Shape, dtype: str, stage: int, ranks: int, offload: str) -> ModelBytes:
    """ModelBytes of zero.frozen: whole, or sharded with ZeRO-3."""
    size, n = SIZE[dtype], shape.parameters
    if stage < 3:
        return ModelBytes(device={"weights": size * n})
    part = {"weights": size * -(-n // ranks)}
    gathered = size * min(n, GATHERED)
    if offload == "all":
        return ModelBytes(host=part, gathered=gathered)
    return ModelBytes(device=part, gathered=gathered)


def average(shape: Shape, stage: int, ranks: int) -> int:
    """Bytes of the fp32 EMA: of this rank's shard under ZeRO-3, else of all."""
    return 4 * (-(-shape.parameters // ranks) if stage == 3 else shape.parameters)


def logits(shape: Shape, tokens: int, dtype: str, device: str, training: bool) -> int:
    """Bytes that the head takes for `tokens` log-probabilities, the weight's gradient included."""
    if shape.scalar:
        return 0
    size, count = SIZE[dtype], tokens * shape.vocabulary
    # Logits, their fp32 copy, probabilities, slopes.
    at_once = min(count, LOGITS_AT_ONCE[device]) * (size + 4 + 4)
    if not training:
        return at_once
    kept = size * count if count <= LOGITS_KEPT else 0
    head = shape.vocabulary * shape.hidden
    return at_once + kept + 4 * head + (size * head if size < 4 else 0)


def training_peak(
    model: ModelBytes, found: Activations, head: int, accumulation: int, other_kept: int
) -> dict[str, int]:
    """Device bytes at the most, in the backward pass and in the optimizer step of one model,
    above what all models keep (`other_kept` is added)."""
    before = model.gradients if accumulation > 1 else 0
    first = before or min(model.first_gradient, model.gradients)
    backward = max(
        # Where the head is done, in the layer that needs most, and when gradients are reduced.
        found.held + head + before + model.buckets,
        found.peak + first + model.buckets,
        found.held * (1 - model.late) + model.gradients + model.buckets + model.reducing,
    )
    return {
        "train": other_kept + model.gathered + round(backward),
        "step": other_kept + model.gradients + model.step,
    }


def generating(shape: Shape, rows: int, length: int, dtype: str) -> dict[str, int]:
    """Device bytes of decoding `rows` at once up to `length` tokens each."""
    size = SIZE[dtype]
    return {
        "KV cache": size * shape.cache * rows * length,
        # The last position's logits in fp32, their exponentials and the running sum.
        "sampling": rows * shape.vocabulary * (size + 3 * 4),
    }
