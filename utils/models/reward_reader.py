"""How a reward model reads a conversation: in its own template and ids, up to the token at which
it was trained to be read."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from utils.data import batches, chat_template, fitting
from utils.models import scalar_model
from utils.models.model_files import refused


@dataclass(frozen=True)
class Reader:
    """tokenizer: the reward model's own. max_length: tokens it has positions for; the prompts of
    longer rows are shortened. read_at: "stop" or "end", see chat_template. name: for messages.
    pad_id: of its config, which plain transformers, that others train with, passes over to find the
    end."""

    tokenizer: object
    max_length: int
    read_at: str
    name: str = "the reward model"
    pad_id: int | None = None

    @classmethod
    def load(
        cls, path: str, trust_remote_code: bool = False, read_at: str = "auto", date: str = ""
    ) -> "Reader":
        """Of the reward model in a folder or on the hub. Raises SystemExit with what is wrong."""
        from transformers import AutoConfig

        tokenizer = chat_template.load_tokenizer(path, trust_remote_code, date)
        with refused(path, "the model's config"):
            settings = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        positions = getattr(settings.get_text_config(), "max_position_embeddings", None)
        if read_at == "auto":
            # Step 2's models of before the setting was saved are known by their bias.
            ours = "stop" if hasattr(settings, "reward_bias") else "end"
            read_at = getattr(settings, "reward_read_at", ours)
        if read_at not in chat_template.READ_AT:
            raise SystemExit(
                f"{path!r}: reward_read_at={read_at!r} in its config.json is none of "
                f"{', '.join(chat_template.READ_AT)}; mend it there, or set --reward_read_at"
            )
        pad_id = getattr(settings, "pad_token_id", None)
        return cls(tokenizer, positions or sys.maxsize, read_at, path, pad_id)

    def encode(self, messages: Sequence[dict], text: str, finished: bool) -> list[int]:
        """One answer's conversation; its score is read at the last id. An answer that was cut at
        the length limit has no stop token, and ends the row wherever the model is read.

        Raises TemplateError where the template refuses the conversation, never for the answer.
        """
        ids = self._whole(messages, text, finished)
        if len(ids) > self.max_length:
            prompt = len(chat_template.encode_prompt(self.tokenizer, messages))
            room = prompt - (len(ids) - self.max_length)
            fitted = fitting.shortened(self.tokenizer, messages, room)
            ids = self._whole(fitted, text, finished) if fitted else ids
        return ids[-self.max_length :]  # an answer that leaves no room for the frame

    def _whole(self, messages: Sequence[dict], text: str, finished: bool) -> list[int]:
        stop = self.tokenizer.eos_token
        while stop in text:  # spelled in letters: the answer would end there for a reader of ids
            text = text.replace(stop, "")
        if self.read_at == "end":
            ids = chat_template.encode_whole(self.tokenizer, messages, text, finished)
            while ids[-1] == self.pad_id:
                ids.pop()
            return ids
        try:
            turns = (*messages, {"role": "assistant", "content": text})
            ids = chat_template.encode_conversation(self.tokenizer, turns).ids[:-1]
        except chat_template.TemplateError:
            # It rewrites earlier turns, or refuses this answer for its text.
            ids = chat_template.encode_whole(self.tokenizer, messages, text, False)
        return [*ids, *[self.tokenizer.eos_token_id] * finished]

    def refusal(self, messages: Sequence[dict]) -> str | None:
        """Why no answer to `messages` can be scored, or None."""
        try:
            chat_template.around_answer(self.tokenizer, messages)
        except chat_template.TemplateError as error:
            return f"as {self.name} reads it: {error}"
        return None


@torch.no_grad()
def scores_of(forward, encoded: Sequence[list[int]], micro_batch_size: int, device) -> list[float]:
    """The fp32 score of each row of ids, read at its last one. Where `forward` is sharded every
    rank must bring as many rows."""
    scores: list[float] = []
    for start in range(0, len(encoded), micro_batch_size):
        some = encoded[start : start + micro_batch_size]
        ids = batches.pad(some, 0).to(device)
        mask = batches.pad([[True] * len(e) for e in some], False)
        scores += scalar_model.sequence_scores(forward, ids, mask).tolist()
    return scores
