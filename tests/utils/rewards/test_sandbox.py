"""Confined programs: what they may do, what they may not, and that nothing of them stays."""

import os
import re
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.rewards import confined, sandbox
from utils.rewards.sandbox import Limits, Servants, run_program

SMALL = Limits(memory=512 << 20, output=10_000)
QUICK = Limits(seconds=1, memory=512 << 20, output=10_000)


def end_of(source, stdin="", limits=SMALL, **how):
    return run_program([source], stdin, limits, **how)


def test_this_machine_confines():
    assert sandbox.refusal() == ""


@pytest.mark.parametrize(
    "source, stdin, output",
    [
        ("print(input()[::-1])", "äb\n", "bä\n"),
        ("import sys; print(len(sys.stdin.buffer.read()))", "x" * 100_000, "100000\n"),
        ("print(open(0).read().split())", "1 2\n3", "['1', '2', '3']\n"),
        ("print(__name__, sorted({'b', 'a'}))", "", "__main__ ['a', 'b']\n"),
        ("import numpy as np; print(np.linalg.inv(np.eye(2))[0, 0])", "", "1.0\n"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n  x: int\nprint(A(1))", "")
        + ("A(x=1)\n",),
        ("import time, random, heapq, asyncio; time.sleep(0.01); print(random.random() < 1)", "")
        + ("True\n",),
        ("import os; print(sorted(os.environ)[:1], os.getcwd())", "", "['LANG'] /\n"),
        ("print(eval('1' * 3))\x00", "", None),  # NUL bytes are no Python
        ("print('\ud800')", "", None),
        ("def", "", None),
    ],
)
def test_a_plain_program_runs(source, stdin, output):
    ended = end_of(source, stdin)
    assert ended == (sandbox.Ended(0, output) if output else sandbox.Ended(1, ""))


def test_a_set_has_one_order():
    source = "print(list({str(i) for i in range(50)}))"
    assert end_of(source).output == end_of(source).output


# Each prints the error that it meets.
REFUSED = {
    "socket": "import socket; socket.socket()",
    "socketpair": "import socket; socket.socketpair()",
    "fork": "import os; os.fork()",
    "thread": "import threading; threading.Thread(target=print).start()",
    "program": "import subprocess; subprocess.run(['/bin/true'])",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "write": "open({canary!r}, 'w')",
    "truncate": "import os; os.open({canary!r}, os.O_RDONLY | os.O_TRUNC)",
    "unlink": "import os; os.unlink({canary!r})",
    "rename": "import os; os.rename({canary!r}, {canary!r} + '2')",
    "chmod": "import os; os.chmod({canary!r}, 0)",
    "read": "open({canary!r}).read()",
    "temporary": "import tempfile; tempfile.TemporaryFile()",
    "environment of the parent": "import os; open(f'/proc/{{os.getppid()}}/environ').read()",
    "its own memory": "open('/proc/self/mem', 'rb').read(1)",
    "kill": "import os; os.kill({pid}, 9)",
    "signal by a file": "import fcntl, os; fcntl.fcntl(0, fcntl.F_SETOWN, {pid})",
    "limits of another": "import resource; resource.prlimit({pid}, resource.RLIMIT_CPU, (1, 1))",
    "its own limits": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    "memory file": "import os; os.memfd_create('x')",
    "user": "import os; os.setuid(0)",
    "mount": "import ctypes, os; c = ctypes.CDLL(None, use_errno=True); "
    "c.mount(b'a', b'/', b'tmpfs', 0, 0) and os.strerror(ctypes.get_errno()); "
    "raise OSError(ctypes.get_errno(), 'mount')",
    "io_uring": "import ctypes; c = ctypes.CDLL(None, use_errno=True); "
    "c.syscall(425, 8, b'0' * 120); raise OSError(ctypes.get_errno(), 'io_uring')",
    "memory": "bytearray(10 << 30)",
}


def children():
    """The confined programs that this process has started and that still run."""
    found = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "pid=,args="], capture_output=True, text=True
    ).stdout
    return [line for line in found.splitlines() if '["run"' in line]


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_what_could_do_harm(what, tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("untouched")
    source = REFUSED[what].format(canary=str(canary), pid=os.getpid())
    source = f"try:\n  {source}\nexcept BaseException as e: print(type(e).__name__)"
    expected = {"thread": "RuntimeError", "memory": "MemoryError", "temporary": "FileNotFoundError"}
    expected |= {"its own limits": "ValueError"}
    ended = end_of(source)
    assert (ended.code, ended.output) == (0, expected.get(what, "PermissionError") + "\n")
    assert canary.read_text() == "untouched"
    # The same program finds nothing to stop it where it is not confined, or it would prove nothing.
    if what in ("socket", "fork", "thread", "write", "read", "program"):
        free = end_of(source, confine=False)
        assert "Error" not in free.output


LONG = {
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "deaf": "import signal, time\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
    "pattern": "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
}


@pytest.mark.parametrize("what", LONG)
def test_time_ends_it(what):
    began = time.monotonic()
    ended = end_of(LONG[what], limits=QUICK)
    assert ended.code != 0 and time.monotonic() - began < 9
    assert not children()


def test_its_output_is_bounded():
    ended = end_of("while True: print('x' * 999)")
    assert ended.code != 0 and 0 < len(ended.output) <= QUICK.output
    assert end_of("print('x' * 9998)").output == "x" * 9998 + "\n"


def test_what_it_started_unconfined_ends_with_it(tmp_path):
    """The limits hold there too, and the whole group is ended."""
    late = str(tmp_path / "late")
    source = f"import os, time\nif not os.fork():\n  time.sleep(0.5)\n  open({late!r}, 'w')"
    assert end_of(source, confine=False).code == 0
    time.sleep(0.8)
    assert not (tmp_path / "late").exists()


def test_the_table_of_calls_is_the_kernels():
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    generic = Path("/usr/include/asm-generic/unistd.h")
    if not header.exists():
        pytest.skip("needs the kernel's headers (linux-libc-dev)")
    for column, path in enumerate((header, generic)):
        found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())
        numbers = {("newfstatat" if n == "fstatat" else n): int(v) for n, v in found}
        for name, pair in {**confined.CALLS, "fcntl": confined.FCNTL}.items():
            assert pair[column] == numbers.get(name), (name, path)


def test_a_machine_that_cannot_confine_says_why(monkeypatch):
    sandbox.refusal.cache_clear()
    monkeypatch.setattr(sandbox.confined, "__file__", "/nowhere.py")
    try:
        assert "cannot be confined here" in sandbox.refusal() and "/nowhere.py" in sandbox.refusal()
    finally:
        monkeypatch.undo()
        sandbox.refusal.cache_clear()


def test_where_its_limits_cannot_be_set_it_says_so():
    """Else no program would start, and every answer would score 0."""

    def poor():
        # Without the capability to raise limits (PR_CAPBSET_DROP, CAP_SYS_RESOURCE): as a user.
        confined.libc.prctl(24, 24, 0, 0, 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    source = "from utils.rewards import sandbox; print(sandbox.refusal())"
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=sandbox.ROOT,
        preexec_fn=poor,
        capture_output=True,
        text=True,
    )
    assert "cannot be confined here" in done.stdout and "maximum limit" in done.stdout


def test_many_open_files_are_no_hindrance():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, before[1]), before[1]))
    files = []
    try:
        files += [os.open("/dev/null", os.O_RDONLY) for _ in range(1200)]
        assert end_of("print(1)") == sandbox.Ended(0, "1\n")
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# Calls of our own functions.


def test_calls_are_answered_in_order_and_the_slow_one_is_ended():
    servants = Servants("operator:pow", 0.5, memory=256 << 20)
    calls = [[2, n] for n in range(40)]
    calls[7] = [9, 9**9 * 9**9]  # in C, for ever
    results = servants.call_each(calls)
    assert results == [None if n == 7 else 2**n for n in range(40)]
    assert servants.call_each([[3, 2]]) == [9]


def test_a_call_that_needs_too_much_memory_has_no_answer():
    servants = Servants("operator:mul", 5.0, memory=256 << 20)
    assert servants.call_each([["a", 1 << 30], ["a", 2]]) == [None, "aa"]


def test_a_function_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="operator:truediv failed"):
        Servants("operator:truediv", 5.0).call_each([[1, 0]])


def test_one_that_was_ended_while_it_was_idle_is_replaced():
    servants = Servants("operator:add", 5.0)
    assert servants.call_each([[1, 2]]) == [3]
    idle = servants.idle.get()
    idle.kill()
    idle.wait()
    servants.idle.put(idle)
    assert servants.call_each([[3, 4]]) == [7]


def test_servants_end_with_their_master():
    source = (
        "from utils.rewards.sandbox import Servants; import os\n"
        "s = Servants('operator:add', 5.0); print(s.call_each([[1, 2]]))\n"
        "print(s.idle.get().pid, flush=True); os._exit(0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=sandbox.ROOT, capture_output=True, text=True
    )
    said, pid = done.stdout.splitlines()
    assert said == "[3]"
    time.sleep(0.3)
    status = Path(f"/proc/{pid}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


ATTACKS = {
    "fork bomb": "import os\nwhile True:\n  os.fork()",
    "fork bomb that goes on": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "endless loop": "while True: pass",
    "open socket": "import socket\nsocket.create_connection(('127.0.0.1', {port}))",
    "10 GB": "x = bytearray(10 << 30)\nprint(len(x))",
    "10 GB in pieces": "x = []\nwhile True: x.append(bytearray(1 << 20))",
}


def attack(times):
    """Each of ATTACKS so often; all score 0 and harm nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        sources = [a.format(port=server.getsockname()[1]) for a in ATTACKS.values()]
        before = len(os.listdir("/proc"))
        ended = sandbox.each(lambda source: end_of(source, limits=QUICK), sources * times)
        assert all(one.code != 0 and one.output == "" for one in ended)
        assert not children() and len(os.listdir("/proc")) < before + 50
        with pytest.raises(BlockingIOError):
            server.accept()
    return len(ended)


def test_attacks_fail():
    assert attack(1) == len(ATTACKS)


@pytest.mark.slow
def test_attacks_fail_a_thousand_times():
    free = os.statvfs("/tmp").f_bavail
    assert attack(167) >= 1000
    assert os.statvfs("/tmp").f_bavail > free * 0.9
