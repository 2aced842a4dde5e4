"""Sampling responses: one decode loop for rollouts, collection and evaluation in the steps.

The noise comes in as a tensor instead of being drawn inside. A caller that draws it for the whole
global batch from (seed, step) gets the same samples on 1 or 8 ranks, and after a resume.
"""

from collections.abc import Callable

import torch
from torch import nn

from utils.models import language_model


def uniform_noise(rows: int, length: int, seed: int, step: int) -> torch.Tensor:
    """(rows, length) fp32 in [0, 1): the sampling noise of step `step`, the same on every rank."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    return torch.rand(rows, length, generator=generator)


def sample_tokens(logits: torch.Tensor, noise: torch.Tensor, temperature: float) -> torch.Tensor:
    """(B,V) logits, (B,) noise → (B,) int64 tokens, by inverting the cumulative distribution.

    No sort and no `torch.multinomial` (on CPU ten times slower).
    """
    cdf = (logits.float() / temperature).softmax(-1).cumsum(-1)
    # Scaled by the last entry, which rounding leaves near 1; `right` so that a token of
    # probability 0 is never drawn.
    threshold = noise[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, threshold, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    *,
    max_new_tokens: int,
    stop_id: int,
    pad_id: int,
    temperature: float = 1.0,
    noise: torch.Tensor | None = None,
    all_finished: Callable[[torch.Tensor], bool] = bool,
) -> torch.Tensor:
    """(B,P) left-padded prompts → (B,R) int64 responses, `pad_id` after the stop token.

    noise: (B,R) uniform numbers, or None for greedy decoding. R is `max_new_tokens` always; the
    loop ends early once every row has stopped, by the word of `all_finished` (scalar bool tensor →
    bool), which a model whose forward pass needs all ranks makes a collective.
    """
    from transformers import DynamicCache

    batch, prompt_length = prompt_ids.shape
    device = prompt_ids.device
    responses = torch.full((batch, max_new_tokens), pad_id, dtype=torch.int64, device=device)
    mask = torch.ones(batch, prompt_length + max_new_tokens, dtype=torch.int64, device=device)
    mask[:, :prompt_length] = prompt_mask
    takes_positions = language_model.accepts(type(model), "position_ids")
    keep = {"logits_to_keep": 1} if language_model.accepts(type(model), "logits_to_keep") else {}
    position = language_model.positions(prompt_mask)
    noise = None if noise is None else noise.to(device)
    cache = DynamicCache(config=model.config)
    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    ids = prompt_ids
    for step in range(max_new_tokens):
        extra = {"position_ids": position} if takes_positions else {}
        logits = model(
            input_ids=ids,
            attention_mask=mask[:, : prompt_length + step],
            past_key_values=cache,
            use_cache=True,
            **extra,
            **keep,
        ).logits[:, -1]
        if noise is None:
            token = logits.argmax(-1)
        else:
            token = sample_tokens(logits, noise[:, step], temperature)
        token = torch.where(finished, pad_id, token)
        responses[:, step] = token
        finished |= token == stop_id
        if all_finished(finished.all()):
            break
        ids = token[:, None]
        position = position[:, -1:] + 1
    return responses


def mask_through_stop(response_ids: torch.Tensor, stop_id: int) -> torch.Tensor:
    """(B,R) → (B,R) bool: True through the first stop token, all True where there is none.

    Counted by position, so a pad id that equals the stop id does no harm.
    """
    is_stop = response_ids == stop_id
    stops_before = is_stop.long().cumsum(-1) - is_stop.long()
    return stops_before == 0
