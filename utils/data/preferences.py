"""UltraFeedback pairs and K-wise rankings -> comparisons for the reward model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.data.instructions import (
    in_order,
    preference_answer,
    preference_prompt,
    prompt_column,
    ranked_responses,
)
from utils.data.loading import Schema, load_as
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


_KNOWN = {
    "preference": Schema((("chosen",), ("rejected",)), prompt_column, None),
    "kwise": Schema((("prompt",), ("responses",), ("scores", "ranks")), prompt_column, None),
}


def load_comparisons(
    names: Sequence[str],
    *,
    split_role: str = "train",
    schema: str = "auto",
    bad: BadRows,
    tabulate=None,
) -> list[Comparison]:
    """Preference pairs and K-wise rankings -> comparisons.

    Arguments: names (files, folders, hub ids, NAME:SPLIT), split_role ("train" or "eval"), schema
    ("preference", "kwise" or "auto"), bad (takes the bad rows; call its finish afterwards).
    Raises DataError for all that is wrong with whole files.
    """

    def convert(found: Schema, row: Row) -> Comparison:
        return _pair(row) if found is _KNOWN["preference"] else _ranking(row)

    return load_as(convert, _KNOWN, PREFERENCE_SPLITS, names, split_role, schema, bad, tabulate)


def _pair(row: Row) -> Comparison:
    turns = preference_prompt(row.data, "chosen")
    if turns != preference_prompt(row.data, "rejected"):
        raise BadRow("chosen and rejected do not answer the same prompt")
    chosen = preference_answer(row.data, "chosen")
    rejected = preference_answer(row.data, "rejected")
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same text")
    high, low = _number(row.data.get("score_chosen")), _number(row.data.get("score_rejected"))
    scores = (1.0, 0.0)
    if high is not None and low is not None and high != low:
        if high < low:
            raise BadRow(f"score_chosen {high} is below score_rejected {low}")
        scores = (high, low)
    prompt = in_order(turns, row.data.get("system"))
    return Comparison(prompt, (chosen, rejected), scores, row.where)


def _number(value: Any) -> float | None:
    """A finite number, which CSV holds as text, or None: the order of a pair needs no scores."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _ranking(row: Row) -> Comparison:
    prompt = in_order(prompt_column(row.data), row.data.get("system"))
    responses, scores = ranked_responses(row.data)
    seen: dict[str, float] = {}
    for number, (text, score) in enumerate(zip(responses, scores, strict=True), 1):
        if seen.setdefault(text, score) != score:
            raise BadRow(f"response {number} is there before with score {seen[text]}, not {score}")
    finished = _finished(row.data.get("finished"), len(responses))
    return Comparison(prompt, tuple(responses), tuple(scores), row.where, finished)


def _finished(value: Any, count: int) -> tuple[bool, ...]:
    """The mark that step2_reward/collect.py leaves beside the answers. Raises BadRow."""
    if value is None:
        return ()
    if not isinstance(value, list) or [type(x) for x in value] != [bool] * count:
        raise BadRow(f"finished is {value!r}, not a list of {count} true or false, one a response")
    return tuple(value)
