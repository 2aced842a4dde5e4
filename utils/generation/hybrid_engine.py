"""The actor's two faces: trained under ZeRO, generating as a plain model.

The only place that knows how to switch. Without ZeRO-3 the trained module itself generates. Under
ZeRO-3 its weights are gathered once into a plain copy that lives for one rollout: no collective
runs inside the decode loop, so ranks may stop at different lengths, and DeepSpeed's hooks, which
would release a gathered weight after its layer, are not in the way. The copy's memory goes back
between rollouts, when the updates need it for activations; to ask for it again costs far less than
the gather that fills it.

A model too large to stand whole on one device (gather "layer") generates as it trains, each layer
gathered for each token. That is slow, and ranks must go in step: `all_finished` lets the decode
loop end only when every rank's rows have stopped.
"""

import contextlib
import copy
import socket

import torch
import torch.distributed as dist
from torch import nn

from utils.checkpoints import engine_state
from utils.distributed import host_memory, process_group, zero
from utils.seeding import undisturbed

BUCKET_BYTES = 256 * 2**20  # of whole weights in one all-gather: 16 for 2 billion in bf16
SHARE_OF_FREE = 0.9  # of the free memory that a rollout may fill; the rest is for activations


class HybridEngine:
    """Wraps a `zero.TrainEngine` around a transformers causal LM.

    gather: under ZeRO-3, "rollout" (once for all of it) or "layer" (each layer for each token).
    """

    def __init__(self, train_engine: zero.TrainEngine, gather: str = "rollout"):
        self.train_engine = train_engine
        self._set_gather(gather)
        self.generator: nn.Module | None = None  # what `generating` gives, while it is open
        self._plain: nn.Module | None = (
            None  # under ZeRO-3: built once, weightless between rollouts
        )

    def _set_gather(self, gather: str) -> None:
        sharded = self.train_engine.zero_stage == 3
        self._copies = sharded and gather == "rollout"
        in_step = sharded and gather == "layer"
        self.all_finished = _finished_on_all_ranks if in_step else bool

    def choose_gather(self, asked: str, rows: int, length: int, trained=()) -> str:
        """Follow --rollout_gather from now on; returns what was chosen, and why.

        auto: "rollout", where weights and cache fit what is free now on every rank and stays so
        once AdamW has its moments, so ask once all else is loaded. rows, length: the sequences of
        one rank decoded at once and their tokens at most, prompt included. trained: the other
        `zero.TrainEngine`s of the run. Every rank must call it.
        """
        module, stage = self.train_engine.module, self.train_engine.zero_stage
        if stage < 3:
            return f"ZeRO-{stage}, the trained module itself generates"
        how = {"rollout": "gathered whole, once a rollout", "layer": "layer by layer (slow)"}
        if asked != "auto":
            self._set_gather(asked)
            return f"ZeRO-3 weights {how[asked]}, as asked"
        parameters = list(module.parameters())
        each = parameters[0].ds_tensor.element_size()
        weights = sum(p.ds_numel * p.ds_tensor.element_size() for p in parameters)
        cache = cache_bytes(module.config, rows, length, each)
        device = parameters[0].device
        engines = (self.train_engine, *trained)
        moments = sum(engine_state.moments_to_come(one, device) for one in engines)
        free = _free_bytes(device, moments)
        fits = weights + cache <= SHARE_OF_FREE * free
        gather = "rollout" if fits else "layer"
        self._set_gather(gather)
        weights, cache, free = (f"{n / 2**30:.3g} GiB" for n in (weights, cache, free))
        return (
            f"ZeRO-3 weights {how[gather]}: {weights} of them and a cache of {cache} "
            f"{'fit' if fits else 'do not fit'} into {SHARE_OF_FREE:.0%} of the {free} that "
            "AdamW's moments leave free"
        )

    @contextlib.contextmanager
    def generating(self):
        """A module with the weights of now, in eval mode, caching and not checkpointing.

        All is as before afterwards, whatever happens inside. (Adapters would be merged here.)
        """
        with self._copy() if self._copies else self._in_eval_mode() as self.generator:
            try:
                yield self.generator
            finally:
                self.generator = None

    @contextlib.contextmanager
    def _copy(self):
        if self._plain is None:
            self._plain = _plain_twin(self.train_engine.module)
        try:
            _copy_weights(self.train_engine.module, self._plain)
            yield self._plain
        finally:
            for p in self._plain.parameters():
                p.data = torch.empty(0, dtype=p.dtype, device=p.device)

    @contextlib.contextmanager
    def _in_eval_mode(self):
        module, engine = self.train_engine.module, self.train_engine.engine
        was_training = module.training
        checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in module.modules())
        try:
            if checkpointing:
                module.gradient_checkpointing_disable()
            engine.eval()  # of the engine: DeepSpeed's own hybrid engine swaps its layers in here
            yield module
        finally:
            if checkpointing:
                module.gradient_checkpointing_enable({"use_reentrant": False})
            engine.train(was_training)


def _finished_on_all_ranks(finished: torch.Tensor) -> bool:
    """Scalar bool tensor of this rank → whether it is True on every rank."""
    value = finished.float()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return bool(value)


def _plain_twin(module: nn.Module) -> nn.Module:
    """A module of the same shape without ZeRO's hooks. Its weights are random: fill them."""
    reference = next(module.parameters())
    # Built for real and not on the meta device: rotary tables are computed here.
    with torch.device(reference.device), undisturbed(reference.device):
        plain = type(module)._from_config(copy.deepcopy(module.config), dtype=reference.dtype)
    plain.to(reference.device)
    for target, source in zip(plain.buffers(), module.buffers(), strict=True):
        target.copy_(source)
    return plain.eval().requires_grad_(False)


@torch.no_grad()
def _copy_weights(module: nn.Module, plain: nn.Module) -> None:
    """Whole weights of a ZeRO-3 `module` into `plain`: one all-gather a bucket, on every rank."""
    targets = dict(plain.named_parameters())
    named = {id(p): name for name, p in module.named_parameters()}
    for bucket in _buckets(list(module.parameters())):
        for p, whole in zip(bucket, _gather(bucket), strict=True):
            target = targets[named[id(p)]]
            target.data = whole.to(target.dtype)


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in their order, cut where BUCKET_BYTES are full or the dtype changes."""
    buckets, size = [], 0
    for p in parameters:
        more = p.ds_numel * p.ds_tensor.element_size()
        if not buckets or size + more > BUCKET_BYTES or p.dtype != buckets[-1][0].dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(p)
        size += more
    return buckets


def _gather(bucket: list[nn.Parameter]) -> list[torch.Tensor]:
    """Whole weights of ZeRO-3 parameters by one collective.

    Not by `deepspeed.zero.GatheredParameters`: it starts a collective for each parameter, and
    holds the gathered weights beside our copy of them.
    """
    shards = [p.ds_tensor.detach().flatten().to(p.device) for p in bucket]
    mine, world = torch.cat(shards), process_group.world_size()
    everyones = mine
    if world > 1:
        everyones = mine.new_empty(world * mine.numel())
        # Its new name since torch 2.13, which warns of the old one.
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        gather(everyones, mine)
    parts = everyones.view(world, -1).split([len(s) for s in shards], dim=1)
    # A parameter lies cut in `world` equal pieces, the last one padded.
    return [
        part.reshape(-1)[: p.ds_numel].view(p.ds_shape)
        for p, part in zip(bucket, parts, strict=True)
    ]


def cache_bytes(config, rows: int, length: int, bytes_each: int) -> int:
    """Keys and values of `rows` sequences of `length` tokens, from a transformers config."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim * rows * length * bytes_each


def _free_bytes(device: torch.device, promised: int) -> int:
    """Memory that every rank may still take, beside so many bytes that this one needs later."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
    else:
        free = host_memory.free_bytes()
    found = process_group.gather_objects((socket.gethostname(), free, promised))
    hosts = [host for host, *_ in found]
    sharers = {host: 1 if device.type == "cuda" else hosts.count(host) for host in hosts}
    return min(free // sharers[host] - promised for host, free, promised in found)
