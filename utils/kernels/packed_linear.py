"""Linear layers whose weights are laid out for oneDNN, for as long as the weights stay as they are.

On a CPU torch multiplies fp32 matrices by MKL, which lays the weights out anew in every call, and
on AMD uses half of AVX-512's width. Measured on one core (Zen 5, AVX-512), layers of 256 to 688: 66
GFLOP/s against 131 at 32 rows, 100 against 245 at 2,048; bf16 218 against 262 at 32 rows. Whether
it pays on the CPU at hand, and whether the CPU can at all, cpu_products.py measures.
"""

import contextlib
import functools

import torch
from torch import nn

from utils.kernels.cpu_products import PRODUCTS, multiply, pack
from utils.kernels.onednn_linear import OneDNNLinear
from utils.kernels.vocabulary_head import VocabularyHead

DTYPES = (torch.float32, torch.bfloat16)


@contextlib.contextmanager
def packed(model: nn.Module):
    """While inside, `model`'s linear layers on the CPU run by oneDNN from copies of their weights.

    Forward passes only, and the weights must not change meanwhile. Layers of a class of their own,
    and those whose weights are shards (ZeRO-3), stay as they are; the vocabulary head gives logits.
    """
    kinds = (nn.Linear, OneDNNLinear, VocabularyHead)
    layers = [m for m in model.modules() if type(m) in kinds and _can_be_packed(m.weight)]
    for layer in layers:
        packed_weight = pack(layer.weight.detach())
        layer.forward = functools.partial(multiply, weight=packed_weight, bias=layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def _can_be_packed(weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype in DTYPES
        and not hasattr(weight, "ds_id")
        and PRODUCTS.onednn("decoding", weight.dtype)
    )
