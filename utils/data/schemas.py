"""Row schemas: by which columns a row is recognised, and which functions read it.

A new schema is an entry in SCHEMAS: with readers of utils/data/readers.py, or with functions that
stand here before the table. Each is given a row and a Reading and raises BadRow.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from utils.data import message_trees
from utils.data.readers import (
    ANSWER,
    LEARNED,
    PROMPT,
    SYSTEM,
    Reading,
    answer_in,
    before_completion,
    best_of,
    chat_in,
    chosen_answer,
    first_turn,
    in_prompt,
    instruction,
    judged,
    listed,
    nectar,
    pair,
    pair_prompt,
    prompt_in,
    shp,
    shp_prompt,
    text_is_transcript,
    transcript_answer,
    transcript_prompt,
    ultrafeedback,
)
from utils.data.rows import BadRow, BadRows, Row
from utils.data.turns import in_order


@dataclass(frozen=True)
class Schema:
    """How rows of one shape are recognised and read.

    columns: each entry lists alternatives, of which one must be there. prompt: the turns up to the
    last user's. answer: the assistant's turn behind them. ranked: answers and their scores. judged:
    one answer and its score, 1 for a good one and 0 for a bad one. Of these, None is what the rows
    do not hold. optional: other columns that are read. only: a further condition. join: makes one
    row of several before any is read, and names their schema. unfold: the rows that one row stands
    for, each with the name of its schema.
    """

    columns: tuple[tuple[str, ...], ...]
    prompt: Callable[[dict, Reading], list[dict]] | None = None
    answer: Callable[[dict, Reading], dict] | None = None
    ranked: Callable[[dict, Reading], tuple[list[str], list[float]]] | None = None
    judged: Callable[[dict, Reading], tuple[list[str], list[float]]] | None = None
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
        if use in ("comparison", "judged"):
            return bool(self.ranked or (use == "judged" and self.judged))
        return bool(self.prompt)

    @property
    def is_plain_text(self) -> bool:
        return not (self.prompt or self.unfold or self.join)


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
    "prompt_completion": Schema(
        (PROMPT, ANSWER), before_completion, answer_in(PROMPT, *ANSWER), judged=judged
    ),
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
