"""CPU memory of this machine: how much is free, copies to a device, frozen models kept there."""

import torch
from torch import nn


def free_bytes() -> int:
    """What all processes of this machine may still take together."""
    with open("/proc/meminfo", encoding="ascii") as file:
        lines = dict(line.split(":") for line in file)
    return int(lines["MemAvailable"].split()[0]) * 1024


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`, without waiting for the work that the device has yet to do.

    From ordinary memory a copy would be in line behind all of it, and the CPU with it.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    # What has gaps would go through ordinary memory once more.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


class FrozenOffload:
    """Frozen modules that a forward pass brings to `device` and `park` sends back.

    Frozen weights never change, so the copy in (pinned) CPU memory is made once and parking is
    forgetting the one on the device.
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
