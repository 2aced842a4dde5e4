"""Step 3's data: prompts as tokens, with the turns and the data row that reward functions read."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from utils.data import fitting, schemas
from utils.data.loading import DataSettings, Kind, load_items
from utils.data.readers import Reading
from utils.data.rows import BadRow, Row
from utils.data.schemas import Schema
from utils.data.splits import load_step
from utils.data.tables import TOKENS, View

# UltraFeedback's splits on the hub have the long names.
SPLITS = {
    "train": ("train_gen", "train_prefs", "train_sft", "train"),
    "eval": ("test_gen", "test_prefs", "test_sft", "validation", "test"),
}


class Reader(Protocol):
    """How a reward model reads conversations (models/scorer.py)."""

    def refusal(self, messages: Sequence[dict]) -> str | None:
        """Why it can score no answer to these messages, or None."""


@dataclass(frozen=True)
class Prompt:
    """Turns that end with a user's, the raw row, where verifiers find their columns, and tokens."""

    messages: tuple[dict, ...]
    where: str
    row: dict
    ids: Sequence[int] = ()

    @property
    def prompt(self) -> tuple[dict, ...]:
        return self.messages


def _convert(schema: Schema, row: Row, reading: Reading) -> list[Prompt]:
    parts = schemas.parts(schema, row, reading)
    turns = [schemas.prompt_of(part, each, reading) for part, each in parts]
    return [Prompt(t, r.where, r.data) for t, (_, r) in zip(turns, parts, strict=True)]


PROMPTS = Kind(
    "prompt",
    Prompt,
    SPLITS,
    _convert,
    {"ids": TOKENS},
    lambda columns, item: dataclasses.replace(item(), ids=columns["ids"]),
)
load_prompts = functools.partial(load_items, PROMPTS)


@dataclass(frozen=True)
class Encode:
    """Prompt → (the same with its tokens or None, Counts); see fitting.encode_prompt.

    readers: those of the reward models that will score the answers. Raises BadRow for a prompt that
    one of them cannot read, so that no run ends in the middle because of it.
    """

    tokenizer: object
    max_prompt_length: int
    long_prompts: str
    readers: Sequence[Reader] = ()

    def __call__(self, row: Prompt) -> tuple[Prompt | None, fitting.Counts]:
        if refusals := [why for r in self.readers if (why := r.refusal(row.messages))]:
            raise BadRow("; ".join(refusals))
        limits = self.max_prompt_length, self.long_prompts
        ids, counts = fitting.encode_prompt(self.tokenizer, row.messages, *limits)
        return None if ids is None else dataclasses.replace(row, ids=ids), counts


def load(
    names: list[str],
    tokenizer,
    settings: DataSettings,
    max_prompt_length: int,
    readers: Sequence[Reader],
    say: Callable[[str], None],
) -> tuple[View, View]:
    """(training prompts, held-out prompts) with tokens, those that all `readers` can read."""
    encode = Encode(tokenizer, max_prompt_length, settings.long_prompts, tuple(readers))
    labels = "prompts", "held-out prompts"
    flags = "prompt_data", "max_prompt_length"
    return load_step(PROMPTS, names, encode, settings, 3, *flags, labels, say)
