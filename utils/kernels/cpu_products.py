"""Matrix products on a CPU: by oneDNN where that is faster, which is measured once a run.

torch gives fp32 products to MKL, which on AMD uses half of AVX-512's width, and which lays weights
out anew in every call; oneDNN uses all of it, and multiplies with weights that it has laid out
before. With AVX2 alone the two are about equal, and on some CPUs MKL is ahead. bf16 goes to oneDNN
by itself in training; it lays bf16 weights out only on CPUs with instructions for bf16. oneDNN's
speed over torch's own, on one core of a Zen 5 and on the same core limited to AVX2, by CPU time, so
that other work on the core does not count:

                                                       AVX-512   AVX2
    training: 512 rows, a layer of 256 × 688              2.0    1.09
    decoding: 32 rows, 24 layers laid out beforehand      2.0    1.21
"""

import contextlib
import functools
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from utils.distributed import process_group

# How much faster oneDNN must be: by more than two measurements on one machine differ. Another
# choice rounds otherwise, and a second run would not equal the first.
MARGIN = 1.05
USES = ("training", "decoding")
ROUNDS = 15
LAYER = (688, 256)  # weights that are measured, (out, in)
LAYERS = 24  # so many while decoding, which finds no weight in the innermost cache
PACKED_ROWS = 32  # for how many rows oneDNN lays weights out; any number may come
PACKED_DTYPES = (torch.float32, torch.bfloat16)


class Products:
    """Answers `onednn(use, dtype)`; a run keeps its answers when it is resumed."""

    def __init__(self):
        self._gains: dict[str, float] = {}

    def onednn(self, use: str, dtype: torch.dtype) -> bool:
        """Is oneDNN to be called directly for `use` ("training", "decoding")?"""
        return self._gain(use, dtype) >= MARGIN

    def _gain(self, use: str, dtype: torch.dtype) -> float:
        key = f"{use} {dtype}"
        if key not in self._gains:
            self._gains[key] = measure(use, dtype)
        return self._gains[key]

    def agree(self, dtype: torch.dtype) -> None:
        """Measure every use; the rank that gains least decides for all. Every rank must call it,
        once the group stands and before the first product."""
        ours = {use: self._gain(use, dtype) for use in USES}
        for theirs in process_group.gather_objects(ours):
            for use in USES:
                key = f"{use} {dtype}"
                self._gains[key] = min(self._gains[key], theirs[use])

    def state_dict(self) -> dict:
        return dict(self._gains)

    def load_state_dict(self, saved: dict) -> None:
        """What was measured when the run began counts, but where this machine cannot at all."""
        for key, gain in saved.items():
            if self._gains.get(key) != 0.0:
                self._gains[key] = gain


PRODUCTS = Products()


def multiply(x: torch.Tensor, weight: torch.Tensor, bias=None) -> torch.Tensor:
    """(…,I) @ (O,I)ᵀ + (O,) → (…,O) by oneDNN. Either matrix may be a transposed view; weight may
    also be one that `pack` has laid out."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def pack(weight: torch.Tensor) -> torch.Tensor:
    """(O,I) → a copy that oneDNN multiplies with as it lies."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)


# Training: fp32 layers that multiply by oneDNN, forward and backward.


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
    can_be_packed = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if suits(x) and self.weight.dtype == x.dtype:
            return _Multiply.apply(x, self.weight, self.bias)
        return super().forward(x)


def train_with(model: nn.Module) -> None:
    """From now on `model`'s linear layers multiply by oneDNN where that is faster.

    The class is swapped in place: the parameter, its name and ZeRO's hooks stay. Layers of a class
    of their own stay as they are. Every rank must call it, as it measures.
    """
    PRODUCTS.agree(next(model.parameters()).dtype)
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.weight.dtype == torch.float32:
            layer.__class__ = OneDNNLinear


# Decoding: layers whose weights are laid out for oneDNN while they do not change.


@contextlib.contextmanager
def packed(model: nn.Module):
    """While inside, `model`'s linear layers on the CPU run by oneDNN from copies of their weights.

    Forward passes only, and the weights must not change meanwhile. Layers of a class of their own,
    which may compute more than a product, and those whose weights are shards (ZeRO-3), stay as they
    are; the vocabulary head gives logits.
    """
    layers = [
        layer
        for layer in model.modules()
        if (type(layer) is nn.Linear or getattr(layer, "can_be_packed", False))
        and _can_be_packed(layer.weight)
    ]
    for layer in layers:
        weight = pack(layer.weight.detach())
        layer.forward = functools.partial(multiply, weight=weight, bias=layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def _can_be_packed(weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype in PACKED_DTYPES
        and not hasattr(weight, "ds_id")
        and PRODUCTS.onednn("decoding", weight.dtype)
    )


# Measuring.


def measure(use: str, dtype: torch.dtype) -> float:
    """How many times faster oneDNN is than torch's own choice, 0 where it cannot; about 0.1 s."""
    if not torch.backends.mkldnn.is_available():
        return 0.0
    if use == "training":
        if dtype != torch.float32:
            return 0.0  # goes to oneDNN by itself
        x, weight, slope = _numbers(512, LAYER[1]), _numbers(*LAYER), _numbers(512, LAYER[0])

        def forward_and_backward(product: Callable) -> None:
            product(x, weight)
            product(slope, weight.t())
            product(slope.t(), x.t())

        return _ratio(
            lambda: forward_and_backward(F.linear), lambda: forward_and_backward(multiply)
        )
    x = _numbers(PACKED_ROWS, LAYER[1]).to(dtype)
    weights = [_numbers(*LAYER).to(dtype) for _ in range(LAYERS)]
    try:
        laid_out = [pack(w) for w in weights]
    except RuntimeError:  # this CPU has no kernel for the dtype
        return 0.0
    return _ratio(
        lambda: [F.linear(x, w) for w in weights], lambda: [multiply(x, w) for w in laid_out]
    )


def _numbers(rows: int, columns: int) -> torch.Tensor:
    # Not drawn: a run's generators are not to move. Not zeros, which some CPUs multiply faster.
    return (torch.arange(rows * columns) % 17 / 17 + 0.1).view(rows, columns)


def _ratio(plain: Callable, ours: Callable) -> float:
    best = {plain: float("inf"), ours: float("inf")}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for product in best:
                started = time.process_time()
                product()
                best[product] = min(best[product], time.process_time() - started)
    return best[plain] / best[ours]
