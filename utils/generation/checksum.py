"""A number that two processes compare to see that they hold the same weights, bit for bit."""

import torch

PART = 2**22  # words at once: their products, summed, stay below 2**63


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> int:
    """Of the bits and their places, on the tensor's device; 64 bits."""
    words = (
        tensor.detach()
        .contiguous()
        .view(-1)
        .view(torch.int16 if tensor.itemsize > 1 else torch.int8)
    )
    total = 0
    for number, part in enumerate(words.split(PART), start=1):
        places = torch.arange(1, len(part) + 1, device=part.device)
        total += number * int((part.long() * places).sum())
    return total % 2**64
