"""Decoding steps captured as CUDA graphs, one for each shape, and replayed.

Memory. A graph's tensors live in its private pool as long as it does. With a pool for each, 200
rollouts of 256 prompts with Qwen2.5-0.5B left 64: eight sizes of batches, each with its halves down
to one row. Logits of 256 rows × 152k tokens in bf16 are 78 MB, those of the halves as much again:
8 × 156 MB = 1.2 GB, activations not counted. Here all graphs take their memory from one pool, and
copy their logits into one buffer outside of it before they end. So nothing in the pool outlives a
replay, graphs use the same memory in turns, and all of them together take what the largest one
takes, and the buffer. What is left to bound is the driver's own copy of the kernels: KEPT stay.
"""

import collections
import contextlib
import warnings

import torch

KEPT = 32  # graphs: the row counts of one batch (powers of two up to 256) at three or four lengths


class NotCapturable(RuntimeError):
    """A step does what a graph cannot hold. Torch's state is as it was before the attempt."""


class Graphs:
    """`run` a step; `forget_others` when weights or cache have moved."""

    def __init__(self):
        self._stream: torch.cuda.Stream | None = None
        self.clear()

    def __len__(self) -> int:
        return len(self._steps)

    def clear(self) -> None:
        """Give the memory back."""
        self._steps: collections.OrderedDict[tuple, tuple] = collections.OrderedDict()
        # A pool whose last graph has gone takes no other.
        self._pool = self._logits = None
        self._addresses: tuple[int, ...] = ()

    def forget_others(self, addresses: tuple[int, ...]) -> None:
        """A graph reads and writes the addresses it was captured with: weights and cache."""
        if addresses != self._addresses:
            self.clear()
            self._addresses = addresses

    def run(self, forward, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """forward(*inputs) → (B,V) logits, valid until the next run.

        `forward` must be the same operations on the same addresses for inputs of the same shapes,
        and harmless to repeat. Raises NotCapturable, after which the step can still be run without
        a graph; SystemExit where that would not be safe.
        """
        shapes = tuple(tuple(x.shape) for x in inputs)
        if shapes in self._steps:
            self._steps.move_to_end(shapes)
        else:
            self._steps[shapes] = self._capture(forward, inputs)
            while len(self._steps) > KEPT:
                self._steps.popitem(last=False)
        graph, buffers, logits = self._steps[shapes]
        for buffer, value in zip(buffers, inputs, strict=True):
            buffer.copy_(value)
        graph.replay()
        return logits

    def _capture(self, forward, inputs) -> tuple:
        """(graph, its input buffers, its logits). The passes that warm up write what the graph
        will write again."""
        now = torch.cuda.current_stream()
        if self._pool is None:
            self._stream = self._stream or torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()
        buffers = tuple(x.clone() for x in inputs)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                logits = forward(*buffers)
        now.wait_stream(self._stream)
        rows = len(logits)
        if self._logits is None or len(self._logits) < rows:
            self._logits = torch.empty_like(logits)
        kept = self._logits[:rows]
        graph, refusal = torch.cuda.CUDAGraph(), None
        try:
            # The outer stream: torch.cuda.graph does not come back from its own where it fails.
            with (
                torch.cuda.stream(now),
                torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=self._stream,
                    # Other threads (NCCL's watchdog, the checkpoint's writer) may go on.
                    capture_error_mode="thread_local",
                ),
            ):
                try:
                    with _no_waiting():
                        kept.copy_(forward(*buffers))
                except RuntimeError as error:
                    refusal = error  # raised below, if torch can end the capture in good order
        except RuntimeError as error:
            # Torch has no way back from here: where a capture ends in an error, its allocator and
            # random number generators may believe that it is still going on.
            raise SystemExit(
                f"capturing a decoding step as a CUDA graph failed ({refusal or error}), and torch "
                "cannot be trusted after that; set --decode eager or static"
            ) from error
        if refusal is not None:
            self.clear()
            raise NotCapturable(f"{type(refusal).__name__}: {refusal}") from refusal
        return graph, buffers, kept


@contextlib.contextmanager
def _no_waiting():
    """While inside, an operation that would wait for the device raises RuntimeError before it does.
    It would break a capture for good; so torch can still end it in good order."""
    before = torch.cuda.get_sync_debug_mode()
    _wait("error")
    try:
        yield
    finally:
        _wait(before)


def _wait(mode: int | str) -> None:
    with warnings.catch_warnings():
        # It may miss a wait, torch says; the capture then fails by itself, which is dealt with.
        warnings.filterwarnings("ignore", "Synchronization debug mode")
        torch.cuda.set_sync_debug_mode(mode)
