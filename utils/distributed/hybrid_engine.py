"""The actor's two faces: trained under ZeRO, generating as a plain model.

The only place that knows how to switch. Without ZeRO-3 the trained module itself generates. Under
ZeRO-3 its weights are gathered once into a plain copy that lives for one rollout: no collective
runs inside the decode loop, so ranks may stop at different lengths, and DeepSpeed's hooks, which
would release a gathered weight after its layer, are not in the way.

DeepSpeed's own hybrid engine is not used: with transformers 5 it crashes at initialize (GPT-2,
Bloom), finds no container (OPT, Qwen, Mistral, Gemma) or corrupts grouped-query weights (Llama).
"""

import contextlib
import copy

import torch
from torch import nn

from utils.distributed import zero


class HybridEngine:
    """Wraps a `zero.TrainEngine` around a transformers causal LM."""

    def __init__(self, train_engine: zero.TrainEngine):
        self.train_engine = train_engine

    @contextlib.contextmanager
    def generating(self):
        """A plain module with the weights of now, in eval mode, caching and not checkpointing."""
        module = self.train_engine.module
        was_training = module.training
        with torch.no_grad():
            model = _plain_copy(module) if self.train_engine.zero_stage == 3 else module
        checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        if checkpointing:
            model.gradient_checkpointing_disable()
        model.eval()
        try:
            yield model
        finally:
            if checkpointing and model is module:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            module.train(was_training)


def _plain_copy(module: nn.Module) -> nn.Module:
    """A module without ZeRO hooks, holding whole weights; one gather a weight."""
    device = next(module.parameters()).device
    dtype = next(module.parameters()).dtype
    with torch.device(device):
        # Built for real and not on the meta device: rotary tables are computed here.
        plain = type(module)._from_config(copy.deepcopy(module.config), dtype=dtype)
    plain.to(device)
    targets = dict(plain.named_parameters())
    for name, source in module.named_parameters():
        with zero.gathered([source]):
            targets[name].copy_(source)
    for (_, target), (_, source) in zip(plain.named_buffers(), module.named_buffers(), strict=True):
        target.copy_(source)
    return plain.requires_grad_(False)
