"""The actor's two faces: trained under ZeRO, generating as a plain model.

The only place that knows how to switch. Without ZeRO-3 the trained module itself generates. Under
ZeRO-3 its weights are gathered once into a plain copy that lives for one rollout: no collective
runs inside the decode loop, so ranks may stop at different lengths, and DeepSpeed's hooks, which
would release a gathered weight after its layer, are not in the way.

A model too large to stand whole on one device (`--rollout_gather layer`) generates as it trains,
each layer gathered for each token. That is slow, and ranks must go in step: `all_finished` lets the
decode loop end only when every rank's rows have stopped.

DeepSpeed's own hybrid engine is not used: with transformers 5 it crashes at initialize (GPT-2,
Bloom), finds no container (OPT, Qwen, Mistral, Gemma) or corrupts grouped-query weights (Llama).
"""

import contextlib
import copy

import torch
import torch.distributed as dist
from torch import nn

from utils.distributed import zero


class HybridEngine:
    """Wraps a `zero.TrainEngine` around a transformers causal LM.

    gather: under ZeRO-3, "rollout" (once for all of it) or "layer" (each layer for each token).
    """

    def __init__(self, train_engine: zero.TrainEngine, gather: str = "rollout"):
        self.train_engine = train_engine
        self._copies = train_engine.zero_stage == 3 and gather == "rollout"
        in_step = train_engine.zero_stage == 3 and gather == "layer"
        self.all_finished = _finished_on_all_ranks if in_step else bool
        self._plain: nn.Module | None = (
            None  # under ZeRO-3: built once, weightless between rollouts
        )

    @contextlib.contextmanager
    def generating(self):
        """A plain module with the weights of now, in eval mode, caching and not checkpointing."""
        module = self.train_engine.module
        if self._copies:
            if self._plain is None:
                self._plain = _plain_twin(module)
            _copy_weights(module, self._plain)
            try:
                yield self._plain
            finally:
                for p in self._plain.parameters():
                    p.data = torch.empty(0, dtype=p.dtype, device=p.device)
            return
        was_training = module.training
        checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in module.modules())
        if checkpointing:
            module.gradient_checkpointing_disable()
        module.eval()
        try:
            yield module
        finally:
            if checkpointing:
                module.gradient_checkpointing_enable({"use_reentrant": False})
            module.train(was_training)


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
    with torch.device(reference.device):
        plain = type(module)._from_config(copy.deepcopy(module.config), dtype=reference.dtype)
    plain.to(reference.device)
    for target, source in zip(plain.buffers(), module.buffers(), strict=True):
        target.copy_(source)
    return plain.eval().requires_grad_(False)


@torch.no_grad()
def _copy_weights(module: nn.Module, plain: nn.Module) -> None:
    """Whole weights of a ZeRO-3 `module` into `plain`: one gather a weight, on every rank."""
    targets = dict(plain.named_parameters())
    for name, source in module.named_parameters():
        with zero.gathered([source]):
            targets[name].data = source.detach().clone()
