"""Step 1's data: conversations that end with the answer to learn, as tokens."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from utils.data import fitting, schemas
from utils.data.chat_template import Encoded
from utils.data.loading import DataSettings, Kind, load_items
from utils.data.readers import Reading, truth
from utils.data.rows import BadRows, Row
from utils.data.schemas import Schema
from utils.data.splits import load_step, train_and_held_out
from utils.data.tables import TOKENS, View, encode_all

SPLITS = {"train": ("train_sft", "train"), "eval": ("test_sft", "validation", "test")}


@dataclass(frozen=True)
class Conversation:
    """Turns {"role", "content"}: perhaps a system turn, then user and assistant by turns.

    The last one is the assistant's. Tools may answer an assistant (see turns.py).
    """

    messages: tuple[dict, ...]
    where: str

    @property
    def prompt(self) -> tuple[dict, ...]:
        return self.messages[:-1]


def _convert(schema: Schema, row: Row, reading: Reading) -> list[Conversation]:
    if truth(row.data.get("label")) is False:  # KTO's
        reading.note("have label false: what not to answer is no demonstration, left out")
        return []
    made = []
    for part, each in schemas.parts(schema, row, reading):
        prompt = schemas.prompt_of(part, each, reading)
        made.append(Conversation((*prompt, part.answer(each.data, reading)), each.where))
    return made


DEMONSTRATIONS = Kind(
    "demonstration",
    Conversation,
    SPLITS,
    _convert,
    {"ids": TOKENS, "supervised": pa.list_(pa.bool_())},
    lambda columns, _: Encoded(**columns),
)
load_conversations = functools.partial(load_items, DEMONSTRATIONS)


@dataclass(frozen=True)
class Encode:
    """Conversation → (Encoded or None, Counts); see fitting.encode_conversation."""

    tokenizer: object
    max_length: int
    long_prompts: str
    long_answers: str

    def __call__(self, row: Conversation) -> tuple[Encoded | None, fitting.Counts]:
        limits = self.max_length, self.long_prompts, self.long_answers
        return fitting.encode_conversation(self.tokenizer, row.messages, *limits)


def load(
    names: list[str],
    tokenizer,
    settings: DataSettings,
    max_length: int,
    long_answers: str,
    say: Callable[[str], None],
) -> tuple[View, View]:
    """(training examples, held-out examples) as Encoded."""
    encode = Encode(tokenizer, max_length, settings.long_prompts, long_answers)
    labels = "training data", "held-out data"
    flags = "sft_data", "max_length"
    return load_step(DEMONSTRATIONS, names, encode, settings, 1, *flags, labels, say)


def held_out_answers(
    names: list[str], tokenizer, settings: DataSettings, max_length: int, bad: BadRows
) -> list[list[int]]:
    """Token rows of the demonstrations that step 1 holds out; only these are tokenised."""
    settings = dataclasses.replace(settings, data_schema="auto", data_weights=(), data_split="")
    _, held = train_and_held_out(DEMONSTRATIONS, names, None, settings, 1, bad)
    encode = Encode(tokenizer, max_length, settings.long_prompts, "cut")
    return [each.ids for each in encode_all(held, encode, bad)[0]]
