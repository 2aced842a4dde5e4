"""CUDA's streams and graphs as torch speaks to them, on a CPU: a capture records its operations and
a replay does them again, on the same tensors. What breaks a capture on a GPU breaks it here, and
leaves behind what it leaves there."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Stream:
    def __init__(self, name="side"):
        self.name, self.waited_for = name, []

    def wait_stream(self, other):
        self.waited_for.append(other)


class StreamContext:
    """As torch's, no generator: one that is not left leaves the stream where it is."""

    def __init__(self, machine, stream):
        self.machine, self.stream = machine, stream

    def __enter__(self):
        self.before, self.machine.current = self.machine.current, self.stream

    def __exit__(self, *_):
        self.machine.current = self.before


class Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.graph.machine.wait()
        found = func(*args, **(kwargs or {}))
        self.graph.operations.append((func, args, kwargs or {}, found))
        return found


class Graph:
    """In the place of torch.cuda.CUDAGraph; `machine` is set by Machine.install."""

    machine = None

    def __init__(self):
        self.operations, self.broken, self.replays = [], False, 0

    def capture_begin(self, *pool, capture_error_mode, check_input_liveness):
        machine = self.machine
        assert machine.capturing is None and machine.current is not machine.main
        self.pool, self.mode, self.stream = pool, capture_error_mode, machine.current
        machine.capturing, self.recorder = self, Recorder(self)
        self.recorder.__enter__()

    def capture_end(self):
        self.recorder.__exit__(None, None, None)
        if self.broken:
            # As in C++: the stream's capture is over, the allocator's and the generators' are not.
            raise RuntimeError("operation failed due to a previous error during capture")
        assert self.machine.current is self.stream
        self.machine.capturing = None
        self.machine.graphs.append(self)

    def replay(self):
        assert self.machine.capturing is None and not self.broken
        self.replays += 1
        for func, args, kwargs, before in self.operations:
            found = func(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(found), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Machine:
    """main, current: streams. capturing: the graph whose capture has begun and not ended. graphs:
    all that were captured."""

    def __init__(self):
        self.main = self.current = Stream("main")
        self.capturing, self.graphs, self.pools, self.debug = None, [], [], 0

    def wait(self):
        """What every operation does that waits for the device."""
        if self.debug == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        self.synchronize()

    def synchronize(self, *_):
        """torch.cuda.synchronize, which the debug mode does not know of."""
        if self.capturing is not None:
            self.capturing.broken = True
            raise RuntimeError("operation not permitted when stream is capturing")

    def handle(self):
        self.pools.append(object())
        return self.pools[-1]

    def in_order(self) -> bool:
        return self.current is self.main and self.capturing is None and self.debug == 0

    def install(self, patch):
        graph = type("CUDAGraph", (Graph,), {"machine": self})
        for name, fake in {
            "Stream": Stream,
            "stream": lambda stream: StreamContext(self, stream),
            "current_stream": lambda *_: self.current,
            "CUDAGraph": graph,
            "graph_pool_handle": self.handle,
            "synchronize": self.synchronize,
            "empty_cache": lambda: None,
            "is_current_stream_capturing": lambda: self.capturing is not None,
            "get_sync_debug_mode": lambda: self.debug,
            "set_sync_debug_mode": lambda mode: setattr(self, "debug", mode),
        }.items():
            patch.setattr(torch.cuda, name, fake)
        patch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        patch.setattr(torch.cuda.graph, "default_capture_stream", None)
        return self


@contextlib.contextmanager
def as_it_is(model):
    """In the place of what gives a model other layers on a CPU."""
    yield
