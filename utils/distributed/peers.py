"""The other ranks of this machine: that one has died is noticed within seconds.

A rank whose peer was killed waits: gloo finds out when it next talks to it, NCCL when its timeout
is over, and a launcher ends one waiting rank after the other, 30 s each. So a thread looks after
the peers, and ends its rank with one line. Ranks of other machines are their launcher's business.
"""

import os
import socket
import threading
import time
from pathlib import Path

import torch.distributed as dist

SECONDS_BETWEEN_LOOKS = 1.0
_stop = threading.Event()
_thread: threading.Thread | None = None


def look_after() -> None:
    """Start looking, once all ranks have joined. Every rank must call it."""
    global _thread
    here = [None] * dist.get_world_size()
    dist.all_gather_object(here, (socket.gethostname(), os.getpid()))
    me = dist.get_rank()
    peers = {
        rank: process
        for rank, (host, process) in enumerate(here)
        if rank != me and host == here[me][0] and _alive(process)
    }
    if peers:
        _stop.clear()
        _thread = threading.Thread(target=_look, args=(me, peers), daemon=True)
        _thread.start()


def stop() -> None:
    """From now on a rank that ends has the right to."""
    _stop.set()


def wait_for_news() -> None:
    """After an error that a dead peer may have caused: let the thread find it, which ends us."""
    if _thread is not None and not _stop.is_set():
        time.sleep(2.5 * SECONDS_BETWEEN_LOOKS)


def _look(me: int, peers: dict[int, int]) -> None:
    while not _stop.wait(SECONDS_BETWEEN_LOOKS):
        gone = [rank for rank, process in peers.items() if not _alive(process)]
        if gone:
            if me < min(peers.keys() - gone, default=me + 1):  # one speaks for all
                print(
                    f"rank {gone[0]} (process {peers[gone[0]]}) is gone, and the run ends with it; "
                    "--resume auto goes on from the newest checkpoint",
                    flush=True,
                )
            os._exit(1)


def _alive(process: int) -> bool:
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"  # a zombie is dead, and not yet buried
