"""Bytes that one rank holds for one model, by ZeRO stage, dtype and offload.

What DeepSpeed 0.19 keeps was read from its source and counted tensor by tensor on running engines
(tests/utils/planner/test_memory.py repeats the count), with the settings of zero.deepspeed_config.
"""

from dataclasses import dataclass, field

from utils.distributed.optimizers import Optimizer
from utils.distributed.zero import MAX_LIVE_PARAMETERS, REDUCE_BUCKET
from utils.kernels import vocabulary_head
from utils.planner.shapes import Activations, Shape

SIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
PLAIN_BUCKET = int(5e8)  # of the gradient reduction without a ZeRO optimizer (fixed in DeepSpeed)
# Of each logit of an earlier policy: it, the likeliest first, their places (int64), sums, twice.
NUCLEUS = 4 + 4 + 8 + 4 + 4
# What vLLM keeps of a GPU while it sleeps, at level 1 and 2 (0.25 on an H100: 1.7 GiB, measured).
ASLEEP = 18 * 10**8
SUB_GROUP = int(1e9)  # numbers that ZeRO-3 steps on at once


@dataclass
class ModelBytes:
    """One model on one rank. device, host: part → bytes that stay for the whole run. The rest
    comes and goes on the device while this model is trained."""

    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    gradients: int = 0  # of the whole backward pass, until the optimizer step
    first_gradient: int = 0  # of the head: there before the activations go
    gathered: int = 0  # whole weights under ZeRO-3, or of one layer that is in few bits
    buckets: int = 0  # for gradients, taken when the backward pass begins
    reducing: int = 0  # and when a bucket is full
    late: float = 1.0  # how much of the backward pass is done when the first bucket is full
    step: int = 0


def trained(
    shape: Shape, dtype: str, stage: int, ranks: int, offload: str, on_gpu: bool, stepper: Optimizer
) -> ModelBytes:
    """Of a zero.TrainEngine around a model of this shape, frozen weights among them or not."""
    size, n, moments = SIZE[dtype], shape.trained, stepper.state_bytes
    first = size * shape.vocabulary * (shape.hidden * shape.trains_head + shape.q_width)
    if stage == 0 and dtype == "fp32":
        kept = {"weights": shape.weights(size), "optimizer": round(moments * n)}
        # A step goes weight by weight, the reduction of gradients in buckets of them.
        on_cpu = 0 if on_gpu else round(stepper.step_bytes * shape.largest)
        step = max(size * min(n, PLAIN_BUCKET), on_cpu)
        whole = size * shape.unpacked
        return ModelBytes(kept, gradients=size * n, first_gradient=first, step=step, gathered=whole)
    # zero.deepspeed_config runs stage 0 as 1 where the weights are not fp32.
    sharded = _zero_3 if stage == 3 else _zero_1 if stage < 2 else _zero_2
    # Buckets are taken whole, but on a CPU memory costs nothing until it is written.
    taken = size * REDUCE_BUCKET if on_gpu else 0
    model = sharded(shape, dtype, ranks, offload, taken)
    model.gathered += size * shape.unpacked
    model.first_gradient, model.late = first, min(1.0, REDUCE_BUCKET / n)
    share = -(-n // ranks)
    optimizer = {"optimizer": round((4 + moments) * share)}  # fp32 weights and moments
    if not on_gpu:
        model.step += round(stepper.step_bytes * share)
    if offload == "none":
        model.device |= optimizer
        return model
    if stage < 3:
        model.device["buffers"] = 2 * size * shape.largest
        model.host = optimizer | {"gradients": 4 * share, "weights": size * share}
    else:
        model.host = optimizer | {"gradients": 2 * 4 * share}
        if offload == "all":
            model.host["weights"] = model.device.pop("weights")
    return model


def _bucket(shape: Shape, size: int) -> int:
    return size * max(min(shape.trained, REDUCE_BUCKET), shape.largest)


def _zero_1(shape: Shape, dtype: str, ranks: int, offload: str, taken: int) -> ModelBytes:
    size, n = SIZE[dtype], shape.trained
    model = ModelBytes({"weights": shape.weights(size)})
    if dtype == "bf16" and offload == "none":
        # DeepSpeed's BF16_Optimizer: whole gradients in fp32, kept, beside the bf16 ones.
        model.device["gradients"] = 4 * n
        model.gradients = size * n
        model.step = (size + 4) * min(n, PLAIN_BUCKET)
    else:
        model.gradients = (4 if dtype == "bf16" else size) * n
        model.buckets, model.reducing = taken, 2 * _bucket(shape, size) - taken
        model.step = 4 * -(-n // ranks)
    return model


def _zero_2(shape: Shape, dtype: str, ranks: int, offload: str, taken: int) -> ModelBytes:
    size, share = SIZE[dtype], -(-shape.trained // ranks)
    return ModelBytes(
        {"weights": shape.weights(size)},
        gradients=(2 if dtype == "fp16" else 4) * share,
        buckets=2 * taken,  # on a GPU one is reduced while the other fills
        reducing=2 * _bucket(shape, size) + 4 * shape.largest - taken,
        step=8 * shape.largest,  # norms are taken in fp64, a weight at a time
    )


def _zero_3(shape: Shape, dtype: str, ranks: int, offload: str, taken: int) -> ModelBytes:
    size, share = SIZE[dtype], -(-shape.trained // ranks)
    whole = size * shape.small if ranks > 1 else 0
    weights = size * -(-shape.parameters // ranks)
    model = ModelBytes({"weights": weights, "buffers": taken + whole})
    model.gathered = size * min(shape.parameters, MAX_LIVE_PARAMETERS)
    model.reducing = 3 * _bucket(shape, size) - taken
    if offload == "none":
        model.device["gradients"] = (2 if dtype == "fp16" else 4) * share
        model.step = 4 * min(share, SUB_GROUP)
    else:
        model.step = 4 * shape.largest
    return model


def frozen(shape: Shape, dtype: str, stage: int, ranks: int, offload: str) -> ModelBytes:
    """Of zero.frozen: whole, or sharded with ZeRO-3."""
    size, n = SIZE[dtype], shape.parameters
    if stage < 3:
        return ModelBytes({"weights": shape.weights(size)}, gathered=size * shape.unpacked)
    part = {"weights": size * -(-n // ranks)}
    gathered = size * min(n, MAX_LIVE_PARAMETERS)
    kept = {"host": part} if offload == "all" else {"device": part}
    return ModelBytes(**kept, gathered=gathered)


def logits(
    shape: Shape, tokens: int, dtype: str, device: str, training: bool, nucleus: bool = False
) -> int:
    """Bytes that the head takes for `tokens` log-probabilities, the weight's gradient included.
    nucleus: over the tokens that an earlier policy allows."""
    if shape.scalar:
        return 0
    size, count = SIZE[dtype], tokens * shape.vocabulary
    # Logits, their fp32 copy, probabilities, slopes.
    at_once = min(count, vocabulary_head.CHUNK[device]) * (size + 4 + 4 + NUCLEUS * nucleus)
    if not training:
        return at_once
    kept = size * count if count <= vocabulary_head.KEPT else 0
    kept *= 3 if shape.q_width else 1  # of both Q heads too
    head = shape.vocabulary * (shape.hidden * shape.trains_head + shape.q_width)
    return at_once + kept + 4 * head + (size * head if size < 4 else 0)


def training_peak(
    model: ModelBytes, activations: Activations, head: int, accumulation: int
) -> dict[str, int]:
    """Device bytes at the most in the backward pass and in the optimizer step of one model, above
    what all models keep. head: as `logits` says. accumulation: micro-batches of the step."""
    before = model.gradients if accumulation > 1 else 0
    first = before or min(model.first_gradient, model.gradients)
    backward = max(
        # Where the head is done, in the layer that needs most, and when gradients are reduced.
        activations.held + head + before + model.buckets,
        activations.peak + first + model.buckets,
        activations.held * (1 - model.late) + model.gradients + model.buckets + model.reducing,
    )
    return {"train": model.gathered + round(backward), "step": model.gradients + model.step}


@dataclass(frozen=True)
class Vllm:
    """A server of vLLM's on each of its cards. share: of a card's memory, which it fills. least:
    bytes without which it does not start. in_turns: on the cards of the training?"""

    share: float
    least: int
    in_turns: bool


def vllm(shape: Shape, cards: int, length: int, dtype: str, share: float, in_turns: bool) -> Vllm:
    """Whole weights, adapters merged into them, and the keys and values of one row, over `cards`.
    The rest of its share it fills with those of more rows."""
    least = SIZE[dtype] * (shape.parameters + shape.cache * length) // cards
    return Vllm(share, least, in_turns)


def generating(shape: Shape, rows: int, length: int, dtype: str) -> dict[str, int]:
    """Device bytes of decoding `rows` at once up to `length` tokens each."""
    size = SIZE[dtype]
    return {
        "KV cache": size * shape.cache * rows * length,
        # The last position's logits in fp32, their exponentials and the running sum.
        "sampling": rows * shape.vocabulary * (size + 3 * 4),
    }
