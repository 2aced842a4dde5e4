"""The updates on one rollout: optimizer steps of actor and critic on its minibatches."""

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
            for name in ("action_mask", "logprobs", "values", "advantages", "returns")
        )
        ids, mask = part.joined()
        ids = host_memory.send(ids, device)
        yield ids, mask, part.action_mask, Experience(part, *tensors)


def step_actor(
    models, experience: Experience, rows: list[int], config, device, follow=None
) -> dict:
    """Policy update on global rows `rows`; returns metrics as means over their actions."""
    actor, method = models.actor, algorithm.ALGORITHMS[config.algorithm]
    count = int(experience.action_mask[rows].sum())  # of all ranks: tokens, or whole answers
    sums = metrics.Sums(device)
    for ids, mask, actions, part in micro_batches(experience, rows, config, device):
        of_tokens, _ = language_model.response_logprobs(
            actor, ids, mask, actions.shape[1], temperature=config.temperature, actions=actions
        )
        new_logprobs = of_tokens
        if config.action_level == "sequence":
            new_logprobs = algorithm.one_action(of_tokens, host_memory.send(actions, device))
        numbers = new_logprobs, part.logprobs, part.advantages, part.action_mask
        loss, stats = method.loss(*numbers, config)
        if follow is not None:
            follow(ids, mask, actions, of_tokens, loss)
        actor.backward(loss, normaliser=count)
        sums.add(stats)
    extra = {}
    if models.ptx is not None:
        pad_id = models.tokenizer.pad_token_id
        extra = ptx.add_gradient(actor, models.ptx, config, pad_id, device)
    return _finish(actor, sums, count, "actor") | extra


def step_critic(engine, experience: Experience, rows: list[int], config, device) -> dict:
    """Value update on global rows `rows`; returns metrics as means over their actions."""
    count = int(experience.action_mask[rows].sum())  # of all ranks
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
