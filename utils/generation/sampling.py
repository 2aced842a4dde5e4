"""Sampling responses: one decode loop for rollouts, collection and evaluation in the steps.

The noise comes in as a tensor instead of being drawn inside. A caller that draws it for the whole
global batch from (seed, step) gets the same samples on 1 or 8 ranks, and after a resume.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from utils.generation.decoder import Decoder
from utils.kernels import cpu_products, token_attention

LOOK_EVERY = 8  # steps between tests for rows that have stopped: each waits for the GPU


def uniform_noise(rows: int, length: int, seed: int, step: int) -> torch.Tensor:
    """(rows, length) fp32 in [0, 1): the sampling noise of step `step`, the same on every rank."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    return torch.rand(rows, length, generator=generator)


def sample_tokens(logits: torch.Tensor, noise: torch.Tensor, temperature: float) -> torch.Tensor:
    """(B,V) logits, (B,) noise → (B,) int64 tokens, by inverting the cumulative distribution.

    No sort and no `torch.multinomial` (on CPU ten times slower).
    """
    cdf = _warmed(logits, temperature).softmax(-1).cumsum(-1)
    # Scaled by the last entry, which rounding leaves near 1; `right` so that a token of
    # probability 0 is never drawn.
    threshold = noise[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, threshold, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


def numbers_of(logits: torch.Tensor, tokens: torch.Tensor, temperature: float):
    """(B,V) logits, (B,) tokens → (B,) fp32 log-probabilities, (B,) fp32 entropies in nats."""
    # Impossible tokens (−∞) add 0 to the entropy, where 0 × −∞ would be no number.
    logits = _warmed(logits, temperature).clamp(min=torch.finfo(torch.float32).min)
    p = logits.softmax(-1)
    logprobs = p.gather(1, tokens[:, None]).log().squeeze(1)
    total = logits.gather(1, tokens[:, None]).squeeze(1) - logprobs  # log Σ exp
    return logprobs, total - torch.linalg.vecdot(p, logits)


def _warmed(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return logits.float() if temperature == 1.0 else logits.float() / temperature


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
    in_step: bool = False,
    logprobs_and_entropies: Sequence[torch.Tensor] | None = None,
    decoder: Decoder | None = None,
) -> torch.Tensor:
    """(B,P) left-padded prompts → (B,R) int64 responses, `pad_id` after the stop token.

    noise: (B,R) uniform numbers, or None for greedy decoding. R is `max_new_tokens` always; the
    loop ends early once every row has stopped, with in_step (each forward pass is one of all ranks
    together) those of every rank. logprobs_and_entropies: two (B,R) fp32 tensors that get those of
    each token up to the stop token. decoder: one whose memory is to be used again, in its mode;
    without it, an eager one.
    """
    batch, device = len(prompt_ids), prompt_ids.device
    responses = torch.full((batch, max_new_tokens), pad_id, dtype=torch.int64, device=device)
    noise = None if noise is None else noise.to(device)
    rows = torch.arange(batch, device=device)  # whose answer a row of the running batch is
    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    decoder = decoder or Decoder("eager")
    look_every = LOOK_EVERY if device.type == "cuda" else 1
    with cpu_products.packed(model), token_attention.used_by(model):
        logits = decoder.begin(model, prompt_ids, prompt_mask, max_new_tokens, in_step)
        for step in range(max_new_tokens):
            if noise is None:
                token = logits.argmax(-1)
            else:
                token = sample_tokens(logits, noise[rows, step], temperature)
            if logprobs_and_entropies is not None:
                of_step = numbers_of(logits, token, temperature)
                for kept, now in zip(logprobs_and_entropies, of_step, strict=True):
                    kept[rows, step] = now
            token = torch.where(finished, pad_id, token)
            responses[rows, step] = token
            finished |= token == stop_id
            if step + 1 == max_new_tokens:
                break
            if (step + 1) % look_every == 0:
                if _all_finished(finished, in_step):
                    break
                stay = decoder.keep_running(finished)
                if stay is not None:
                    rows, finished, token = rows[stay], finished[stay], token[stay]
            logits = decoder.step(token)
    return responses


def _all_finished(finished: torch.Tensor, in_step: bool) -> bool:
    """(B,) of this rank → whether all rows have stopped, with in_step those of all ranks."""
    everything = finished.all().float()
    if in_step and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(everything, op=dist.ReduceOp.MIN)
    return bool(everything)


def mask_through_stop(response_ids: torch.Tensor, stop_id: int) -> torch.Tensor:
    """(B,R) → (B,R) bool: True through the first stop token, all True where there is none.

    Counted by position, so a pad id that equals the stop id does no harm.
    """
    is_stop = response_ids == stop_id
    stops_before = is_stop.long().cumsum(-1) - is_stop.long()
    return stops_before == 0
