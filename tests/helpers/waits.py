"""Counts how often the CPU would wait for a device, on a machine without one.

`torch.device("cpu", 0)` stands for the device and `torch.device("cpu")` for the host. What is moved
there is marked, and so is all that is reckoned from it; what then needs a number of the device, or
how many there are, counts.
"""

import collections

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils.distributed import host_memory

DEVICE = torch.device("cpu", 0)
ASK = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "masked_scatter_backward",  # selects by the mask
    "_unique2",
    "unique_dim",
    "equal",
)
_DEVICE_OF = torch.Tensor.device.__get__


class _Operations(TorchDispatchMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        on_device = any(self.waits.has(x) for x in tree_leaves((args, kwargs)))
        if on_device and (name in ASK or _asks_how_many(name, func, args, kwargs)):
            self.waits.counts[name] += 1
        found = func(*args, **kwargs)
        if on_device:
            self.waits.mark(found)
        return found


def _asks_how_many(name: str, func, args, kwargs) -> bool:
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(x is not None and x.dtype == torch.bool for x in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return False


class _Functions(TorchFunctionMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, waits = kwargs or {}, self.waits
        if func == _DEVICE_OF and waits.has(args[0]):
            return DEVICE
        target = _target(func, args, kwargs)
        if target is not None and (target == DEVICE) != waits.has(args[0]):
            waits.counts[f"to {target}"] += 1  # from or to ordinary memory
            return waits.moved(args[0], target)
        if func is torch.Tensor.tolist and waits.has(args[0]):
            waits.counts["tolist"] += 1
        found = func(*args, **kwargs)
        if kwargs.get("device") == DEVICE:
            waits.mark(found)
        return found


def _target(func, args, kwargs) -> torch.device | None:
    """Where `.to` and `.cpu` take a tensor; None where they leave it."""
    if func is torch.Tensor.cpu:
        return torch.device("cpu")
    if func is not torch.Tensor.to:
        return None
    named = kwargs.get("device", args[1] if len(args) > 1 else None)
    return torch.device(named) if isinstance(named, (str, torch.device)) else None


class Waits:
    """While inside, what waits for DEVICE is in `counts`, by name. `host_memory.send` does not."""

    def __init__(self):
        self.counts = collections.Counter()
        self._marked: dict[int, StorageWeakRef] = {}

    def has(self, thing) -> bool:
        if not isinstance(thing, torch.Tensor):
            return False
        with torch._C.DisableTorchFunction():
            found = self._marked.get(thing.untyped_storage()._cdata)
        return found is not None and not found.expired()

    def mark(self, found) -> None:
        with torch._C.DisableTorchFunction():
            for x in tree_leaves(found):
                if isinstance(x, torch.Tensor):
                    storage = x.untyped_storage()
                    self._marked[storage._cdata] = StorageWeakRef(storage)

    def moved(self, tensor, target):
        with torch._C.DisableTorchFunction():
            copy = tensor.clone()
        if target == DEVICE:
            self.mark(copy)
        else:
            with torch._C.DisableTorchFunction():
                self._marked.pop(copy.untyped_storage()._cdata, None)
        return copy

    def __enter__(self):
        self._send, host_memory.send = host_memory.send, self._sent
        self._modes = (_Operations(self), _Functions(self))
        for mode in self._modes:
            mode.__enter__()
        return self

    def _sent(self, tensor, device):
        return self.moved(tensor, device) if device == DEVICE and not self.has(tensor) else tensor

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        host_memory.send = self._send
