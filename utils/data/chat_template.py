"""Messages → token ids, and which of them are supervised."""

import functools
import json
import os
from dataclasses import dataclass, field
from datetime import datetime

from utils.data.turns import shows_tools
from utils.pretrained import refused
from utils.terminal import coloured, visible

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PAD = "<|pad|>"
READ_AT = ("stop", "end")
READ_AT_HELP = (
    "where the reward model's score is read: at the stop token of the answer (stop; step 2's, "
    "OpenRLHF's) or behind what its template puts after that (end; TRL's); auto: as its "
    "config.json says, else stop for step 2's and end for others"
)
PROBE = "xyzzy"  # an answer that no template holds or rewrites


class TemplateError(ValueError):
    """A conversation the template cannot render turn by turn."""


def load_tokenizer(path: str, trust_remote_code: bool = False, date: str = ""):
    """The tokenizer of a folder or hub name, with a template, a stop token and a pad of its own.

    date: the day for a template that states one, YYYY-MM-DD; empty: the clock's.
    """
    from transformers import AutoTokenizer

    with refused(path, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    try:
        set_up(tokenizer)
    except TemplateError as error:
        raise SystemExit(f"the chat template of {path!r} cannot be used: {error}") from error
    tokenizer.date = date
    return tokenizer


def set_up(tokenizer) -> None:
    """Give `tokenizer` what training needs, changing only what is missing.

    - a chat template: its own, else ChatML; in front of it what the tokenizer puts before a text
      (BOS, often), if the template does not;
    - `eos_token`: the token that ends an assistant turn in that template. A base model's
      tokenizer may name another (Qwen2.5's base: <|endoftext|>), and a policy trained to end
      turns with one token while the sampler waits for the other never stops;
    - a pad token that is not the stop token.
    """
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHATML
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    _close_last_turn(tokenizer)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    rendered = _render(tokenizer, messages, False)
    start = "".join(tokenizer.convert_ids_to_tokens(start_of_text(tokenizer)))
    if not rendered.lstrip().startswith(start):
        tokenizer.chat_template = start + tokenizer.get_chat_template()
    stop = _turn_end(tokenizer, rendered)
    if stop != tokenizer.eos_token:
        _replace_stop(tokenizer, stop)
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "left"


def _close_last_turn(tokenizer) -> None:
    """Where nothing but the next turn's first token ends an answer (GLM-4's `<|user|>`, at which it
    stops), make the template write that token behind a last answer too."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    if _special_tokens_in(tokenizer, _render(tokenizer, turns, False).split(PROBE)[-1]):
        return
    after = _render(tokenizer, [*turns, turns[0]], False).split(PROBE)[-1]
    opening = next(iter(_special_tokens_in(tokenizer, after)), "")
    if opening and after.startswith(opening):
        tokenizer.chat_template = (
            tokenizer.get_chat_template()
            + "{% if not add_generation_prompt and messages[-1]['role'] == 'assistant' %}"
            + f"{{{{ {json.dumps(opening)} }}}}{{% endif %}}"
        )


def _replace_stop(tokenizer, stop: str) -> None:
    """Make `stop` the stop token. A template that writes `eos_token` (Phi-3's, behind all turns)
    goes on to write the one that it had."""
    turns, meant = [{"role": "user", "content": "a"}], tokenizer.eos_token
    turns.append({"role": "assistant", "content": "b"})
    before = _render(tokenizer, turns, False)
    tokenizer.eos_token = stop
    if meant is not None and _render(tokenizer, turns, False) != before:
        template = tokenizer.get_chat_template()
        tokenizer.chat_template = f"{{% set eos_token = {json.dumps(meant)} %}}{template}"


def _special_tokens_in(tokenizer, text: str) -> list[str]:
    """The special tokens that stand in `text`, in their order; of two at one place the longer."""
    known = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""}
    places = [(text.index(token), -len(token), token) for token in known if token in text]
    return [token for _, _, token in sorted(places)]


def start_of_text(tokenizer) -> list[int]:
    """The special tokens that the tokenizer itself puts before a text. A template's text is
    tokenised without them, and a Gemma that never sees its BOS writes nonsense."""
    plain = tokenizer(PROBE, add_special_tokens=False).input_ids
    whole = tokenizer(PROBE).input_ids
    starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[: next(starts, 0)]


def _turn_end(tokenizer, rendered: str) -> str:
    """The special token that closes the assistant's turn in `rendered`, whose answer is PROBE."""
    after = rendered.split(PROBE)[-1]
    specials_after = _special_tokens_in(tokenizer, after)
    if not specials_after:
        specials = ", ".join(sorted(tokenizer.all_special_tokens))
        raise SystemExit(
            f"the chat template ends an assistant turn with {after!r}, which holds no special "
            f"token of the tokenizer ({specials}): the model could never learn to stop"
        )
    return specials_after[0]


def _render(tokenizer, messages, add_generation_prompt: bool) -> str:
    """Text of the turns; TemplateError where the template refuses them (system turns, often)."""
    from jinja2.exceptions import TemplateError as JinjaError

    template = tokenizer.get_chat_template()
    if "strftime_now" in template and getattr(tokenizer, "date", ""):
        template = _stating_the_day(template, tokenizer.date)
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=template,
        )
    except (JinjaError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        # A template is a program: beside what it raises itself, it may stumble over the turns.
        raise TemplateError(f"the chat template refuses this conversation: {error}") from error
    if not shows_tools(messages, text):
        raise TemplateError("the chat template leaves out a tool's call or its result")
    return text


@functools.lru_cache(maxsize=16)
def _stating_the_day(template: str, date: str) -> str:
    """A template (Llama-3.2's, SmolLM3's, gpt-oss's) that asks for the clock's day, asking for
    `date` instead. A macro, for transformers passes no function on to a template."""
    day, value = datetime.fromisoformat(date), "format"
    for directive in (f"%{flag}{letter}" for flag in ("-", "") for letter in "aAbBdeFHIjmMpSyYZ"):
        value += f" | replace({directive!r}, {day.strftime(directive)!r})"
    return "{% macro strftime_now(format) %}{{ " + value + " }}{% endmacro %}" + template


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens. `supervised[i]`: loss falls on predicting `ids[i]`.

    rewritten: earlier answers are not supervised, for the template renders them otherwise once
    turns follow.
    """

    ids: list[int]
    supervised: list[bool]
    rewritten: bool = field(default=False, compare=False)

    @property
    def last_answer(self) -> int:
        """Where the last assistant turn's tokens begin (they end the row)."""
        start = len(self.ids)
        while start > 0 and self.supervised[start - 1]:
            start -= 1
        return start


def encode_prompt(tokenizer, messages) -> list[int]:
    """Ids of a conversation that ends with a user turn, up to where the assistant begins.

    Earlier turns are the tokens they were trained as. A template that rewrites them is rendered
    as it stands.
    """
    prompt = _before_answer(tokenizer, messages)
    try:
        earlier, done = _encode_turns(tokenizer, messages)
    except TemplateError:
        return _ids(tokenizer, prompt)
    if not done or not prompt.startswith(done):
        return _ids(tokenizer, prompt)
    return earlier.ids + _continuation_ids(tokenizer, prompt[len(done) :])


def encode_conversation(tokenizer, messages) -> Encoded:
    """All turns; the assistant's tokens are supervised, each turn's stop token included.

    Text is tokenised turn by turn, so the tokens before an answer are exactly those that prompt a
    rollout. Where a template rewrites earlier answers (those of reasoning models drop the thoughts)
    only the answers that stay as they were are supervised, the last one always. Raises
    TemplateError where an answer does not follow its generation prompt, or contains the text of the
    stop token, which would end it early.
    """
    return _encode_turns(tokenizer, messages)[0]


def _encode_turns(tokenizer, messages) -> tuple[Encoded, str]:
    """The turns through the last assistant's, and their text."""
    ids: list[int] = []
    supervised: list[bool] = []
    done, rewritten = "", False
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _before_answer(tokenizer, messages[:i])
        full = _render(tokenizer, messages[: i + 1], False)
        if not full.startswith(prompt):
            same = len(os.path.commonprefix([prompt, full]))
            raise TemplateError(
                f"the chat template asks for turn {i + 1} with {prompt[same:][:60]!r} where it "
                f"renders it behind {full[same:][:60]!r}; give the tokenizer a template whose "
                "generation prompt is what stands before an answer"
            )
        answer = _whole_answer(message["content"], full[len(prompt) :], tokenizer.eos_token)
        stops = answer.count(tokenizer.eos_token)
        if stops != 1:
            raise TemplateError(
                f"turn {i + 1} holds the stop token {tokenizer.eos_token} {stops} times as "
                "rendered, not once at its end; take it out of the answer's text"
            )
        answer = answer[: answer.index(tokenizer.eos_token) + len(tokenizer.eos_token)]
        if done and prompt.startswith(done):
            piece = _continuation_ids(tokenizer, prompt[len(done) :])
        else:
            rewritten = rewritten or bool(done)
            ids, supervised, piece = [], [], _ids(tokenizer, prompt)
        ids += piece
        supervised += [False] * len(piece)
        piece = _continuation_ids(tokenizer, answer)
        ids += piece
        supervised += [True] * len(piece)
        done = prompt + answer
    return Encoded(ids, supervised, rewritten), done


def _before_answer(tokenizer, messages) -> str:
    """The text that the assistant's next answer follows, in a prompt as in a training row."""
    prompt = _render(tokenizer, messages, True)
    return prompt.removesuffix(_never_answered(tokenizer, tokenizer.get_chat_template()))


@functools.lru_cache(maxsize=16)
def _never_answered(tokenizer, template: str) -> str:
    """What the template's generation prompt ends with that no rendered answer begins with.

    DeepSeek-R1's is `<think>\n`, but an answer without thoughts follows the assistant's header
    directly. Rollouts begin there too, so that the policy writes its thoughts from the first word.
    """
    question = [{"role": "user", "content": "a"}]
    prompt = _render(tokenizer, question, True)
    full = _render(tokenizer, [*question, {"role": "assistant", "content": PROBE}], False)
    same = len(os.path.commonprefix([prompt, full]))
    return prompt[same:] if full[same:].lstrip().startswith(PROBE) else ""


def _whole_answer(content: str, rendered: str, stop: str) -> str:
    """`rendered`, what the template makes of the answer `content`, with the beginning (thoughts)
    that a template may leave out even of the last turn: a row would teach to answer without."""
    text, ended, _ = rendered.partition(stop)
    if content in text:
        return rendered
    had, has = "".join(content.split()), "".join(text.split())
    return content.strip() + ended if had != has and had.endswith(has) else rendered


def around_answer(tokenizer, messages) -> tuple[str, str]:
    """The text before an answer to `messages` and behind it, as the template renders them.

    Raises TemplateError where it refuses them, or shows no answer that ends with the stop token.
    """
    turns = (*messages, {"role": "assistant", "content": PROBE})
    before, probe, after = _render(tokenizer, turns, False).rpartition(PROBE)
    if not probe or tokenizer.eos_token not in after:
        raise TemplateError("the chat template shows no last answer that ends with the stop token")
    return before, after


def reply_ids(tokenizer, messages, reply: dict) -> list[int]:
    """What stands between an answer's stop token and the next answer, where `reply` ({"role",
    "content"}, a tool's or a user's) comes between: the same ids as in a row of training data.

    messages: a conversation that ends with that answer, whose text changes nothing here. Texts of
    special tokens are taken out of the reply: they would end its turn and begin another. Raises
    TemplateError where the template has no such turn.
    """
    special = {*tokenizer.all_special_tokens}
    special |= {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    text = reply["content"]
    while found := [token for token in special if token and token in text]:
        text = functools.reduce(lambda text, token: text.replace(token, ""), found, text)
    probe = PROBE
    while any(probe in turn["content"] for turn in (*messages[:-1], reply)):
        probe += PROBE
    turns = (*messages[:-1], {"role": "assistant", "content": probe}, {**reply, "content": text})
    _, _, after = _before_answer(tokenizer, turns).partition(probe)
    _, stop, between = after.partition(tokenizer.eos_token)
    if not stop:
        raise TemplateError(
            "the chat template puts no stop token between an answer and what follows it"
        )
    return _continuation_ids(tokenizer, between)


def encode_whole(tokenizer, messages, answer: str, finished: bool) -> list[int]:
    """`answer` to `messages`, rendered and tokenised in one piece, with what the template puts
    behind the answer's stop token. An answer that is not finished ends the row, without one.

    Raises TemplateError as around_answer, and never for the answer's text: where the template
    refuses that (many refuse an empty one), it stands where another answer would.
    """
    turns = (*messages, {"role": "assistant", "content": answer})
    try:
        text = _render(tokenizer, turns, False)
    except TemplateError:
        text = answer.join(around_answer(tokenizer, messages))
    if not finished:
        text, stop, _ = text.rpartition(tokenizer.eos_token)
        if not stop:
            raise TemplateError("the chat template puts no stop token behind the answer")
    return _ids(tokenizer, text)


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _continuation_ids(tokenizer, text: str) -> list[int]:
    """Ids of text that follows other text: sentencepiece would put a space before the first word
    of a string, so the string is tokenised behind a special token, which is then dropped."""
    return _ids(tokenizer, tokenizer.eos_token + text)[1:]


def show(tokenizer, encoded: Encoded) -> str:
    """The text with supervised tokens in green, others grey, for a terminal."""
    parts = []
    for token, on in zip(encoded.ids, encoded.supervised, strict=True):
        parts.append(coloured(visible(tokenizer.decode([token])), on))
    count = sum(encoded.supervised)
    return "".join(parts) + f"\n{len(encoded.ids)} tokens, {count} supervised (green)"
