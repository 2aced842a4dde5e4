"""Messages → token ids, and which of them are supervised.

    python -m utils.data.chat_template --tokenizer FOLDER --data FILE [--row N]

shows a data row with its supervised tokens in green.
"""

from dataclasses import dataclass

from utils.model_files import refused
from utils.terminal import visible

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
PROBE = "xyzzy"  # an answer that no template rewrites


class TemplateError(ValueError):
    """A conversation the template cannot render turn by turn."""


def load_tokenizer(path: str, trust_remote_code: bool = False):
    """The tokenizer of a folder or hub name, with a template, a stop token and a pad of its own."""
    from transformers import AutoTokenizer

    with refused(path, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    try:
        set_up(tokenizer)
    except TemplateError as error:
        raise SystemExit(f"the chat template of {path!r} cannot be used: {error}") from error
    return tokenizer


def set_up(tokenizer) -> None:
    """Give `tokenizer` what training needs, changing only what is missing.

    - a chat template: its own, else ChatML;
    - `eos_token`: the token that ends an assistant turn in that template. A base model's
      tokenizer may name another (Qwen2.5's base: <|endoftext|>), and a policy trained to end
      turns with one token while the sampler waits for the other never stops;
    - a pad token that is not the stop token.
    """
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHATML
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    stop = _turn_end(tokenizer)
    if stop != tokenizer.eos_token:
        tokenizer.eos_token = stop
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "left"


def _turn_end(tokenizer) -> str:
    """The special token that closes an assistant turn in the tokenizer's template."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    after = _render(tokenizer, messages, False).split(PROBE)[-1]
    specials = sorted(
        set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab()), key=len, reverse=True
    )
    found = [(after.index(token), token) for token in specials if token and token in after]
    if not found:
        raise SystemExit(
            f"the chat template ends an assistant turn with {after!r}, which holds no special "
            f"token of the tokenizer ({', '.join(specials)}): the model could never learn to stop"
        )
    return min(found, key=lambda pair: pair[0])[1]


def _render(tokenizer, messages, add_generation_prompt: bool) -> str:
    """Text of the turns; TemplateError where the template refuses them (system turns, often)."""
    from jinja2.exceptions import TemplateError as JinjaError

    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (JinjaError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        # A template is a program: beside what it raises itself, it may stumble over the turns.
        raise TemplateError(f"the chat template refuses this conversation: {error}") from error


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens. `supervised[i]`: loss falls on predicting `ids[i]`."""

    ids: list[int]
    supervised: list[bool]

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
    prompt = _render(tokenizer, messages, True)
    try:
        earlier, done = _encode_turns(tokenizer, messages)
    except TemplateError:
        return _ids(tokenizer, prompt)
    if not done or not prompt.startswith(done):
        return _ids(tokenizer, prompt)
    return earlier.ids + _continuation_ids(tokenizer, prompt[len(done) :])


def encode_conversation(tokenizer, messages) -> Encoded:
    """All turns; the assistant's tokens are supervised, each turn's stop token included.

    Text is tokenised turn by turn, so what stands before an answer is to the token what a rollout
    is prompted with. Raises TemplateError where the template rewrites earlier turns, or an answer
    holds the text of the stop token, at which a reader would take it to end.
    """
    return _encode_turns(tokenizer, messages)[0]


def _encode_turns(tokenizer, messages) -> tuple[Encoded, str]:
    """The turns through the last assistant's, and their text."""
    ids: list[int] = []
    supervised: list[bool] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:i], True)
        full = _render(tokenizer, messages[: i + 1], False)
        if not prompt.startswith(done) or not full.startswith(prompt):
            raise TemplateError(
                f"the chat template renders turn {i + 1} differently once turns follow it; train "
                "on single-turn rows, or give the tokenizer a template that only appends"
            )
        before, answer = prompt[len(done) :], full[len(prompt) :]
        stops = answer.count(tokenizer.eos_token)
        if stops != 1:
            raise TemplateError(
                f"turn {i + 1} holds the stop token {tokenizer.eos_token} {stops} times as "
                "rendered, not once at its end; take it out of the answer's text"
            )
        answer = answer[: answer.index(tokenizer.eos_token) + len(tokenizer.eos_token)]
        piece = _ids(tokenizer, before) if not done else _continuation_ids(tokenizer, before)
        ids += piece
        supervised += [False] * len(piece)
        piece = _continuation_ids(tokenizer, answer)
        ids += piece
        supervised += [True] * len(piece)
        done = full[: len(prompt) + len(answer)]
    return Encoded(ids, supervised), done


def around_answer(tokenizer, messages) -> tuple[str, str]:
    """The text before an answer to `messages` and behind it, as the template renders them.

    Raises TemplateError where it refuses them, or shows no answer that ends with the stop token.
    """
    turns = (*messages, {"role": "assistant", "content": PROBE})
    before, found, after = _render(tokenizer, turns, False).rpartition(PROBE)
    if not found or tokenizer.eos_token not in after:
        raise TemplateError("the chat template shows no last answer that ends with the stop token")
    return before, after


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
        text, found, _ = text.rpartition(tokenizer.eos_token)
        if not found:
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
        text = visible(tokenizer.decode([token]))
        parts.append(f"\033[32m{text}\033[0m" if on else f"\033[90m{text}\033[0m")
    count = sum(encoded.supervised)
    return "".join(parts) + f"\n{len(encoded.ids)} tokens, {count} supervised (green)"


def main() -> None:
    import argparse

    from utils.data import instructions, rows

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", required=True, help="folder or hub name")
    parser.add_argument("--data", required=True, help="data file, folder or hub name")
    parser.add_argument("--row", type=int, default=0, help="which row, from 0")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.tokenizer)
    bad = rows.BadRows()
    conversations = instructions.load_conversations([arguments.data], bad=bad)
    bad.finish(arguments.data)
    if not 0 <= arguments.row < len(conversations):
        raise SystemExit(f"--row {arguments.row}: there are rows 0 to {len(conversations) - 1}")
    row = conversations[arguments.row]
    print(row.where)
    print(show(tokenizer, encode_conversation(tokenizer, row.messages)))


if __name__ == "__main__":
    main()
