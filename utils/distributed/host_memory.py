"""CPU memory of this machine, and the way from there to a device."""

import torch


def free_bytes() -> int:
    """What all processes of this machine may still take together."""
    with open("/proc/meminfo", encoding="ascii") as file:
        lines = dict(line.split(":") for line in file)
    return int(lines["MemAvailable"].split()[0]) * 1024


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`, without waiting for what that has yet to do.

    From ordinary memory a copy would be in line behind all work of the device, and the CPU with it.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    # What has gaps would go through ordinary memory once more.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)
