"""The weights that a rollout is drawn with, of an actor that trains under ZeRO.

Without ZeRO-3 the trained module itself generates (`in_eval_mode`). Under ZeRO-3 its weights are
gathered once a rollout into a plain copy (`plain_twin`, `filled`): no collective runs inside
the decode loop, so ranks may stop at different lengths, and DeepSpeed's hooks, which would release
a gathered weight after its layer, are not in the way. The copy's memory goes back between rollouts,
when the updates need it for activations; allocating it again costs far less than the all-gather
that fills it.

A model too large to stand whole on one device generates as it trains, each layer gathered for each
token. That is slow, and all ranks must decode in step, until the last of them has stopped.
"""

import contextlib
import copy
import socket
from collections.abc import Iterator

import torch
from torch import nn

from utils.distributed import host_memory, process_group, zero
from utils.generation.kv_cache import numbers_a_token
from utils.models import adapters, value_heads
from utils.seeding import undisturbed

BUCKET_BYTES = 256 * 2**20  # of whole weights in one all-gather: 16 for 2 billion in bf16
SHARE_OF_FREE = 0.9  # of the free memory that a rollout may fill; the rest is for activations


def choose_gather(asked: str, actor, rows: int, length: int, others=()) -> tuple[str, str]:
    """--rollout_gather → ("rollout" or "layer", a line that says which and why).

    auto: "rollout", where weights and KV cache fit what is free now on every rank and stays so
    once AdamW has its moments, so ask once all models are loaded. rows, length: the sequences of
    one rank decoded at once and their tokens at most, prompt included. actor, others: the
    `zero.TrainEngine`s of the run. A collective.
    """
    if actor.zero_stage < 3:
        return asked, f"ZeRO-{actor.zero_stage}, the trained module itself generates"
    how = {"rollout": "gathered whole, once a rollout", "layer": "layer by layer (slow)"}
    if asked != "auto":
        return asked, f"ZeRO-3 weights {how[asked]}, as asked"
    parameters = list(actor.module.parameters())
    each, device = parameters[0].ds_tensor.element_size(), parameters[0].device
    weights = sum(p.ds_numel * p.ds_tensor.element_size() for p in parameters)
    cache = numbers_a_token(actor.module.config) * rows * length * each
    moments = sum(one.moments_to_come(device) for one in (actor, *others))
    free = _free_bytes(device, moments)
    fits = weights + cache <= SHARE_OF_FREE * free
    gather = "rollout" if fits else "layer"
    weights, cache, free = (f"{n / 2**30:.3g} GiB" for n in (weights, cache, free))
    return gather, (
        f"ZeRO-3 weights {how[gather]}: {weights} of them and a cache of {cache} "
        f"{'fit' if fits else 'do not fit'} into {SHARE_OF_FREE:.0%} of the {free} that "
        "AdamW's moments leave free"
    )


@contextlib.contextmanager
def in_eval_mode(actor):
    """The trained module, in eval mode, caching and not checkpointing; as before afterwards."""
    module, engine = actor.module, actor.engine
    was_training = module.training
    checkpointing = [m for m in module.modules() if getattr(m, "gradient_checkpointing", False)]
    try:
        for m in checkpointing:  # --checkpoint_layers may have chosen some
            m.gradient_checkpointing = False
        engine.eval()
        yield module
    finally:
        for m in checkpointing:
            m.gradient_checkpointing = True
        engine.train(was_training)


@contextlib.contextmanager
def filled(plain: nn.Module, module: nn.Module):
    """`plain`, of `plain_twin`, with the whole weights of the sharded `module`; weightless again
    afterwards. A collective."""
    try:
        _copy_weights(module, plain)
        yield plain
    finally:
        for p in plain.parameters():
            p.data = torch.empty(0, dtype=p.dtype, device=p.device)


def plain_twin(module: nn.Module) -> nn.Module:
    """A module of the same shape without ZeRO's hooks. Its weights are random: fill them."""
    reference = next(module.parameters())
    # Built for real and not on the meta device: rotary tables are computed here.
    with torch.device(reference.device), undisturbed(reference.device):
        plain = type(module)._from_config(copy.deepcopy(module.config), dtype=reference.dtype)
        adapters.same_layers(plain, module)
        value_heads.same_layers(plain)
    plain.to(reference.device)
    for target, source in zip(plain.buffers(), module.buffers(), strict=True):
        target.copy_(source)
    return plain.eval().requires_grad_(False)


@torch.no_grad()
def _copy_weights(module: nn.Module, plain: nn.Module) -> None:
    """Whole weights of a ZeRO-3 `module` into `plain`."""
    targets = dict(plain.named_parameters())
    for bucket in whole_buckets(dict(module.named_parameters())):
        for name, whole in bucket.items():
            target = targets[name]
            target.data = whole.to(target.dtype)


def merged_buckets(module: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """`whole_buckets` of a model without adapters that computes what `module` does."""
    weights = dict(module.named_parameters())
    if adapters.settings_of(module) is None:
        yield from whole_buckets(weights)
        return
    adapters.check_apart(module)
    beside = {name: weights.pop(name) for name in [*weights] if ".lora_" in name}
    own = {name: w for bucket in whole_buckets(beside) for name, w in bucket.items()}
    for bucket in whole_buckets(weights):
        yield adapters.merged(module, bucket, own)


def whole_buckets(weights: dict[str, nn.Parameter]) -> Iterator[dict[str, torch.Tensor]]:
    """Parameters by name, whole, some BUCKET_BYTES at a time: under ZeRO-3 one all-gather a bucket,
    on every rank. A bucket is of one dtype."""
    named = {id(p): name for name, p in weights.items()}
    for bucket in _buckets(list(weights.values())):
        if not hasattr(bucket[0], "ds_tensor"):
            yield {named[id(p)]: p.detach() for p in bucket}
            continue
        # Not by `deepspeed.zero.GatheredParameters`: it starts a collective for each parameter, and
        # holds the gathered weights beside our copy of them.
        shards = [zero.local(p).to(p.device) for p in bucket]
        wholes = zero.all_gathered(shards, bucket)
        yield {named[id(p)]: whole for p, whole in zip(bucket, wholes, strict=True)}


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in their order, cut where BUCKET_BYTES are full or the dtype changes."""
    buckets, size = [], 0
    for p in parameters:
        more = zero.size_of(p) * zero.local(p).element_size()
        if not buckets or size + more > BUCKET_BYTES or p.dtype != buckets[-1][0].dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(p)
        size += more
    return buckets


def _free_bytes(device: torch.device, promised: int) -> int:
    """Memory that every rank may still take, beside so many bytes that this one needs later."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
    else:
        free = host_memory.free_bytes()
    ranks = process_group.gather_objects((socket.gethostname(), free, promised))
    hosts = [host for host, *_ in ranks]
    sharers = {host: 1 if device.type == "cuda" else hosts.count(host) for host in hosts}
    return min(free // sharers[host] - promised for host, free, promised in ranks)
