"""Talk to a checkpoint, or to two side by side, in the terminal or on a web page.

python evaluation/chat.py --checkpoint output/step3_ppo/actor
python evaluation/chat.py --checkpoint output/step1_sft output/step3_ppo/actor --web

/reset forgets the conversation, /system TEXT opens it anew with a system turn, /temp 0.5 sets the
temperature, /save FILE adds the conversation to a file that step 1 reads; /exit, end of input and
Ctrl-C end it. Lines may come from a pipe.
"""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

import torch

from evaluation import checkpoints
from evaluation.web import WebSettings
from utils import whole_files
from utils.data import rows
from utils.distributed import program
from utils.settings import command_line
from utils.settings.fields import setting
from utils.terminal import visible


def check_two(names: list[str]) -> None:
    if len(names) > 2 or len(set(names)) < len(names):
        raise ValueError("not one, or two different ones")


@dataclass
class ChatConfig(WebSettings, checkpoints.Answering):
    checkpoint: list[str] = setting(
        [], "chat model, or two that answer side by side: folders or hub names", needed=True,
        check=check_two,
    )  # fmt: skip
    system: str = setting("", "system turn that opens the conversation; empty: none")
    temperature: float = setting(0.7, "sampling temperature; 0: the likeliest token always")
    top_p: float = setting(
        0.95, "share of the probability that is sampled from", above=0, at_most=1
    )
    web: bool = setting(False, "a page for the browser in place of the terminal (needs gradio)")

    def contradictions(self, world_size: int) -> Iterator[str]:
        yield from super().contradictions(world_size)
        yield from self.of_web(self.web)
        if world_size > 1:
            yield f"{world_size} processes were started; start one, with python"
        for name in self.checkpoint:
            yield from checkpoints.folder_problems(name, "checkpoint")


@dataclass
class Speaker:
    """A checkpoint and the tokens of prompt that it has room for."""

    name: str
    model: object
    tokenizer: object
    room: int

    def stream(self, messages: list[dict], config, temperature: float) -> Iterator[str]:
        """The parts of an answer while they are sampled. Raises TooLong where none fits.

        The model runs in a thread of its own, which ends with what reads here: at its next token.
        """
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        ids, _ = self.prompt(messages)
        if ids is None:
            raise TooLong(f"not answered: more than the {self.room} tokens that fit")
        sampling = {"do_sample": temperature > 0}
        if temperature > 0:
            sampling |= {"temperature": temperature, "top_p": config.top_p}
        how = checkpoints.generation_config(
            self.tokenizer, max_new_tokens=config.max_new_tokens, **sampling
        )
        parts = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        prompt, left, failed = torch.tensor([ids], device=self.model.device), [], []

        @torch.no_grad()
        def sample() -> None:
            try:
                self.model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=how,
                    streamer=parts,
                    stopping_criteria=StoppingCriteriaList([lambda *_, **__: bool(left)]),
                )
            except BaseException as error:  # told where the parts are read
                failed.append(error)
                parts.end()

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield from parts
        finally:
            left.append(True)
            thread.join()
        if failed:
            raise failed[0]

    def prompt(self, messages: list[dict]) -> tuple[list[int] | None, bool]:
        where = "this conversation"
        return checkpoints.encode_prompt(self.tokenizer, messages, where, self.room)


class TooLong(Exception):
    """Not even the frame of the conversation fits."""


@dataclass
class Talk:
    """The conversations of all speakers, who hear the same and go on from their own answers."""

    config: ChatConfig
    speakers: list[Speaker]
    temperature: float = 0.0
    messages: list[list[dict]] = field(default_factory=list)

    def __post_init__(self):
        self.temperature, self.system = self.config.temperature, self.config.system
        if not self.messages:
            self.reset(self.system)

    def reset(self, system: str) -> None:
        self.system = system
        opening = [{"role": "system", "content": system}] if system else []
        self.messages = [list(opening) for _ in self.speakers]

    def answer(self, text: str) -> Iterator[tuple[int, str]]:
        """(speaker, its answer so far) after each part. Where a speaker has no room, what was said
        is not part of its conversation, and TooLong tells so once all have answered. A reset while
        the parts come, as a page allows, ends them."""
        problems, heard = [], self.messages
        for k, speaker in enumerate(self.speakers):
            asked = [*heard[k], {"role": "user", "content": text}]
            answered = ""
            try:
                for part in speaker.stream(asked, self.config, self.temperature):
                    if self.messages is not heard:
                        return
                    answered += part
                    yield k, answered
            except TooLong as problem:
                problems.append(f"{speaker.name}: {problem}")
                continue
            heard[k] = [*asked, {"role": "assistant", "content": answered}]
        if problems:
            raise TooLong("; ".join(problems))

    def is_cut(self, text: str) -> bool:
        """Will any speaker's oldest turns give way to this one?"""
        asked = {"role": "user", "content": text}
        both = zip(self.speakers, self.messages, strict=True)
        return any(speaker.prompt([*messages, asked])[1] for speaker, messages in both)

    def save(self, path: str) -> str:
        """Add every conversation with an answer to a file of demonstrations; → what was done."""
        kept = [
            {"messages": messages, "checkpoint": speaker.name, "temperature": self.temperature}
            for speaker, messages in zip(self.speakers, self.messages, strict=True)
            if messages and messages[-1]["role"] == "assistant"
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        whole_files.append_lines(path, lines, "/save FILE")
        return f"{len(kept)} conversation{'s'[: len(kept) != 1]} added to {path}"


def to_save(talk: Talk, rest: str) -> str:
    return talk.save(rest or "conversations.jsonl")


def to_reset(talk: Talk, rest: str) -> str:
    talk.reset(talk.system)
    return "conversation forgotten"


def to_system(talk: Talk, rest: str) -> str:
    talk.reset(rest)
    return "conversation forgotten; " + ("the system turn is new" if rest else "no system turn")


def to_temp(talk: Talk, rest: str) -> str:
    try:
        value = float(rest)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        return f"temperature {rest!r} is no number from 0; it stays {talk.temperature:g}"
    talk.temperature = value
    return f"temperature {value:g}"


COMMANDS: dict[str, Callable[[Talk, str], str]] = {
    "/reset": to_reset,
    "/clear": to_reset,
    "/system": to_system,
    "/temp": to_temp,
    "/save": to_save,
}
ENDS = ("/exit", "/quit")


def said(talk: Talk, line: str) -> str:
    """What a command answers, or what keeps a line from being sent; empty: send it."""
    command, _, rest = line.partition(" ")
    if command in COMMANDS:
        try:
            return COMMANDS[command](talk, rest.strip())
        except OSError as error:
            return str(error)
    problem = rows.text_problem(line)
    return f"not sent: your line {problem}" if problem else ""


def in_terminal(talk: Talk) -> None:
    """Reads the user's lines and answers them until /exit or the end of input."""
    ask = "you: " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(ask).strip()
        except EOFError:
            return
        if line in ENDS:
            return
        if not line:
            continue
        if told := said(talk, line):
            print(f"({visible(told)})", flush=True)
            continue
        if talk.is_cut(line):
            print("(the oldest turns no longer fit; /reset starts afresh)")
        speaking, shown = None, ""
        try:
            for k, text in talk.answer(line):
                if k != speaking:
                    name = "assistant" if len(talk.speakers) == 1 else talk.speakers[k].name
                    print("" if speaking is None else "\n", end="")
                    print(f"{visible(name)}: ", end="", flush=True)
                    speaking, shown = k, ""
                print(visible(text[len(shown) :]), end="", flush=True)
                shown = text
            print(flush=True)
        except TooLong as problem:
            print(f"{'' if speaking is None else chr(10)}({problem}; /reset starts afresh)")


def load(config: ChatConfig) -> list[Speaker]:
    speakers = []
    for name in config.checkpoint:
        model, tokenizer = checkpoints.load_checkpoint(
            name, dtype=config.dtype, trust_remote_code=config.trust_remote_code
        )
        room = checkpoints.prompt_room(model, config.max_new_tokens)
        speakers.append(Speaker(name, model, tokenizer, room))
    return speakers


def main() -> None:
    config = command_line.parse(ChatConfig, __doc__)
    program.quiet_libraries()
    sys.stdin.reconfigure(errors="replace")  # a line that is not UTF-8 must not end the talk
    try:
        speakers = load(config)
        torch.manual_seed(config.seed)
        if config.web:
            from evaluation import chat_page

            chat_page.serve(config, speakers)
            return
        names = " and ".join(config.checkpoint)
        print(f"{names}; /reset forgets the conversation, /exit ends", flush=True)
        in_terminal(Talk(config, speakers))
    except KeyboardInterrupt:
        pass  # the usual way out
    print()


if __name__ == "__main__":
    main()
