"""A frozen base in 4 or 8 bits, beside which adapters are trained: QLoRA (Dettmers et al. 2023) and
LLM.int8() (Dettmers et al. 2022). The one module that knows bitsandbytes' layers.

Linear layers below the head are rounded as they are read; embeddings, norms and heads stay whole.
Folders name the base as it is on disk, in all its digits.
"""

import copy
import functools
import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import nn

from utils.distributed import zero

BLOCK = 64  # numbers that share a scale in NF4


def check(load_in_4bit: bool, load_in_8bit: bool) -> None:
    """SystemExit where bitsandbytes is not installed and is needed."""
    asked = [f"load_in_{n}bit" for n, on in ((4, load_in_4bit), (8, load_in_8bit)) if on]
    if asked and importlib.util.find_spec("bitsandbytes") is None:
        raise SystemExit(
            f"{asked[0]}=true needs the package bitsandbytes, which is not installed: pip install "
            f"-r requirements-quantised.txt, or leave out --{asked[0]}"
        )


def settings(load_in_4bit: bool, load_in_8bit: bool, dtype: str) -> dict:
    """What from_pretrained is told: 4 bits as NF4 with scales in 8 bits, multiplied in `dtype`."""
    if not load_in_4bit and not load_in_8bit:
        return {}
    from transformers import BitsAndBytesConfig

    four = dict(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=zero.DTYPES[dtype],
    )
    how = four if load_in_4bit else dict(load_in_8bit=True)
    return {"quantization_config": BitsAndBytesConfig(**how)}


def tidy(model: nn.Module) -> None:
    """Take out of a model just loaded what would be wrong later on."""
    # Folders are saved with this config, and name the base that is whole.
    del model.config.quantization_config
    model.is_quantized = False  # as which transformers would refuse fp16
    for name, layer in model.named_modules():
        four = hasattr(layer, "support_avx512bf16_for_cpu") and layer.weight.device.type == "cpu"
        if four and layer.in_features % BLOCK:
            raise SystemExit(
                f"load_in_4bit=true: {name} reads {layer.in_features} numbers, no multiple of "
                f"{BLOCK}, and bitsandbytes on a CPU then multiplies with wrong scales; set "
                "--load_in_8bit, or leave out --load_in_4bit"
            )
    for p in model.parameters():
        if p.device.type == "cpu" and p.is_floating_point():
            p.data = p.data.clone()  # a view of the file would keep all of it mapped
    for layer in model.modules():
        # In eval mode on CPUs with AVX-512 BF16 it would round its scales to bf16 for good: what
        # samples would be another model than what is trained.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        # In 8 bits its first pass would take the numbers from the weight, which twins share.
        if getattr(getattr(layer, "weight", None), "CB", None) is not None:
            layer.init_8bit_state()
            _let_go_of_inputs()
            # In eval mode on a CPU, and in no other, it would round what it reads to 8 bits.
            if layer.weight.device.type == "cpu":
                layer.training, layer.train = True, _stay


@functools.cache  # once a process
def _let_go_of_inputs() -> None:
    """bitsandbytes' products in 8 bits keep what they read in an attribute of autograd's context,
    which lives as long as the loss does: through the forward pass of the next micro-batch. These
    are the inputs of all layers, 3.1 GB of Qwen2.5-1.5B in bf16 with 4,096 tokens. From now on they
    go with the backward pass."""
    from bitsandbytes.autograd import _functions as products

    for product in (products.MatMul8bitLt, products.MatMul8bitFp):
        product.backward = staticmethod(_then_empty(product.backward))


def _then_empty(backward: Callable) -> Callable:
    def and_let_go(context, gradient):
        found = backward(context, gradient)
        context.A = context.tensors = context.tensor_states = None
        return found

    return and_let_go


def _stay(mode: bool = True) -> None:
    """In place of a layer's `train`, which then changes nothing."""


def dequantised(layer: nn.Module) -> torch.Tensor:
    """The fp32 weight (out, in) that a layer in few bits stands for."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.state.CB.float() * (layer.state.SCB.float() / 127)[:, None]
    from bitsandbytes.functional import dequantize_4bit

    exact = copy.copy(state)
    exact.dtype = torch.float32
    return dequantize_4bit(layer.weight.data, exact)


def states(model: nn.Module) -> Iterator[object]:
    """What layers in 8 bits keep beside their weight, which twins of a model share too."""
    return (m.state for m in model.modules() if hasattr(m, "init_8bit_state"))
