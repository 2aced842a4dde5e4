"""Metrics and sampled answers in Weights & Biases, MLflow or trackio (--track), beside
metrics.jsonl.

The tracker's library runs in a process of its own, this file, which a thread feeds. So a tracker
that fails or hangs costs a warning, and neither the run nor its time. The process notes in
`OUTPUT/tracking.json` which tracked run it is, and a resumed run goes on in that one.
"""

import contextlib
import importlib
import importlib.util
import json
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

PROJECT = "rlhf-in-three-steps"  # unless the tracker's own environment variable names another
SECONDS_TO_END = 60.0  # for what is still to be sent when a run ends
WAITING = 1000  # records that may wait for the tracker
LONGEST = 500  # characters of a setting that MLflow takes


class Wandb:
    """Weights & Biases. known: what identifies the run that is gone on with; empty: a new one."""

    def __init__(self, known: str, name: str, settings: dict):
        self.library, self.known = importlib.import_module("wandb"), known or uuid.uuid4().hex
        self.library.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=self.known,
            name=name,
            config=settings,
            resume="allow",
            allow_val_change=True,
        )

    def log(self, step: int, metrics: dict[str, float], tables: dict[str, list[dict]]) -> None:
        made = {
            name: self.library.Table(list(rows[0]), [list(row.values()) for row in rows])
            for name, rows in tables.items()
        }
        self.library.log(metrics | made, step=step)

    def close(self, whole: bool) -> None:
        self.library.finish(exit_code=int(not whole))


class Trackio(Wandb):
    """Has the functions of wandb, and knows a run by its name."""

    def __init__(self, known: str, name: str, settings: dict):
        self.library = importlib.import_module("trackio")
        self.known = known or f"{name} {uuid.uuid4().hex[:8]}"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.library.init(project, self.known, config=settings, resume="allow")

    def close(self, whole: bool) -> None:
        self.library.finish()


class Mlflow:
    def __init__(self, known: str, name: str, settings: dict):
        self.library = importlib.import_module("mlflow")
        if known:
            self.known = self.library.start_run(run_id=known).info.run_id
            return
        self.library.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        self.known = self.library.start_run(run_name=name).info.run_id
        self.library.log_params({n: str(value)[:LONGEST] for n, value in settings.items()})

    def log(self, step: int, metrics: dict[str, float], tables: dict[str, list[dict]]) -> None:
        named = {re.sub(r"[^\w./ -]", "_", name): value for name, value in metrics.items()}
        self.library.log_metrics(named, step=step)
        for name, rows in tables.items():
            columns = {column: [row[column] for row in rows] for column in rows[0]}
            self.library.log_table(columns, f"{name}_{step}.json")

    def close(self, whole: bool) -> None:
        self.library.end_run("FINISHED" if whole else "FAILED")


TRACKERS: dict[str, Callable] = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}


def check(name: str) -> None:
    """ValueError where the library of --track is missing."""
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"it is not installed: pip install {name}, or leave out --track")


class Tracking:
    """What rank 0 sends to the tracker `name`. say: for warnings; resumed: does the run go on?"""

    def __init__(self, name: str, output_dir: str, settings: dict, resumed: bool, say: Callable):
        self.name, self.say, self.tables = name, say, {}
        folder = Path(output_dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        self.log_file = folder / "tracking.log"
        with open(self.log_file, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, name, folder / "tracking.json", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is the run's
            )
        self.waiting: queue.Queue[bytes | None] = queue.Queue(WAITING)
        threading.Thread(target=self._feed, args=[self.process.stdin], daemon=True).start()
        self._send({"name": "/".join(folder.parts[-2:]), "settings": settings, "resumed": resumed})

    def table(self, name: str, rows: list[dict]) -> None:
        """Rows of the same plain values, for the next step that is logged."""
        if rows:
            self.tables[name] = rows

    def log(self, step: int, metrics: dict[str, float]) -> None:
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._send({"step": step, "metrics": finite, "tables": self.tables})
        self.tables = {}

    def close(self) -> None:
        """Wait, not long, until all is sent."""
        self._send({"whole": True})
        if self.process is None:
            return
        try:
            self.waiting.put(None, timeout=SECONDS_TO_END)
            if code := self.process.wait(SECONDS_TO_END):
                self._give_up(f"ended with code {code}")
        except (queue.Full, subprocess.TimeoutExpired):
            self._give_up(f"was not done {SECONDS_TO_END:.0f} s after the run")

    def _send(self, record: dict) -> None:
        if self.process is None:
            return
        if self.process.poll() is not None:
            self._give_up(f"ended with code {self.process.returncode}")
            return
        try:
            self.waiting.put_nowait(json.dumps(record).encode() + b"\n")
        except queue.Full:
            self._give_up(f"has not taken {WAITING} records")

    def _give_up(self, why: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process = None
        self.say(
            f"warning: track={self.name} {why}; see {self.log_file}. Nothing more is sent to it; "
            "metrics.jsonl has all that was measured"
        )

    def _feed(self, pipe) -> None:
        with contextlib.suppress(BrokenPipeError), pipe:
            for line in iter(self.waiting.get, None):
                pipe.write(line)
                pipe.flush()


def follow(lines, name: str, note: Path) -> None:
    """Give the records in `lines` to the library of a tracker. note: names the tracked run."""
    begin = json.loads(next(lines))
    noted = json.loads(note.read_text()) if begin["resumed"] and note.exists() else {}
    tracker = TRACKERS[name](noted.get(name, ""), begin["name"], begin["settings"])
    note.write_text(json.dumps(noted | {name: tracker.known}) + "\n")
    whole = False
    for record in map(json.loads, lines):
        whole = record.get("whole", False)
        if not whole:
            tracker.log(record["step"], record["metrics"], record["tables"])
    tracker.close(whole)


def end_with(parent: int) -> None:
    """A tracker that hangs must not outlive the run, which would have ended it, for long."""
    while os.getppid() == parent:
        time.sleep(5)
    signal.alarm(int(SECONDS_TO_END))


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose modules are not those that libraries mean
    # The run decides when it is over, by closing the pipe.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with, args=[int(sys.argv[3])], daemon=True).start()
    follow(sys.stdin, sys.argv[1], Path(sys.argv[2]))
