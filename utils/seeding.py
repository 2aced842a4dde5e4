"""Every random number generator of this process from one seed."""

import contextlib
import os
import random

import numpy as np
import torch


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python, NumPy and torch. Two runs on one machine and rank count are then bit-equal on a
    CPU; on a GPU with `deterministic`, which takes slower kernels and names what has none."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        # cuBLAS reads it when its first handle is made, which is later than here.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Warn and go on: sampling needs a cumsum, and torch has no deterministic one on CUDA.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cuda.enable_mem_efficient_sdp(False)  # its backward pass adds atomically


@contextlib.contextmanager
def undisturbed(device: torch.device):
    """The generators are afterwards as they were before, whatever is drawn inside."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
