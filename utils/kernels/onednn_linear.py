"""fp32 linear layers by oneDNN on a CPU where that is faster, forward and backward.

torch gives fp32 matrix products on a CPU to MKL. Measured on one core (Zen 5, AVX-512), 1,536 rows,
layers of 256 to 688: MKL 91 to 101 GFLOP/s, oneDNN 174 to 238, results within 1.2e-6 of the
largest. bf16 goes to oneDNN by itself, and so do the packed weights that answers are decoded with
(packed_linear.py).
"""

import torch
from torch import nn

from utils.kernels.cpu_products import PRODUCTS, multiply


def suits(x: torch.Tensor) -> bool:
    """Is x an fp32 tensor on a CPU where oneDNN multiplies faster?"""
    on_cpu = x.dtype == torch.float32 and x.device.type == "cpu"
    return on_cpu and PRODUCTS.onednn("training", x.dtype)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return multiply(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            multiply(grad, weight.t()) if wants_x else None,
            multiply(rows.t(), x.reshape(-1, x.shape[-1]).t()) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )


class OneDNNLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if suits(x) and self.weight.dtype == x.dtype:
            return _Multiply.apply(x, self.weight, self.bias)
        return super().forward(x)


def use(model: nn.Module) -> None:
    """From now on `model`'s linear layers multiply by oneDNN where that suits them.

    The class is swapped in place: the parameter, its name and ZeRO's hooks stay. Layers of a class
    of their own stay as they are.
    """
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.weight.dtype == torch.float32:
            layer.__class__ = OneDNNLinear
