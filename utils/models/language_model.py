"""The causal language model: loading it, and the log-probabilities of responses."""

import functools
import inspect

import torch
from torch import nn
from torch.nn import functional as F

from utils.distributed import host_memory, zero
from utils.kernels import onednn_linear, packing, vocabulary_head
from utils.kernels.cpu_products import PRODUCTS
from utils.models import loading, model_code
from utils.models.model_files import refused


def load(config, path: str, *, dtype: str, zero_stage: int, tokenizer=None) -> nn.Module:
    """A causal LM from a folder or hub name, ready for `tokenizer`.

    With a tokenizer the embeddings grow to hold all its tokens (a multiple of 64) and the
    model's stop and pad ids follow the tokenizer's. Dropout is set to 0: PPO's ratio compares two
    passes, and noise between them is a silent bug.

    Raises SystemExit with the path and the cause if the folder holds no such model.
    """
    model = from_pretrained(config, path, dtype, zero_stage, tokenizer)
    prepare_training(model, config)
    packing.choose(model, config, dtype)
    return model


def from_pretrained(
    config,
    path: str,
    dtype: str,
    zero_stage: int,
    tokenizer=None,
    scalar: bool = False,
    grow: bool = True,
):
    """The language model of `path`, or its backbone with one number a token (scalar), refusing what
    would leave weights at random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    attention, auto_class = config.attn_implementation, AutoModelForCausalLM
    how = {"trust_remote_code": config.trust_remote_code}
    if scalar:
        with refused(path, "the model's config"):
            how["config"] = AutoConfig.from_pretrained(path, num_labels=1, **how)
        auto_class = model_code.scalar_class(how["config"])

    def fit(model: nn.Module) -> None:
        # In the sharded loading, where transformers knows that the embeddings may be shards.
        if tokenizer is not None:
            fit_to_tokenizer(model, tokenizer, path, grow)

    with zero.sharded_loading(config, dtype, zero_stage):
        return loading.load_whole(
            auto_class,
            path,
            fit,
            dtype=zero.DTYPES[dtype],
            attn_implementation=None if attention == "auto" else attention,
            **how,
        )


def check_positions(path: str, length: int, flags: str, trust_remote_code: bool) -> None:
    """Refuse rows longer than the model of `path` has positions for, before it is loaded."""
    from transformers import AutoConfig

    with refused(path, "the model's config"):
        settings = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    have = getattr(settings.get_text_config(), "max_position_embeddings", None)
    if have is not None and length > have:
        raise SystemExit(
            f"rows of up to {length} tokens ({flags}) do not fit into the {have} positions of "
            f"{path!r}; lower {flags}"
        )


def fit_to_tokenizer(model: nn.Module, tokenizer, path: str, grow: bool = True) -> None:
    """Embeddings for every token; stop and pad ids the same in model and tokenizer.

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


def prepare_training(model: nn.Module, config) -> None:
    """Dropout to 0 wherever a family keeps its rates; gradient checkpointing where asked for; on a
    CPU the faster matrix products. Every rank must call it."""
    from deepspeed.accelerator import get_accelerator

    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        # Many layers keep a rate in an attribute (attention_dropout, Bloom's hidden_dropout, OPT's
        # layerdrop) and some read it from the config as they run (Falcon, GPT-J).
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)
    if get_accelerator().device_name() == "cpu":
        PRODUCTS.agree(next(model.parameters()).dtype)
        onednn_linear.use(model)
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
    mask = host_memory.send(mask, input_ids.device)
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
    vocabulary head: prompts never do. For a few rows: training asks for `wanted_logprobs`.
    """
    model = getattr(forward, "module", forward)
    inputs = forward_inputs(model, input_ids, mask)
    if accepts(type(model), "logits_to_keep"):
        inputs["logits_to_keep"] = response_length + 1
    logits = forward(**inputs, use_cache=False).logits
    return logits[:, -response_length - 1 : -1]


def wanted_logprobs(
    forward,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    wanted: torch.Tensor,
    *,
    temperature: float = 1.0,
    with_entropies: bool = False,
):
    """fp32 log-probabilities (N,) of the N tokens that `wanted` (B,T) names, row after row, and
    their positions' entropies (N,) in nats, which have no gradient, or None.

    `forward` is the model or the DeepSpeed engine around it; token t is predicted from t−1, so a
    row's first token never counts. No other position passes the vocabulary head, and its logits
    exist a chunk at a time, see vocabulary_head. With mask and wanted on the CPU, nothing waits for
    the device of `input_ids`.
    """
    model, device = getattr(forward, "module", forward), input_ids.device
    mask = mask.cpu()
    wanted = wanted.cpu() & follows_another(mask)
    sources = F.pad(wanted[:, 1:], (0, 1))
    if packing.is_on(model):
        inputs, sources = packing.inputs(input_ids, mask), sources[mask]
    else:
        inputs = forward_inputs(model, input_ids, mask)
    sources = packing.places(sources, device)
    targets = input_ids.flatten().index_select(0, packing.places(wanted, device))
    head = vocabulary_head.of(model)
    if head is not None and not head.changes_logits:
        asked = vocabulary_head.Question(sources, targets, temperature, with_entropies)
        with head.asked(asked):
            answer = forward(**inputs, use_cache=False).logits
        if asked.answered_by(answer):
            return answer, asked.entropies
        # A family that scales or caps its logits after the head has now done so to the answer.
        head.changes_logits = True
    logits = forward(**inputs, use_cache=False).logits.flatten(0, 1)
    logits = logits.index_select(0, sources).float() / temperature
    entropies = None
    if with_entropies:
        with torch.no_grad():
            logs = logits.log_softmax(-1)
            entropies = -(logs.exp() * logs).sum(-1)
    return token_logprobs(logits, targets), entropies


def follows_another(mask: torch.Tensor) -> torch.Tensor:
    """(B,T) mask → True where a real token has a real one before it."""
    return mask & F.pad(mask[:, :-1], (1, 0))


def response_part(mask: torch.Tensor, response_length: int) -> torch.Tensor:
    """(B,P+R) mask → what can be predicted in it, without the prompts' P columns."""
    wanted = follows_another(mask)
    wanted[:, :-response_length] = False
    return wanted


def new_logprobs(forward, input_ids, mask, response_length: int, temperature: float):
    """(B,P+R) ids and mask → (B,R) fp32 log-probabilities with gradient, 0 off the mask."""
    wanted = response_part(mask, response_length)
    found, _ = wanted_logprobs(forward, input_ids, mask, wanted, temperature=temperature)
    return packing.spread(found, wanted[:, -response_length:])


@torch.no_grad()
def response_logprobs(forward, input_ids, mask, response_length, *, temperature, micro_batch_size):
    """(B,P+R) ids and mask → (B,R) fp32 log-probabilities and (B,R) fp32 entropies in nats, both
    0 off the mask."""
    logprobs, entropies = [], []
    for ids, m in zip(input_ids.split(micro_batch_size), mask.split(micro_batch_size), strict=True):
        wanted = response_part(m, response_length)
        found = wanted_logprobs(
            forward, ids, m, wanted, temperature=temperature, with_entropies=True
        )
        for parts, values in zip((logprobs, entropies), found, strict=True):
            parts.append(packing.spread(values, wanted[:, -response_length:]))
    return torch.cat(logprobs), torch.cat(entropies)
