"""Sides that take turns on the same cores: in each round every side has one turn (A B C A B C …),
so what else the machine does falls on all of them alike.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import trl_environment
from utils.distributed import process_group

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class System:
    """One side. function: MODULE:NAME for benchmarks.worker; arguments: its own. One process a
    rank, each bound to one of `cores` and to one thread (on a GPU: unbound)."""

    name: str
    function: str
    arguments: dict
    folder: Path  # for its logs
    cores: list[int]
    device: str = "cpu"
    ranks: int = 1
    python: str = sys.executable
    facts: dict = field(default_factory=dict)  # memory once built, versions
    turns: list[dict] = field(default_factory=list)
    _processes: list[subprocess.Popen] = field(default_factory=list)

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        port = str(process_group.free_port())
        paths = [str(ROOT)]
        if self.python == sys.executable and os.environ.get("PYTHONPATH"):
            paths.append(os.environ["PYTHONPATH"])  # ours may come from there, TRL's never
        for rank in range(self.ranks):
            environment = os.environ | trl_environment.VARIABLES
            environment |= {"PYTHONPATH": os.pathsep.join(paths)}
            if self.device == "cpu":
                environment |= trl_environment.ON_CPU | {"OMP_NUM_THREADS": "1"}
            if self.ranks > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
                environment |= {"MASTER_ADDR": "127.0.0.1"}
                environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(self.ranks))
            command = [self.python, "-m", "benchmarks.worker", self.function]
            command.append(json.dumps(self.arguments))
            bound = {self.cores[rank % len(self.cores)]} if self.device == "cpu" else None
            with open(self._log(rank), "w", encoding="utf-8") as log:
                self._processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=environment,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                        # Bound before Python starts, so that every thread it makes is.
                        preexec_fn=(lambda c=bound: os.sched_setaffinity(0, c)) if bound else None,
                    )
                )

    def _log(self, rank: int) -> Path:
        return self.folder / f"{self.name}.{rank}.log"

    def _answers(self) -> list[dict]:
        """A line of every rank."""
        lines = [p.stdout.readline() for p in self._processes]
        for rank, line in enumerate(lines):
            if not line:
                tail = self._log(rank).read_text(encoding="utf-8").splitlines()[-15:]
                stop([self])
                raise SystemExit(f"{self.name}, rank {rank}, ended early:\n" + "\n".join(tail))
        return [json.loads(line) for line in lines]

    def wait_until_built(self) -> None:
        self.facts = self._answers()[0]

    def turn(self) -> None:
        for p in self._processes:
            p.stdin.write("go\n")
            p.stdin.flush()
        answers = self._answers()
        # The slowest rank is the speed of all; memory is a rank's largest.
        slowest = max(answers, key=lambda a: a["seconds"])
        peak = max(a["peak_memory"] for a in answers)
        self.turns.append(slowest | {"peak_memory": peak})


def stop(systems: list[System]) -> None:
    """End the workers: those that wait at once, one in the middle of a turn after ten seconds."""
    for system in systems:
        for p in system._processes:
            p.stdin.close()  # a worker that reads the end of its input ends
        for p in system._processes:
            try:
                p.wait(timeout=10)
            except subprocess.TimeoutExpired:
                p.kill()
                p.wait()
        system._processes = []


def take_turns(systems: list[System], repeats: int, say: Callable = print) -> None:
    """Start all, one round to warm up (not kept), then `repeats` rounds of a turn each."""
    # Told to end, this process takes the workers with it: the `finally` below runs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    try:
        for system in systems:
            system.start()
        for system in systems:
            system.wait_until_built()
        for number in range(repeats + 1):
            for system in systems:
                system.turn()
            shown = "  ".join(f"{s.name} {s.turns[-1]['seconds']:.2f}" for s in systems)
            say(f"round {number}/{repeats}, seconds: {shown}{'' if number else '  (warm-up)'}")
    finally:
        stop(systems)
    for system in systems:
        del system.turns[0]


def parser(description: str, repeats: int):
    """Flags that all throughput benchmarks share."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--repeats", type=int, default=repeats, help="rounds after the warm-up")
    found.add_argument(
        "--core", type=int, default=-1, help="CPU core to use (default: the last; ranks: all)"
    )
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    found.add_argument("--output_dir", default="output/benchmarks")
    found.add_argument(
        "--flags",
        nargs=argparse.REMAINDER,
        default=[],
        help="last: all that follows is told to our step, e.g. --flags --micro_batch_tokens 1536",
    )
    return found


def cores_of(arguments, ranks: int = 1) -> list[int]:
    """The core of one rank, or one each of several."""
    free = sorted(os.sched_getaffinity(0))
    if ranks > len(free) and arguments.device == "cpu":
        raise SystemExit(f"{ranks} ranks need {ranks} cores; this process may use {len(free)}")
    if ranks > 1:
        return free[:ranks]
    if arguments.core >= 0 and arguments.core not in free:
        raise SystemExit(f"--core {arguments.core}: this process may use {free}")
    return [arguments.core if arguments.core >= 0 else free[-1]]
