"""PPO-ptx's data: demonstrations, of which the answers are learned, or plain text, all of it."""

import dataclasses
from dataclasses import dataclass

from utils.data import demonstrations, schemas
from utils.data.cache import load_view
from utils.data.chat_template import Encoded, start_of_text
from utils.data.demonstrations import DEMONSTRATIONS, Conversation
from utils.data.fitting import Counts
from utils.data.loading import DataSettings
from utils.data.readers import Reading
from utils.data.rows import BadRow, Row
from utils.data.schemas import Schema
from utils.data.tables import View
from utils.data.turns import text_of


def _convert(schema: Schema, row: Row, reading: Reading) -> list[Conversation]:
    if not schema.is_plain_text:
        return DEMONSTRATIONS.convert(schema, row, reading)
    if schemas.has_answer(row.data):
        raise BadRow("has the columns of a demonstration, unlike the first row")
    turn = {"role": "text", "content": text_of(row.data["text"], "text")}
    return [Conversation((turn,), row.where)]


TEXTS = dataclasses.replace(DEMONSTRATIONS, use="text", convert=_convert)


@dataclass(frozen=True)
class Encode(demonstrations.Encode):
    """Conversation → (Encoded or None, Counts); of plain text all counts, its end where it fits."""

    def __call__(self, row: Conversation) -> tuple[Encoded | None, Counts]:
        if row.messages[0]["role"] != "text":
            return super().__call__(row)
        ids = self.tokenizer(row.messages[0]["content"], add_special_tokens=False).input_ids
        ids = [*start_of_text(self.tokenizer), *ids, self.tokenizer.eos_token_id]
        counts = Counts(kept=1, cut_answers=int(len(ids) > self.max_length))
        ids = ids[: self.max_length]
        return Encoded(ids, [True] * len(ids)), counts


def load(
    names: list[str], tokenizer, settings: DataSettings, max_length: int
) -> tuple[View, Counts]:
    """(examples as Encoded, what became of all rows)."""
    bad, settings = settings.bad_rows(), dataclasses.replace(settings, data_schema="auto")
    encode = Encode(tokenizer, max_length, settings.long_prompts, "drop")
    view = load_view(TEXTS, names, "train", encode, settings, bad)
    bad.finish("ptx_data")
    return view.usable(), view.counts()
