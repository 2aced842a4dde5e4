"""The causal language model: loading it, and the log-probabilities of responses."""

import functools
import inspect
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from utils.data import batches
from utils.distributed import host_memory
from utils.kernels import packing, vocabulary_head
from utils.models import loading
from utils.models.loading import Loading
from utils.pretrained import config_of, positions_of


def load(how: Loading, path: str, *, dtype: str, zero_stage: int = 0, **settings) -> nn.Module:
    """A causal LM from a folder or hub name; tokenizer, lora, shared: see loading.load."""
    from transformers import AutoModelForCausalLM

    settings |= dict(dtype=dtype, zero_stage=zero_stage)
    return loading.load(AutoModelForCausalLM, path, how, **settings)


def check_positions(path: str, length: int, flags: str, trust_remote_code: bool) -> None:
    """Refuse rows longer than the model of `path` has positions for, before it is loaded."""
    have = positions_of(config_of(path, trust_remote_code))
    if have is not None and length > have:
        raise SystemExit(
            f"rows of up to {length} tokens ({flags}) do not fit into the {have} positions of "
            f"{path!r}; lower {flags}"
        )


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
    shared: Sequence[tuple[int, int]] | None = None,
    nucleus=None,
    values: bool = False,
):
    """fp32 log-probabilities (N,) of the N tokens that `wanted` (B,T) names, row after row, and
    their positions' entropies (N,) in nats, which have no gradient, or None.

    `forward` is the model or the DeepSpeed engine around it; token t is predicted from t−1, so a
    row's first token never counts. No other position passes the vocabulary head, and its logits
    exist a chunk at a time, see vocabulary_head. With mask and wanted on the CPU, nothing waits for
    the device of `input_ids`. shared: what right-padded rows begin with and need not go through
    twice (packing.shared_beginnings), where rows go end to end. nucleus: of a Nucleus, which says
    what may stand at each position; the log-probabilities are normalised over that. values: in
    place of log-probabilities (N,7), see PerturbedHead.numbers of value_heads.
    """
    model, device = getattr(forward, "module", forward), input_ids.device
    mask = mask.cpu()
    wanted = wanted.cpu() & follows_another(mask)
    if packing.is_on(model):
        inputs = packing.inputs(input_ids, packing.own(mask, shared), shared)
        sources = host_memory.send(packing.predecessors(wanted, mask, shared), device)
    else:
        inputs = forward_inputs(model, input_ids, mask)
        sources = packing.places(F.pad(wanted[:, 1:], (0, 1)), device)
    targets = input_ids.flatten().index_select(0, packing.places(wanted, device))
    entropies = None
    allowed = None if nucleus is None else nucleus.allowed(inputs, sources, targets)
    head = vocabulary_head.of(model)
    if head is not None and head.changes_logits is None:
        head.probe(forward, inputs)
    if head is not None and not head.changes_logits:

        def logprobs_of(hidden: torch.Tensor) -> torch.Tensor:
            nonlocal entropies
            if values:
                return head.numbers(hidden, sources, targets)
            settings = sources, targets, temperature, with_entropies, allowed
            logprobs, entropies = head.logprobs(hidden, *settings)
            return logprobs

        with head.giving(logprobs_of):
            return forward(**inputs, use_cache=False).logits, entropies
    if values:
        raise SystemExit(
            f"loss=ilql: {type(model).__name__} changes what its vocabulary head gives, to which "
            "the value heads add; use a model of another family"
        )
    logits = forward(**inputs, use_cache=False).logits.flatten(0, 1)
    logits = logits.index_select(0, sources).float() / temperature
    if allowed is not None:
        logits = logits.masked_fill(~allowed(slice(None)), torch.finfo(logits.dtype).min)
    if with_entropies:
        with torch.no_grad():
            logs = logits.log_softmax(-1)
            entropies = -(logs.exp() * logs).sum(-1)
    return token_logprobs(logits, targets), entropies


def follows_another(mask: torch.Tensor) -> torch.Tensor:
    """(B,T) mask → True where a real token has a real one before it."""
    return mask & F.pad(mask[:, :-1], (1, 0))


def response_logprobs(
    forward,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    response_length: int,
    *,
    temperature: float = 1.0,
    with_entropies: bool = False,
    actions: torch.Tensor | None = None,
    nucleus=None,
):
    """(B,P+R) ids and mask → (B,R) fp32 log-probabilities and, where asked for, (B,R) fp32
    entropies in nats (else None), both 0 off the mask and off `actions` (B,R), where that is given;
    see wanted_logprobs."""
    wanted = follows_another(mask)
    wanted[:, :-response_length] = False
    if actions is not None:
        wanted[:, -response_length:] &= actions
    settings = dict(temperature=temperature, with_entropies=with_entropies, nucleus=nucleus)
    parts = wanted_logprobs(forward, input_ids, mask, wanted, **settings)
    answers = wanted[:, -response_length:]
    return tuple(None if x is None else packing.spread(x, answers) for x in parts)


def answer_logprobs(
    forward,
    groups: Sequence[Sequence[list[int]]],
    begins: Sequence[Sequence[int]],
    device: torch.device,
) -> torch.Tensor:
    """(N,) fp64 log-probabilities of N answers, in nats, each the sum over its tokens; see
    answer_tokens."""
    logprobs, owners = answer_tokens(forward, groups, begins, device)
    # In fp64: differences of two sums of a thousand tokens are what is learned from.
    sums = torch.zeros(sum(map(len, groups)), dtype=torch.float64, device=device)
    return sums.index_add(0, owners, logprobs.double())


def answer_tokens(
    forward,
    groups: Sequence[Sequence[list[int]]],
    begins: Sequence[Sequence[int]],
    device: torch.device,
    values: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(M,) fp32 log-probabilities of the M tokens of N answers, or with `values` (M,7) as
    wanted_logprobs gives them, and (M,) int64, which of the N answers each is of.

    groups: rows of token ids, the answers to one prompt each; N counts them laid end to end.
    begins: where in each row the answer begins. What a group begins with goes forward once, where
    rows go end to end.
    """
    rows = [ids for group in groups for ids in group]
    mask = batches.pad([[True] * len(ids) for ids in rows], False)
    starts = torch.tensor([begin for group in begins for begin in group])
    answers = mask & (torch.arange(mask.shape[1]) >= starts[:, None])
    shared = packing.shared_beginnings(groups) if len(rows) > len(groups) else None
    ids = host_memory.send(batches.pad(rows, 0), device)
    found, _ = wanted_logprobs(forward, ids, mask, answers, shared=shared, values=values)
    owners = answers[:, 1:].nonzero()[:, 0]  # no answer is predicted from nothing
    return found, host_memory.send(owners, device)
