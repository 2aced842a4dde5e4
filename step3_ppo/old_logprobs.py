"""Which log-probabilities an update starts from: the decode loop's, or another forward pass's.

The decode loop has computed them already, but with other shapes and kernels than the update's pass.
Where both agree, the pass over the rollout is saved; where they do not, as in bf16, a ratio of 1
would start from noise.
"""

import dataclasses

import torch

from step3_ppo import rollout as rollouts
from step3_ppo.episodes import lay_out, numbers_of
from utils.distributed import process_group
from utils.generation.sampling import uniform_noise

TOLERANCE = 1e-4  # nats, of any one token: rounding in fp32 makes 1e-6 to 1e-5
ROWS, TOKENS, NOISE = 8, 32, 2**31 + 9  # of a rank; at most; a noise that no rollout draws


@torch.no_grad()
def choose(models, prompts, config, device, say) -> str:
    """→ "decode" or "forward", by a few answers to `prompts`; the same on all ranks, which all call
    it."""
    if not models.rollout_engine.returns_entropies:
        say("old log-probabilities from the forward: the engine that samples is not the trainer")
        return "forward"
    short = min(config.max_response_length, TOKENS)
    config = dataclasses.replace(config, logprobs_from="decode", max_response_length=short)
    rank, world = process_group.rank(), process_group.world_size()
    noise = uniform_noise(ROWS * world, short, config.seed, NOISE)[rank::world]
    few = [prompts[(rank + i * world) % len(prompts)] for i in range(ROWS)]
    episodes = rollouts.generate(models, few, noise, config)
    tokens = lay_out(episodes, models.tokenizer.pad_token_id)
    scored = rollouts.actor_logprobs(models, tokens, config, device)
    decoded = [numbers_of(episodes, name) for name in ("logprobs", "entropies")]
    return compare(decoded, scored, say)


def compare(decoded, scored, say) -> str:
    """decoded, scored: log-probabilities and entropies, (B,R) each and 0 where no action is."""
    gaps = [float((a - b).abs().max()) for a, b in zip(decoded, scored, strict=True)]
    every_rank = process_group.gather_objects(gaps)
    # Not `max`, which may pass over a NaN.
    agree = all(gap <= TOLERANCE for gaps in every_rank for gap in gaps)
    source = "decode" if agree else "forward"
    logprobs, entropies = (max(gaps) for gaps in zip(*every_rank, strict=True))
    say(
        f"old log-probabilities from the {source}: decode loop and scoring pass differ by up to "
        f"{logprobs:.1e} nats a token, entropies by {entropies:.1e} (allowed {TOLERANCE:.0e})"
    )
    return source
