"""One batch of experience: generate → mask → score.

Rows are dealt to the ranks for the forward passes and gathered again, so every rank holds the
whole rollout (a few bytes a token) and PPO's arithmetic, its minibatches and its metrics are the
same on any number of ranks.
"""

import dataclasses
import itertools
import time
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from step3_ppo import algorithm
from utils.data import batches
from utils.distributed import process_group
from utils.models import generation, language_model, scalar_model


@dataclass
class Rollout:
    """B sequences, prompts left-padded to P, responses right-padded to R. All on the CPU."""

    prompt_ids: torch.Tensor  # (B,P) int64
    prompt_mask: torch.Tensor  # (B,P) bool
    response_ids: torch.Tensor  # (B,R) int64
    response_mask: torch.Tensor  # (B,R) bool, through the stop token
    logprobs: torch.Tensor  # (B,R) fp32, of the policy that sampled
    ref_logprobs: torch.Tensor  # (B,R) fp32
    entropies: torch.Tensor  # (B,R) fp32, nats
    values: torch.Tensor  # (B,R) fp32
    scores: torch.Tensor  # (B,) fp32, the reward model's, unclipped
    finished: torch.Tensor  # (B,) bool: ended with the stop token, not at the limit

    def select(self, rows) -> "Rollout":
        """Some rows, with padding that none of them needs cut off."""
        part = {f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)}
        left = int(part["prompt_mask"].long().argmax(1).min())
        right = int(part["response_mask"].sum(1).max())
        for name in part:
            if name.startswith("prompt_"):
                part[name] = part[name][:, left:]
            elif part[name].dim() == 2:
                part[name] = part[name][:, :right]
        return Rollout(**part)

    def lengths(self) -> list[int]:
        return (self.prompt_mask.sum(1) + self.response_mask.sum(1)).tolist()


def _gather(parts: list[Rollout], order: list[int]) -> Rollout:
    """Parts of all ranks → one Rollout; row k of the parts laid end to end becomes row order[k]."""
    parts = [p for p in parts if len(p.scores)]
    prompt = max(p.prompt_ids.shape[1] for p in parts)
    response = max(p.response_ids.shape[1] for p in parts)
    back = torch.tensor(order).argsort()
    fields = {}
    for f in dataclasses.fields(Rollout):
        tensors = [getattr(p, f.name) for p in parts]
        if f.name.startswith("prompt_"):
            tensors = [pad(t, (prompt - t.shape[1], 0)) for t in tensors]
        elif tensors[0].dim() == 2:
            tensors = [pad(t, (0, response - t.shape[1])) for t in tensors]
        fields[f.name] = torch.cat(tensors)[back]
    return Rollout(**fields)


def sample(models, generator, prompt_ids, prompt_mask, noise, config) -> torch.Tensor:
    """(B,P) prompts, (B,·) noise → (B,R) responses, R the length of the longest."""
    stop_id = models.tokenizer.eos_token_id
    step = config.generation_batch_size or len(prompt_ids)
    parts = [
        generation.generate(
            generator,
            prompt_ids[i : i + step],
            prompt_mask[i : i + step],
            max_new_tokens=config.max_response_length,
            stop_id=stop_id,
            pad_id=models.tokenizer.pad_token_id,
            temperature=config.temperature,
            noise=noise[i : i + step],
            all_finished=models.hybrid.all_finished,
        )
        for i in range(0, len(prompt_ids), step)
    ]
    responses = torch.cat(parts)
    longest = int(generation.mask_through_stop(responses, stop_id).sum(1).max())
    return responses[:, :longest]


@torch.no_grad()
def collect(models, encoded: list[list[int]], config, device, noise_step: int):
    """Sample and score one response for each prompt of `encoded` (id lists, all ranks' rows).

    noise_step numbers the call: the same number gives the same samples. Returns (Rollout of all
    rows on every rank, {"seconds_generate", "seconds_score"}).
    """
    rank, world = process_group.rank(), process_group.world_size()
    pad_id, stop_id = models.tokenizer.pad_token_id, models.tokenizer.eos_token_id
    noise = generation.uniform_noise(
        len(encoded), config.max_response_length, config.seed, noise_step
    )
    # Like lengths together, and the same number of rows and so of forward passes on every rank.
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i))
    per_rank = -(-len(order) // world)
    filled = list(itertools.islice(itertools.cycle(order), per_rank * world))
    mine = filled[rank::world]
    prompt_ids, prompt_mask = (
        t.to(device) for t in batches.prompt_batch([encoded[i] for i in mine], pad_id)
    )

    started = time.time()
    with models.hybrid.generating() as generator:
        responses = sample(models, generator, prompt_ids, prompt_mask, noise[mine], config)
        generated = time.time()
        response_mask = generation.mask_through_stop(responses, stop_id)
        input_ids = torch.cat([prompt_ids, responses], 1)
        mask = torch.cat([prompt_mask, response_mask], 1)
        length = responses.shape[1]
        score = dict(temperature=config.temperature, micro_batch_size=config.micro_batch_size)
        # With the same module and mode that the update uses: dropout is off in both.
        logprobs, entropies = language_model.response_logprobs(
            generator, input_ids, mask, length, **score
        )
    ref_logprobs, _ = language_model.response_logprobs(
        models.reference, input_ids, mask, length, **score
    )
    values = response_values(models.critic, input_ids, mask, length, config.micro_batch_size)
    scores = torch.cat(
        [
            scalar_model.sequence_scores(models.reward, ids, m)
            for ids, m in zip(
                input_ids.split(config.micro_batch_size),
                mask.split(config.micro_batch_size),
                strict=True,
            )
        ]
    )
    part = Rollout(
        prompt_ids,
        prompt_mask,
        responses,
        response_mask,
        logprobs * response_mask,
        ref_logprobs * response_mask,
        entropies * response_mask,
        values * response_mask,
        scores,
        (responses == stop_id).any(1),
    )
    own = len(range(rank, len(order), world))  # without the filling
    part = Rollout(**{f.name: getattr(part, f.name)[:own].cpu() for f in dataclasses.fields(part)})
    dealt = [i for r in range(world) for i in order[r::world]]
    rollout = _gather(process_group.gather_objects(part), dealt)
    seconds = {"seconds_generate": generated - started, "seconds_score": time.time() - generated}
    return rollout, seconds


def response_values(critic, input_ids, mask, length: int, micro_batch_size: int) -> torch.Tensor:
    """(B,P+R) → (B,R): V before response token t is drawn, read at the token before it."""
    pieces = [
        critic(ids, m)[:, -length - 1 : -1]
        for ids, m in zip(
            input_ids.split(micro_batch_size), mask.split(micro_batch_size), strict=True
        )
    ]
    return torch.cat(pieces)


@dataclass
class Experience:
    """A rollout with what the updates need, (B,R) fp32 each, 0 off the response mask."""

    rollout: Rollout
    advantages: torch.Tensor
    returns: torch.Tensor


def make_experience(
    rollout: Rollout, config, kl_coef: float
) -> tuple[Experience, dict[str, float]]:
    """Scores → token rewards → advantages; and the rollout's metrics."""
    mask = rollout.response_mask
    scores = rollout.scores
    if config.missing_eos_penalty > 0:
        scores = torch.where(rollout.finished, scores, -config.missing_eos_penalty)
    if config.score_clip > 0:
        scores = scores.clamp(-config.score_clip, config.score_clip)
    rewards, kl = algorithm.token_rewards(
        scores, rollout.logprobs, rollout.ref_logprobs, mask, kl_coef
    )
    advantages, returns = algorithm.gae(rewards, rollout.values, mask, config.gamma, config.lam)
    metrics = measure(rollout) | {
        "kl_coef": kl_coef,
        "reward": rewards.sum(1).mean().item(),
        "advantage_std": advantages[mask].std().item(),
        "return": algorithm.masked_mean(returns, mask).item(),
        "explained_variance": algorithm.explained_variance(rollout.values, returns, mask).item(),
    }
    if config.whiten_advantages:
        advantages = algorithm.whiten(advantages, mask)
    return Experience(rollout, advantages, returns), metrics


def measure(rollout: Rollout) -> dict[str, float]:
    """What can be said of a rollout without training. KLs are per response, in nats."""
    mask = rollout.response_mask
    k1, _, k3 = algorithm.kl_estimates(rollout.logprobs, rollout.ref_logprobs)
    return {
        "score": rollout.scores.mean().item(),
        "score_std": rollout.scores.std().item(),
        "kl": (k1 * mask).sum(1).mean().item(),
        "kl_k3": (k3 * mask).sum(1).mean().item(),
        "entropy": algorithm.masked_mean(rollout.entropies, mask).item(),
        "response_length": mask.sum(1).float().mean().item(),
        "eos_share": rollout.finished.float().mean().item(),
    }
