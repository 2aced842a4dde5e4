"""How rows of a prompt and perhaps its answer are read: the functions behind utils/data/schemas.py.

Each takes a row and a Reading, returns turns, and raises BadRow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from utils.data import transcripts
from utils.data.reading import Reading, first_of
from utils.data.rows import BadRow
from utils.data.turns import kind_of, split_answer, text_of, turns_of, without_open_end

PROMPTS = ("prompt", "question")
ANSWERS = ("completion", "response", "answer")


def prompt_in(*columns: str, extras: Sequence[str] = ("context",)) -> Callable:
    """A prompt in the first of `columns`, with what stands in `extras` behind a blank line."""

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


asked = prompt_in(*PROMPTS)
instructed = prompt_in("instruction", extras=("input", "context"))


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


def completed(data: dict, reading: Reading) -> list[dict]:
    """The prompt of a completion, with the turns that stand in the completion before the answer."""
    turns = asked(data, reading)
    name = first_of(ANSWERS, data)
    if isinstance(data.get(name), list) and len(data[name]) > 1:
        turns += turns_of(data[name][:-1], name)
    return turns


def answer_in(prompts: Sequence[str], *columns: str) -> Callable:
    """The answer in the first of `columns`: a text, or turns that end with it. prompts: where the
    text that it answers may stand."""

    def answer(data: dict, reading: Reading) -> dict:
        name = first_of(columns, data)
        if not isinstance(data[name], list):
            text = text_of(data[name], name)
            return spoken(text, data.get(first_of(prompts, data)), reading)
        _, last = split_answer(data[name], name)
        if last is None:
            turns_of(data[name], name)
            raise BadRow(f"the last turn of {name} is not the assistant's")
        return turns_of([last], f"the last of {name}")[0]

    return answer


def spoken(text: str, prompt: Any, reading: Reading) -> dict:
    """The assistant's turn. The space that follows a transcript's mark is the transcript's."""
    text = text.strip() if reading.is_transcript(prompt) else text
    return {"role": "assistant", "content": text}


def chat_in(*columns: str) -> tuple[Callable, Callable]:
    """(prompt, answer) of a list of turns in the first of `columns`."""

    def split(data: dict, reading: Reading, notes: Counter) -> tuple[str, Any, Any]:
        name = first_of(columns, data)
        turns = data[name]
        if reading.use == "demonstration":
            turns = without_open_end(turns, name, notes)
        return name, *split_answer(turns, name)

    def prompt(data: dict, reading: Reading) -> list[dict]:
        name, turns, last = split(data, reading, reading.notes)
        return turns_of(turns, name) if turns or last is None else []

    def answer(data: dict, reading: Reading) -> dict:
        name, _, last = split(data, reading, Counter())  # prompt has counted
        if last is None:
            raise BadRow(f"the last turn of {name} is not the assistant's, so there is no answer")
        return turns_of([last], f"the last of {name}")[0]

    return prompt, answer


def first_turn(data: dict, reading: Reading) -> list[dict]:
    """MT-Bench: what the user says, of which only the first waits for no answer."""
    turns = data["turns"]
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"turns is {kind_of(turns) if turns != [] else 'an empty list'}, not texts")
    return [{"role": "user", "content": text_of(turns[0], "turn 1 of turns")}]


def is_text_transcript(data: dict) -> bool:
    return isinstance(data["text"], str) and transcripts.is_transcript(data["text"])


def transcript_prompt(data: dict, reading: Reading) -> list[dict]:
    """All that a transcript in `text` says before its last answer."""
    turns = transcripts.turns_of_text(text_of(data["text"], "text"), "text")
    return turns[:-1] if turns[-1]["role"] == "assistant" else turns


def transcript_answer(data: dict, reading: Reading) -> dict:
    last = transcripts.turns_of_text(text_of(data["text"], "text"), "text")[-1]
    if last["role"] != "assistant":
        raise BadRow("the transcript in text does not end with the assistant, so has no answer")
    return last
