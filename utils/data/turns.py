"""Chat turns in the spellings that data sets have, lists or one text → {"role", "content"}.

A conversation in one text ("Human: … Assistant: …") has one of three spellings: Anthropic's (HH,
rm-static, Nectar), where a blank line stands before each mark; Belle's, where each mark begins a
line; Guanaco's `### Human: …`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from utils import strict_json
from utils.data.rows import BadRow, text_problem

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
# The roles that may come after a turn's; None is the beginning.
FOLLOWS = {
    None: ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
MARK = r"(Human|Assistant)[ \t]*[:：]"
BEGINNING = re.compile(r"\s*(###[ \t]*)?" + MARK)  # a cheap test that most texts fail
# A text has the first spelling in which it begins with Human and goes on with Assistant.
SPELLINGS = tuple(re.compile(before + MARK) for before in (r"###[ \t]*", r"\n[ \t\r]*\n", r"\n"))
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def kind_of(value: Any) -> str:
    """A value's type for an error message."""
    return "null" if value is None else type(value).__name__


def text_of(value: Any, name: str) -> str:
    """The value, which must be a text that is not blank. Raises BadRow naming `name`."""
    if not isinstance(value, str):
        raise BadRow(f"{name} is {kind_of(value)}, not a string")
    if not value.strip():
        raise BadRow(f"{name} is {'blank' if value else 'empty'}")
    if problem := text_problem(value):
        raise BadRow(f"{name} {problem}")
    return value


def turns_of(value: Any, name: str) -> list[dict]:
    """A list of chat turns, in any spelling, as {"role", "content"}. Raises BadRow.

    A blank system turn is left out; in_order judges the order. A turn that calls tools has
    `tool_calls`, and its content may be ""; a tool's may have `name` and `tool_call_id`.
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
        content, extra = _joined(content, f"the content of {label}"), {}
        if role == "assistant" and turn.get("weight") == 0:
            raise BadRow(f"{label} has weight 0, so is not to be learnt, but every answer is here")
        if role == "assistant" and (calls := _tool_calls(turn, label)):
            content, extra = content or "", {"tool_calls": calls}
        if role == "tool":
            extra = {k: turn[k] for k in ("name", "tool_call_id") if isinstance(turn.get(k), str)}
        if "tool_calls" not in extra or content:
            content = text_of(content, f"the content of {label}")
        turns.append({"role": role, "content": content, **extra})
    return turns


def role_of(turn: Any, label: str) -> str:
    """ "system", "user", "assistant" or "tool". Raises BadRow for any other role."""
    if not isinstance(turn, dict):
        raise BadRow(f"{label} is {kind_of(turn)}, not an object with role and content")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str):
        raise BadRow(f"the role of {label} is {kind_of(role)}, not a string")
    if role.lower() not in ROLES:
        raise BadRow(f"the role of {label} is {role!r}, none of {', '.join(ROLES)}")
    return ROLES[role.lower()]


def _joined(content: Any, name: str) -> Any:
    """Content given as a list of parts → their texts joined, as chat templates do."""
    if not isinstance(content, list) or not content:
        return content
    texts = []
    for number, part in enumerate(content, 1):
        text, kind = part, kind_of(part)
        if isinstance(part, dict):
            text, kind = part.get("text"), part.get("type", "text")
        if not isinstance(text, str) or kind not in ("text", "str"):
            raise BadRow(f"part {number} of {name} is {kind}, and only text can be read")
        texts.append(text)
    return "".join(texts)


def _tool_calls(turn: dict, label: str) -> list[dict]:
    """The calls of a turn as chat templates expect them, arguments as an object."""
    calls = turn.get("tool_calls") or []
    if turn.get("function_call"):  # OpenAI's older spelling
        calls = [{"function": turn["function_call"]}]
    result = []
    for number, call in enumerate(calls if isinstance(calls, list) else [calls], 1):
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        arguments = function.get("arguments") if name else None
        try:
            arguments = strict_json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError) as error:
            raise BadRow(f"the arguments of call {number} of {label}: not JSON: {error}") from None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise BadRow(f"call {number} of {label} lacks a function's name or arguments")
        if problem := text_problem(json.dumps(arguments, ensure_ascii=False, default=str)):
            raise BadRow(f"the arguments of call {number} of {label}: {problem}")
        own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        function = {"name": name, "arguments": arguments}
        result.append({"type": "function", "function": function, **own})
    return result


def shows_tools(turns: Sequence[dict], text: str) -> bool:
    """Whether `text`, which a chat template made of `turns`, has their tool calls and results."""
    wanted = []
    for turn in turns:
        wanted += [(call["function"]["name"],) for call in turn.get("tool_calls", ())]
        if turn["role"] == "tool":  # some templates write it as JSON
            said = turn["content"].strip()
            quoted = (json.dumps(said, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
            wanted.append((said, *quoted))
    return all(any(form in text for form in forms) for forms in wanted)


def is_transcript(text: str) -> bool:
    """Whether a text begins with `Human:` and has the assistant's mark where a turn begins."""
    return bool(_marks(text)[1])


def _marks(text: str) -> tuple[str, list[re.Match]]:
    """(the text in which the marks were found, the marks of its turns or [])."""
    if not BEGINNING.match(text):
        return text, []
    text = "\n\n" + text.lstrip()
    for spelling in SPELLINGS:
        marks = list(spelling.finditer(text))
        speakers = [mark[1] for mark in marks]
        if speakers[:1] == ["Human"] and marks[0].start() <= 2 and "Assistant" in speakers:
            return text, marks
    return text, []


def turns_of_text(text: str, name: str) -> list[dict]:
    """The turns of a transcript, without the whitespace around each. Raises BadRow.

    The assistant's mark at the end, after which the answer is to come, makes no turn.
    """
    text, marks = _marks(text)
    if not marks:
        raise BadRow(f'{name} is no transcript: it does not go "Human: … Assistant: …"')
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    turns = [
        {"role": SPEAKERS[mark[1]], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]
    if turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    if silent := [n for n, turn in enumerate(turns, 1) if not turn["content"]]:
        raise BadRow(f"turn {silent[0]} of the transcript in {name} is empty")
    return turns


def split_answer(value: Any, name: str) -> tuple[Any, Any]:
    """A list of turns → (the turns before a last assistant turn, that turn or None)."""
    if not isinstance(value, list) or not value:
        return value, None
    answered = role_of(value[-1], f"turn {len(value)} of {name}") == "assistant"
    return (value[:-1], value[-1]) if answered else (value, None)


def without_open_end(value: Any, name: str, note: Callable[[str], None]) -> Any:
    """A list of turns up to its last assistant turn, where it has one."""
    if not isinstance(value, list):
        return value
    end = len(value)
    while end and role_of(value[end - 1], f"turn {end} of {name}") != "assistant":
        end -= 1
    if 0 < end < len(value):
        note("ended without an answer; what follows the last answer was cut off")
        return value[:end]
    return value


def in_order(turns: Sequence[dict], system: Any, note: Callable[[str], None]) -> tuple[dict, ...]:
    """The turns of a prompt behind the row's system text. Raises BadRow.

    After an optional system turn, user and assistant must alternate, from user to user; after an
    assistant turn tools may answer. Assistant turns at the beginning are left out and successive
    turns of the user are joined, with a remark to note().
    """
    if system is not None and not isinstance(system, str):
        raise BadRow(f"system is {kind_of(system)}, not a string")
    if system and system.strip():
        if turns and turns[0]["role"] == "system":
            raise BadRow("there is a system column and a system turn; keep one of them")
        turns = [{"role": "system", "content": text_of(system, "system")}, *turns]
    ordered: list[dict] = []
    greeted = False
    for turn in turns:
        before = ordered[-1]["role"] if ordered else "system"
        if turn["role"] == "assistant" and before == "system":
            greeted = True  # nobody has asked yet
        elif turn["role"] == before and ordered and before in ("user", "system"):
            together = f"{ordered[-1]['content']}\n\n{turn['content']}"
            ordered[-1] = {"role": before, "content": together}
        else:
            ordered.append(turn)
    roles = [turn["role"] for turn in ordered]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken:
        raise BadRow("the prompt is empty: there is no user turn before the answer")
    for before, role in zip([None, *spoken], spoken, strict=False):
        if role not in FOLLOWS[before]:
            raise BadRow(f"roles do not alternate user, assistant: {', '.join(roles)}")
    if spoken[-1] == "assistant":
        raise BadRow(f"two assistant turns follow each other: {', '.join(roles)}, assistant")
    if greeted:
        note("began with the assistant; what it said before anybody asked was left out")
    if len(ordered) + greeted < len(turns):
        note("had several turns of the user (or system) in a row, which were joined")
    return tuple(ordered)
