"""The updates on one rollout: optimizer steps of actor and critic on its minibatches."""

import math

import torch

from step3_ppo import algorithm, ptx
from step3_ppo.rollout import Experience
from utils import metrics
from utils.data import batches
from utils.distributed import host_memory
from utils.models import language_model


def train_on(
    models, experience: Experience, config, device, step: int, watch, follow=None
) -> dict[str, float]:
    """Every epoch and minibatch of rollout number `step`; returns the mean of their metrics.
    follow: looks on at the first step of the actor, see check_alignment.Followed."""
    updates = []
    for epoch in range(config.ppo_epochs):
        for minibatch in range(config.minibatches()):
            rows = batches.rows_of_step(
                minibatch,
                config.global_batch_size,
                config.rollout_size(),
                seed=config.seed + 1 + step * config.ppo_epochs + epoch,
            )
            first = None if updates else follow
            measured = step_actor(models, experience, rows, config, device, first)
            if models.ema is not None:
                models.ema.update()
            if models.critic is not None:
                measured |= step_critic(models.critic, experience, rows, config, device)
            watch.after_update(measured, experience, rows, step)
            updates.append(measured)
    return metrics.mean_over(updates) | {
        f"first_{name}": updates[0][name]
        for name in ("ratio", "approx_kl", "value_gap")
        if name in updates[0]
    }


def micro_batches(experience: Experience, rows: list[int], config, device):
    """This rank's share of minibatch `rows`, a micro-batch at a time, like lengths together.

    Yields (input_ids (b,P+R), mask (b,P+R), R, the experience of these rows), all on the device but
    the mask: what depends on it is reckoned on the CPU, where that waits for nobody.
    """
    lengths = experience.rollout.lengths()
    budget = config.micro_batch_size, config.micro_batch_tokens
    for micro in batches.share(rows, lengths, *budget):
        part = experience.rollout.select(micro)
        width = part.response_ids.shape[1]
        yield (
            host_memory.send(torch.cat([part.prompt_ids, part.response_ids], 1), device),
            torch.cat([part.prompt_mask, part.response_mask], 1),
            width,
            Experience(
                part,
                *(
                    host_memory.send(getattr(experience, name)[micro][:, :width], device)
                    for name in ("mask", "logprobs", "values", "advantages", "returns")
                ),
            ),
        )


def step_actor(
    models, experience: Experience, rows: list[int], config, device, follow=None
) -> dict:
    """Policy update on global rows `rows`; returns metrics as means over their actions."""
    actor = models.actor
    actions = int(experience.mask[rows].sum())  # of all ranks: tokens, or whole answers
    sums = metrics.Sums(device)
    for ids, mask, length, part in micro_batches(experience, rows, config, device):
        new_logprobs, _ = language_model.response_logprobs(
            actor, ids, mask, length, temperature=config.temperature
        )
        told = new_logprobs
        if config.action_level == "sequence":
            answers = host_memory.send(mask[:, -length:], device)
            new_logprobs = algorithm.one_action(new_logprobs, answers)
        taken = (new_logprobs, part.logprobs, part.advantages, part.mask)
        if config.algorithm == "ppo":
            clips = (config.clip_ratio, config.clip_ratio_high, config.dual_clip)
            loss, stats = algorithm.policy_loss(*taken, *clips)
        else:
            loss, stats = algorithm.policy_gradient_loss(*taken)
        if follow is not None:
            follow(ids, mask, length, told, loss)
        actor.backward(loss, normaliser=actions)
        sums.add(stats)
    extra = {}
    if models.ptx is not None:
        pad_id = models.tokenizer.pad_token_id
        extra = ptx.add_gradient(actor, models.ptx, config, pad_id, device)
    return _finish(actor, sums, actions, "actor") | extra


def step_critic(engine, experience: Experience, rows: list[int], config, device) -> dict:
    """Value update on global rows `rows`; returns metrics as means over their actions."""
    actions = int(experience.mask[rows].sum())  # of all ranks
    clipped = config.algorithm == "ppo" and config.clip_value > 0
    clip_value = config.clip_value if clipped else math.inf
    sums = metrics.Sums(device)
    for ids, mask, length, part in micro_batches(experience, rows, config, device):
        new_values = engine(ids, mask)[:, -length - 1 : -1][:, : part.mask.shape[1]]
        loss, stats = algorithm.value_loss(
            new_values, part.values, part.returns, part.mask, clip_value
        )
        stats["value_gap"] = ((new_values - part.values).abs() * part.mask).sum().detach()
        engine.backward(loss, normaliser=actions)
        sums.add(stats)
    return _finish(engine, sums, actions, "critic")


def _finish(engine, sums: metrics.Sums, actions: int, who: str) -> dict[str, float]:
    return sums.over(actions) | {f"{who}_{name}": value for name, value in engine.step().items()}
