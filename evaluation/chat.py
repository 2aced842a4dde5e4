"""Talk to one checkpoint in the terminal, turn after turn.

python evaluation/chat.py --checkpoint output/step3_ppo/actor

/clear forgets the conversation; /exit, end of input and Ctrl-C end it. Lines may come from a pipe.
"""

import json
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

import torch

from utils import config as run_config
from utils import report as reporting
from utils.config import setting
from utils.data import chat_template, rows
from utils.distributed import zero
from utils.models import language_model


@dataclass
class ChatConfig:
    checkpoint: str = setting("", "chat model: folder or hub name")
    system: str = setting("", "system turn that opens the conversation; empty: none")
    temperature: float = setting(0.7, "sampling temperature; 0: the likeliest token always")
    top_p: float = setting(0.95, "share of the probability that is sampled from")
    seed: int = setting(42, "seed of the sampling")
    max_new_tokens: int = setting(128, "tokens an answer at most")
    dtype: str = setting(
        "auto",
        "of the weights; auto: bf16 on GPUs that have it, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    trust_remote_code: bool = setting(False, "run Python code that comes with a model (a risk)")

    def problems(self, world_size: int) -> list[str]:
        """What cannot work, one sentence each, with the flag that mends it."""
        found = []
        if world_size > 1:
            found.append(f"{world_size} processes were started; start one, with python")
        if not self.checkpoint:
            found.append("checkpoint is empty; name a folder with --checkpoint")
        else:
            found += folder_problems(self.checkpoint, "checkpoint")
        if self.temperature < 0:
            found.append(f"temperature={self.temperature} must not be negative; set --temperature")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p={self.top_p} must lie in (0, 1]; set --top_p")
        if self.max_new_tokens < 1:
            found.append(f"max_new_tokens={self.max_new_tokens}: set --max_new_tokens ≥ 1")
        if self.dtype == "fp16" and not torch.cuda.is_available():
            found.append("dtype=fp16 has no CPU kernels worth using; --dtype bf16 or fp32")
        return found


def looks_local(name: str) -> bool:
    """Whether a name that is not there was meant as a path.

    `output/x` could be a hub name too; it is a path where the folder `output` exists.
    """
    parts = Path(name).parts
    return (
        name.startswith(("/", ".", "~"))
        or name.lower().endswith((".txt", *rows.FILES))
        or len(parts) > 2
        or (len(parts) == 2 and Path(parts[0]).is_dir())
    )


def folder_problems(path: str, setting_name: str) -> list[str]:
    """What keeps `path` from being the kind of model that --`setting_name` takes."""
    folder = Path(path)
    if not folder.exists():
        if looks_local(path):
            return [f"{setting_name}: {path!r} does not exist; set --{setting_name} to a folder"]
        return []  # a hub name
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [
            f"{setting_name}: {path!r} holds no readable config.json ({error}); set "
            f"--{setting_name} to a folder that a step has written"
        ]
    names = settings.get("architectures") or []
    if setting_name != "reward_model" and any("SequenceClassification" in n for n in names):
        return [
            f"{setting_name}: {path!r} is a reward model or critic and writes no text; set "
            f"--{setting_name} to a language model"
        ]
    if setting_name == "reward_model" and any("CausalLM" in n or "LMHead" in n for n in names):
        return [
            f"reward_model: {path!r} is a language model; set --reward_model to a folder that "
            "step2_reward/main.py has written"
        ]
    return []


def load_checkpoint(
    path: str,
    *,
    dtype: str,
    trust_remote_code: bool,
    device_map: str = "",
    attn_implementation: str = "sdpa",
):
    """(model in eval mode on its device or devices, tokenizer) of a folder or hub name.

    Raises SystemExit with the path and the cause where it holds no whole language model.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = chat_template.load_tokenizer(path, trust_remote_code)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=zero.DTYPES[zero.resolve_dtype(dtype, device)],
            device_map=device_map or None,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"cannot load a language model from {path!r}: {error}") from error
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:5])
        raise SystemExit(
            f"{path!r} lacks weights of {type(model).__name__}, which would stay random: {names} "
            f"({len(info['missing_keys'])} in all); is it the right folder?"
        )
    have = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > have:
        language_model.fit_to_tokenizer(model, tokenizer)
        print(f"{path}: chat template needs {len(tokenizer) - have} new tokens, untrained")
    return (model if device_map else model.to(device)).eval(), tokenizer


def generation_config(tokenizer, *, max_new_tokens: int, **how):
    """The whole of how to decode: nothing is left to what a checkpoint's own file says."""
    from transformers import GenerationConfig

    if how.get("do_sample"):
        how["top_k"] = 0  # transformers' own default is 50
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **how,
    )


def prompt_room(model, max_new_tokens: int) -> int:
    """Tokens of prompt that fit into the model's positions before the answer."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    if positions <= max_new_tokens:
        raise SystemExit(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the {positions} "
            f"positions of {model.name_or_path}; lower --max_new_tokens"
        )
    return positions - max_new_tokens


def encode_prompt(tokenizer, messages, where: str) -> list[int]:
    """Ids up to where the assistant begins. Raises SystemExit where the template refuses."""
    from jinja2 import TemplateError

    try:
        return chat_template.encode_prompt(tokenizer, messages)
    except TemplateError as error:
        raise SystemExit(
            f"{where}: the chat template of {tokenizer.name_or_path} refuses it: {error}"
        ) from error


def visible(text: str) -> str:
    """Control characters spelled out, so that a model's text cannot steer the terminal."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in text
    )


@torch.no_grad()
def answer(model, tokenizer, messages, room: int) -> str:
    """Prints the answer to `messages` while it is sampled, and returns it."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False):
            print(visible(text), end="\n" if stream_end else "", flush=True)

    ids = encode_prompt(tokenizer, messages, "this conversation")
    if len(ids) > room:
        print(f"(its first {len(ids) - room} tokens no longer fit; /clear starts afresh)")
        ids = ids[-room:]
    prompt = torch.tensor([ids], device=model.device)
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def talk(config: ChatConfig, model, tokenizer) -> None:
    """Reads the user's lines and answers them until /exit or the end of input."""
    room = prompt_room(model, config.max_new_tokens)
    opening = [{"role": "system", "content": config.system}] if config.system else []
    messages = list(opening)
    ask = "you: " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(ask).strip()
        except EOFError:
            return
        if line == "/exit":
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
            messages.append({"role": "assistant", "content": text})


def main() -> None:
    config = run_config.parse(ChatConfig, __doc__)
    reporting.quiet_libraries()
    sys.stdin.reconfigure(errors="replace")  # a line that is not UTF-8 must not end the talk
    try:
        model, tokenizer = load_checkpoint(
            config.checkpoint, dtype=config.dtype, trust_remote_code=config.trust_remote_code
        )
        sampling = {"do_sample": config.temperature > 0}
        if config.temperature > 0:
            sampling |= {"temperature": config.temperature, "top_p": config.top_p}
        model.generation_config = generation_config(
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
