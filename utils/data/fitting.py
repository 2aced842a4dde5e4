"""Conversations → tokens that fit a limit, and what gives way where they are longer.

A long prompt keeps its frame: BOS, the system turn, the headers of its turns. The oldest exchanges
go first, whole; of the last user turn, if it alone is too long, the left end of its text. A prompt
is shortened as messages and then encoded, so it is what a conversation that begins with these
messages would be trained as.

Each function takes one row and nothing else, so that rows may be encoded in any process.
"""

import bisect
import functools
from dataclasses import astuple, dataclass

from utils.data import chat_template
from utils.data.chat_template import Encoded


@dataclass
class Counts:
    """What became of the rows of a data set."""

    kept: int = 0
    cut_prompts: int = 0
    cut_answers: int = 0
    dropped: int = 0
    rewritten: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def line(self, name: str) -> str:
        parts = [f"{self.kept} rows kept"]
        if self.cut_prompts:
            parts.append(f"{self.cut_prompts} of them with the prompt cut")
        if self.cut_answers:
            parts.append(f"{self.cut_answers} of them with the answer cut")
        if self.rewritten:
            parts.append(
                f"{self.rewritten} of them without loss on earlier answers, which the chat "
                "template rewrites once turns follow"
            )
        if self.dropped:
            parts.append(f"{self.dropped} dropped as too long")
        return f"{name}: {', '.join(parts)}"


def prompt_room(prompt: int, answer: int, max_length: int) -> int:
    """How many of `prompt` tokens may stay before an answer of `answer` tokens: all that fit, and
    at least a quarter of `max_length`."""
    return min(prompt, max(max_length - answer, max_length // 4))


def encode_prompt(
    tokenizer, messages, limit: int, long_prompts: str
) -> tuple[list[int] | None, Counts]:
    """At most `limit` ids up to where the assistant begins; None: left out, for long_prompts="drop"
    or a frame that does not fit. Raises TemplateError."""
    ids = chat_template.encode_prompt(tokenizer, messages)
    if len(ids) <= limit:
        return ids, Counts(kept=1)
    fitted = shortened(tokenizer, messages, limit) if long_prompts == "cut" else None
    if fitted is None:
        return None, Counts(dropped=1)
    return chat_template.encode_prompt(tokenizer, fitted), Counts(kept=1, cut_prompts=1)


def encode_conversation(
    tokenizer, messages, max_length: int, long_prompts: str, long_answers: str
) -> tuple[Encoded | None, Counts]:
    """A conversation that ends with an answer in at most `max_length` tokens; None: left out. See
    encode_answers."""
    rows, counts = encode_answers(
        tokenizer, messages[:-1], messages[-1:], max_length, long_prompts, long_answers
    )
    if rows is None:
        return None, counts
    counts.rewritten = int(rows[0].rewritten)
    return rows[0], counts


def encode_answers(
    tokenizer, prompt, answers, max_length: int, long_prompts: str, long_answers: str
) -> tuple[list[Encoded] | None, Counts]:
    """Each of `answers` (turns) behind the same prompt, in at most `max_length` tokens, and Counts
    of answers; None: all are left out.

    The prompt is shortened to the room that the longest answer leaves, at least a quarter of
    `max_length`, or with long_prompts="drop" all are left out. An answer too long even then loses
    its tail but keeps its stop token, or with long_answers="drop" all are left out. Raises
    TemplateError.
    """
    prompt, count = tuple(prompt), len(answers)

    def encoded(prompt) -> list[Encoded]:
        return [chat_template.encode_conversation(tokenizer, (*prompt, turn)) for turn in answers]

    rows = encoded(prompt)
    before = rows[0].last_answer
    longest = max(len(row.ids) - row.last_answer for row in rows)
    room = prompt_room(before, longest, max_length)
    if room + longest > max_length and long_answers == "drop":
        return None, Counts(dropped=count)
    counts = Counts(kept=count)
    if room < before:
        fitted = _fitted(tokenizer, prompt, room, max_length, long_prompts, long_answers)
        if fitted is None:
            return None, Counts(dropped=count)
        counts.cut_prompts = count if fitted != prompt else 0
        rows = encoded(fitted)
    for i, row in enumerate(rows):
        if len(row.ids) > max_length:
            counts.cut_answers += 1
            ids = [*row.ids[: max_length - 1], tokenizer.eos_token_id]
            rows[i] = Encoded(ids, row.supervised[:max_length], row.rewritten)
    return rows, counts


def _fitted(tokenizer, prompt, room: int, max_length: int, long_prompts: str, long_answers: str):
    """The messages of `prompt` shortened to `room` tokens, or where its frame needs more and the
    answer may be cut, to half of `max_length`; None: it is to be left out."""
    fitted = None
    for limit in (room, max_length // 2) if long_answers == "cut" else (room,):
        fitted = fitted or shortened(tokenizer, prompt, limit)
    return fitted if long_prompts == "cut" or fitted == prompt else None


def shortened(tokenizer, messages, limit: int) -> tuple[dict, ...] | None:
    """The messages of a prompt, shortened to at most `limit` tokens; None where its frame alone, or
    its last user turn without a word, has more. Raises TemplateError."""
    messages = tuple(messages)
    roles = [message["role"] for message in messages]
    first = next((i for i, r in enumerate(roles) if r not in ("system", "developer")), len(roles))

    @functools.cache
    def over(start: int) -> int:
        """Tokens too many of the prompt from message `start` on, behind its system turn."""
        ids = chat_template.encode_prompt(tokenizer, messages[:first] + messages[start:])
        return len(ids) - limit

    if over(first) <= 0:
        return messages
    # An exchange begins where a user speaks and did not just before.
    starts = [
        i
        for i in range(first, len(roles))
        if roles[i] == "user" and (i == first or roles[i - 1] != "user")
    ]
    if not starts:
        return None
    fits = bisect.bisect_left(starts, True, hi=len(starts) - 1, key=lambda i: over(i) <= 0)
    start = starts[fits]
    return _cut_last_text(tokenizer, messages[:first] + messages[start:], limit, over(start))


def _cut_last_text(tokenizer, messages, limit: int, over: int) -> tuple[dict, ...] | None:
    """`messages`, which are `over` tokens too many, with the left end of the last user's text cut
    until they fit."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    while over > 0:
        text = messages[last]["content"]
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if over >= len(ids):
            return None
        # Where the tokens that stay begin; by the share of the text, where a tokenizer that
        # normalises gives back other text. (U+FFFD: a character of which a part was cut.)
        rest = tokenizer.decode(ids[over:], clean_up_tokenization_spaces=False).lstrip("\ufffd")
        start = len(text) - len(rest) if text.endswith(rest) else len(text) * over // len(ids)
        turn = messages[last] | {"content": text[max(1, start) :]}
        messages = (*messages[:last], turn, *messages[last + 1 :])
        over = len(chat_template.encode_prompt(tokenizer, messages)) - limit
    return messages
