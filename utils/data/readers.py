"""Readers of columns: functions (row, Reading) → the prompt, the answer or the ranked answers.

The table of utils/data/schemas.py names them. Each raises BadRow. Scores are higher for better
answers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils.data.rows import BadRow
from utils.data.turns import (
    is_transcript,
    kind_of,
    split_answer,
    text_of,
    turns_of,
    turns_of_text,
    without_open_end,
)

PROMPT = ("prompt", "question")
ANSWER = ("completion", "response", "answer")
PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
SYSTEM = ("system", "system_prompt")
LEARNED = ("demonstration", "text")  # uses that learn an answer
# Columns that count beside those of a schema.
EXTRA = {*SYSTEM, "input", "context", "history", "label", "tools"}.union(*PAIR_SCORES)


@dataclass
class Reading:
    """What rows are read for and how; remarks about them.

    use: "demonstration", "text" (the same or plain text), "prompt", "comparison" or "judged" (the
    same or single answers called good or bad). schema: a name, or "auto". columns: {ours: theirs}
    of those that have other names in the data. texts: "auto" (transcripts become turns),
    "transcript" (all texts are transcripts) or "plain" (none is).
    notes: for each remark the number of rows it holds for.
    """

    use: str
    schema: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    texts: str = "auto"
    notes: Counter = field(default_factory=Counter)
    noted: set = field(default_factory=set)  # remarks about the row that is being read

    def note(self, remark: str) -> None:
        """Counts a remark once a row."""
        if remark not in self.noted:
            self.noted.add(remark)
            self.notes[remark] += 1

    def is_transcript(self, value: Any) -> bool:
        if not isinstance(value, str) or self.texts == "plain":
            return False
        return self.texts == "transcript" or is_transcript(value)

    def turns(self, value: Any, name: str) -> list[dict]:
        """The turns of a list of turns or a text. Raises BadRow."""
        if isinstance(value, list):
            return turns_of(value, name)
        text = text_of(value, name)
        if not self.is_transcript(text):
            return [{"role": "user", "content": text}]
        turns = turns_of_text(text, name)
        self.note("hold a transcript (Human: … Assistant: …), read as turns")
        return turns

    def answer(self, text: str, prompt: Any) -> dict:
        """The assistant's turn. The space behind a transcript's mark belongs to the transcript."""
        text = text.strip() if self.is_transcript(prompt) else text
        return {"role": "assistant", "content": text}


def first_of(names: Iterable[str], data: dict) -> str | None:
    """The first of the columns that the row has."""
    return next((name for name in names if name in data), None)


# Prompts.


def prompt_in(*columns: str, extras: Sequence[str] = ("context",)) -> Callable:
    """A prompt in the first of `columns`, followed by what stands in `extras`."""

    def prompt(data: dict, reading: Reading) -> list[dict]:
        name = first_of(columns, data) or columns[0]
        turns = _history(data) + reading.turns(data.get(name), name)
        for extra in extras:
            value = data.get(extra)
            if value is not None and not isinstance(value, str):
                raise BadRow(f"{extra} is {kind_of(value)}, not a string")
            if value and value.strip():
                together = f"{turns[-1]['content']}\n\n{text_of(value, extra)}"
                turns[-1] = {**turns[-1], "content": together}
        return turns

    return prompt


def _history(data: dict) -> list[dict]:
    """Earlier turns in a `history` column of pairs (asked, answered)."""
    history, turns = data.get("history") or [], []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise BadRow("history is no list of pairs (asked, answered)")
    for number, pair in enumerate(history, 1):
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": text_of(text, f"pair {number} of history")})
    return turns


in_prompt = prompt_in(*PROMPT)


def before_completion(data: dict, reading: Reading) -> list[dict]:
    """The prompt of a completion, with the turns of the completion before its last."""
    turns, name = in_prompt(data, reading), first_of(ANSWER, data)
    if isinstance(data.get(name), list) and len(data[name]) > 1:
        turns += turns_of(data[name][:-1], name)
    return turns


def first_turn(data: dict, reading: Reading) -> list[dict]:
    """MT-Bench: what the user says; only the first of these waits for no answer."""
    turns = data["turns"]
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"turns is {kind_of(turns) if turns != [] else 'an empty list'}, not texts")
    return [{"role": "user", "content": text_of(turns[0], "turn 1 of turns")}]


# Answers.


def answer_in(prompts: Sequence[str], *columns: str) -> Callable:
    """The answer in the first of `columns`: a text, or turns that end with it. prompts: where the
    text that it answers may stand."""

    def answer(data: dict, reading: Reading) -> dict:
        name = first_of(columns, data)
        if not isinstance(data[name], list):
            text = text_of(data[name], name)
            return reading.answer(text, data.get(first_of(prompts, data)))
        return _last_answer(*split_answer(data[name], name), name)

    return answer


def _last_answer(turns: Any, last: Any, name: str) -> dict:
    _require_answer(turns, last, name)
    return turns_of([last], f"the last of {name}")[0]


def _require_answer(turns: Any, last: Any, name: str) -> None:
    """Raises BadRow where split_answer found no last answer."""
    if last is None:
        turns_of(turns, name)
        raise BadRow(f"the last turn of {name} is not the assistant's, so there is no answer")


def best_of(ranked: Callable) -> Callable:
    """The best of the answers that `ranked` reads."""

    def answer(data: dict, reading: Reading) -> dict:
        texts, scores = ranked(data, reading)
        return {"role": "assistant", "content": texts[scores.index(max(scores))]}

    return answer


# Conversations: prompt and answer in one.


def chat_in(*columns: str) -> tuple[Callable, Callable]:
    """(prompt, answer) of a list of turns in the first of `columns`."""

    def split(data: dict, reading: Reading) -> tuple[str, Any, Any]:
        name = first_of(columns, data)
        turns = data[name]
        if reading.use in LEARNED:
            turns = without_open_end(turns, name, reading.note)
        return name, *split_answer(turns, name)

    def prompt(data: dict, reading: Reading) -> list[dict]:
        name, turns, last = split(data, reading)
        return turns_of(turns, name) if turns or last is None else []

    def answer(data: dict, reading: Reading) -> dict:
        name, turns, last = split(data, reading)
        return _last_answer(turns, last, name)

    return prompt, answer


def text_is_transcript(data: dict) -> bool:
    return isinstance(data["text"], str) and is_transcript(data["text"])


def transcript_prompt(data: dict, reading: Reading) -> list[dict]:
    """All that a transcript in `text` says before its last answer."""
    return split_answer(turns_of_text(text_of(data["text"], "text"), "text"), "text")[0]


def transcript_answer(data: dict, reading: Reading) -> dict:
    turns = turns_of_text(text_of(data["text"], "text"), "text")
    return _last_answer(*split_answer(turns, "text"), "text")


# Rankings.


def _side(data: dict, reading: Reading, name: str) -> tuple[list[dict], Any]:
    """The turns before the answer in `chosen` or `rejected`, and the answer as it stands there.

    A text is the answer to the prompt column. A list of turns is the whole conversation; so is a
    transcript where there is no prompt column or it begins with the prompt.
    """
    value, column = data[name], first_of(PROMPT, data)
    if not isinstance(value, str):
        turns, last = split_answer(value, name)
        _require_answer(turns, last, name)
        if not turns:
            return in_prompt(data, reading) if column else [], last
        return turns_of(turns, name), last
    given = data.get(column)
    begins = isinstance(given, str) and given.strip() and value.strip().startswith(given.strip())
    if (not column or begins) and reading.is_transcript(value):
        turns, last = split_answer(reading.turns(value, name), name)
        _require_answer(turns, last, name)
        return turns, last
    return in_prompt(data, reading), reading.answer(value, given)


def pair_prompt(data: dict, reading: Reading) -> list[dict]:
    return _side(data, reading, "chosen")[0]


def chosen_answer(data: dict, reading: Reading) -> dict:
    return turns_of([_side(data, reading, "chosen")[1]], "the answer of chosen")[0]


def pair(data: dict, reading: Reading) -> tuple[list[str], list[float]]:
    """[chosen, rejected] and their scores: the row's own, else 1 and 0."""
    turns, texts = [], []
    for name in ("chosen", "rejected"):
        before, last = _side(data, reading, name)
        turn = turns_of([last], f"the answer of {name}")[0]
        if "tool_calls" in turn:
            raise BadRow(f"the answer of {name} calls a tool, and only text can be compared")
        turns.append(before)
        texts.append(turn["content"])
    if turns[0] != turns[1]:
        raise BadRow("chosen and rejected do not answer the same prompt")
    if texts[0] == texts[1]:
        raise BadRow("chosen and rejected are the same text")
    for names in PAIR_SCORES:
        high, low = (_number(data.get(name)) for name in names)
        if high is not None and low is not None:
            if high < low:
                raise BadRow(f"{names[0]} {high} is below {names[1]} {low}")
            return texts, [high, low]
    return texts, [1.0, 0.0]


def judged(data: dict, reading: Reading) -> tuple[list[str], list[float]]:
    """KTO's rows: the one answer, and 1 where `label` calls it a good one, 0 where a bad one."""
    turn, label = answer_in(PROMPT, *ANSWER)(data, reading), truth(data.get("label"))
    if label is None:
        raise BadRow(f"label is {data.get('label')!r}, neither true (a good answer) nor false")
    if "tool_calls" in turn:
        raise BadRow("the answer calls a tool, and only text can be judged")
    return [turn["content"]], [float(label)]


def truth(value: Any) -> bool | None:
    """A truth value as JSON and CSV spell it; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def _number(value: Any) -> float | None:
    """A finite number, which CSV holds as text, or None: the order of a pair needs no scores."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def listed(data: dict, reading: Reading) -> tuple[list[str], list[float]]:
    """`responses` with `scores`, else with `ranks` (1 is best)."""
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
        objects = data[column]
        if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
            raise BadRow(f"{column} is no list of objects")
        value = next((v for v in values if all(one.get(v) is not None for one in objects)), None)
        if value is None:
            raise BadRow(f"not all of {column} have {' or '.join(values)}")
        answers = [one.get(answer) for one in objects]
        return _scored(answers, column, [one[value] for one in objects], value)

    return ranked


def shp_prompt(data: dict, reading: Reading) -> list[dict]:
    return reading.turns(data["history"], "history")


def shp(data: dict, reading: Reading) -> tuple[list[str], list[float]]:
    """Stanford's SHP: labels 1 says that human_ref_A is the better answer, 0 that B is."""
    texts = [text_of(data[name], name) for name in ("human_ref_A", "human_ref_B")]
    label = _number(data["labels"])
    if label not in (0, 1):
        raise BadRow(f"labels is {data['labels']!r}, neither 1 (A is better) nor 0 (B is)")
    return texts, [label, 1 - label]


ultrafeedback = objects_in("completions", "response", "overall_score", "fine-grained_score")
nectar = objects_in("answers", "answer", "rank")
instruction = prompt_in("instruction", extras=("input", "context"))
