"""Ranks: joining, leaving, and the few collectives the steps use.

Works under `deepspeed`, `torchrun` and plain `python` (one process), on NCCL and gloo.
"""

import ipaddress
import os
import re
import socket
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from utils.distributed import builds, peers

_had_peers = False  # was this process one of several ranks, by the time it left them?
_device = torch.device("cpu")  # this rank's, once it has joined


def init(timeout_minutes: float = 30.0) -> torch.device:
    """Join the process group and return this rank's device.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which the launchers set;
    without them this is a run of one process and a free port is chosen.
    """
    # Imported here: setting the accelerator aside, `import deepspeed` costs 2 s, which --help
    # and config errors should not pay.
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    global _device
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    accelerator = get_accelerator()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu:
        # DeepSpeed would compile a shared-memory all-reduce with g++ now: 1 to 2 minutes, a
        # compiler on every machine, and a lock file that stops all later runs if this one is
        # killed meanwhile. gloo does the same sums without any of it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        device = torch.device("cpu")
    else:
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(local_rank))
    _share_cores()
    if int(os.environ["WORLD_SIZE"]) > 1 and (name := interface_towards(os.environ["MASTER_ADDR"])):
        # By itself gloo takes the address that the machine's own name has: on many that is
        # 127.0.1.1, where no other machine finds it.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    builds.watch()
    timeout = timedelta(minutes=timeout_minutes)
    # DeepSpeed makes groups of its own and names no timeout for them: theirs would be 10 minutes
    # under NCCL and 30 under gloo, whatever was asked for.
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout
    deepspeed.init_distributed(
        dist_backend="gloo" if on_cpu else accelerator.communication_backend_name(),
        auto_mpi_discovery=False,
        timeout=timeout,
        verbose=False,
    )
    _device = device
    if missing := builds.missing_tools():
        say(missing)
    if dist.get_world_size() > 1:
        peers.look_after()
    return device


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def interface_towards(host: str) -> str | None:
    """The network interface that reaches `host` from here; None for one of this machine alone."""
    import psutil

    family, kind, _, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as s:
        s.connect(address)  # sends nothing: the kernel chooses where it would
        own = s.getsockname()[0]
    if ipaddress.ip_address(own.partition("%")[0]).is_loopback:
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, each in interfaces if own in [a.address for a in each]), None)


def _share_cores() -> None:
    """Give each rank of this machine an equal share of the cores, unless the user chose.

    torch takes all cores in every process; two ranks on two cores would then fight over them
    (measured: three times slower). On GPUs too: an AdamW that is kept in CPU memory steps there.
    """
    if "OMP_NUM_THREADS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return  # torchrun sets OMP_NUM_THREADS=1 unasked; else it is the user's choice
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(max(1, cores // ranks_here))


class StopRun(SystemExit):
    """The run ends here, with a diagnosis, on every rank at the same place."""


def timed_out(error: RuntimeError) -> bool:
    """Is this how gloo or NCCL tell that a peer did not come to a collective in time?"""
    return bool(re.search(r"[Tt]imed out|Timeout\(ms\)=|collective operation timeout", str(error)))


def device() -> torch.device:
    """This rank's, once it has joined; the CPU before."""
    return _device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return (
        dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    )


def is_main() -> bool:
    return rank() == 0


def say(text: str, file=None) -> None:
    """Print one line (or block) for people, on rank 0 alone."""
    if is_main():
        print(text, file=file, flush=True)


def leave(code: int, text: str = "") -> NoReturn:
    """End the run with this exit code and a line from rank 0. Every rank must call it."""
    if text:
        say(text, sys.stderr if code else None)
    shut_down()
    raise SystemExit(code)


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def sum_over_ranks(values: Iterable[float], device: torch.device) -> list[float]:
    """Sum each number over the ranks (float64 on CPU and CUDA)."""
    totals = torch.tensor(list(values), dtype=torch.float64, device=device)
    if world_size() > 1:
        dist.all_reduce(totals)
    return totals.tolist()


def on_any_rank(flags: Iterable[bool]) -> list[bool]:
    """Which of the flags is True on at least one rank; the same answer on every rank."""
    return [total > 0 for total in sum_over_ranks(map(float, flags), _device)]


def gather_objects(value) -> list:
    """`[value of rank 0, value of rank 1, …]` on every rank (small picklable things only)."""
    if world_size() == 1:
        return [value]
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def shut_down() -> None:
    """Leave the group, after the last collective. `end_process` follows it in a run of ranks."""
    global _had_peers
    if dist.is_initialized():
        _had_peers = dist.get_world_size() > 1
        peers.stop()
        if _had_peers:
            dist.barrier()
        # Rank 0 hosts the rendezvous store: it leaves last, once all others are gone.
        if dist.get_rank() == 0 and _had_peers:
            time.sleep(0.2)
        dist.destroy_process_group()


def end_process(code: int = 0) -> None:
    """Exit with `code` at once, where this was one rank of several; else return.

    A worker thread of gloo may still hold a tensor of the last collective. If it lets go of it
    while Python takes itself down, the process aborts with "terminate called without an active
    exception" (-6) after all its work is done, and the launcher calls the run failed
    (pytorch/pytorch#179291). Destroying the group does not wait for such a thread.
    """
    if _had_peers:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
