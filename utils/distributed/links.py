"""TCP connections between the machines of a run: from the first rank of each one to rank 0.

A connection closes when its process ends, however it ends, and the kernel's keepalive closes one
to a machine that no longer answers. Nobody sends a heartbeat: a thread of Python may stand still
for as long as another one holds the interpreter's lock.
"""

import errno
import os
import secrets
import selectors
import socket
import time
from dataclasses import dataclass

import torch.distributed as dist

SECONDS_TO_CONNECT = 60.0
SECONDS_UNTIL_ASKED = 5  # of silence; then the kernel asks every so many seconds …
QUESTIONS = 3  # … and takes the machine for gone after so many without an answer
_LOST = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}


@dataclass(frozen=True)
class News:
    """From the machine of `rank`. told: what it said; empty where its connection ended."""

    rank: int
    told: str = ""
    unreachable: bool = False


class Links:
    """What this rank hears from other machines. sockets: rank at the other end → connection."""

    def __init__(self, sockets: dict[int, socket.socket]):
        self._sockets = sockets
        self._selector = selectors.DefaultSelector()
        for rank, connection in sockets.items():
            _keep_alive(connection)
            self._selector.register(connection, selectors.EVENT_READ, rank)

    def wait(self, seconds: float) -> News | None:
        """The next news, or None after `seconds` without."""
        for key, _ in self._selector.select(seconds):
            try:
                told = key.fileobj.recv(4096)
            except OSError as error:
                return News(key.data, unreachable=error.errno in _LOST)
            return News(key.data, told.decode("utf-8", "replace"))
        return None

    def tell(self, text: str) -> None:
        """Say `text` to all of them that still listen."""
        for connection in self._sockets.values():
            try:
                connection.sendall(text.encode())
            except OSError:
                continue  # this one is gone: there is nobody to tell


def connect(leaders: list[int]) -> Links | None:
    """Connect the ranks `leaders`, of which rank 0 is the first; None on all other ranks.

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
            return Links(_accept(listener, secret, set(leaders) - {0}))
    if me not in leaders:
        return None
    host = os.environ["MASTER_ADDR"]
    try:
        connection = socket.create_connection((host, port), SECONDS_TO_CONNECT)
        connection.sendall(secret + me.to_bytes(4, "big"))
    except OSError as error:
        raise SystemExit(
            f"{socket.gethostname()} cannot reach rank 0 at {host}, TCP port {port}: {error}. The "
            "machines of a run must reach each other on every port, as gloo and NCCL need it too"
        ) from error
    return Links({0: connection})


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _accept(listener: socket.socket, secret: bytes, missing: set[int]) -> dict:
    """The connections of the ranks `missing`; strangers, who lack the secret, are sent away."""
    found, end = {}, time.monotonic() + SECONDS_TO_CONNECT
    while missing - found.keys():
        try:
            listener.settimeout(max(0.01, end - time.monotonic()))
            connection, _ = listener.accept()
            connection.settimeout(5.0)
            greeting = connection.recv(20, socket.MSG_WAITALL)
        except ConnectionError:
            continue
        except TimeoutError:
            if time.monotonic() < end:
                continue  # of a stranger who said nothing
            raise SystemExit(
                f"ranks {sorted(missing - found.keys())}, each the first of its machine, did not "
                f"connect to TCP port {listener.getsockname()[1]} of rank 0's machine within "
                f"{SECONDS_TO_CONNECT:.0f} s: the machines of a run must reach each other on every "
                "port"
            ) from None
        rank = int.from_bytes(greeting[16:], "big")
        if secrets.compare_digest(greeting[:16], secret) and rank in missing:
            found[rank] = connection
        else:
            connection.close()
    return found


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(1.0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    tcp = socket.IPPROTO_TCP
    connection.setsockopt(tcp, socket.TCP_KEEPIDLE, SECONDS_UNTIL_ASKED)
    connection.setsockopt(tcp, socket.TCP_KEEPINTVL, SECONDS_UNTIL_ASKED)
    connection.setsockopt(tcp, socket.TCP_KEEPCNT, QUESTIONS)
    # The kernel asks nothing while it waits for an answer to what was sent.
    limit = SECONDS_UNTIL_ASKED * (QUESTIONS + 1) * 1000
    connection.setsockopt(tcp, socket.TCP_USER_TIMEOUT, limit)
