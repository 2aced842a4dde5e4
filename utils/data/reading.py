"""What a row schema is, and what a loader reads rows for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils.data import transcripts
from utils.data.rows import BadRows, Row
from utils.data.turns import text_of, turns_of
from utils.distributed import process_group


@dataclass
class Reading:
    """What rows are read for, how texts in them are taken, and what is to be told about them.

    use: "demonstration", "prompt" or "comparison". schema: a name, or "auto". columns: {ours:
    theirs} of those that have other names in the data. texts: "auto" (those that are transcripts
    become turns), "transcript" (all are, or their rows are bad) or "plain" (none is). notes: how
    many rows each remark holds for.
    """

    use: str
    schema: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    texts: str = "auto"
    notes: Counter = field(default_factory=Counter)

    def is_transcript(self, value: Any) -> bool:
        if not isinstance(value, str) or self.texts == "plain":
            return False
        return self.texts == "transcript" or transcripts.is_transcript(value)

    def turns(self, value: Any, name: str) -> list[dict]:
        """The turns of a list of turns or a text. Raises BadRow."""
        if isinstance(value, list):
            return turns_of(value, name)
        text = text_of(value, name)
        if not self.is_transcript(text):
            return [{"role": "user", "content": text}]
        turns = transcripts.turns_of_text(text, name)
        self.notes["hold a transcript (Human: … Assistant: …), read as turns"] += 1
        return turns

    def tell(self, names: Sequence[str]) -> None:
        """Prints the remarks, one a line."""
        if process_group.is_main():
            for note, count in self.notes.items():
                print(f"{', '.join(names)}: {count} row(s) {note}", flush=True)


@dataclass(frozen=True)
class Schema:
    """How rows of one shape are recognised and read.

    columns: each entry lists alternatives, of which one must be there. prompt: the turns up to the
    last user's. answer: the assistant's turn behind them. ranked: answers and their scores, higher
    better. Of these, None is what the rows do not hold. optional: other columns that are read.
    only: what a row must be beside having the columns. gather: makes one row of several, before any
    is read, and names the schema of these. unfold: the rows that one row stands for, each with its
    schema's name, where it stands for several.
    """

    columns: tuple[tuple[str, ...], ...]
    prompt: Callable[[dict, Reading], list[dict]] | None = None
    answer: Callable[[dict, Reading], dict] | None = None
    ranked: Callable[[dict, Reading], tuple[list[str], list[float]]] | None = None
    optional: tuple[str, ...] = ()
    only: Callable[[dict], bool] | None = None
    gather: Callable[[Iterable[Row], BadRows, Counter], tuple[list[Row], str]] | None = None
    unfold: Callable[[dict, Reading], list[tuple[str, dict]]] | None = None

    @property
    def reads(self) -> set[str]:
        """All columns that are read of a row."""
        return set(self.optional).union(*self.columns)

    def missing(self, data: dict) -> list[str]:
        """The columns that the row lacks."""
        return [" or ".join(names) for names in self.columns if data.keys().isdisjoint(names)]

    def fits(self, data: dict) -> bool:
        """Whether a row looks like one of this schema."""
        return not self.missing(data) and (self.only is None or self.only(data))

    def serves(self, use: str) -> bool:
        """Whether rows of this schema can be read for a `Reading.use`."""
        if use == "text":
            return not (self.prompt or self.unfold or self.gather)
        needed = {"demonstration": self.answer, "comparison": self.ranked}.get(use, self.prompt)
        return bool(needed or self.unfold or self.gather)


def first_of(names: Iterable[str], data: dict) -> str | None:
    """The first of the columns that the row has."""
    return next((name for name in names if name in data), None)
