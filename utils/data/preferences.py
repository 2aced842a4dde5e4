"""Pairs and K-wise rankings of any schema -> comparisons for the reward model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.data import schemas
from utils.data.loading import load_as
from utils.data.reading import Schema
from utils.data.rows import BadRow, BadRows, Row

PREFERENCE_SPLITS = {
    "train": ("train_prefs", "train"),
    "eval": ("test_prefs", "validation", "test"),
}


@dataclass(frozen=True)
class Comparison:
    """K >= 2 answers to one prompt with K finite scores, higher better.

    All scores may be equal, as in real rankings: such a row is sound, but teaches nothing.
    finished: whether each answer ended itself, and was not cut at the length limit it was sampled
    with; where not given, all did."""

    prompt: tuple[dict, ...]
    responses: tuple[str, ...]
    scores: tuple[float, ...]
    where: str
    finished: tuple[bool, ...] = ()

    def __post_init__(self):
        if not self.finished:
            object.__setattr__(self, "finished", (True,) * len(self.responses))

    @property
    def messages(self) -> tuple[dict, ...]:
        return self.prompt


def load_comparisons(
    names: Sequence[str],
    *,
    split_role: str = "train",
    schema: str = "auto",
    columns: Mapping[str, str] | None = None,
    bad: BadRows,
    tabulate=None,
) -> list[Comparison]:
    """Preference pairs and K-wise rankings -> comparisons.

    Arguments and errors are those of instructions.load_conversations.
    """
    reading = schemas.reading_of("comparison", schema, columns)

    def convert(found: Schema, row: Row) -> list[Comparison]:
        made = []
        for part, each in schemas.parts(found, row, reading):
            prompt = schemas.prompt_of(part, each, reading)
            responses, scores = part.ranked(each.data, reading)
            seen: dict[str, float] = {}
            for number, (text, score) in enumerate(zip(responses, scores, strict=True), 1):
                if seen.setdefault(text, score) != score:
                    raise BadRow(
                        f"response {number} is there before with score {seen[text]}, not {score}"
                    )
            marks = each.data.get("finished") if "responses" in each.data else None
            finished = _finished(marks, len(responses))
            made.append(Comparison(prompt, tuple(responses), tuple(scores), each.where, finished))
        return made

    return load_as(convert, reading, PREFERENCE_SPLITS, names, split_role, bad, tabulate)


def _finished(value: Any, count: int) -> tuple[bool, ...]:
    """The mark that step2_reward/collect.py leaves beside the answers. Raises BadRow."""
    if value is None:
        return ()
    if not isinstance(value, list) or [type(x) for x in value] != [bool] * count:
        raise BadRow(f"finished is {value!r}, not a list of {count} true or false, one a response")
    return tuple(value)
