"""A row and where it stands, and what becomes of those that cannot be used."""

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
    """One row as read, and where it stands, in words that a person can follow."""

    data: dict
    where: str


class DataError(UserError):
    """What is wrong with the data, every problem beginning with the place where it is.

    Arguments: problems (one text or several), title (a line before them), advice (a line after).
    """

    def __init__(self, problems: str | Sequence[str], title: str = "", advice: str = ""):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        lines = [title] if title else []
        lines += self.problems[:SHOWN_PROBLEMS]
        if len(self.problems) > SHOWN_PROBLEMS:
            lines.append(f"... and {len(self.problems) - SHOWN_PROBLEMS} more")
        super().__init__("\n".join(lines + ([advice] if advice else [])))


class BadRow(ValueError):
    """Why one row cannot be used; raised by converters, turned into an entry of BadRows."""


class BadRows:
    """Collects the bad rows of one loading, and in the end writes them down or refuses them all.

    Arguments: max_share (of the rows seen, how many may be left out: 0 none, 1 whatever comes),
    report_path (JSON Lines file that keeps the rows left out). Readers add to `seen`.
    """

    def __init__(self, max_share: float = 0.0, report_path: str | None = None):
        self.max_share = max_share
        self.report_path = report_path
        self.seen = 0
        self._rows: list[tuple[str, str, Any]] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def problems(self) -> list[str]:
        """One text a bad row, `where: reason`."""
        return [f"{where}: {reason}" for where, reason, _ in self._rows]

    @property
    def too_many(self) -> bool:
        """Whether more rows are bad than may be left out."""
        return len(self._rows) > self.max_share * max(self.seen, len(self._rows))

    def add(self, where: str, reason: str, data: Any = None) -> None:
        """Notes one bad row: its place, what is wrong with it, and the row or its raw text."""
        self._rows.append((where, reason, data))

    def finish(self, label: str) -> int:
        """Ends one loading and returns how many rows were left out.

        Up to `max_share` of the rows are appended to report_path, and counted in one line with the
        first of them. Raises one DataError that names them all where there are more. Either way
        the collection is empty afterwards.
        """
        rows, problems, seen, too_many = self._rows, self.problems, self.seen, self.too_many
        self._rows, self.seen = [], 0
        if not rows:
            return 0
        count = f"{len(rows)} bad row(s) of {seen}"
        if too_many:
            least = math.ceil(1e4 * len(rows) / max(seen, len(rows))) / 1e4
            raise DataError(
                problems,
                title=f"{label}: {count}, more than --max_bad_rows {self.max_share:g} lets out",
                advice=f"Mend them, or leave them out with --max_bad_rows {least:g}.",
            )
        if not process_group.is_main():
            return len(rows)  # rank 0 tells and writes for all
        written = ""
        if self.report_path:
            self._keep([_report_line(*row) for row in rows])
            written = f", kept in {self.report_path}"
        print(f"{label}: left out {count}{written}; the first: {problems[0]}", flush=True)
        return len(rows)

    def _keep(self, lines: list[str]) -> None:
        """Adds lines that the report does not hold yet: a resumed run reads its data again."""
        known: set[str] = set()
        if os.path.exists(self.report_path):
            with open(self.report_path, encoding="utf-8") as file:
                known = set(file.read().splitlines())
        new = [line + "\n" for line in lines if line not in known]
        if new:
            whole_files.append_lines(self.report_path, "".join(new))


def _report_line(where: str, reason: str, data: Any) -> str:
    record = {"where": where, "reason": reason, "row": data}
    # ASCII on purpose: a lone surrogate may be the very thing that is reported, and it cannot be
    # written as UTF-8. A row that holds NaN goes in as text, so that the report is strict JSON.
    try:
        return json.dumps(record, default=str, allow_nan=False)
    except ValueError:
        return json.dumps({**record, "row": json.dumps(data, default=str)})


def text_problem(text: str) -> str | None:
    """What a tokenizer could not take in `text` (a NUL, half a surrogate pair), or None."""
    if "\0" in text:
        return "holds a NUL character"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"holds a lone surrogate, U+{ord(text[error.start]):04X}"
    return None
