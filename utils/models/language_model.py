"""The causal language model: loading it, and the log-probabilities of responses."""

import functools
import inspect

import torch
from torch import nn
from torch.nn import functional as F

from utils.data.chat_template import advice
from utils.distributed import zero


def load(config, path: str, *, dtype: str, zero_stage: int, tokenizer=None) -> nn.Module:
    """A causal LM from a folder or hub name, ready for `tokenizer`.

    With a tokenizer the embeddings grow to hold all its tokens (a multiple of 64) and the
    model's stop and pad ids follow the tokenizer's. Dropout is set to 0: PPO's ratio compares two
    passes, and noise between them is a silent bug.

    Raises SystemExit with the path and the cause if the folder holds no such model.
    """
    from transformers import AutoModelForCausalLM

    model = from_pretrained(AutoModelForCausalLM, config, path, dtype, zero_stage, tokenizer)
    prepare_training(model, config)
    return model


def from_pretrained(
    auto_class, config, path: str, dtype: str, zero_stage: int, tokenizer=None, **kwargs
):
    """`auto_class.from_pretrained`, refusing what would leave weights at random."""
    try:
        with zero.sharded_loading(config, dtype, zero_stage):
            model, info = auto_class.from_pretrained(
                path,
                dtype=zero.DTYPES[dtype],
                attn_implementation=config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                **kwargs,
            )
            if tokenizer is not None:
                # In here, where transformers knows that the embeddings may be shards.
                fit_to_tokenizer(model, tokenizer)
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"cannot load a model from {path!r}: {error}\n{advice(path)}") from error
    if any(k.startswith("score.") for k in info["unexpected_keys"]):
        raise SystemExit(
            f"{path!r} is a reward model or critic and writes no text; give a language model's "
            "folder, such as step 1's output"
        )
    # A new score head is meant to be missing; any other missing weight would stay random.
    missing = [k for k in info["missing_keys"] if not k.startswith("score.")]
    if missing:
        raise SystemExit(
            f"{path!r} lacks weights of {type(model).__name__}: {', '.join(sorted(missing)[:5])}"
            f"{' …' if len(missing) > 5 else ''} ({len(missing)} in all); is it the right folder?"
        )
    model.head_was_missing = any(k.startswith("score.") for k in info["missing_keys"])
    return model


def check_positions(path: str, length: int, flags: str, trust_remote_code: bool) -> None:
    """Refuse rows longer than the model of `path` has positions for, before it is loaded."""
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(
            f"cannot read the model's config from {path!r}: {error}\n{advice(path)}"
        ) from error
    have = getattr(settings.get_text_config(), "max_position_embeddings", None)
    if have is not None and length > have:
        raise SystemExit(
            f"rows of up to {length} tokens ({flags}) do not fit into the {have} positions of "
            f"{path!r}; lower {flags}"
        )


def fit_to_tokenizer(model: nn.Module, tokenizer) -> None:
    """Embeddings for every token; stop and pad ids the same in model and tokenizer."""
    rows = model.get_input_embeddings()
    have = rows.num_embeddings
    if len(tokenizer) > have:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    for holder in (model.config, getattr(model, "generation_config", None)):
        if holder is not None:
            holder.eos_token_id = tokenizer.eos_token_id
            holder.pad_token_id = tokenizer.pad_token_id
            if tokenizer.bos_token_id is not None:
                holder.bos_token_id = tokenizer.bos_token_id


def prepare_training(model: nn.Module, config) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Some attention layers keep their rate in an attribute and pass it to the kernel.
        for name in ("attention_dropout", "dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


@functools.cache
def accepts(model_class: type, name: str) -> bool:
    """Does the model's forward take an argument of that name?"""
    return name in inspect.signature(model_class.forward).parameters


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """(B,T) mask, True = real → (B,T) int64 positions from 0 at each row's first real token."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def forward_inputs(model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor) -> dict:
    """Keyword arguments of one forward pass on padded rows.

    Positions follow the mask: most models would otherwise count the left padding, and the same
    text would score differently in another batch. (Bloom and OPT derive them from the mask.)
    """
    inputs = {"input_ids": input_ids, "attention_mask": mask.long()}
    if accepts(type(model), "position_ids"):
        inputs["position_ids"] = positions(mask)
    return inputs


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0):
    """(…,V) logits, (…) int64 targets → (…) fp32 log-probabilities at `temperature`."""
    flat = logits.reshape(-1, logits.shape[-1]).float() / temperature
    return -F.cross_entropy(flat, targets.reshape(-1), reduction="none").view(targets.shape)


def response_logits(forward, input_ids: torch.Tensor, mask: torch.Tensor, response_length: int):
    """(B,P+R) ids → (B,R,V) logits that predict the last R tokens.

    `forward` is the model or the DeepSpeed engine around it. Only the R positions pass the
    vocabulary head: prompts never do.
    """
    model = getattr(forward, "module", forward)
    inputs = forward_inputs(model, input_ids, mask)
    if accepts(type(model), "logits_to_keep"):
        inputs["logits_to_keep"] = response_length + 1
    logits = forward(**inputs, use_cache=False).logits
    return logits[:, -response_length - 1 : -1]


@torch.no_grad()
def response_logprobs(forward, input_ids, mask, response_length, *, temperature, micro_batch_size):
    """(B,P+R) ids and mask → (B,R) fp32 log-probabilities and (B,R) fp32 entropies in nats."""
    logprobs, entropies = [], []
    for ids, m in zip(input_ids.split(micro_batch_size), mask.split(micro_batch_size), strict=True):
        logits = response_logits(forward, ids, m, response_length).float() / temperature
        logs = logits.log_softmax(-1)
        logprobs.append(logs.gather(-1, ids[:, -response_length:, None]).squeeze(-1))
        entropies.append(-(logs.exp() * logs).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)
