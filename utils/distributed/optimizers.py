"""The optimizers that --optimizer names: how each is made, and what it keeps of a weight."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Optimizer:
    """make(groups, lr=, betas=) → a torch Optimizer. state_bytes: what it keeps of a weight, beside
    the fp32 weight. step_bytes: what a step on a CPU takes beside that, of one weight of the tensor
    that it steps on. package: what it comes from, and what installs it."""

    make: Callable
    meaning: str
    state_bytes: float
    step_bytes: float = 0.0
    package: str = ""
    install: str = ""


def _adamw(groups: list[dict], **settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True, **settings)


def _adamw8bit(groups: list[dict], **settings) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **settings)


OPTIMIZERS = {
    "adamw": Optimizer(_adamw, "AdamW, moments in fp32", 8.0),
    "adamw8bit": Optimizer(
        _adamw8bit,
        "AdamW of bitsandbytes, moments in 8 bits with a scale for each 256",
        2 + 2 * 4 / 256,
        # bitsandbytes on a CPU makes moments, weights and denominator whole again.
        step_bytes=20.0,
        package="bitsandbytes",
        install="pip install -r requirements-quantised.txt",
    ),
}


def check(name: str) -> None:
    """SystemExit where the package of optimizer `name` is not installed."""
    entry = OPTIMIZERS[name]
    if entry.package and importlib.util.find_spec(entry.package) is None:
        raise SystemExit(
            f"optimizer={name} is of the package {entry.package}, which is not installed: "
            f"{entry.install}, or set --optimizer adamw"
        )


# Moments in 8 bits.

STATE = ("state1", "state2", "absmax1", "absmax2")  # the tensors of bitsandbytes' state


def in_blocks(optimizer: torch.optim.Optimizer) -> bool:
    """Does it keep moments in blocks of 8 bits?"""
    return hasattr(optimizer, "name2qmap")


def make_state(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> None:
    """The state of `tensor` as the first step of an 8-bit optimizer would make it."""
    group = optimizer.param_groups[0]
    params, group["params"] = group["params"], [tensor]  # under ZeRO-3 it is in no group now
    optimizer.init_state(group, tensor, 0, 0)
    group["params"] = params
