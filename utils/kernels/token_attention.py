"""Attention of one new token to all before it, on a CPU.

torch's fused attention is made for many queries: with one it spends its time on small products, in
bf16 on conversions too. Plain batched products are faster, if keys and values lie without gaps, as
the cache's blocks do (torch copies them first otherwise). Measured on one core, 32 rows × 8 heads ×
128 keys of 32, µs a layer, the cache larger than the processor's:

           fused   products on a longer view   on blocks
    fp32     985                         908         361
    bf16   1,490                         840         379
"""

import contextlib

import torch
from torch import nn

from utils.kernels import packing

NAME = "one_token_on_cpu"
BLOCK = 32  # tokens by which the cache's view grows; half of it is read in vain on average


def block_of(model: nn.Module) -> int:
    """The block that the cache of `model` shall have: 0 where the model attends another way."""
    return BLOCK if model.config._attn_implementation == NAME else 0


def attend(module, query, key, value, attention_mask, scaling=None, **settings):
    """(B,heads,Q,D) queries, (B,kv heads,T,D) keys and values → ((B,Q,heads,D), None)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    unusual = any(settings.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    if query.shape[2] > 1 or unusual:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **settings
        )
    (rows, heads, _, size), groups = query.shape, key.shape[1]
    scaling = size**-0.5 if scaling is None else scaling
    query = (query * scaling).reshape(rows * groups, heads // groups, size)
    scores = torch.bmm(query, key.flatten(0, 1).transpose(1, 2))  # (B·kv heads, group, T)
    if attention_mask is not None:
        scores.view(rows, heads, -1).add_(attention_mask[:, 0])
    out = torch.bmm(scores.softmax(-1), value.flatten(0, 1))
    return out.view(rows, 1, heads, size), None


def mask(*sizes, dtype=torch.float32, **settings) -> torch.Tensor | None:
    """transformers' sdpa mask; for one token (B,1,1,T) what is added to its scores: 0 or −∞."""
    from transformers.masking_utils import sdpa_mask

    seen = sdpa_mask(*sizes, **settings)
    if seen is None or seen.shape[2] > 1:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


@contextlib.contextmanager
def used_by(model: nn.Module):
    """While inside, `model`'s layers attend so on a CPU, in place of torch's own, if they take
    another function at all: Falcon's compare its name with "sdpa" and do something else."""
    from transformers import AttentionInterface, AttentionMaskInterface

    before = model.config._attn_implementation
    takes_any = getattr(model, "_supports_attention_backend", False)
    on_cpu = next(model.parameters()).device.type == "cpu"
    if before not in ("sdpa", packing.NAME) or not takes_any or not on_cpu:
        yield
        return
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
