"""Exponential moving average of a model's weights, in fp32, under every ZeRO stage."""

import torch
from torch import nn

from utils.distributed import process_group, zero
from utils.models import adapters


class EMA:
    """`shadow ← decay · shadow + (1 − decay) · weight`, once an optimizer step.

    Where ZeRO-3 shards a weight, each rank averages its own shard, and there is no all-gather until
    the weights are asked for. (What is written into a gathered parameter without `modifier_rank` is
    thrown away.)
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.module = module
        self.shadow = {n: zero.local(p).float().clone() for n, p in adapters.own_of(module)}

    @torch.no_grad()
    def update(self) -> None:
        for name, p in adapters.own_of(self.module):
            self.shadow[name].lerp_(zero.local(p).float(), 1.0 - self.decay)

    def whole(self, name: str, p: nn.Parameter) -> torch.Tensor:
        """The average of one weight, in fp32. A collective where it is sharded."""
        from deepspeed.accelerator import get_accelerator

        if not hasattr(p, "ds_id"):
            return self.shadow[name]
        # With weights offloaded the shard lies on the CPU, where NCCL cannot gather.
        shard = self.shadow[name].to(get_accelerator().current_device_name())
        return zero.all_gathered([shard], [p])[0]

    @torch.no_grad()
    def state_dict(self, copy: zero.Copy = zero.to_cpu) -> dict[str, torch.Tensor]:
        """Whole averaged weights on the CPU, each in its weight's dtype.

        Every rank must call it; rank 0 gets the weights, others an empty dict.
        """
        state = {}
        for name, p in adapters.own_of(self.module):
            whole = self.whole(name, p)
            if process_group.is_main():
                state[name] = copy(whole, p.dtype)
        return state
