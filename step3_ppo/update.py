"""The updates on one rollout: optimizer steps of actor and critic on its minibatches."""

import math

import torch

from step3_ppo import algorithm, ptx, trust_region
from step3_ppo.experience import Experience
from utils import metrics
from utils.data import batches
from utils.distributed import host_memory
from utils.generation.weights import in_eval_mode
from utils.models import language_model


def train_on(
    models, experience: Experience, config, device, step: int, watch, follow=None
) -> dict[str, float]:
    """Every epoch and minibatch of rollout number `step`; returns the mean of their metrics.
    follow: is called at the first step of the actor, see checks/alignment.py, LossTrace."""
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

    Yields (input_ids (b,P+R), mask (b,P+R), actions (b,R), the experience of these rows), on the
    device but for the two masks: what depends on them is computed on the CPU, where nothing waits.
    """
    lengths = experience.rollout.lengths()
    budget = config.micro_batch_size, config.micro_batch_tokens
    for micro in batches.share(rows, lengths, *budget):
        part = experience.rollout.select(micro)
        width = part.action_mask.shape[1]
        tensors = (
            host_memory.send(getattr(experience, name)[micro][:, :width], device)
            for name in ("action_mask", "logprobs", "values", "advantages", "returns", "weights")
        )
        ids, mask = part.joined()
        ids = host_memory.send(ids, device)
        yield ids, mask, part.action_mask, Experience(part, *tensors)


def step_actor(
    models, experience: Experience, rows: list[int], config, device, follow=None
) -> dict:
    """Policy update on global rows `rows`; returns metrics as means over their actions."""
    actor, method = models.actor, algorithm.ALGORITHMS[config.algorithm]
    mask = experience.action_mask[rows]  # of all ranks
    count = max(int(mask.sum()), 1)  # tokens, or whole answers
    normaliser = algorithm.loss_normaliser(mask, config.normalisation())
    sums = metrics.Sums(device)
    for ids, mask, actions, part in micro_batches(experience, rows, config, device):
        price = experience.kl_in_loss
        of_tokens, loss, stats = policy_terms(models, ids, mask, actions, part, price, config)
        if follow is not None:
            follow(ids, mask, actions, of_tokens, loss)
        actor.backward(loss, normaliser=normaliser)
        # As the loss is divided by: of other statistics means over actions are told.
        of_loss = {name: stats[name] for name in stats.keys() & {"policy_loss", "kl_in_loss"}}
        sums.add(stats | {name: x * (count / normaliser) for name, x in of_loss.items()})
    extra = {}
    if models.ptx is not None:
        pad_id = models.tokenizer.pad_token_id
        extra = ptx.add_gradient(actor, models.ptx, config, pad_id, device)
    if not method.trust_region:
        return _finish(actor, sums, count, "actor") | extra
    before = trust_region.Before(actor)
    measured = _finish(actor, sums, count, "actor") | extra
    measured |= {"trust_region_step": 0.0, "trust_region_kl": math.nan}
    if not measured["actor_skipped"]:
        loss = measured["policy_loss"] + experience.kl_in_loss * measured.get("kl_in_loss", 0.0)

        def measure() -> tuple[float, float]:
            return distance_and_loss(models, experience, rows, normaliser, config, device)

        measured |= trust_region.search(before, measure, loss, config.trust_region)
    return measured


def policy_terms(models, ids, mask, actions, part: Experience, price: float, config):
    """Of one micro-batch: (b,R) log-probabilities of its tokens, the sum that is its loss, and
    statistics. price: what a nat of KL costs in the loss."""
    method, device = algorithm.ALGORITHMS[config.algorithm], ids.device
    of_tokens, _ = language_model.response_logprobs(
        models.actor,
        ids,
        mask,
        actions.shape[1],
        temperature=config.temperature,
        actions=actions,
        nucleus=models.nucleus,
    )
    new_logprobs = of_tokens
    if config.action_level == "sequence":
        new_logprobs = algorithm.one_action(of_tokens, host_memory.send(actions, device))
    loss, stats = method.loss(new_logprobs, part, config)
    if price:
        stats["kl_in_loss"] = kl = kl_term(of_tokens, part, config, device)
        loss = loss + price * kl
    return of_tokens, loss, stats


@torch.no_grad()
def distance_and_loss(
    models, experience: Experience, rows: list[int], normaliser: int, config, device
) -> tuple[float, float]:
    """(KL of the policy that sampled to the actor as it is, nats an action; the policy's loss), on
    global rows `rows`, without a gradient."""
    count = max(int(experience.action_mask[rows].sum()), 1)
    sums, price = metrics.Sums(device), experience.kl_in_loss
    with in_eval_mode(models.actor):
        for ids, mask, actions, part in micro_batches(experience, rows, config, device):
            _, loss, stats = policy_terms(models, ids, mask, actions, part, price, config)
            sums.add({"kl": stats["approx_kl"], "loss": loss * (count / normaliser)})
    found = sums.over(count)
    return found["kl"], found["loss"]


def kl_term(of_tokens, part: Experience, config, device):
    """The KL of one micro-batch in the loss: a sum over actions by their weights. of_tokens (b,R):
    the policy's log-probabilities. An answer that is one action pays for the sum of its tokens."""
    ref_logprobs, actions = (
        host_memory.send(getattr(part.rollout, name), device)
        for name in ("ref_logprobs", "action_mask")
    )
    kl = algorithm.kl_loss(of_tokens, ref_logprobs, actions, config.estimator_of_kl())
    if config.action_level == "sequence":
        kl = algorithm.one_action(kl, actions)
    return (kl * part.weights).sum()


def step_critic(engine, experience: Experience, rows: list[int], config, device) -> dict:
    """Value update on global rows `rows`; returns metrics as means over their actions."""
    count = max(int(experience.action_mask[rows].sum()), 1)  # of all ranks
    method = algorithm.ALGORITHMS[config.algorithm]
    sums = metrics.Sums(device)
    for ids, mask, actions, part in micro_batches(experience, rows, config, device):
        new_values = engine(ids, mask)[:, -actions.shape[1] - 1 : -1]
        if config.action_level == "sequence":
            new_values = algorithm.first_action(new_values, host_memory.send(actions, device))
        numbers = new_values, part.values, part.returns, part.action_mask
        loss, stats = method.value_loss(*numbers, config)
        stats["value_gap"] = ((new_values - part.values).abs() * part.action_mask).sum().detach()
        engine.backward(loss, normaliser=count)
        sums.add(stats)
    return _finish(engine, sums, count, "critic")


def _finish(engine, sums: metrics.Sums, count: int, who: str) -> dict[str, float]:
    return sums.over(count) | {f"{who}_{name}": value for name, value in engine.step().items()}
