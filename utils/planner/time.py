"""How long an iteration takes, from what this device was measured to do a second.

Counted are matrix products and the reading of weights and caches. Not counted: communication
between ranks, traffic of offloading, Python. So the estimate is a floor, near the truth where
models are large and ranks share fast links.
"""

from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer

from utils.planner.memory import SIZE
from utils.planner.shapes import Shape


@dataclass(frozen=True)
class Speed:
    """Of one rank. flops: multiply-adds count two. bandwidth: bytes read a second."""

    flops: float
    bandwidth: float
    measured: bool


def measure(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> Speed:
    """Matrix products and sums on this rank's device, each for about `seconds`."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    # Larger than any cache: 256 MB on CPUs, 2 GB on GPUs. A sum only reads; a copy would also
    # write, and on CPUs read what it writes.
    block = torch.zeros(2**29 if device.type == "cuda" else 2**26, device=device)

    def mean_seconds(work: str) -> float:
        timer = Timer(work, globals={"a": a, "b": block}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=seconds).mean

    product, total = mean_seconds("a @ a"), mean_seconds("b.sum()")
    return Speed(2 * size**3 / product, block.nbytes / total, measured=True)


def forward_flops(shape: Shape, tokens: float, length: int, head_tokens: float) -> float:
    """Of one forward pass: 2 a weight and token, the head at `head_tokens` only, and attention
    over on average half of `length`."""
    head = 0 if shape.scalar else shape.vocabulary * shape.hidden
    q = shape.vocabulary * shape.q_width
    attention = 2 * shape.layers * shape.hidden * length
    return tokens * (2 * (shape.multiplied - head) + attention) + 2 * head_tokens * (head + q)


def training_seconds(shape: Shape, tokens, length, head_tokens, checkpointing, speed) -> float:
    """Forward and backward (twice the forward where all weights are trained), and the forward once
    more with checkpointing."""
    # The gradients of frozen weights, a third of the work, are left out.
    times = 2 + shape.trained / shape.parameters + bool(checkpointing)
    return times * forward_flops(shape, tokens, length, head_tokens) / speed.flops


def decoding_seconds(
    shape: Shape, rows: int, at_once: int, prompt: int, response: int, dtype: str, speed: Speed
) -> float:
    """`rows` prompts of a rank, `at_once` at a time: one pass over the prompts, then a token at a
    time, for which every weight and the cache so far is read."""
    size, batches = SIZE[dtype], -(-rows // at_once)
    prefill = forward_flops(shape, rows * prompt, prompt, rows) / speed.flops
    cache = size * shape.cache * at_once * (prompt + response / 2)
    multiplied = shape.weights(size) - size * (shape.parameters - shape.multiplied)
    reading = (multiplied + cache) / speed.bandwidth
    computing = forward_flops(shape, at_once, 2 * prompt + response, at_once) / speed.flops
    return prefill + batches * response * max(reading, computing)


def optimizer_seconds(shape: Shape, ranks: int, stage: int, moments: float, speed: Speed) -> float:
    """Reading and writing of weights in fp32 and of moments, of so many bytes a weight, and reading
    of gradients."""
    each = 2 * (4 + moments) + 4
    return each * shape.trained / (ranks if stage else 1) / speed.bandwidth
