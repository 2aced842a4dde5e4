"""Conversations → tokens that fit a limit, and what gives way where they are longer.

A long prompt keeps its frame: BOS, the system turn, the headers of its turns. The oldest exchanges
go first, whole; of the last user turn, if it alone is too long, the left end of its text. A prompt
is shortened as messages and then encoded, so it is what a conversation that begins with these
messages would be trained as.

Each function takes one row and nothing else, so that rows may be encoded in any process.
"""

import bisect
import functools
from collections.abc import Sequence
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
    """A conversation that ends with an answer in at most `max_length` tokens; None: left out.

    What stands before the last answer is shortened to the room that the answer leaves, at least a
    quarter of `max_length`, or with long_prompts="drop" the row is left out. An answer too long
    even then is left out, or with long_answers="cut" loses its tail but keeps its stop token.
    Raises TemplateError.
    """
    whole = chat_template.encode_conversation(tokenizer, messages)
    prompt, answer = whole.last_answer, len(whole.ids) - whole.last_answer
    room = prompt_room(prompt, answer, max_length)
    if room + answer > max_length and long_answers == "drop":
        return None, Counts(dropped=1)
    counts = Counts(kept=1)
    if room < prompt:
        before = tuple(messages[:-1])
        fitted = _fitted(tokenizer, before, room, max_length, long_prompts, long_answers)
        if fitted is None:
            return None, Counts(dropped=1)
        counts.cut_prompts = int(fitted != before)
        whole = chat_template.encode_conversation(tokenizer, (*fitted, messages[-1]))
    counts.rewritten = int(whole.rewritten)
    if len(whole.ids) > max_length:
        counts.cut_answers = 1
        ids = [*whole.ids[: max_length - 1], tokenizer.eos_token_id]
        whole = Encoded(ids, whole.supervised[:max_length], whole.rewritten)
    return whole, counts


def encode_answers(
    tokenizer, prompt, answers: Sequence[str], max_length: int, long_prompts: str
) -> tuple[list[list[int]] | None, Counts]:
    """Ids of each answer behind the same prompt, which is shortened so that the longest fits; an
    answer that is too long even so loses its tail but keeps its stop token. None: left out. Counts
    are of answers. Raises TemplateError."""
    prompt = tuple(prompt)
    turns = [{"role": "assistant", "content": text} for text in answers]
    whole = [chat_template.encode_conversation(tokenizer, (*prompt, turn)) for turn in turns]
    before = whole[0].last_answer
    room = prompt_room(before, max(len(e.ids) - e.last_answer for e in whole), max_length)
    counts = Counts(kept=len(answers))
    if room < before:
        fitted = _fitted(tokenizer, prompt, room, max_length, long_prompts, "cut")
        if fitted is None:
            return None, Counts(dropped=len(answers))
        counts.cut_prompts = len(answers) if fitted != prompt else 0
        whole = [chat_template.encode_conversation(tokenizer, (*fitted, turn)) for turn in turns]
    rows = [e.ids for e in whole]
    counts.cut_answers = sum(len(ids) > max_length for ids in rows)
    stop = tokenizer.eos_token_id
    return [i if len(i) <= max_length else [*i[: max_length - 1], stop] for i in rows], counts


def _fitted(tokenizer, prompt, room: int, max_length: int, long_prompts: str, long_answers: str):
    """The messages of `prompt` shortened to `room` tokens, or where its frame needs more and the
    answer may be cut, to half of `max_length`; None: it is to be left out."""
    fitted = None
    for limit in (room, max_length // 2) if long_answers == "cut" else (room,):
        fitted = fitted or shortened(tokenizer, prompt, limit)
    return fitted if long_prompts == "cut" or fitted == prompt else None


def shortened(tokenizer, messages, limit: int) -> tuple[dict, ...] | None:
    """The messages of a prompt with so much taken away that it has at most `limit` tokens; None
    where its frame alone, or its last user turn without a word, has more. Raises TemplateError."""

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
