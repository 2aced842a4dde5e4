"""Ranks of several machines, pretended on one: a rank that dies ends all of them, and soon."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.helpers.running import ROOT
from utils.distributed import peers
from utils.distributed.process_group import free_port

MACHINES = "aabc"  # of ranks 0 to 3
LIMIT = 20.0  # seconds, on a machine with other work; alone it is three

# A rank sees its own machine's ranks only: by the name it is given in place of the kernel's.
RANK = """
import datetime, os, sys, time
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
from utils.distributed import peers

end, names = sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=10))
me = dist.get_rank()
peers.machine = lambda: names[me]
peers.look_after()
assert peers.leaders() == sorted({names.index(name) for name in names})
dist.barrier()
print(f"rank {me} has joined", flush=True)
if end == "wait":
    time.sleep(10_000)
if me == 0:
    time.sleep(2.5)  # the others are done, and wait for the last farewell
peers.stop()
dist.barrier()
time.sleep(1.0 * me)  # they leave one after the other
os._exit(0)
"""


def start(tmp_path, end: str) -> list[subprocess.Popen]:
    (tmp_path / "rank.py").write_text(RANK)
    shared = os.environ | {"WORLD_SIZE": str(len(MACHINES)), "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, tmp_path / "rank.py", ROOT, end, MACHINES],
            env=shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(len(MACHINES))
    ]


def end_of(processes: list[subprocess.Popen], within: float) -> list[str]:
    """What each printed, once all have ended."""
    until = time.monotonic() + within
    try:
        return [p.communicate(timeout=max(0.1, until - time.monotonic()))[0] for p in processes]
    finally:
        for p in processes:
            p.kill()


# Rank 0, whom all are connected to; one beside it; one alone on its machine, which a third machine
# must hear of.
@pytest.mark.parametrize("victim", [0, 1, 3])
def test_a_killed_rank_ends_those_of_all_machines(tmp_path, victim):
    processes = start(tmp_path, "wait")
    try:
        for rank, process in enumerate(processes):
            assert process.stdout.readline() == f"rank {rank} has joined\n"
        processes[victim].kill()
    except BaseException:
        end_of(processes, 0.1)
        raise
    told = end_of(processes, LIMIT)
    assert [p.returncode for p in processes] == [-9 if r == victim else 1 for r in range(4)], told
    line = rf"rank {victim} \(process {processes[victim].pid} on \S+\) is gone, and the run ends"
    # A machine whose only word of it came from rank 0 leaves the speaking to rank 0.
    first_hand = {0: [1, 2, 3], 1: [0], 3: [0]}[victim]
    assert [r for r, text in enumerate(told) if re.search(line, text)] == first_hand, told
    assert not re.search("Traceback|does not answer", "".join(told)), told


# What a rank does while Python cannot handle a signal: the key derivation is one call of C.
BUSY = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from utils.distributed import peers, preemption

preemption.watch()
gone = int(sys.argv[2])
names = ["rank 0 (process 1 on here)", "rank 1"]
peers._thread = peers.threading.Thread(
    target=peers._look, args=(1, {0: gone}, {}, names), daemon=True
)
peers._thread.start()
print("busy", flush=True)
hashlib.pbkdf2_hmac("sha256", b"a", b"b", 200_000_000)
"""


@pytest.mark.parametrize("asked", [True, False])
def test_a_rank_that_was_asked_to_stop_says_so_though_another_one_has_left_first(asked):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    words = [sys.executable, "-c", BUSY, ROOT, str(other.pid)]
    busy = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert busy.stdout.readline() == "busy\n"
        time.sleep(0.5)  # now it is inside
        if asked:
            busy.send_signal(signal.SIGUSR1)
        other.kill()
        other.wait()
        assert busy.wait(LIMIT) == (75 if asked else 1)
    finally:
        busy.kill()
        other.kill()


def test_ranks_that_have_said_farewell_leave_one_after_the_other(tmp_path):
    processes = start(tmp_path, "leave")
    told = end_of(processes, 60.0)
    assert [p.returncode for p in processes] == [0] * 4, told
    assert told == [f"rank {rank} has joined\n" for rank in range(4)]


def test_a_stranger_at_the_port_is_sent_away():
    with peers._listen() as listener:
        address = ("127.0.0.1", listener.getsockname()[1])
        found = {}
        thread = threading.Thread(
            target=lambda: found.update(peers._accept(listener, b"s" * 16, {2}))
        )
        thread.start()
        strangers = []
        for greeting in (
            b"x" * 16 + (2).to_bytes(4, "big"),
            b"s" * 16 + (7).to_bytes(4, "big"),
            b"s",
        ):
            strangers.append(socket.create_connection(address, 5.0))
            strangers[-1].sendall(greeting)
        strangers[-1].close()
        friend = socket.create_connection(address, 5.0)
        friend.sendall(b"s" * 16 + (2).to_bytes(4, "big"))
        thread.join(30.0)
        assert list(found) == [2] and found[2].getpeername()[1] == friend.getsockname()[1]
        assert strangers[0].recv(1) == b"" and strangers[1].recv(1) == b""
        for connection in (*strangers, friend, found[2]):
            connection.close()


def test_a_machine_that_falls_silent_is_found_by_the_kernel():
    """Within 20 s, by the options as the kernel has them; test_nodes.py takes a link down."""
    with peers._listen() as listener:
        one = socket.create_connection(("127.0.0.1", listener.getsockname()[1]), 5.0)
        other, _ = listener.accept()
        peers._keep_alive(one)
        tcp = socket.IPPROTO_TCP
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        idle, between, count = (
            one.getsockopt(tcp, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle + between * count <= 20
        assert one.getsockopt(tcp, socket.TCP_USER_TIMEOUT) <= 20_000
        one.close()
        other.close()
