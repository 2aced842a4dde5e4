"""NCCL's calls between the trainer and vLLM by gloo, where there are no GPUs: ours in place of
torch.cuda.nccl (`for_the_trainer`), and vLLM's communicator in its workers (`Extension`).

Both sides' own code runs: the group, its warm-up, the order of broadcasts. What it cannot show is
how NCCL itself waits for a peer that is gone: gloo says so at once where a socket is closed.
"""

import datetime

import torch
from torch.distributed import ProcessGroupGloo, TCPStore

ID_BYTES = 128  # of NCCL's unique id


class Group:
    """A communicator: whoever has the id that rank 0 made meets there, all at once."""

    def __init__(self, world: int, unique: bytes, rank: int, seconds: float = 60.0):
        port, patience = int.from_bytes(unique[:4], "big"), datetime.timedelta(seconds=seconds)
        self.store = TCPStore("127.0.0.1", port, world, rank == 0, patience, wait_for_workers=False)
        self.gloo = ProcessGroupGloo(self.store, rank, world, patience)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self.gloo.allreduce([tensor]).wait()

    def broadcast(self, tensor: torch.Tensor, src: int = 0, stream=None) -> None:
        self.gloo.broadcast(tensor, src).wait()

    def destroy(self) -> None:
        self.gloo.shutdown()


def for_the_trainer(monkeypatch) -> list[Group]:
    """The groups of ours that were given up, as they are."""
    from utils.distributed.process_group import free_port
    from utils.generation import vllm_weights

    given_up: list[Group] = []
    calls = {
        "unique_id": lambda: free_port().to_bytes(4, "big").ljust(ID_BYTES, b"\0"),
        "init_rank": Group,
        "all_reduce": lambda inputs, comms: comms[0].all_reduce(inputs[0]),
        "broadcast": lambda inputs, comms: comms[0].broadcast(inputs[0]),
    }
    for name, call in calls.items():
        monkeypatch.setattr(f"torch.cuda.nccl.{name}", call)
    for name in ("current_device", "set_device", "synchronize"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_: 0)
    monkeypatch.setattr(vllm_weights, "abort", given_up.append)
    monkeypatch.setattr(vllm_weights.Nccl, "device", "cpu")
    return given_up


def in_vllms_worker() -> type:
    """The extension of vLLM's worker, once NCCL is replaced there."""
    from vllm.distributed.weight_transfer import nccl_common

    from utils.generation import vllm_worker

    nccl_common.uid_init_process_group = warmed_up
    torch.accelerator.current_device_index = lambda: 0
    torch.cuda.current_stream = lambda *_: None
    return vllm_worker.Extension


def warmed_up(unique: bytes, rank: int, world: int, device) -> Group:
    """As PyNcclCommunicator.from_unique_id_bytes."""
    group = Group(world, unique, rank)
    group.all_reduce(torch.zeros(1))
    return group


def __getattr__(name: str):
    """`Extension` for vLLM, by name; nothing of vLLM where the trainer imports this file."""
    if name == "Extension":
        return in_vllms_worker()
    raise AttributeError(name)
