"""A row and where it stands, and what becomes of those that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils import whole_files
from utils.distributed import process_group

SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Row:
    """One row as read, and where it stands, in words that a person can follow."""

    data: dict
    where: str


class DataError(ValueError):
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
    """Collects the bad rows of one loading, and in the end refuses them or writes them down.

    Arguments: on_bad_rows ("error" or "skip"), report_path (JSON Lines file for skipped rows).
    Raises DataError for another on_bad_rows.
    """

    def __init__(self, on_bad_rows: str = "error", report_path: str | None = None):
        if on_bad_rows not in ("error", "skip"):
            raise DataError(f"on_bad_rows={on_bad_rows!r}: set --on_bad_rows to error or skip")
        self.on_bad_rows = on_bad_rows
        self.report_path = report_path
        self._rows: list[tuple[str, str, Any]] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def problems(self) -> list[str]:
        """One text a bad row, `where: reason`."""
        return [f"{where}: {reason}" for where, reason, _ in self._rows]

    def add(self, where: str, reason: str, data: Any = None) -> None:
        """Notes one bad row: its place, what is wrong with it, and the row or its raw text."""
        self._rows.append((where, reason, data))

    def finish(self, label: str) -> int:
        """Ends one loading and returns how many rows were left out.

        "error" raises one DataError that names all bad rows. "skip" appends them to report_path
        and prints one line. Either way the collection is empty afterwards.
        """
        rows, problems = self._rows, self.problems
        self._rows = []
        if not rows:
            return 0
        if self.on_bad_rows == "error":
            raise DataError(
                problems,
                title=f"{label}: {len(rows)} bad row(s)",
                advice="Mend them, or leave them out with --on_bad_rows skip.",
            )
        written = ""
        if not process_group.is_main():
            return len(rows)  # rank 0 tells and writes for all
        if self.report_path:
            text = "".join(_report_line(*row) + "\n" for row in rows)
            whole_files.append_lines(self.report_path, text)
            written = f", listed in {self.report_path}"
        print(f"{label}: left out {len(rows)} bad row(s){written}", flush=True)
        return len(rows)


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
