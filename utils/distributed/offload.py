"""Reference and reward models, in CPU memory between their uses."""

import torch
from torch import nn


class FrozenOffload:
    """Frozen modules that a forward pass brings to `device` and `park` sends away.

    Frozen weights never change, so the copy in (pinned) CPU memory is made once, parking is
    forgetting the one on the device, and a module that is used before it was asked for comes by
    itself.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device):
        self.device, self.parked = device, {}
        pin = device.type == "cuda"
        for module in modules:
            weights = [p.data.to("cpu", copy=True) for p in module.parameters()]
            self.parked[module] = [w.pin_memory() if pin else w for w in weights]
            module.register_forward_pre_hook(lambda module, _: self._bring(module))
        self.present = set(modules)
        self.park()

    def _bring(self, module: nn.Module) -> None:
        if module in self.present:
            return
        for p, weight in zip(module.parameters(), self.parked[module], strict=True):
            # On the stream of the forward pass, which so waits for it.
            p.data = weight.to(self.device, non_blocking=True, copy=True)
        self.present.add(module)

    def park(self) -> None:
        """Free the device of every module's weights. Those of each stay readable, on the CPU."""
        for module in self.present:
            for p, weight in zip(module.parameters(), self.parked[module], strict=True):
                p.data = weight
        self.present = set()
