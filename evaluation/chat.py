"""Talk to one checkpoint in the terminal, turn after turn.

python evaluation/chat.py --checkpoint output/step3_ppo/actor

/clear forgets the conversation; /exit, end of input and Ctrl-C end it. Lines may come from a pipe.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

import torch

from evaluation import checkpoints
from utils import terminal
from utils.data import rows
from utils.distributed import program
from utils.settings import command_line
from utils.settings.fields import setting


@dataclass
class ChatConfig(checkpoints.Answering):
    checkpoint: str = setting("", "chat model: folder or hub name", needed=True)
    system: str = setting("", "system turn that opens the conversation; empty: none")
    temperature: float = setting(0.7, "sampling temperature; 0: the likeliest token always")
    top_p: float = setting(
        0.95, "share of the probability that is sampled from", above=0, at_most=1
    )

    def contradictions(self, world_size: int) -> Iterator[str]:
        yield from super().contradictions(world_size)
        if world_size > 1:
            yield f"{world_size} processes were started; start one, with python"
        if self.checkpoint:
            yield from checkpoints.folder_problems(self.checkpoint, "checkpoint")


@torch.no_grad()
def answer(model, tokenizer, messages, room: int) -> str | None:
    """Prints the answer to `messages` while it is sampled, and returns it; None where there is no
    room for it."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False):
            print(terminal.visible(text), end="\n" if stream_end else "", flush=True)

    ids, shorter = checkpoints.encode_prompt(tokenizer, messages, "this conversation", room)
    if ids is None:
        print(f"(not answered: more than the {room} tokens that fit; /clear starts afresh)")
        return None
    if shorter:
        print("(its oldest turns no longer fit; /clear starts afresh)")
    prompt = torch.tensor([ids], device=model.device)
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def talk(config: ChatConfig, model, tokenizer) -> None:
    """Reads the user's lines and answers them until /exit or the end of input."""
    room = checkpoints.prompt_room(model, config.max_new_tokens)
    opening = [{"role": "system", "content": config.system}] if config.system else []
    messages = list(opening)
    ask = "you: " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(ask).strip()
        except EOFError:
            return
        if line in ("/exit", "/quit"):
            return
        if line == "/clear":
            messages = list(opening)
            print("(conversation forgotten)", flush=True)
        elif problem := rows.text_problem(line):
            print(f"(not sent: your line {problem})", flush=True)
        elif line:
            messages.append({"role": "user", "content": line})
            print("assistant: ", end="", flush=True)
            text = answer(model, tokenizer, messages, room)
            if text is None:
                messages.pop()  # it was not answered, so it was not said
            else:
                messages.append({"role": "assistant", "content": text})


def main() -> None:
    config = command_line.parse(ChatConfig, __doc__)
    program.quiet_libraries()
    sys.stdin.reconfigure(errors="replace")  # a line that is not UTF-8 must not end the talk
    try:
        model, tokenizer = checkpoints.load_checkpoint(
            config.checkpoint, dtype=config.dtype, trust_remote_code=config.trust_remote_code
        )
        sampling = {"do_sample": config.temperature > 0}
        if config.temperature > 0:
            sampling |= {"temperature": config.temperature, "top_p": config.top_p}
        model.generation_config = checkpoints.generation_config(
            tokenizer, max_new_tokens=config.max_new_tokens, **sampling
        )
        torch.manual_seed(config.seed)
        print(f"{config.checkpoint}; /clear forgets the conversation, /exit ends", flush=True)
        talk(config, model, tokenizer)
    except KeyboardInterrupt:
        pass  # the usual way out
    print()


if __name__ == "__main__":
    main()
