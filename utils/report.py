"""What a run says: console lines or a progress bar, metrics.jsonl, TensorBoard, closing table."""

import json
import math
import os
import sys
import time
from pathlib import Path

from utils.data.rows import DataError
from utils.distributed import process_group


class Report:
    """Rank 0 writes; on other ranks every method does nothing.

    `OUTPUT/metrics.jsonl` gets one line a step, written at once, so that a killed run keeps all
    it measured. On a terminal a progress bar shows the step, elsewhere plain lines.
    """

    def __init__(self, output_dir: str, log_every: int, tensorboard: bool):
        self.main = process_group.is_main()
        self.total_steps = 0
        self.log_every = log_every
        self._file = self._board = self._bar = None
        if not self.main:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / "metrics.jsonl", "w", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))

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
        record = {"step": step} | {k: _plain(v) for k, v in metrics.items()}
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
        line = "  ".join(f"{k} {brief(metrics[k])}" for k in show if k in metrics)
        if self._bar is not None:
            self._bar.update(max(0, step - self._bar.n))
            self._bar.set_postfix_str(line)
        elif step % self.log_every == 0 or step in (1, self.total_steps):
            print(f"step {step:>4}/{self.total_steps}  {line}", flush=True)

    def close(self) -> None:
        for thing in (self._bar, self._board, self._file):
            if thing is not None:
                thing.close()


def run(main) -> None:
    """Call a step's `main`; what a user can mend ends as a message, not as a traceback a rank.

    DataError and SystemExit("…") are such. Any other exception is a bug and keeps its traceback.
    """
    try:
        main()
    except (DataError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.code, str):
            raise
        if not process_group.is_main():
            # Rank 0 mostly fails the same way and speaks for all: the launcher ends this rank
            # when rank 0 exits. A failure of this rank alone is told a little later.
            time.sleep(3.0)
        print(
            f"error: {error}"
            if process_group.is_main()
            else f"error on rank {process_group.rank()}: {error}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # peers may wait in a collective for ever; the launcher ends them


def save_result(output_dir: str, result: dict) -> None:
    """Write `result.json`: what a step ended with, for the closing table. Rank 0 only."""
    if process_group.is_main():
        text = json.dumps({k: _plain(v) for k, v in result.items()}, indent=2, ensure_ascii=False)
        Path(output_dir, "result.json").write_text(text + "\n", encoding="utf-8")


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


def batch_arithmetic(config, world_size: int) -> str:
    """The sum every batch setting takes part in, as it works out in this run."""
    accumulation = config.accumulation(world_size)
    return (
        f"global batch {config.global_batch_size} = micro batch {config.micro_batch_size} × "
        f"accumulation {accumulation} × ranks {world_size}"
    )


def quiet_libraries() -> None:
    """Silence what is not about the run: info logs of libraries, and notices to developers."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
