"""The other ranks: that one has died is noticed within seconds, on every machine of the run.

A rank whose peer was killed waits: gloo finds out when it next talks to it, NCCL when its timeout
is over, and a launcher ends one waiting rank after the other, 30 s each, on its own machine. So a
thread looks after the ranks of this machine, the first rank of each machine also after its
connection to rank 0's, and ends its rank with one line.
"""

import os
import socket
import threading
import time
from pathlib import Path

import torch.distributed as dist

from utils.distributed import links

SECONDS_BETWEEN_LOOKS = 1.0
# Killed on one machine, seen there, told to rank 0, told to a third machine, seen by its others.
SECONDS_OF_NEWS = 5.0
_stop = threading.Event()
_thread: threading.Thread | None = None
_leaders: list[int] = []


def machine() -> str:
    """Whose processes are seen in /proc here: equal on ranks that can look after each other."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"


def look_after() -> None:
    """Start looking, once all ranks have joined. Every rank must call it."""
    global _thread, _leaders
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (machine(), socket.gethostname(), os.getpid()))
    me, machines = dist.get_rank(), [where for where, _, _ in everywhere]
    _leaders = sorted({where: rank for rank, where in reversed(list(enumerate(machines)))}.values())
    connected = links.connect(_leaders) if len(_leaders) > 1 else None
    names = [f"rank {r} (process {p} on {host})" for r, (_, host, p) in enumerate(everywhere)]
    here = {
        rank: process
        for rank, (where, _, process) in enumerate(everywhere)
        if rank != me and where == machines[me] and _alive(process)
    }
    if here or connected:
        _stop.clear()
        _thread = threading.Thread(target=_look, args=(me, here, connected, names), daemon=True)
        _thread.start()


def leaders() -> list[int]:
    """The first rank of each machine, in order; empty where this run has one rank."""
    return _leaders


def stop() -> None:
    """From now on a rank that ends has the right to."""
    _stop.set()


def wait_for_news() -> None:
    """After an error that a dead peer may have caused: let the thread find it, which ends us."""
    if _thread is not None and not _stop.is_set():
        time.sleep(SECONDS_OF_NEWS if len(_leaders) > 1 else 2.5 * SECONDS_BETWEEN_LOOKS)


def _look(me: int, here: dict[int, int], connected: links.Links | None, names: list[str]) -> None:
    while not _stop.is_set():
        news = connected.wait(SECONDS_BETWEEN_LOOKS) if connected else None
        if connected is None:
            _stop.wait(SECONDS_BETWEEN_LOOKS)
        gone = [rank for rank, process in here.items() if not _alive(process)]
        speaks = me < min(here.keys() - gone, default=me + 1)  # one for all of this machine
        if news and news.told:
            what, speaks = news.told, me == 0
        elif gone:
            what = f"{names[gone[0]]} is gone"
        elif news:
            what = names[news.rank]
            what += "'s machine does not answer any more" if news.unreachable else " is gone"
        else:
            continue
        # Whoever ends where all ranks end together may be a little ahead of us.
        if _stop.wait(SECONDS_BETWEEN_LOOKS if news and not news.told else 0.0):
            return
        if connected:
            connected.tell(what)
        if speaks:
            print(
                f"{what}, and the run ends with it; --resume auto goes on from the newest "
                "checkpoint",
                flush=True,
            )
        os._exit(1)


def _alive(process: int) -> bool:
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"  # a zombie is dead, and not yet buried
