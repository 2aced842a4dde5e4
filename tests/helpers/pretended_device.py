"""A pretended GPU for a machine without one: what is on it, and what may not be mixed.

Every storage carries a tag, host or device. Inside `Pretended()` factories, moves and copies set
it, each operation's outputs inherit it, and an operation that mixes the two raises RuntimeError as
it would on a GPU. `tensor.device` says cuda:0 of what is tagged so, and code that asks for "cuda"
gets it, so that the branches for GPUs are the ones that run. All arithmetic stays the CPU's:
autograd, DeepSpeed and transformers run as they are, several times slower.

It shows tensors left on the wrong device, wherever code is walked. It cannot show kernels, streams,
NCCL, memory or speed. What torch.cuda and DeepSpeed answer is in pretended_cuda.py.

A storage of which nothing is known (made in C++, or before) counts as the host's until it joins
the side that it first meets lawfully.
"""

import functools
import threading

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

HOST, DEVICE = torch.device("cpu"), torch.device("cuda", 0)
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
# These take a single number on the host, as pointwise operations do.
_NUMBERS = ("aten.masked_fill.Tensor", "aten.masked_fill_.Tensor", "aten.fill_.Tensor")
# These wait for the device, to know a number or a size.
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")
_WAITING += ("is_nonzero",)
_CROSSING = ("_to_copy", "copy_", "set_")

_tags: dict[int, tuple[torch.device, StorageWeakRef]] = {}
operations = 0  # with a tensor of the device among their inputs
_thread = threading.local()


def tag(t: torch.Tensor, where: torch.device) -> torch.Tensor:
    if not t.is_meta:  # which is on neither
        storage = t.untyped_storage()
        _tags[storage._cdata] = (where, StorageWeakRef(storage))
    return t


def tag_of(t: torch.Tensor) -> torch.device | None:
    """HOST, DEVICE, or None where nothing said."""
    found = _tags.get(t.untyped_storage()._cdata)
    return None if found is None or found[1].expired() else found[0]


def tensors_of(tree):
    for x in tree:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from tensors_of(x)


def _side(device) -> torch.device | None:
    """HOST, DEVICE, or None for meta."""
    if isinstance(device, int):  # an index means the accelerator
        return DEVICE
    return {"cuda": DEVICE, "cpu": HOST}.get(torch.device(device).type)


# Operations.


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        global operations
        kwargs = kwargs or {}
        inputs = list(tensors_of((*args, *kwargs.values())))
        tags = [tag_of(x) for x in inputs]
        where = DEVICE if DEVICE in tags else HOST if HOST in tags else None
        if where is DEVICE:
            operations += 1
        name = func.overloadpacket.__name__
        if name in _WAITING or (name in _INDEXING and _by_a_mask(args[1])):
            forbid_while_capturing(func)
        if func.namespace == "c10d" or (where is DEVICE and tags.count(DEVICE) < len(tags)):
            _check(func, args, inputs, tags)
        if where is DEVICE and func is torch.ops.aten.sum.default:
            # A GPU adds in another order.
            out = func(args[0].flatten().flip(0), *args[1:], **kwargs)
        else:
            out = func(*args, **kwargs)
        if where is not None:
            for x, known in zip(inputs, tags, strict=True):
                if known is None:
                    tag(x, where)
            for x in tensors_of((out,)):
                if tag_of(x) is None:
                    tag(x, where)
        if (operations_so_far := captured()) is not None:
            operations_so_far.append((func, args, kwargs, out))
        return out


def _by_a_mask(indices) -> bool:
    return any(x is not None and x.dtype == torch.bool for x in indices)


def captured() -> list[tuple] | None:
    """[(func, args, kwargs, what they gave)] of the graph that this thread captures, if it does."""
    return getattr(_thread, "captured", None)


def capture(into: list[tuple] | None) -> None:
    _thread.captured = into


def forbid_while_capturing(what) -> None:
    if captured() is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


def _check(func, args, inputs, tags) -> None:
    """Raises what a GPU would, where this operation may not have these inputs."""
    name = func.overloadpacket.__name__
    if name in _CROSSING:
        if HOST in tags:
            forbid_while_capturing(func)
        return
    if func.namespace == "c10d":
        if HOST in tags and name != "barrier":  # whose tensor PyTorch makes itself
            raise RuntimeError(
                f"No backend type associated with device type cpu: {_told(func, inputs)}"
            )
        return
    host = [x for x, where in zip(inputs, tags, strict=True) if where is not DEVICE]
    if name in _INDEXING:
        # Indices may lie on the host; a value too, if it is a single number.
        own, values = args[0], [x for x in args[2:3] if isinstance(x, torch.Tensor)]
        if tag_of(own) is DEVICE and all(x.dim() == 0 for x in values if tag_of(x) is not DEVICE):
            return
    elif all(x.dim() == 0 for x in host) and _takes_numbers(func):
        # A single number on the host counts as one, unless it is what is written to.
        written = [a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        if not written or tag_of(args[0]) is DEVICE:
            return
    raise RuntimeError(f"Expected all tensors to be on the same device: {_told(func, inputs)}")


@functools.cache
def _takes_numbers(func) -> bool:
    return torch.Tag.pointwise in func.tags or str(func) in _NUMBERS


def _told(func, inputs) -> str:
    return f"{func} got " + ", ".join(f"{tag_of(x)}{tuple(x.shape)}" for x in inputs)


# Functions and attributes of tensors.


class _Moved(torch.autograd.Function):
    """A copy on the other side, whose gradient comes back."""

    @staticmethod
    def forward(ctx, x, where, back):
        ctx.back = back
        return tag(x.clone(), where)

    @staticmethod
    def backward(ctx, grad):
        return tag(grad.clone(), ctx.back), None, None


def _to(own, *args, **kwargs):
    copy, where = kwargs.pop("copy", False), None
    if args and isinstance(args[0], torch.Tensor):
        where, args = tag_of(args[0]) or HOST, (args[0].dtype, *args[1:])
    if isinstance(kwargs.get("device", args[0] if args else None), int):
        where, args = DEVICE, args[1:]
        kwargs.pop("device", None)
    device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and device.type == "meta":
        return own.to(device, dtype or own.dtype)
    where = where or (None if device is None else _side(device))
    layout = {} if layout is None else {"memory_format": layout}
    out = own.to(dtype or own.dtype, copy=copy, **layout)
    return out if where is None else _moved(out, own, where)


def _moved(out, own, where):
    """`out`, made of `own`, on the side `where`."""
    before = tag_of(own) or HOST
    if before is where:
        return tag(out, where)
    forbid_while_capturing("a copy between host and device")
    if out.untyped_storage()._cdata != own.untyped_storage()._cdata and not out.requires_grad:
        return tag(out, where)
    return _Moved.apply(out, where, before)


def _cpu(own, *args, **kwargs):
    return _moved(own, own, HOST)


def _cuda(own, *args, **kwargs):
    return _moved(own, own, DEVICE)


def _numpy(own, *args, **kwargs):
    if tag_of(own) is DEVICE:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )
    return own.numpy(*args, **kwargs)


def _array(own, *args, **kwargs):
    _numpy(own.detach())
    return own.__array__(*args, **kwargs)


def _pinned(own, *args, **kwargs):
    if tag_of(own) is DEVICE:
        raise RuntimeError(
            "cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned"
        )
    return tag(own.clone(), HOST)


def _set_grad(own, grad):
    if grad is not None and {tag_of(own), tag_of(grad)} == {HOST, DEVICE}:
        raise RuntimeError(
            f"assigned grad has data located on a different device: {tag_of(grad)} at a weight on "
            f"{tag_of(own)}"
        )
    torch.Tensor.grad.__set__(own, grad)


_ANSWERS = {
    torch.Tensor.device.__get__: lambda own: tag_of(own) or own.device,
    torch.Tensor.is_cuda.__get__: lambda own: tag_of(own) is DEVICE,
    torch.Tensor.is_cpu.__get__: lambda own: tag_of(own) is not DEVICE and own.is_cpu,
    torch.Tensor.get_device: lambda own: 0 if tag_of(own) is DEVICE else -1,
    torch.Tensor.to: _to,
    torch.Tensor.cpu: _cpu,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.numpy: _numpy,
    torch.Tensor.__array__: _array,
    torch.Tensor.pin_memory: _pinned,
    torch.Tensor.is_pinned: lambda own, *args: False,
    torch.Tensor.grad.__set__: _set_grad,
}


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        answer = _ANSWERS.get(func)
        if answer is not None:
            return answer(*args, **kwargs)
        if isinstance(func, torch._ops.OpOverload):  # from _Operations, which sees to it
            return func(*args, **kwargs)
        asked = kwargs.get("device")
        if asked is not None:
            asked = _side(asked)
            if asked is not None:
                kwargs = kwargs | {"device": HOST}
        if kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}
        out = func(*args, **kwargs)
        if isinstance(out, (torch.Tensor, list, tuple)):
            for x in tensors_of((out,)):
                if asked is not None or tag_of(x) is None:
                    out = self._place(out, x, asked, args, kwargs)
        return out

    @staticmethod
    def _place(out, x, asked, args, kwargs):
        """Tags `x`, which is `out` or part of it: where it was asked for, or with its inputs."""
        given = list(tensors_of((*args, *kwargs.values())))
        if asked is None:
            sides = {tag_of(t) for t in given}
            tag(x, DEVICE if DEVICE in sides else HOST)
            return out
        shared = next(
            (t for t in given if t.untyped_storage()._cdata == x.untyped_storage()._cdata), None
        )
        if shared is not None:  # as_tensor, asarray
            return _moved(x, shared, asked)
        tag(x, asked)
        return out


class Pretended:
    """The calling thread pretends while inside."""

    def __enter__(self):
        self._modes = (_Operations(), Functions())
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)
