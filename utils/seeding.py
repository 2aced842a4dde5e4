"""Every random number generator of this process from one seed."""

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
        # Warned of and not refused: torch has no deterministic cumsum on CUDA, by its own word,
        # and sampling needs one.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cuda.enable_mem_efficient_sdp(False)  # its backward pass adds atomically
