"""Untrusted programs, and calls that may never end, in child processes (confined.py).

run_program    Python from a model: what it writes, and how it ended
call_each      a function of ours on many arguments, each call with a time limit
"""

import contextlib
import functools
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from utils.rewards import confined

ROOT = str(Path(__file__).resolve().parents[2])
# Sets have one order, numpy starts no threads, and nothing of this environment is passed on.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8", "LANG": "C.UTF-8"}
ENVIRONMENT |= {f"{x}_NUM_THREADS": "1" for x in ("OMP", "OPENBLAS", "MKL")}
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Of one program: seconds of processor time (and twice as many by the clock), bytes of memory
    and of output."""

    seconds: int = 5
    memory: int = 1024 * MEGABYTE
    output: int = MEGABYTE


@dataclass(frozen=True)
class Ended:
    """How a program ended: its exit code, as subprocess gives it, or None where it was stopped by
    the clock; and its output."""

    code: int | None
    output: str


def _command(*job) -> list[str]:
    return [sys.executable, "-s", "-B", confined.__file__, json.dumps(job)]


@functools.cache
def refusal() -> str:
    """Why this machine cannot confine programs; empty where it can."""
    # With the limits: where this user may not set them, no program would start.
    asked = _command("attempt", Limits.memory, Limits.seconds, Limits.output)
    tried = subprocess.run(asked, env=ENVIRONMENT, cwd="/", capture_output=True, text=True)
    if tried.returncode == 0:
        return ""
    why = tried.stderr.strip().splitlines()[-1:] or [f"exit code {tried.returncode}"]
    return f"programs cannot be confined here (Linux 5.13 with Landlock and seccomp can): {why[0]}"


def run_program(
    sources: Sequence[str],
    stdin: str = "",
    limits: Limits = Limits(),
    name: str = "__main__",
    confine: bool = True,
) -> Ended:
    """Run Python sources, one after the other with the same globals, in a process of its own.

    name: what __name__ is to them. confine: see confined.py; without it the program may do all that
    the user may, within the limits. Text is UTF-8; what is no UTF-8 is replaced.
    """
    job = json.dumps({"name": name, "sources": list(sources)})
    with (
        tempfile.TemporaryFile() as asked,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as written,
    ):
        for file, text in ((asked, job), (given, stdin)):
            file.write(text.encode("utf-8", "replace"))
            file.seek(0)
        number = asked.fileno()
        process = subprocess.Popen(
            _command("run", number, limits.memory, limits.seconds, limits.output, confine),
            stdin=given,
            stdout=written,
            stderr=subprocess.DEVNULL,
            pass_fds=[number],
            env=ENVIRONMENT,
            cwd="/",
            start_new_session=True,
        )
        watched = os.pidfd_open(process.pid)
        waiting = select.poll()  # select.select would refuse the 1024th open file
        waiting.register(watched, select.POLLIN)
        in_time = waiting.poll(2000 * limits.seconds)
        os.close(watched)
        # Unconfined it may have started others, which are in its group; the group's number is its
        # own until `wait` has taken note of its end.
        os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        written.seek(0)
        output = written.read(limits.output).decode("utf-8", "replace")
        return Ended(code if in_time else None, output)


def each(function, items: Sequence) -> list:
    """[function(item), …], as many at a time as this process has processors."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(function, items))


class Servants:
    """Processes that answer calls of one function of ours, kept from one batch to the next.

    name: package.module:function, of arguments and a result that JSON can hold. A call that takes
    more than `seconds` of processor time, or `memory` bytes, gives None; one that fails raises
    RuntimeError.
    """

    def __init__(self, name: str, seconds: float, memory: int = 2048 * MEGABYTE):
        self.name, self.seconds, self.memory = name, seconds, memory
        self.idle: queue.SimpleQueue = queue.SimpleQueue()

    def call_each(self, calls: Sequence[Sequence]) -> list:
        """The function's results for each of the argument lists."""
        return each(self._call, calls)

    def _call(self, arguments: Sequence) -> object:
        process = self._taken()
        try:
            process.stdin.write(json.dumps(arguments) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            self.idle.put(process)
            return json.loads(line)
        with contextlib.suppress(BrokenPipeError):  # what it has not read
            process.stdin.close()
        if process.wait() not in (-signal.SIGPROF, -signal.SIGALRM):
            raise RuntimeError(f"{self.name} failed, exit code {process.returncode}; see stderr")
        return None

    def _taken(self) -> subprocess.Popen:
        """One that is idle, or a new one. Idle ones may have been ended where memory ran out."""
        while not self.idle.empty():
            with contextlib.suppress(queue.Empty):
                process = self.idle.get_nowait()
                if process.poll() is None:
                    return process
        return self._started()

    def _started(self) -> subprocess.Popen:
        # They run our own code: the time limit holds where nothing can be confined, too.
        paths = [ROOT, *filter(os.path.isabs, sys.path)]
        asked = (self.name, paths, self.memory, self.seconds, not refusal())
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        return subprocess.Popen(_command("serve", *asked), **pipes, env=ENVIRONMENT, cwd="/")
