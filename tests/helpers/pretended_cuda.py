"""What torch.cuda, DeepSpeed's accelerator and the varlen kernel answer beside pretended_device.py.

Answers only: nothing here computes on another device.
"""

import collections
import contextlib
import functools
import threading
from types import SimpleNamespace
from unittest import mock

import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from tests.helpers import pretended_device
from tests.helpers.pretended_device import DEVICE, HOST, Functions, Pretended, tensors_of
from utils.checkpoints import background

GIB = 2**30
counts = collections.Counter()  # of what was walked


class Accelerator(CPU_Accelerator):
    """DeepSpeed's for CPUs under the name of its one for GPUs, whose code then runs."""

    def device_name(self, device_index=None):
        return "cuda" if device_index is None else f"cuda:{device_index}"

    def current_device_name(self):
        return "cuda:0"

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def synchronize(self, device_index=None):
        pretended_device.forbid_while_capturing("synchronize")

    def on_accelerator(self, tensor):
        return tensor.is_cuda

    def pin_memory(self, tensor, make_copy=True, match_shape=True):
        return tensor.pin_memory()


class Graph:
    """Operations that were captured, done again on the same memory by `replay`."""

    def __init__(self, keep_graph=False):
        self.operations: list[tuple] = []

    def replay(self) -> None:
        counts["replays"] += 1
        for func, args, kwargs, before in self.operations:
            now = func(*args, **kwargs)
            for old, new in zip(tensors_of((before,)), tensors_of((now,)), strict=True):
                given = [t.untyped_storage()._cdata for t in tensors_of((*args, *kwargs.values()))]
                if old.untyped_storage()._cdata not in given:  # neither a view nor in place
                    old.copy_(new)

    def pool(self) -> tuple[int, int]:
        return (0, 0)

    def reset(self) -> None:
        self.operations = []


@contextlib.contextmanager
def capturing(graph, pool=None, stream=None, capture_error_mode="global"):
    pretended_device.capture(into=[])
    try:
        yield
        graph.operations = pretended_device.captured()
    finally:
        pretended_device.capture(into=None)


class Stream:
    def __init__(self, device=None, priority=0):
        self.device = DEVICE

    def wait_stream(self, stream) -> None:
        """All happens in its order anyway."""

    def synchronize(self) -> None:
        pretended_device.forbid_while_capturing("synchronize")


def _set_rng_state(state, device=DEVICE) -> None:
    if state.device != HOST or state.dtype != torch.uint8:
        raise TypeError("RNG state must be a torch.ByteTensor")
    torch.set_rng_state(state)


def _properties(device=DEVICE):
    return SimpleNamespace(
        name="pretended", total_memory=80 * GIB, multi_processor_count=100, major=9, minor=0
    )


_TORCH_CUDA = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "synchronize": lambda device=None: pretended_device.forbid_while_capturing("synchronize"),
    "empty_cache": lambda: None,
    "manual_seed_all": lambda seed: None,
    "get_rng_state": lambda device=DEVICE: torch.get_rng_state(),
    "set_rng_state": _set_rng_state,
    "Stream": Stream,
    "current_stream": lambda device=None: Stream(),
    "stream": lambda stream: contextlib.nullcontext(),
    "CUDAGraph": Graph,
    "graph": capturing,
    "graph_pool_handle": lambda: (0, 0),
    "is_current_stream_capturing": lambda: pretended_device.captured() is not None,
    "get_sync_debug_mode": lambda: 0,
    "set_sync_debug_mode": lambda mode: None,
    "is_bf16_supported": lambda including_emulation=True: True,
    "mem_get_info": lambda device=None: (60 * GIB, 80 * GIB),
    "memory_reserved": lambda device=None: 0,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: "pretended",
    "get_device_properties": _properties,
}


def _grouped(real):
    """C++ sees the CPU's tensors; optimizers move numbers to the device that it names."""

    def group(lists, with_indices=False):
        found = real(lists, with_indices)
        return {
            (pretended_device.tag_of(tensors[0][0]) or HOST, dtype): (tensors, *rest)
            for (_, dtype), (tensors, *rest) in found.items()
        }

    return group


def _backward(real):
    """PyTorch sets function modes aside for all of `Tensor.backward`; hooks in it pretend too."""

    def run(*args, **kwargs):
        with Functions():
            return real(*args, **kwargs)

    return run


def _varlen(real):
    """Rows one by one, refusing what the kernel refuses."""

    @functools.wraps(real)
    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa
    ):
        for t in (query, key, value, cu_seq_q, cu_seq_k):
            if not t.is_cuda:
                raise RuntimeError(f"varlen attention got a tensor on {t.device}")
        if query.dtype not in (torch.bfloat16, torch.float16):
            raise RuntimeError(f"FlashAttention only supports fp16 and bf16, not {query.dtype}")
        for ends, longest in ((cu_seq_q, max_q), (cu_seq_k, max_k)):
            if ends.dtype != torch.int32 or longest != int(ends.diff().max()):
                raise RuntimeError(f"the rows end at {ends}, the longest has {longest}")
        queries, keys = (
            x.split(n.diff().tolist()) for x, n in ((query, cu_seq_q), (key, cu_seq_k))
        )
        rows = []
        for q, k, v in zip(queries, keys, value.split(cu_seq_k.diff().tolist()), strict=True):
            more = len(k) - len(q)  # keys before the first query's
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            pairs = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            seen = pairs.tril(more + window_size[1])
            if window_size[0] >= 0:
                seen = seen.triu(more - window_size[0])
            found = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
            )
            rows.append(found[0].transpose(0, 1))
        counts["packed attentions"] += 1
        return torch.cat(rows)

    return varlen_attn


def _shape_and_dtype(t) -> dict:
    """What gradient checkpointing compares. Its hooks are called in C++, where no mode can tell
    them the device."""
    return {"shape": t.shape, "dtype": t.dtype}


def _in_a_thread(real):
    """Modes belong to a thread: one that starts meanwhile pretends too."""

    def run(self):
        with Pretended():
            real(self)

    return run


@contextlib.contextmanager
def answering():
    """A process that believes it has a GPU, while inside."""
    from torch.nn.attention import varlen
    from torch.utils import checkpoint

    set_accelerator(Accelerator())
    with contextlib.ExitStack() as stack:
        for kind in (threading.Thread, background.Writing):
            stack.enter_context(mock.patch.object(kind, "run", _in_a_thread(kind.run)))
        for name, answer in _TORCH_CUDA.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        for holder, name, around in (
            (torch.autograd, "_engine_run_backward", _backward),
            (torch._C, "_group_tensors_by_device_and_dtype", _grouped),
            (varlen, "varlen_attn", _varlen),
        ):
            wrapped = around(getattr(holder, name))
            stack.enter_context(mock.patch.object(holder, name, wrapped))
        stack.enter_context(
            mock.patch.dict(checkpoint._allowed_determinism_checks_to_fns, default=_shape_and_dtype)
        )
        stack.enter_context(Pretended())
        yield
