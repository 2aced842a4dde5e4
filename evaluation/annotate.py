"""A page on which people rank the answers to a prompt, blind and in an order of chance.

python evaluation/annotate.py --answers to_rank.jsonl --output_file rankings.jsonl

The answers are what `step2_reward/collect.py --labeller none` has written. Each click is on the
disk before the page answers. `rankings.jsonl` is what step 2 reads, a line for each person and
prompt.
"""

import contextlib
import copy
import fcntl
import hashlib
import json
import math
import random
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

import numpy as np

from evaluation import estimates
from evaluation.web import WebSettings
from utils import whole_files
from utils.data import rows as data_rows
from utils.distributed import program
from utils.errors import UserError
from utils.settings import command_line
from utils.settings.fields import setting

LONGEST_NAME = 60


@dataclass
class AnnotateConfig(WebSettings):
    answers: str = setting(
        "", "what step2_reward/collect.py --labeller none has written", needed=True
    )
    output_file: str = setting(
        "rankings.jsonl", "where step 2 reads the rankings; the clicks stand beside it", needed=True
    )
    seed: int = setting(42, "seed of the orders in which answers are shown", below=2**63)

    def contradictions(self, world_size: int) -> Iterator[str]:
        yield from self.of_web(True)
        if self.answers and not Path(self.answers).is_file():
            yield f"answers: {self.answers} is no file; set --answers"
        if self.answers and Path(self.answers).resolve() == Path(self.output_file).resolve():
            yield "output_file is the file of the answers; set --output_file to another"


@dataclass
class Judgement:
    """What a person has said of the answers to a prompt. ranks: by answer as it stands in the file,
    1 the best, equal ones tie, 0 not ranked yet. ratings: 1 to 7, 0 none."""

    ranks: list[int]
    ratings: list[int]
    skipped: bool = False

    def is_done(self) -> bool:
        return not self.skipped and all(self.ranks)


@dataclass
class Annotations:
    """All judgements of all people. Every change is a line of `clicks`; the last line of a person
    and a prompt counts. The rankings are written anew with each."""

    rows: list[dict]
    file: Path
    seed: int = 42
    fingerprint: str = ""  # of the answers, whose numbers the clicks name
    judged: dict[tuple[str, int], Judgement] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self):
        header = {"answers": self.fingerprint, "seed": self.seed}
        if self.file.exists() and not self.clicks.exists():
            raise UserError(
                f"{self.file} is there without {self.clicks}, so this page did not write it and "
                "would replace it: give another --output_file"
            )
        lines = self.clicks.read_bytes().split(b"\n") if self.clicks.exists() else []
        whole = [line.decode() for line in lines[:-1]]  # a kill may have left half of the last one
        if whole and json.loads(whole[0]) != header:
            raise UserError(
                f"{self.clicks} is of other answers, or another --seed: give these, or another "
                "--output_file"
            )
        for click in map(json.loads, whole[1:]):
            key = click.pop("person"), click.pop("row")
            self.judged[key] = Judgement(**click)
        kept = whole or [json.dumps(header)]
        with whole_files.writing(self.clicks, "--output_file") as file:
            file.writelines(f"{line}\n" for line in kept)
        if self.judged:
            self.write()  # the kill may have come between a click and the rankings

    @property
    def clicks(self) -> Path:
        return self.file.with_suffix(".clicks.jsonl")

    def of(self, person: str, row: int) -> Judgement:
        """A copy: only what is saved counts."""
        count = len(self.rows[row]["responses"])
        found = self.judged.get((person, row)) or Judgement([0] * count, [0] * count)
        return copy.deepcopy(found)

    def order(self, person: str, row: int) -> list[int]:
        """The answers as this person sees them: their numbers in the file."""
        shown = list(range(len(self.rows[row]["responses"])))
        random.Random(f"{self.seed} {person} {row}").shuffle(shown)
        return shown

    def click(self, person: str, row: int, column: str, answer: int, value: int) -> None:
        """Set a rank or a rating: column "ranks" or "ratings". Clicks may come at the same time."""
        with self.lock:
            judgement = self.of(person, row)
            getattr(judgement, column)[answer] = value
            judgement.skipped = False
            self._keep(person, row, judgement)

    def skip(self, person: str, row: int) -> None:
        with self.lock:
            judgement = self.of(person, row)
            judgement.skipped = True
            self._keep(person, row, judgement)

    def _keep(self, person: str, row: int, judgement: Judgement) -> None:
        """It is on the disk, and in the rankings, when this returns."""
        changes = judgement.is_done() or self.of(person, row).is_done()
        line = json.dumps({"person": person, "row": row, **vars(judgement)}, ensure_ascii=False)
        whole_files.append_lines(self.clicks, line + "\n", "--output_file")
        whole_files.sync(self.clicks)
        self.judged[person, row] = judgement
        if changes:
            self.write()

    def write(self) -> None:
        with whole_files.writing(self.file, "--output_file") as file:
            for (person, row), judgement in sorted(self.judged.items(), key=lambda x: x[0][::-1]):
                if judgement.is_done():
                    kept = {n: x for n, x in self.rows[row].items() if n not in ("scores", "ranks")}
                    said = kept | {"ranks": judgement.ranks, "annotator": person}
                    said |= {"ratings": judgement.ratings} if any(judgement.ratings) else {}
                    file.write(json.dumps(said, ensure_ascii=False) + "\n")

    def next_row(self, person: str, after: int = -1) -> int:
        """The first prompt behind `after`, in a circle, of which the person has said nothing or not
        all; `after` itself where there is none."""
        count = len(self.rows)
        for step in range(1, count + 1):
            row = (after + step) % count
            judgement = self.of(person, row)
            if not judgement.is_done() and not judgement.skipped:
                return row
        return max(after, 0)

    def done(self, person: str) -> int:
        with self.lock:
            return sum(p == person and j.is_done() for (p, _), j in self.judged.items())

    def agreement(self) -> tuple[float, int]:
        """(Krippendorff's alpha of the ranks, the number of prompts ranked by two or more)."""
        with self.lock:
            people = sorted({person for person, _ in self.judged})
        twice = [
            row
            for row in range(len(self.rows))
            if sum(self.of(person, row).is_done() for person in people) > 1
        ]
        ratings = [
            [
                rank if judgement.is_done() else math.nan
                for row in twice
                for judgement in [self.of(person, row)]
                for rank in places(judgement.ranks)
            ]
            for person in people
        ]
        alpha = estimates.krippendorff_alpha(np.array(ratings)) if twice else math.nan
        return alpha, len(twice)


def places(ranks: list[int]) -> list[float]:
    """Ranks as places from 1 to K, equal ones at the mean of the places that they take: [1, 1, 5]
    and [1, 1, 2] say the same."""
    below = [sum(other < rank for other in ranks) for rank in ranks]
    ties = [sum(other == rank for other in ranks) for rank in ranks]
    return [b + (t + 1) / 2 for b, t in zip(below, ties, strict=True)]


def load(path: str) -> list[dict]:
    """Rows with a prompt of turns and two or more answers. DataError with every problem."""
    found, problems = [], []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair has no place
            texts, turns = row["responses"], row["prompt"]
            turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
            sound = isinstance(texts, list) and len(texts) > 1
            sound &= all(isinstance(x, str) for x in texts)
            sound &= all(isinstance(t["content"], str) and t["role"] for t in turns)
        except (ValueError, TypeError, KeyError) as error:
            problems.append(f"{path}:{number}: {type(error).__name__}: {error}")
            continue
        if sound:
            found.append(row)
        else:
            problems.append(f"{path}:{number}: responses are not two or more texts")
    if not found and not problems:
        problems.append(f"{path}: holds no answers")
    if problems:
        raise data_rows.DataError(problems, title="answers that cannot be ranked:")
    return found


@contextlib.contextmanager
def only_writer(file: Path) -> Iterator[None]:
    """UserError where another process writes the same rankings: each would undo the other's."""
    lock = file.with_name(f".{file.name}.lock")
    with whole_files.naming(lock, "--output_file"):
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = open(lock, "a")
    with held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another annotate.py writes {file} and holds {lock}: rank on its page, end it, or "
                "give another --output_file"
            ) from None
        yield


def main() -> None:
    config = command_line.parse(AnnotateConfig, __doc__)
    from evaluation import annotate_page

    rows = load(config.answers)
    fingerprint = hashlib.sha256(Path(config.answers).read_bytes()).hexdigest()
    file = Path(config.output_file)
    with only_writer(file):
        annotate_page.serve(config, Annotations(rows, file, config.seed, fingerprint))


if __name__ == "__main__":
    program.run(main)
