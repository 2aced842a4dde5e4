"""What a run says: console lines or a progress bar, metrics.jsonl, TensorBoard, trackers, closing
table."""

import json
import math
import statistics
import sys
from pathlib import Path

from utils import whole_files
from utils.distributed import process_group
from utils.metrics import check as check_metrics


class Report:
    """Rank 0 writes; on other ranks every method does nothing.

    `OUTPUT/metrics.jsonl` gets one line a step, written at once, so that a killed run keeps all
    it measured. On a terminal a progress bar shows the step, elsewhere plain lines. A run that goes
    on after step `resumed_at` keeps what was written up to there and writes the rest again.
    """

    def __init__(
        self, output_dir: str, log_every: int, tensorboard: bool, resumed_at: int | None = None
    ):
        self.main = process_group.is_main()
        self.total_steps = 0
        self.log_every = log_every
        self._file = self._board = self._bar = None
        self.tracking = None  # utils/tracking.py's, which gets the same numbers
        if not self.main:
            return
        folder = Path(output_dir)
        self._metrics, self._events = folder / "metrics.jsonl", folder / "tensorboard"
        with whole_files.naming(self._metrics):
            folder.mkdir(parents=True, exist_ok=True)
            if resumed_at is not None:
                keep_lines_through(self._metrics, resumed_at)
            mode = "wb" if resumed_at is None else "ab"
            self._file = open(self._metrics, mode, buffering=0)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if resumed_at is None else resumed_at + 1
            with whole_files.naming(self._events):
                self._board = SummaryWriter(str(self._events), purge_step=purge)

    def expect(self, total_steps: int) -> None:
        """The run will have so many steps (known once the data is read)."""
        self.total_steps = total_steps
        if self.main and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, dynamic_ncols=True, unit="step")

    def say(self, text: str) -> None:
        """One line (or block) for people."""
        if self.main:
            if self._bar is not None:
                self._bar.write(text)
            else:
                print(text, flush=True)

    def log(self, step: int, metrics: dict[str, float], show: tuple[str, ...] = ()) -> None:
        """Record one step; `show` names what the console line holds, in that order."""
        if not self.main:
            return
        check_metrics([*metrics, *show])
        record = {"step": step} | {k: _plain(v) for k, v in metrics.items()}
        with whole_files.naming(self._metrics):
            whole_files.append(self._file, json.dumps(record, ensure_ascii=False) + "\n")
        if self._board is not None:
            with whole_files.naming(self._events):
                for name, value in metrics.items():
                    self._board.add_scalar(name, value, step)
        if self.tracking is not None:
            self.tracking.log(step, metrics)
        line = "  ".join(f"{k} {brief(metrics[k])}" for k in show if k in metrics)
        if self._bar is not None:
            self._bar.update(max(0, step - self._bar.n))
            self._bar.set_postfix_str(line)
        elif step % self.log_every == 0 or step in (1, self.total_steps):
            print(f"step {step:>4}/{self.total_steps}  {line}", flush=True)

    def table(self, name: str, rows: list[dict]) -> None:
        """Rows of the same plain values, for a tracker, with the next step that is recorded."""
        if self.tracking is not None:
            self.tracking.table(name, rows)

    def close(self) -> None:
        for thing in (self._bar, self._board, self._file, self.tracking):
            if thing is not None:
                with whole_files.naming(self._events):
                    thing.close()


def answers_as_table(rows: list[dict]) -> list[dict]:
    """Rows of samples.json, the turns of their prompts as text."""
    said = ["\n\n".join(f"{t['role']}: {t['content']}" for t in row["prompt"]) for row in rows]
    return [row | {"prompt": text} for row, text in zip(rows, said, strict=True)]


def keep_lines_through(path: Path, step: int) -> None:
    """Drop the lines of later steps from a metrics file, and one that a kill left unfinished."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            done = json.loads(line)["step"] <= step
        except ValueError:
            break
        if done:
            kept.append(line + "\n")
    whole_files.write_text(path, "".join(kept))


def save_result(output_dir: str, result: dict) -> None:
    """Write `result.json`: what a step ended with, for the closing table. Rank 0 only."""
    if process_group.is_main():
        text = json.dumps({k: _plain(v) for k, v in result.items()}, indent=2, ensure_ascii=False)
        whole_files.write_text(Path(output_dir, "result.json"), text + "\n")


def standard_error(values: list[float]) -> float | None:
    """Of the mean of independent values; None where there are fewer than two, or one that is not
    finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return statistics.stdev(values) / len(values) ** 0.5


def brief(value: float) -> str:
    """A number for people: four significant digits."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"


def _plain(value):
    # JSON has no NaN: null says "no value" where NaN would make the file unreadable.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: list[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """Rows as aligned text columns."""
    cells = [header, *[tuple(str(c) for c in row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
