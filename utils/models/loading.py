"""Model folders → models with every weight from the file, fitted to a tokenizer, ready to train."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from utils.distributed import process_group, zero
from utils.kernels import cpu_products, packing
from utils.models import adapters, quantised, shared_base, value_heads
from utils.models.adapters import Lora
from utils.models.freezing import layers_of
from utils.pretrained import base_of, refused


@dataclass(frozen=True)
class Loading:
    """The settings that decide how a model is loaded; for what they mean see RunConfig."""

    attn_implementation: str = "auto"
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False
    checkpoint_layers: int = 0
    packing: str = "auto"
    offload: str = "none"  # where ZeRO-3 puts the shards
    load_in_4bit: bool = False
    load_in_8bit: bool = False


def load(
    auto_class,
    path: str,
    how: Loading,
    *,
    dtype: str,
    zero_stage: int,
    tokenizer=None,
    grow: bool = True,
    lora: Lora | None = None,
    shared: dict[str, nn.Module] | None = None,
    ilql_beta: float | None = None,
    **settings,
) -> nn.Module:
    """The model that `auto_class` makes of a folder or hub name, ready to train.

    With a tokenizer the embeddings grow to hold all its tokens and the model's stop and pad ids
    follow the tokenizer's; see fit_to_tokenizer. lora: of a model to be trained, see
    adapters.put_on. shared: models by the name of their base, of which one on the same base takes
    the weights instead of reading them again; this one is added. ilql_beta: of a model whose value
    heads are trained, see value_heads.put_on. settings: more for from_pretrained. Raises SystemExit
    with the path and the cause where the folder holds no such model.
    """
    attention = None if how.attn_implementation == "auto" else how.attn_implementation
    settings |= {"attn_implementation": attention, "trust_remote_code": how.trust_remote_code}
    settings |= {"dtype": zero.DTYPES[dtype]}
    base = base_of(path) or path
    key = os.path.realpath(base) if os.path.isdir(base) else base
    shared = None if adapters.replaces_weights(path) else shared
    model = (
        shared and key in shared and shared_base.standing_on(shared[key], auto_class, **settings)
    )
    with zero.sharded_loading(dtype, zero_stage, how.offload):
        read = not model
        few = quantised.settings(how.load_in_4bit, how.load_in_8bit, dtype)
        model = load_whole(auto_class, base, **settings, **few) if read else model
        if read and few:
            quantised.tidy(model)
        # Inside, where transformers knows that the embeddings may be shards.
        grown = tokenizer is not None and fit_to_tokenizer(model, tokenizer, base, grow)
        if read and shared is not None and not grown:  # grown embeddings are trained
            shared[key] = shared_base.twin(model)
        adapters.put_on(model, path, lora, grown)
        value_heads.put_on(model, base, ilql_beta)
    if lora is not None and lora.lora_rank:
        process_group.say(f"{path}: {adapters.told(model)}")
    prepare_training(model)
    if how.gradient_checkpointing:
        checkpoint(model, how.checkpoint_layers)
    packing.choose(model, how.packing, dtype)
    return model


def load_whole(auto_class, path: str, **settings) -> nn.Module:
    """`auto_class.from_pretrained(path, **settings)`, of which no weight is left at random or out.

    A new score head alone may be missing: `head_was_missing` of the model says so. Pickled weights
    (pytorch_model.bin) are read as plain tensors only. Raises SystemExit with what was expected.
    """
    with refused(path, f"a model ({auto_class.__name__})"):
        model, info = auto_class.from_pretrained(
            path,
            output_loading_info=True,
            # Other shapes are refused below, by name; transformers' own error names none.
            ignore_mismatched_sizes=True,
            weights_only=True,
            **settings,
        )
    # Under ZeRO-3 transformers reports neither names nor shapes that do not fit.
    unexpected = set(info["unexpected_keys"]) | (_names_on_disk(path) - model.state_dict().keys())
    if any(name.startswith("score.") for name in unexpected):
        raise SystemExit(
            f"{path!r} is a reward model or critic and writes no text; give a language model's "
            "folder, such as step 1's output"
        )
    heads = {name for name in info["missing_keys"] if name.startswith("score.")}
    kind = type(model).__name__
    problems = {
        f"lacks weights of {kind}, which would stay random": set(info["missing_keys"]) - heads,
        f"holds weights of another shape than its config.json gives {kind}": {
            f"{name} (found {list(shape)}, expected {list(expected)})"
            for name, shape, expected in info["mismatched_keys"]
        },
        f"holds weights that do not load into {kind}": set(info.get("error_msgs", ())),
        f"holds layers that its config.json leaves out of {kind}": _left_out(model, unexpected),
    }
    for what, names in problems.items():
        if names:
            shown = ", ".join(sorted(names)[:5]) + (" …" if len(names) > 5 else "")
            raise SystemExit(
                f"{path!r} {what}: {shown} ({len(names)} in all); is it the right folder?"
            )
    model.head_was_missing = bool(heads)
    return model


def _names_on_disk(path: str) -> set[str]:
    """Names of the weights in a folder's safetensors files; empty for hub names and pickles."""
    from safetensors import safe_open

    names = set()
    for file in Path(path).glob("model*.safetensors"):
        with safe_open(str(file), framework="pt") as weights:
            names |= set(weights.keys())
    return names


def _left_out(model: nn.Module, unexpected: set[str]) -> set[str]:
    """The weights among `unexpected` that are like one of a layer which the model has.

    Others may well be there: a vocabulary head that a reward model does without, the image encoder
    of a model that is used for its text, a layer that its family lists as left out.
    """

    def of_any_layer(name: str) -> str:
        return re.sub(r"\.\d+\.", ".N.", name)

    own = {of_any_layer(name) for name in model.state_dict() if of_any_layer(name) != name}
    unused = "|".join(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ["(?!)"])
    return {n for n in unexpected if of_any_layer(n) in own and not re.search(unused, n)}


def fit_to_tokenizer(model: nn.Module, tokenizer, path: str, grow: bool = True) -> bool:
    """Embeddings for every token, a multiple of 64; stop and pad ids as the tokenizer's. → Are
    there rows now for tokens, beside the pad, that the model did not know?

    Only special tokens (a template's, the pad) may be new, and to language models only: rows for
    other tokens would be random where the tokenizer is another model's. The pad may be new to any,
    for nothing attends to it; without `grow` it gets no row. Raises SystemExit.
    """
    have = model.get_input_embeddings().num_embeddings
    added = tokenizer.added_tokens_decoder
    new = range(have, max(tokenizer.get_vocab().values()) + 1)
    trained_head = getattr(model, "head_was_missing", True) is False and hasattr(model, "score")
    unknown = [i for i in new if i != tokenizer.pad_token_id]
    if unknown and (trained_head or not all(i in added and added[i].special for i in unknown)):
        raise SystemExit(
            f"{path!r} has embeddings for {have} tokens and the tokenizer {new.stop}, of which "
            f"{len(unknown)} would stay random: the tokenizer is another model's, or tokens were "
            "added without growing the model; give a folder whose tokenizer and weights belong "
            "together"
        )
    if new and grow:
        model.resize_token_embeddings(new.stop, pad_to_multiple_of=64)
        # Code that comes with a model may build its layers by a name of its own (ChatGLM's
        # padded_vocab_size), and would not load what is saved.
        for name, value in vars(model.config).items():
            if "vocab_size" in name and value == have:
                setattr(model.config, name, model.config.vocab_size)
    for holder in (model.config, getattr(model, "generation_config", None)):
        if holder is not None:
            holder.eos_token_id = tokenizer.eos_token_id
            holder.pad_token_id = tokenizer.pad_token_id
            if tokenizer.bos_token_id is not None:
                holder.bos_token_id = tokenizer.bos_token_id
    return grow and bool(unknown)


def prepare_training(model: nn.Module) -> None:
    """Dropout to 0 wherever a family keeps its rates: PPO's ratio compares two passes, and noise
    between them is a silent bug. On a CPU the faster matrix products. Every rank must call it."""
    from deepspeed.accelerator import get_accelerator

    for where, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and ".lora_dropout." not in where:
            module.p = 0.0
        # Many layers keep a rate in an attribute (attention_dropout, Bloom's hidden_dropout, OPT's
        # layerdrop) and some read it from the config as they run (Falcon, GPT-J).
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)
    if get_accelerator().device_name() == "cpu":
        cpu_products.train_with(model)


def checkpoint(model: nn.Module, layers: int = 0) -> None:
    """In training the first `layers` layers keep their inputs only, and run again in the backward
    pass; 0: all of them. Raises SystemExit where the family's code has no such layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable({"use_reentrant": False})
    # It has the embeddings' output want a gradient, which only reentrant checkpointing needs:
    # frozen layers would keep activations and have a backward pass.
    model.disable_input_require_grads()
    if not layers:
        return
    blocks = layers_of(model)
    if not all(isinstance(block, GradientCheckpointingLayer) for block in blocks):
        raise SystemExit(
            f"checkpoint_layers={layers}: {type(model).__name__} recomputes all layers or none; "
            "leave out --checkpoint_layers"
        )
    for block in blocks[layers:]:
        block.gradient_checkpointing = False
