"""Alpaca, Belle, chat, preference and ranking rows -> conversations to learn, prompts to answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.data.loading import Schema, load_as
from utils.data.rows import BadRow, BadRows, Row, text_problem

# The first split that a data set has is taken. The long names are UltraFeedback's on the hub.
SFT_SPLITS = {
    "train": ("train_sft", "train"),
    "eval": ("test_sft", "validation", "test"),
}
PROMPT_SPLITS = {
    "train": ("train_gen", "train_prefs", "train_sft", "train"),
    "eval": ("test_gen", "test_prefs", "test_sft", "validation", "test"),
}
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


@dataclass(frozen=True)
class Conversation:
    """Turns {"role", "content"}: perhaps a system turn, then user and assistant by turns.

    The last one is the assistant's.
    """

    messages: tuple[dict, ...]
    where: str


@dataclass(frozen=True)
class Prompt:
    """Turns that end with a user's, and the raw row, where verifiers find their columns."""

    messages: tuple[dict, ...]
    where: str
    row: dict


def kind_of(value: Any) -> str:
    """A value's type, in the words of an error message."""
    return "null" if value is None else type(value).__name__


def text_of(value: Any, name: str) -> str:
    """The value if it is a text with something in it. Raises BadRow naming `name`."""
    if not isinstance(value, str):
        raise BadRow(f"{name} is {kind_of(value)}, not a string")
    if not value.strip():
        raise BadRow(f"{name} is {'blank' if value else 'empty'}")
    if problem := text_problem(value):
        raise BadRow(f"{name} {problem}")
    return value


def turns_of(value: Any, name: str) -> list[dict]:
    """A list of chat turns, in either spelling, as {"role", "content"}. Raises BadRow.

    A blank system turn is left out; the order of the roles is for `in_order` to judge.
    """
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else f"{kind_of(value)}, not a list of turns"
        raise BadRow(f"{name} is {kind}")
    turns = []
    for number, turn in enumerate(value, 1):
        label = f"turn {number} of {name}"
        role, content = role_of(turn, label), turn.get("content", turn.get("value"))
        if role == "system" and content in (None, ""):
            continue
        turns.append({"role": role, "content": text_of(content, f"the content of {label}")})
    return turns


def role_of(turn: Any, label: str) -> str:
    """ "system", "user" or "assistant". Raises BadRow for any other role."""
    if not isinstance(turn, dict):
        raise BadRow(f"{label} is {kind_of(turn)}, not an object with role and content")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str):
        raise BadRow(f"the role of {label} is {kind_of(role)}, not a string")
    if role not in ROLES:
        raise BadRow(f"the role of {label} is {role!r}, none of {', '.join(ROLES)}")
    return ROLES[role]


def split_answer(value: Any, name: str) -> tuple[Any, Any]:
    """A list of turns as (the turns before the last assistant turn, that turn or None)."""
    if isinstance(value, list) and value:
        last = role_of(value[-1], f"turn {len(value)} of {name}")
        if last == "assistant":
            return value[:-1], value[-1]
    return value, None


def in_order(turns: Sequence[dict], system: Any = None) -> tuple[dict, ...]:
    """The turns of a prompt, with the row's system column in front. Raises BadRow.

    After an optional system turn, user and assistant must take turns, from user to user.
    """
    if system is not None and not isinstance(system, str):
        raise BadRow(f"system is {kind_of(system)}, not a string")
    if system and system.strip():
        if turns and turns[0]["role"] == "system":
            raise BadRow("there is a system column and a system turn; keep one of them")
        turns = [{"role": "system", "content": text_of(system, "system")}, *turns]
    roles = [turn["role"] for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken:
        raise BadRow("the prompt is empty: there is no user turn before the answer")
    for number, role in enumerate(spoken):
        if role != ("user", "assistant")[number % 2]:
            raise BadRow(f"roles do not alternate user, assistant: {', '.join(roles)}")
    if spoken[-1] != "user":
        raise BadRow(f"two assistant turns follow each other: {', '.join(roles)}, assistant")
    return tuple(turns)


def prompt_column(data: dict) -> list[dict]:
    """The turns of a `prompt` column, which is one text or a list of turns. Raises BadRow."""
    if isinstance(data.get("prompt"), list):
        return turns_of(data["prompt"], "prompt")
    return [{"role": "user", "content": text_of(data.get("prompt"), "prompt")}]


def preference_prompt(data: dict, name: str) -> list[dict]:
    """The turns before the answer in `chosen` or `rejected`. Raises BadRow.

    A text, and a list of nothing but the answer, belong to the `prompt` column.
    """
    if isinstance(data[name], str):
        return prompt_column(data)
    turns, last = split_answer(data[name], name)
    if last is None:
        turns_of(turns, name)
        raise BadRow(f"the last turn of {name} is not the assistant's")
    if not turns:
        return prompt_column(data) if "prompt" in data else []
    return turns_of(turns, name)


def preference_answer(data: dict, name: str) -> str:
    """The answer in `chosen` or `rejected`, after preference_prompt took it. Raises BadRow."""
    if isinstance(data[name], str):
        return text_of(data[name], name)
    return turns_of(data[name][-1:], f"the answer of {name}")[0]["content"]


def ranked_responses(data: dict) -> tuple[list[str], list[float]]:
    """The answers of a K-wise row and their scores, higher better. Raises BadRow.

    `ranks` (1 is best) become scores by their sign; `scores` are taken where both are there.
    """
    responses, column = data["responses"], "scores" if "scores" in data else "ranks"
    values = data[column]
    if not isinstance(responses, list) or not isinstance(values, list):
        name, value = ("responses", responses) if isinstance(values, list) else (column, values)
        raise BadRow(f"{name} is {kind_of(value)}, not a list")
    if len(responses) < 2:
        raise BadRow(f"responses holds {len(responses)}, at least 2 are needed")
    if len(responses) != len(values):
        raise BadRow(f"there are {len(responses)} responses but {len(values)} {column}")
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
    sign = 1.0 if column == "scores" else -1.0
    return texts, [sign * value for value in values]


def _alpaca_prompt(data: dict) -> list[dict]:
    content = text_of(data["instruction"], "instruction")
    extra = data.get("input")
    if extra is not None and not isinstance(extra, str):
        raise BadRow(f"input is {kind_of(extra)}, not a string")
    if extra and extra.strip():
        content += "\n\n" + text_of(extra, "input")
    return [{"role": "user", "content": content}]


def _chat(column: str) -> Schema:
    def prompt(data: dict) -> list[dict]:
        turns, last = split_answer(data[column], column)
        return turns_of(turns, column) if turns or last is None else []

    def answer(data: dict) -> str:
        turns, last = split_answer(data[column], column)
        if last is None:
            raise BadRow(f"the last turn of {column} is not the assistant's, so there is no answer")
        return turns_of([last], f"the last of {column}")[0]["content"]

    return Schema(((column,),), prompt, answer)


def _completion(data: dict) -> str:
    name = "completion" if "completion" in data else "response"
    return text_of(data[name], name)


def _best_response(data: dict) -> str:
    responses, scores = ranked_responses(data)
    return responses[scores.index(max(scores))]


def _first_turn(data: dict) -> list[dict]:
    turns = data["turns"]
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"turns is {kind_of(turns) if turns != [] else 'an empty list'}, not texts")
    return [{"role": "user", "content": text_of(turns[0], "turn 1 of turns")}]


# In the order in which they are tried on a row's columns: UltraFeedback has messages, chosen and
# prompt side by side, and a later entry must not take what an earlier one says more about.
_BY_NAME = {
    "messages": _chat("messages"),
    "conversations": _chat("conversations"),
    "alpaca": Schema(
        (("instruction",), ("output",)), _alpaca_prompt, lambda d: text_of(d["output"], "output")
    ),
    "preference": Schema(
        (("chosen",), ("rejected",)),
        lambda data: preference_prompt(data, "chosen"),
        lambda data: preference_answer(data, "chosen"),
    ),
    "kwise": Schema(
        (("prompt",), ("responses",), ("scores", "ranks")), prompt_column, _best_response
    ),
    "prompt_completion": Schema(
        (("prompt",), ("completion", "response")), prompt_column, _completion
    ),
    "prompt": Schema((("prompt",),), prompt_column, None),
    "turns": Schema((("turns",),), _first_turn, None),
    "instruction": Schema((("instruction",),), _alpaca_prompt, None),
}
SCHEMAS = tuple(_BY_NAME)


def load_conversations(
    names: Sequence[str],
    *,
    split_role: str = "train",
    schema: str = "auto",
    bad: BadRows,
    tabulate=None,
) -> list[Conversation]:
    """Rows of any schema with an answer -> what supervised fine-tuning learns from.

    Arguments: names (files, folders, hub ids, NAME:SPLIT), split_role ("train" or "eval"), schema
    (one of SCHEMAS, or "auto" for each name by its columns), bad (takes the bad rows; call its
    finish afterwards). Raises DataError for all that is wrong with whole files.
    """

    def convert(found: Schema, row: Row) -> Conversation:
        prompt = in_order(found.prompt(row.data), row.data.get("system"))
        answer = {"role": "assistant", "content": found.answer(row.data)}
        return Conversation((*prompt, answer), row.where)

    known = {name: one for name, one in _BY_NAME.items() if one.answer}
    return load_as(convert, known, SFT_SPLITS, names, split_role, schema, bad, tabulate)


def has_answer(data: dict) -> bool:
    """Has a row the columns that load_conversations reads?"""
    return any(one.answer and not one.missing(data) for one in _BY_NAME.values())


def load_prompts(
    names: Sequence[str],
    *,
    split_role: str = "train",
    schema: str = "auto",
    bad: BadRows,
    tabulate=None,
) -> list[Prompt]:
    """Rows of any schema -> all that stands before the last answer, and the rows themselves.

    Arguments and errors are those of load_conversations.
    """

    def convert(found: Schema, row: Row) -> Prompt:
        turns = in_order(found.prompt(row.data), row.data.get("system"))
        return Prompt(turns, row.where, row.data)

    return load_as(convert, _BY_NAME, PROMPT_SPLITS, names, split_role, schema, bad, tabulate)
