"""Joining the process group: what a rank takes of its machine."""

import os

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from utils.distributed import builds, peers, process_group


@pytest.fixture
def join(monkeypatch):
    """join(device, **environment) → the threads that torch has, once process_group.init is through
    on a machine of twelve cores. Nothing is joined for real."""
    before = torch.get_num_threads()
    accelerator = type(get_accelerator())
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: None)
    monkeypatch.setattr(builds, "watch", lambda: None)
    monkeypatch.setattr(peers, "look_after", lambda: None)
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(dist.distributed_c10d, name, None)
    monkeypatch.setattr(process_group, "_device", torch.device("cpu"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))

    def join(device, **environment):
        name = lambda self, index=None: device if index is None else f"{device}:{index}"  # noqa: E731
        monkeypatch.setattr(accelerator, "device_name", name)
        monkeypatch.setattr(accelerator, "set_device", lambda self, index: None)
        monkeypatch.setattr(accelerator, "communication_backend_name", lambda self: "nccl")
        given = dict(RANK="0", WORLD_SIZE="4", LOCAL_RANK="0", MASTER_PORT="1") | environment
        for unset in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(unset, raising=False)
        for key, value in given.items():
            monkeypatch.setenv(key, value)
        torch.set_num_threads(1)
        assert process_group.init().type == device
        return torch.get_num_threads()

    yield join
    torch.set_num_threads(before)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ranks_of_one_machine_share_its_cores(join, device):
    """A rank of a GPU steps the AdamW that --offload keeps in CPU memory: eight of them with all
    cores each would fight. Each launcher has its own name for the number of ranks."""
    assert join(device) == 12
    assert join(device, LOCAL_WORLD_SIZE="4") == 3
    assert join(device, LOCAL_SIZE="3") == 4
    assert join(device, LOCAL_WORLD_SIZE="40") == 1
    torchrun = dict(LOCAL_WORLD_SIZE="4", OMP_NUM_THREADS="1", TORCHELASTIC_RUN_ID="x")
    assert join(device, **torchrun) == 3, "torchrun sets the variable by itself"
    assert join(device, LOCAL_WORLD_SIZE="4", OMP_NUM_THREADS="7") == 1, "the user's own choice"
