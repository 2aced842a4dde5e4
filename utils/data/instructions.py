"""Rows of any schema -> conversations to learn, prompts to answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from utils.data import schemas
from utils.data.loading import load_as
from utils.data.reading import Schema
from utils.data.rows import BadRows, Row

# The first split that a data set has is taken. The long names are UltraFeedback's on the hub.
SFT_SPLITS = {
    "train": ("train_sft", "train"),
    "eval": ("test_sft", "validation", "test"),
}
PROMPT_SPLITS = {
    "train": ("train_gen", "train_prefs", "train_sft", "train"),
    "eval": ("test_gen", "test_prefs", "test_sft", "validation", "test"),
}


@dataclass(frozen=True)
class Conversation:
    """Turns {"role", "content"}: perhaps a system turn, then user and assistant by turns.

    The last one is the assistant's. Tools may answer an assistant (see turns.py).
    """

    messages: tuple[dict, ...]
    where: str


@dataclass(frozen=True)
class Prompt:
    """Turns that end with a user's, and the raw row, where verifiers find their columns."""

    messages: tuple[dict, ...]
    where: str
    row: dict


def load_conversations(
    names: Sequence[str],
    *,
    split_role: str = "train",
    schema: str = "auto",
    columns: Mapping[str, str] | None = None,
    bad: BadRows,
    tabulate=None,
) -> list[Conversation]:
    """Rows of any schema with an answer -> what supervised fine-tuning learns from.

    Arguments: names (files, folders, hub ids, NAME:SPLIT), split_role ("train" or "eval"), schema
    (--data_schema, see schemas.reading_of), columns (--columns, {ours: theirs}), bad (takes the bad
    rows; call its finish afterwards). Raises DataError for all that is wrong with whole files.
    """
    reading = schemas.reading_of("demonstration", schema, columns)

    def convert(found: Schema, row: Row) -> list[Conversation]:
        if _is_bad_example(row.data):
            reading.notes["have label false: what not to answer is no demonstration, left out"] += 1
            return []
        made = []
        for part, each in schemas.parts(found, row, reading):
            prompt = schemas.prompt_of(part, each, reading)
            answer = part.answer(each.data, reading)
            made.append(Conversation((*prompt, answer), each.where))
        return made

    return load_as(convert, reading, SFT_SPLITS, names, split_role, bad, tabulate)


def _is_bad_example(data: dict) -> bool:
    """KTO's `label`, in the spellings that JSON and CSV have, says that the answer is a bad one."""
    label = data.get("label")
    if isinstance(label, str):
        return label.strip().lower() in ("false", "0")
    return isinstance(label, (bool, int, float)) and label == 0


def has_answer(data: dict) -> bool:
    """Has a row the columns that load_conversations reads?"""
    return any(one.serves("demonstration") and one.fits(data) for one in schemas.SCHEMAS.values())


def load_prompts(
    names: Sequence[str],
    *,
    split_role: str = "train",
    schema: str = "auto",
    columns: Mapping[str, str] | None = None,
    bad: BadRows,
    tabulate=None,
) -> list[Prompt]:
    """Rows of any schema -> all that stands before the last answer, and the rows themselves.

    Arguments and errors are those of load_conversations.
    """
    reading = schemas.reading_of("prompt", schema, columns)

    def convert(found: Schema, row: Row) -> list[Prompt]:
        parts = schemas.parts(found, row, reading)
        turns = [schemas.prompt_of(part, each, reading) for part, each in parts]
        return [Prompt(t, r.where, r.data) for t, (_, r) in zip(turns, parts, strict=True)]

    return load_as(convert, reading, PROMPT_SPLITS, names, split_role, bad, tabulate)
