"""PPO-ptx's data: rows of plain text, all of it learned, or demonstrations."""

import dataclasses
import functools
import operator
from dataclasses import dataclass

from utils.data import demonstrations, schemas
from utils.data.cache import load_view
from utils.data.chat_template import Encoded, start_of_text
from utils.data.demonstrations import DEMONSTRATIONS, Conversation
from utils.data.fitting import Counts
from utils.data.loading import DataSettings, Kind
from utils.data.reading import Reading, Schema
from utils.data.rows import BadRow, BadRows, Row
from utils.data.sources import stream_rows
from utils.data.tables import View
from utils.data.turns import text_of


def _convert(schema: Schema, row: Row, reading: Reading) -> list[Conversation]:
    if schemas.has_answer(row.data):
        raise BadRow("has the columns of a demonstration, unlike the first row")
    turn = {"role": "text", "content": text_of(row.data["text"], "text")}
    return [Conversation((turn,), row.where)]


TEXTS = Kind(
    "text",
    Conversation,
    DEMONSTRATIONS.splits,
    _convert,
    DEMONSTRATIONS.columns,
    DEMONSTRATIONS.build,
)


@dataclass(frozen=True)
class Encode:
    """Conversation of one plain text → (Encoded, Counts): all of it counts, its end where it
    fits."""

    tokenizer: object
    max_length: int

    def __call__(self, row: Conversation) -> tuple[Encoded, Counts]:
        text = row.messages[0]["content"]
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        ids = [*start_of_text(self.tokenizer), *ids, self.tokenizer.eos_token_id]
        counts = Counts(kept=1, cut_answers=int(len(ids) > self.max_length))
        ids = ids[: self.max_length]
        return Encoded(ids, [True] * len(ids)), counts


def load(
    names: list[str], tokenizer, settings: DataSettings, max_length: int
) -> tuple[View, Counts]:
    """(examples as Encoded, what became of all rows); each data set is plain text, or
    demonstrations by whatever schema."""
    bad = settings.bad_rows()
    learned = demonstrations.Encode(tokenizer, max_length, settings.long_prompts, "drop")
    views = []
    for name in names:
        kind, encode, schema = DEMONSTRATIONS, learned, "auto"
        if _is_plain(name, settings.names_of_columns()):
            kind, encode, schema = TEXTS, Encode(tokenizer, max_length), "plain_text"
        own = dataclasses.replace(settings, data_schema=schema)
        views.append(load_view(kind, [name], "train", encode, own, bad))
    view = functools.reduce(operator.add, views)
    bad.finish("ptx_data")
    return view.usable(), view.counts()


def _is_plain(name: str, columns: dict[str, str]) -> bool:
    """Is the first row one of `text`, and of nothing that an answer could be read from?"""
    first = next(stream_rows(name, DEMONSTRATIONS.splits["train"], BadRows(1.0)), None)
    data = schemas.renamed(first, columns).data if first is not None else {}
    return "text" in data and not schemas.has_answer(data)
