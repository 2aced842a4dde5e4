"""The updates on one rollout: optimizer steps of actor and critic on its minibatches."""

import torch

from step3_ppo import algorithm
from step3_ppo.rollout import Experience
from utils.data import batches
from utils.distributed import process_group
from utils.models import language_model


def train_on(models, experience: Experience, config, device, step: int) -> dict[str, float]:
    """Every epoch and minibatch of rollout number `step`; returns the mean of their metrics."""
    updates = []
    for epoch in range(config.ppo_epochs):
        for minibatch in range(config.minibatches()):
            rows = batches.rows_of_step(
                minibatch,
                config.global_batch_size,
                config.rollout_size(),
                seed=config.seed + 1 + step * config.ppo_epochs + epoch,
            )
            metrics = step_actor(models.actor, experience, rows, config, device)
            if models.ema is not None:
                models.ema.update()
            metrics |= step_critic(models.critic, experience, rows, config, device)
            updates.append(metrics)
    return {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}


def micro_batches(experience: Experience, rows: list[int], config, device):
    """This rank's share of minibatch `rows`, `micro_batch_size` rows at a time, like lengths
    together. Yields (part of the rollout, input_ids, mask, advantages, returns) on the device."""
    lengths = experience.rollout.lengths()
    rank, world = process_group.rank(), process_group.world_size()
    for micro in batches.deal(rows, lengths, rank, world, config.micro_batch_size):
        part = experience.rollout.select(micro)
        width = part.response_ids.shape[1]
        yield (
            part,
            torch.cat([part.prompt_ids, part.response_ids], 1).to(device),
            torch.cat([part.prompt_mask, part.response_mask], 1).to(device),
            experience.advantages[micro][:, :width].to(device),
            experience.returns[micro][:, :width].to(device),
        )


def step_actor(engine, experience: Experience, rows: list[int], config, device) -> dict:
    """Policy update on global rows `rows`; returns metrics as means over their tokens."""
    tokens = int(experience.rollout.response_mask[rows].sum())  # of all ranks
    totals: dict[str, float] = {}
    for part, ids, mask, advantages, _ in micro_batches(experience, rows, config, device):
        length = part.response_ids.shape[1]
        logits = language_model.response_logits(engine, ids, mask, length)
        new_logprobs = language_model.token_logprobs(logits, ids[:, -length:], config.temperature)
        loss, stats = algorithm.policy_loss(
            new_logprobs,
            part.logprobs.to(device),
            advantages,
            mask[:, -length:],
            config.clip_ratio,
        )
        engine.backward(loss, normaliser=tokens)
        totals = {k: totals.get(k, 0.0) + float(v) for k, v in stats.items()}
    return _finish(engine, totals, tokens, device, "actor")


def step_critic(engine, experience: Experience, rows: list[int], config, device) -> dict:
    """Value update on global rows `rows`; returns metrics as means over their tokens."""
    tokens = int(experience.rollout.response_mask[rows].sum())  # of all ranks
    totals: dict[str, float] = {}
    for part, ids, mask, _, returns in micro_batches(experience, rows, config, device):
        length = part.response_ids.shape[1]
        new_values = engine(ids, mask)[:, -length - 1 : -1]
        loss, stats = algorithm.value_loss(
            new_values, part.values.to(device), returns, mask[:, -length:], config.clip_value
        )
        engine.backward(loss, normaliser=tokens)
        totals = {k: totals.get(k, 0.0) + float(v) for k, v in stats.items()}
    return _finish(engine, totals, tokens, device, "critic")


def _finish(engine, totals: dict, tokens: int, device, who: str) -> dict[str, float]:
    sums = process_group.sum_over_ranks(totals.values(), device)
    metrics = {name: total / tokens for name, total in zip(totals, sums, strict=True)}
    return metrics | {f"{who}_{name}": value for name, value in engine.step().items()}
