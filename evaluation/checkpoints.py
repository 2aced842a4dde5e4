"""A chat checkpoint as plain transformers sees it: is it one, load it, prompt it, show text."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.data import chat_template, files, fitting
from utils.distributed import zero
from utils.models import adapters, loading, value_heads
from utils.pretrained import base_of, positions_of
from utils.settings.fields import Settings, setting


@dataclass
class Answering(Settings):
    """What the chat and the side-by-side evaluation both ask."""

    seed: int = setting(42, "seed of the sampling", below=2**63)
    max_new_tokens: int = setting(128, "tokens an answer at most", at_least=1)
    dtype: str = setting(
        "auto",
        "of the weights; auto: bf16 where the GPU or CPU computes it, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    trust_remote_code: bool = setting(False, "run Python code that comes with a model (a risk)")

    def contradictions(self, world_size: int) -> Iterator[str]:
        if self.dtype == "fp16" and not torch.cuda.is_available():
            yield "dtype=fp16 has no CPU kernels worth using; --dtype bf16 or fp32"


def looks_local(name: str) -> bool:
    """Whether a name that is not there was meant as a path.

    `output/x` could be a hub name too; it is a path where the folder `output` exists.
    """
    parts = Path(name).parts
    return (
        name.startswith(("/", ".", "~"))
        or name.lower().endswith((".txt", *files.FILES))
        or len(parts) > 2
        or (len(parts) == 2 and Path(parts[0]).is_dir())
    )


def folder_problems(path: str, setting_name: str) -> list[str]:
    """What keeps `path` from being the kind of model that --`setting_name` takes."""
    folder = Path(path)
    if not os.path.exists(path):  # also where the name is too long for any folder
        if looks_local(path):
            return [f"{setting_name}: {path!r} does not exist; set --{setting_name} to a folder"]
        return []  # a hub name
    if (folder / "adapter_config.json").exists():
        return []  # a LoRA adapter, which names its base model itself
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
    attn_implementation: str = "auto",
):
    """(model in eval mode on its device or devices, tokenizer) of a folder or hub name.

    Raises SystemExit with the path and the cause where it holds no whole language model.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = chat_template.load_tokenizer(path, trust_remote_code)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = base_of(path) or path
    model = loading.load_whole(
        AutoModelForCausalLM,
        base,
        dtype=zero.DTYPES[zero.resolve_dtype(dtype, device)],
        device_map=device_map or None,
        attn_implementation=None if attn_implementation == "auto" else attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    have = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > have:
        loading.fit_to_tokenizer(model, tokenizer, path)
        print(f"{path}: chat template needs {len(tokenizer) - have} new tokens, untrained")
    adapters.put_on(model, path, None)
    value_heads.put_on(model, base)
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
    positions = positions_of(model.config) or sys.maxsize
    if positions <= max_new_tokens:
        raise SystemExit(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the {positions} "
            f"positions of {model.name_or_path}; lower --max_new_tokens"
        )
    return positions - max_new_tokens


def encode_prompt(tokenizer, messages, where: str, room: int) -> tuple[list[int] | None, bool]:
    """At most `room` ids up to where the assistant begins, and whether they are of a shortened
    prompt; None where not even its frame fits. Raises SystemExit where the template refuses."""
    try:
        ids, counts = fitting.encode_prompt(tokenizer, messages, room, "cut")
    except chat_template.TemplateError as error:
        raise SystemExit(
            f"{where}: the chat template of {tokenizer.name_or_path} refuses it: {error}"
        ) from error
    return ids, bool(counts.cut_prompts)
