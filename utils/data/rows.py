"""A row and its place, and the collection of rows that cannot be used."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils import whole_files
from utils.distributed import process_group
from utils.errors import UserError

SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Row:
    """One row as read, and its place: FILE:LINE, FILE[ELEMENT] or FILE row NUMBER."""

    data: dict
    where: str


class DataError(UserError):
    """What is wrong with the data, each problem with its place.

    problems: one text or several. title, advice: a line before them and one after.
    """

    def __init__(self, problems: str | Sequence[str], title: str = "", advice: str = ""):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        lines = [title] if title else []
        lines += self.problems[:SHOWN_PROBLEMS]
        if len(self.problems) > SHOWN_PROBLEMS:
            lines.append(f"... and {len(self.problems) - SHOWN_PROBLEMS} more")
        super().__init__("\n".join(lines + ([advice] if advice else [])))


class BadRow(ValueError):
    """Why one row cannot be used."""


class BadRows:
    """The bad rows of one loading, which in the end are written to a file or end the run.

    max_share: how many of all rows may be bad (0: none, 1: all). report_path: the JSON Lines file
    for the bad rows. entries: (place, reason, row) of each. seen: how many rows were read.
    """

    def __init__(self, max_share: float = 0.0, report_path: str | None = None):
        self.max_share, self.report_path = max_share, report_path
        self.entries: list[tuple[str, str, Any]] = []
        self.seen = 0

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def problems(self) -> list[str]:
        """`place: reason` of each bad row."""
        return [f"{where}: {reason}" for where, reason, _ in self.entries]

    @property
    def too_many(self) -> bool:
        return len(self) > self.max_share * max(self.seen, len(self))

    def add(self, where: str, reason: str, data: Any = None) -> None:
        self.entries.append((where, reason, data))

    def merge(self, other: BadRows) -> None:
        self.entries += other.entries
        self.seen += other.seen

    def moved(self) -> BadRows:
        """All that was collected so far, in a new collection; this one is empty afterwards."""
        other = BadRows(self.max_share, self.report_path)
        other.merge(self)
        self.entries, self.seen = [], 0
        return other

    def finish(self, label: str) -> int:
        """Ends one loading: empties the collection and returns how many rows were bad.

        They are added to the file at report_path and counted in one line; raises DataError that
        names them where they are more than max_share of all rows.
        """
        ended = self.moved()
        if not len(ended):
            return 0
        count = f"{len(ended)} bad row(s) of {ended.seen}"
        if ended.too_many:
            share = math.ceil(1e4 * len(ended) / max(ended.seen, len(ended))) / 1e4
            raise DataError(
                ended.problems,
                title=f"{label}: {count}, more than --max_bad_rows {self.max_share:g} lets out",
                advice=f"Mend them, or leave them out with --max_bad_rows {share:g}.",
            )
        if process_group.is_main():
            written = ""
            if self.report_path:
                self._report(ended)
                written = f", kept in {self.report_path}"
            print(f"{label}: left out {count}{written}; the first: {ended.problems[0]}", flush=True)
        return len(ended)

    def _report(self, ended: BadRows) -> None:
        """Adds the lines that the file lacks: a resumed run reads its data again."""
        known: set[str] = set()
        if os.path.exists(self.report_path):
            with open(self.report_path, encoding="utf-8") as file:
                known = set(file.read().splitlines())
        lines = [_report_line(*entry) for entry in ended.entries]
        if new := [line + "\n" for line in lines if line not in known]:
            whole_files.append_lines(self.report_path, "".join(new))


def _report_line(where: str, reason: str, data: Any) -> str:
    record = {"where": where, "reason": reason, "row": data}
    # ASCII, because a lone surrogate, which may be what is wrong, cannot be written as UTF-8.
    try:
        return json.dumps(record, default=str, allow_nan=False)
    except ValueError:  # NaN, for which strict JSON has no form
        return json.dumps({**record, "row": json.dumps(data, default=str)})


def text_problem(text: str) -> str | None:
    """What a tokenizer cannot read in `text` (a NUL, half a surrogate pair), or None."""
    if "\0" in text:
        return "holds a NUL character"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"holds a lone surrogate, U+{ord(text[error.start]):04X}"
    return None
