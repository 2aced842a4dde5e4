"""A copy of the training state in CPU memory, and the thread that writes it to disk.

The thread makes no collective (two threads' messages would cross) and reads no tensor of the model.
Copying, hashing, writing and waiting for the disk all release the GIL.
"""

import socket
import threading
from collections.abc import Callable

import torch

from utils.distributed import host_memory, process_group

# Of the free CPU memory: caches and evaluations of later steps need some of it as well.
SHARE_OF_FREE = 0.5


class Copies:
    """Copies of tensors, in memory that the next checkpoint's copies take again.

    The system hands out new memory page by page as it is first written, which takes several times
    as long as the copying. Call `begin`, then this for each tensor, always in the same order.
    """

    def __init__(self):
        self._kept: list[torch.Tensor] = []
        self._used = 0

    def begin(self) -> None:
        self._used = 0

    def __call__(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        dtype = dtype or tensor.dtype
        if self._used == len(self._kept):
            self._kept.append(torch.empty(0))
        kept = self._kept[self._used]
        if kept.shape != tensor.shape or kept.dtype != dtype:
            kept = self._kept[self._used] = torch.empty(tensor.shape, dtype=dtype, device="cpu")
        self._used += 1
        return kept.copy_(tensor.detach())


class Writing(threading.Thread):
    """Calls `work` in a thread, which does not keep a process alive that ends by an error."""

    def __init__(self, work: Callable[[], dict]):
        super().__init__(name="checkpoint", daemon=True)
        self._work, self._result, self._error = work, {}, None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:  # raised again by `result`, in the thread that asks
            self._error = error

    def result(self) -> dict:
        """What `work` returned or raised, once it has."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._result


def does_not_fit(needed: int) -> str:
    """Why some machine has no memory for copies of the `needed` bytes of each of its ranks; empty
    where all have. Every rank must call it."""
    mine = (socket.gethostname(), needed, host_memory.free_bytes())
    ranks = process_group.gather_objects(mine)
    for machine in sorted({name for name, _, _ in ranks}):
        wanted = sum(size for name, size, _ in ranks if name == machine)
        free = min(free for name, _, free in ranks if name == machine)
        if wanted > SHARE_OF_FREE * free:
            return (
                f"a copy of the state takes {wanted / 1e9:.3g} GB of CPU memory on {machine}, "
                f"where {free / 1e9:.3g} GB are free; up to {SHARE_OF_FREE:.0%} of them would do"
            )
    return ""
