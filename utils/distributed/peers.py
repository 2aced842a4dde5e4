"""The other ranks: that one has died is noticed within seconds, on every machine of the run.

A rank whose peer was killed waits: gloo finds out when it next talks to it, NCCL when its timeout
is over, and a launcher ends one waiting rank after the other, 30 s each, on its own machine. So a
thread watches the processes of this machine. The first rank of each machine also has a TCP
connection to rank 0, which closes when its process ends, however it ends; the kernel's keepalive
closes one to a machine that no longer answers. (No heartbeat: a thread of Python may stand still
for as long as another one holds the interpreter's lock.)
"""

import errno
import os
import secrets
import selectors
import socket
import threading
import time
from pathlib import Path

import torch.distributed as dist

from utils.distributed import preemption

SECONDS_BETWEEN_LOOKS = 1.0
# Killed on one machine, seen there, told to rank 0, told to a third machine, seen by its others.
SECONDS_OF_NEWS = 5.0
SECONDS_TO_CONNECT = 60.0
SECONDS_UNTIL_ASKED = 5  # of silence; then the kernel asks every so many seconds …
QUESTIONS = 3  # … and takes the machine for gone after so many without an answer
_LOST = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}
_stop = threading.Event()
_thread: threading.Thread | None = None
_leaders: list[int] = []


def machine() -> str:
    """Whose processes are seen in /proc here: equal on ranks that can look after each other."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"


def look_after() -> None:
    """Start the thread, once all ranks have joined. Every rank must call it."""
    global _thread, _leaders
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (machine(), socket.gethostname(), os.getpid()))
    me, machines = dist.get_rank(), [where for where, _, _ in everywhere]
    _leaders = sorted({where: rank for rank, where in reversed(list(enumerate(machines)))}.values())
    links = connect(_leaders) if len(_leaders) > 1 else {}
    names = [f"rank {r} (process {p} on {host})" for r, (_, host, p) in enumerate(everywhere)]
    here = {
        rank: process
        for rank, (where, _, process) in enumerate(everywhere)
        if rank != me and where == machines[me] and _alive(process)
    }
    if here or links:
        _stop.clear()
        _thread = threading.Thread(target=_look, args=(me, here, links, names), daemon=True)
        _thread.start()


def leaders() -> list[int]:
    """The first rank of each machine, in order; empty in a run of one rank."""
    return _leaders


def stop() -> None:
    """From now on a rank may end without ending the others."""
    _stop.set()


def wait_for_news() -> None:
    """After an error that a dead peer may have caused: let the thread find it, which ends us."""
    if _thread is not None and not _stop.is_set():
        time.sleep(SECONDS_OF_NEWS if len(_leaders) > 1 else 2.5 * SECONDS_BETWEEN_LOOKS)


def _look(me: int, here: dict[int, int], links: dict[int, socket.socket], names: list[str]) -> None:
    """The thread's work: end this process once a rank is gone, and send other machines the reason.
    here: rank → process of this machine; links: rank at the other end → connection."""
    selector = selectors.DefaultSelector()
    for rank, connection in links.items():
        selector.register(connection, selectors.EVENT_READ, rank)
    while not _stop.is_set():
        events = selector.select(SECONDS_BETWEEN_LOOKS)
        gone = [rank for rank, process in here.items() if not _alive(process)]
        speaks = me < min(here.keys() - gone, default=me + 1)  # one for all of this machine
        told = ""
        if events:
            rank, connection = events[0][0].data, events[0][0].fileobj
            told, ending = _read(connection)
        if told:
            what, speaks = told, me == 0
        elif gone:
            what = f"{names[gone[0]]} is gone"
        elif events:
            what = names[rank] + ending
        else:
            continue
        # A rank that ends where all ranks end together may be a little ahead of us.
        if _stop.wait(SECONDS_BETWEEN_LOOKS if events and not told else 0.0):
            return
        for connection in links.values():
            try:
                connection.sendall(what.encode())
            except OSError:
                continue  # this one is gone: there is nobody to tell
        if speaks:
            print(
                f"{what}, and the run ends with it; --resume auto goes on from the newest "
                "checkpoint",
                flush=True,
            )
        # Before the first step a rank that is asked to stop is gone at once. This one was perhaps
        # asked too, and is still inside a library.
        os._exit(preemption.EXIT_CODE if preemption.asked() else 1)


def _read(connection: socket.socket) -> tuple[str, str]:
    """(what the other end tells, how the connection ended where it tells nothing)."""
    try:
        told = connection.recv(4096)
    except OSError as error:
        lost = error.errno in _LOST
        return "", "'s machine does not answer any more" if lost else " is gone"
    return told.decode("utf-8", "replace"), " is gone"


def _alive(process: int) -> bool:
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"  # a zombie has died too


def connect(leaders: list[int]) -> dict[int, socket.socket]:
    """Connect rank 0, the first of `leaders`, with the others: rank at the other end → connection.

    Every rank must call it. Raises SystemExit where a machine cannot reach rank 0's.
    """
    me, listener, secret = dist.get_rank(), None, secrets.token_bytes(16)
    if me == 0:
        listener = _listen()
    shared = [None] * dist.get_world_size()
    dist.all_gather_object(shared, listener and (listener.getsockname()[1], secret))
    port, secret = shared[0]
    if me == 0:
        with listener:
            return _accept(listener, secret, set(leaders) - {0})
    if me not in leaders:
        return {}
    host = os.environ["MASTER_ADDR"]
    try:
        connection = socket.create_connection((host, port), SECONDS_TO_CONNECT)
        connection.sendall(secret + me.to_bytes(4, "big"))
    except OSError as error:
        raise SystemExit(
            f"{socket.gethostname()} cannot reach rank 0 at {host}, TCP port {port}: {error}. The "
            "machines of a run must reach each other on every port, as gloo and NCCL need it too"
        ) from error
    return {0: _keep_alive(connection)}


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _accept(listener: socket.socket, secret: bytes, missing: set[int]) -> dict[int, socket.socket]:
    """The connections of the ranks `missing`; one that lacks the secret is closed."""
    accepted, end = {}, time.monotonic() + SECONDS_TO_CONNECT
    while missing - accepted.keys():
        try:
            listener.settimeout(max(0.01, end - time.monotonic()))
            connection, _ = listener.accept()
            connection.settimeout(5.0)
            greeting = connection.recv(20, socket.MSG_WAITALL)
        except ConnectionError:
            continue
        except TimeoutError:
            if time.monotonic() < end:
                continue  # a stranger who said nothing
            raise SystemExit(
                f"ranks {sorted(missing - accepted.keys())}, each the first of its machine, did "
                f"not connect to TCP port {listener.getsockname()[1]} of rank 0's machine within "
                f"{SECONDS_TO_CONNECT:.0f} s: the machines of a run must reach each other on every "
                "port"
            ) from None
        rank = int.from_bytes(greeting[16:], "big")
        if secrets.compare_digest(greeting[:16], secret) and rank in missing:
            accepted[rank] = _keep_alive(connection)
        else:
            connection.close()
    return accepted


def _keep_alive(connection: socket.socket) -> socket.socket:
    """Have the kernel close it where the other machine falls silent."""
    connection.settimeout(1.0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, SECONDS_UNTIL_ASKED),
        (socket.TCP_KEEPINTVL, SECONDS_UNTIL_ASKED),
        (socket.TCP_KEEPCNT, QUESTIONS),
        # The kernel asks nothing while it waits for an answer to what was sent.
        (socket.TCP_USER_TIMEOUT, SECONDS_UNTIL_ASKED * (QUESTIONS + 1) * 1000),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection
