"""How rows of several answers to one prompt are read: the functions behind utils/data/schemas.py.

Each takes a row and a Reading and raises BadRow. Scores are higher for better answers; those of
equally good ones are equal, and such a comparison teaches nothing (step 2 counts it and leaves it
out).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from utils.data.prompt_answers import PROMPTS, asked, spoken
from utils.data.reading import Reading, first_of
from utils.data.rows import BadRow
from utils.data.turns import kind_of, split_answer, text_of, turns_of

PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)


def _side(data: dict, reading: Reading, name: str) -> tuple[list[dict], Any]:
    """The turns before the answer in `chosen` or `rejected`, and the answer as it stands there.

    A text is the answer to the prompt column; a transcript, where there is no such column or it
    begins with it, and a list of turns are the whole conversation.
    """
    value, column = data[name], first_of(PROMPTS, data)
    if not isinstance(value, str):
        turns, last = split_answer(value, name)
        if last is None:
            turns_of(turns, name)
            raise BadRow(f"the last turn of {name} is not the assistant's")
        if not turns:
            return asked(data, reading) if column else [], last
        return turns_of(turns, name), last
    given = data.get(column)
    begins = isinstance(given, str) and given.strip() and value.strip().startswith(given.strip())
    if (not column or begins) and reading.is_transcript(value):
        turns = reading.turns(value, name)
        if turns[-1]["role"] != "assistant":
            raise BadRow(f"the last turn of {name} is not the assistant's")
        return turns[:-1], turns[-1]
    return asked(data, reading), spoken(value, given, reading)


def _said(last: dict, name: str) -> str:
    turn = turns_of([last], f"the answer of {name}")[0]
    if "tool_calls" in turn:
        raise BadRow(f"the answer of {name} calls a tool, and only text can be compared")
    return turn["content"]


def pair_prompt(data: dict, reading: Reading) -> list[dict]:
    return _side(data, reading, "chosen")[0]


def chosen_answer(data: dict, reading: Reading) -> dict:
    _, last = _side(data, _silent(reading), "chosen")
    return turns_of([last], "the answer of chosen")[0]


def _silent(reading: Reading) -> Reading:
    """The same, for what has been told about its row already."""
    return dataclasses.replace(reading, notes=Counter())


def pair(data: dict, reading: Reading) -> tuple[list[str], list[float]]:
    """[chosen, rejected] and their scores: the row's own, else 1 and 0."""
    reading = _silent(reading)
    turns, chosen = _side(data, reading, "chosen")
    other_turns, rejected = _side(data, reading, "rejected")
    if turns != other_turns:
        raise BadRow("chosen and rejected do not answer the same prompt")
    texts = [_said(chosen, "chosen"), _said(rejected, "rejected")]
    if texts[0] == texts[1]:
        raise BadRow("chosen and rejected are the same text")
    for names in PAIR_SCORES:
        high, low = (_number(data.get(name)) for name in names)
        if high is not None and low is not None:
            if high < low:
                raise BadRow(f"{names[0]} {high} is below {names[1]} {low}")
            return texts, [high, low]
    return texts, [1.0, 0.0]


def _number(value: Any) -> float | None:
    """A finite number, which CSV holds as text, or None: the order of a pair needs no scores."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def listed(data: dict, reading: Reading) -> tuple[list[str], list[float]]:
    """`responses` with `scores`, else `ranks` (1 is best) whose sign makes them scores."""
    column = "scores" if "scores" in data else "ranks"
    return _scored(data["responses"], "responses", data[column], column)


def _scored(responses: Any, name: str, values: Any, column: str) -> tuple[list[str], list[float]]:
    if not isinstance(responses, list) or not isinstance(values, list):
        name, value = (name, responses) if isinstance(values, list) else (column, values)
        raise BadRow(f"{name} is {kind_of(value)}, not a list")
    if len(responses) < 2:
        raise BadRow(f"{name} holds {len(responses)}, at least 2 are needed")
    if len(responses) != len(values):
        raise BadRow(f"there are {len(responses)} {name} but {len(values)} {column}")
    texts = [text_of(text, f"response {number}") for number, text in enumerate(responses, 1)]
    for number, value in enumerate(values, 1):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadRow(f"number {number} of {column} is {kind_of(value)}, not a number")
        try:
            finite = math.isfinite(value)
        except OverflowError:
            raise BadRow(f"number {number} of {column} is an integer beyond all floats") from None
        if not finite:
            raise BadRow(f"number {number} of {column} is {value}, not a finite number")
    sign = -1.0 if column in ("ranks", "rank") else 1.0
    return texts, [sign * value for value in values]


def objects_in(column: str, answer: str, *values: str) -> Callable:
    """A list of objects that each hold an `answer` and one of `values` (a score, or a `rank`)."""

    def ranked(data: dict, reading: Reading) -> tuple[list[str], list[float]]:
        found = data[column]
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise BadRow(f"{column} is no list of objects")
        value = next((v for v in values if all(one.get(v) is not None for one in found)), None)
        if value is None:
            raise BadRow(f"not all of {column} have {' or '.join(values)}")
        answers = [one.get(answer) for one in found]
        return _scored(answers, column, [one[value] for one in found], value)

    return ranked


def shp_prompt(data: dict, reading: Reading) -> list[dict]:
    return reading.turns(data["history"], "history")


def shp(data: dict, reading: Reading) -> tuple[list[str], list[float]]:
    """Stanford's SHP: labels 1 says that human_ref_A is the better answer, 0 that B is."""
    names = ("human_ref_A", "human_ref_B")
    texts = [text_of(data[name], name) for name in names]
    label = _number(data["labels"])
    if label not in (0, 1):
        raise BadRow(f"labels is {data['labels']!r}, neither 1 (A is better) nor 0 (B is)")
    return texts, [label, 1 - label]


def best_of(ranked: Callable) -> Callable:
    """The best answer of a row whose answers `ranked` reads, as a demonstration."""

    def answer(data: dict, reading: Reading) -> dict:
        texts, scores = ranked(data, reading)
        return {"role": "assistant", "content": texts[scores.index(max(scores))]}

    return answer
