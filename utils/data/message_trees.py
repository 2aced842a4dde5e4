"""OpenAssistant's trees of messages, nested or flat (`parent_id`) → rows of other schemas.

A tree is {"message_tree_id", "prompt": message}, a message {"role": "prompter" or "assistant",
"text", "rank" (0 is best), "replies": [message, …]}. Messages that were deleted or failed review
are left out, with all that answers them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from utils.data.rows import BadRow, BadRows, Row
from utils.data.turns import kind_of

FLAT = ("message_id", "parent_id", "text", "role")


def join(rows: Iterable[Row], bad: BadRows, notes: Counter) -> tuple[list[Row], str]:
    """Flat messages → (trees, each where its first message stands; their schema's name).

    Messages without their columns go to `bad`; those whose parent is not there are counted in
    `notes`.
    """
    answers: dict[str, list[dict]] = {}
    roots, there, messages = [], set(), 0
    for row in rows:
        name, parent = row.data.get("message_id"), row.data.get("parent_id")
        lacks = [column for column in FLAT if column not in row.data]
        twice = isinstance(name, str) and name in there
        if lacks or twice or not isinstance(name, str) or not isinstance(parent, (str, type(None))):
            reason = f"lacks {', '.join(lacks)}" if lacks else "message_id or parent_id is no text"
            bad.add(row.where, f"message_id {name} is there before" if twice else reason, row.data)
            continue
        there.add(name)
        messages += 1
        # The list is shared with `answers`, so that answers may stand before what they answer.
        message = {**row.data, "replies": answers.setdefault(name, [])}
        if parent is None or parent == "":
            tree = {"message_tree_id": row.data.get("message_tree_id", name), "prompt": message}
            roots.append(Row(tree, row.where))
        else:
            answers.setdefault(parent, []).append(message)
    lost = messages - sum(_size(root.data["prompt"]) for root in roots)
    if lost:
        notes["were left out: the message that they answer is not there"] += lost
    return roots, "tree"


def _size(message: dict) -> int:
    stack, count = [message], 0
    while stack:
        count += 1
        stack += stack.pop()["replies"]
    return count


def _turn(message: Any) -> dict:
    if not isinstance(message, dict):
        raise BadRow(f"a message of the tree is {kind_of(message)}, not an object")
    return {"role": message.get("role"), "content": message.get("text")}


def _replies(message: dict) -> list[dict]:
    """The sound replies, the best first, those without a rank last."""
    replies = message.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(one, dict) for one in replies):
        raise BadRow("the replies of a message of the tree are no list of objects")
    return sorted(filter(_sound, replies), key=lambda one: (_rank(one) is None, _rank(one) or 0))


def _sound(message: dict) -> bool:
    return not message.get("deleted") and message.get("review_result") is not False


def _rank(message: dict) -> float | None:
    rank = message.get("rank")
    return None if isinstance(rank, bool) or not isinstance(rank, (int, float)) else rank


def _prompts(tree: dict) -> Iterator[tuple[list[dict], dict, list[dict]]]:
    """(the turns up to a prompter's message, the message, its replies), from the root down."""
    stack = [(tree["prompt"], [])]
    while stack:
        message, before = stack.pop()
        turns, replies = [*before, _turn(message)], _replies(message)
        if message.get("role") == "prompter":
            yield turns, message, replies
        stack += [(reply, turns) for reply in reversed(replies)]


def unfold(tree: dict, reading) -> list[tuple[str, dict]]:
    """What a tree stands for: as demonstration the path of best replies, as prompts every message
    of a prompter with what was said before, as comparisons those of them with two ranked replies.
    """
    _turn(tree["prompt"])
    if not _sound(tree["prompt"]):
        reading.note("are trees whose first message was deleted or failed review, left out")
        return []
    if reading.use in ("demonstration", "text"):
        turns, message = [_turn(tree["prompt"])], tree["prompt"]
        while replies := _replies(message):
            message = replies[0]
            turns.append(_turn(message))
        return [("messages", {"messages": turns})]
    rows = []
    for turns, message, replies in _prompts(tree):
        ranked = [reply for reply in replies if _rank(reply) is not None]
        row = {"prompt": turns, "message_id": message.get("message_id")}
        if reading.use == "prompt":
            rows.append(("prompt", row))
        elif len(ranked) > 1:
            row |= {"responses": [reply.get("text") for reply in ranked]}
            rows.append(("kwise", row | {"ranks": [_rank(reply) for reply in ranked]}))
    if not rows:
        reading.note("are trees without two ranked answers to a message, left out")
    return rows
