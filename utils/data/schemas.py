"""Row schemas: by which columns a row is recognised, and how prompt and answers are read from it.

A new schema is an entry in SCHEMAS and the functions that it names. Each function is given a row
and a Reading and raises BadRow. Scores are higher for better answers.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils.data import message_trees
from utils.data.rows import BadRow, BadRows, Row
from utils.data.turns import (
    in_order,
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

    use: "demonstration", "text" (the same or plain text), "prompt" or "comparison". schema: a name,
    or "auto". columns: {ours: theirs} of those that have other names in the data. texts: "auto"
    (transcripts become turns), "transcript" (all texts are transcripts) or "plain" (none is).
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


@dataclass(frozen=True)
class Schema:
    """How rows of one shape are recognised and read.

    columns: each entry lists alternatives, of which one must be there. prompt: the turns up to the
    last user's. answer: the assistant's turn behind them. ranked: answers and their scores. Of
    these, None is what the rows do not hold. optional: other columns that are read. only: a further
    condition. join: makes one row of several before any is read, and names their schema. unfold:
    the rows that one row stands for, each with the name of its schema.
    """

    columns: tuple[tuple[str, ...], ...]
    prompt: Callable[[dict, Reading], list[dict]] | None = None
    answer: Callable[[dict, Reading], dict] | None = None
    ranked: Callable[[dict, Reading], tuple[list[str], list[float]]] | None = None
    optional: tuple[str, ...] = ()
    only: Callable[[dict], bool] | None = None
    join: Callable[[Iterable[Row], BadRows, Counter], tuple[list[Row], str]] | None = None
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
        """Whether rows of this schema can be read for a Reading.use."""
        if self.unfold or self.join:
            return True
        if use in LEARNED:
            return bool(self.answer) or (use == "text" and self.is_plain_text)
        return bool(self.ranked if use == "comparison" else self.prompt)

    @property
    def is_plain_text(self) -> bool:
        return not (self.prompt or self.unfold or self.join)


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

# In the order in which they are tried on a row's columns: UltraFeedback has messages, chosen and
# prompt side by side, and the entry that says most about the row must come first.
# name: columns, prompt, answer, ranked answers.
SCHEMAS = {
    "messages": Schema((("messages",),), *chat_in("messages")),
    # ShareGPT, Belle's multi-turn
    "conversations": Schema(
        (("conversations", "conversation"),), *chat_in("conversations", "conversation")
    ),
    # OpenAssistant: a tree a row, or a message a row
    "tree": Schema((("message_tree_id",), ("prompt",)), unfold=message_trees.unfold),
    "tree_messages": Schema(
        tuple((column,) for column in message_trees.FLAT), join=message_trees.join
    ),
    # UltraFeedback as it was annotated, Nectar, Stanford's human preferences
    "ultrafeedback": Schema(
        (("instruction",), ("completions",)),
        prompt_in("instruction"),
        best_of(ultrafeedback),
        ultrafeedback,
    ),
    "nectar": Schema((("prompt",), ("answers",)), in_prompt, best_of(nectar), nectar),
    "shp": Schema(
        (("history",), ("human_ref_A",), ("human_ref_B",), ("labels",)),
        shp_prompt,
        best_of(shp),
        shp,
    ),
    # Alpaca, Belle; Dolly
    "alpaca": Schema(
        (("instruction",), ("output", "response")),
        instruction,
        answer_in(("instruction",), "output", "response"),
    ),
    # UltraFeedback binarized, Anthropic's HH, rm-static
    "preference": Schema(
        (("chosen",), ("rejected",)), pair_prompt, chosen_answer, pair, optional=PROMPT
    ),
    "kwise": Schema(
        (("prompt",), ("responses",), ("scores", "ranks")), in_prompt, best_of(listed), listed
    ),
    # TRL's, texts or lists of turns; KTO; GSM8K
    "prompt_completion": Schema((PROMPT, ANSWER), before_completion, answer_in(PROMPT, *ANSWER)),
    "prompt": Schema((PROMPT,), in_prompt),
    # MT-Bench's question.jsonl, and FastChat's older one
    "turns": Schema((("turns",),), first_turn),
    "text": Schema((("question_id",), ("text",)), prompt_in("text")),
    # Guanaco: whole conversations in `text`, which otherwise is plain text (--ptx_data)
    "text_transcript": Schema(
        (("text",),), transcript_prompt, transcript_answer, only=text_is_transcript
    ),
    "instruction": Schema((("instruction",),), instruction),
    "plain_text": Schema((("text",),)),  # --ptx_data, see texts.py
}


@functools.cache
def known_for(use: str) -> dict[str, Schema]:
    """The schemas whose rows can be read for a Reading.use."""
    return {name: schema for name, schema in SCHEMAS.items() if schema.serves(use)}


def has_answer(data: dict) -> bool:
    """Whether a demonstration could be read from a row."""
    return any(schema.fits(data) for schema in known_for("demonstration").values())


def parts(schema: Schema, row: Row, reading: Reading) -> list[tuple[Schema, Row]]:
    """The rows that a row stands for, each with its schema. Raises BadRow."""
    if not schema.unfold:
        return [(schema, row)]
    unfolded = schema.unfold(row.data, reading)
    return [
        (SCHEMAS[name], Row(data, f"{row.where}, part {number}" if number > 1 else row.where))
        for number, (name, data) in enumerate(unfolded, 1)
    ]


def prompt_of(schema: Schema, row: Row, reading: Reading) -> tuple[dict, ...]:
    """The turns of a row up to the last user's, its system text in front. Raises BadRow."""
    data = row.data
    if data.get("tools") not in (None, [], {}, "", "[]"):
        raise BadRow("tools lists functions, and no prompt made here would show them")
    system = next((data[name] for name in SYSTEM if data.get(name)), None)
    return in_order(schema.prompt(data, reading), system, reading.note)
