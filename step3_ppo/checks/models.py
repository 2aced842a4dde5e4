"""Checks of models: generation, padding, modes, reference."""

import dataclasses

import torch

from step3_ppo.checks.probe import (
    AFTER,
    AT_START,
    BEFORE,
    COPIES,
    MOST_TOKENS,
    NOISE,
    Fault,
    Probe,
    apart,
    check,
    distributions,
    train_forward,
    worst,
)
from utils.distributed import process_group, zero
from utils.generation import sampling as generation
from utils.generation.engine import Request, Sampling, synced
from utils.models import language_model, scorer


@check(BEFORE, "generator equals model")
def generator_equals_model(probe: Probe) -> str:
    """Greedy tokens and the log-probabilities of sampled ones, decode loop against training."""
    models, own = probe.models, probe.own_rows()
    limit = min(probe.config.max_response_length, MOST_TOKENS)
    shape = (len(probe.rollout.scores), limit, probe.config.seed, NOISE + 1)
    noise = generation.uniform_noise(*shape)[process_group.rank() :: process_group.world_size()]
    tokenizer = models.tokenizer
    ids = tokenizer.eos_token_id, tokenizer.pad_token_id
    sampling = Sampling(limit, *ids, probe.config.temperature, logprobs=True)
    prompts = own.prompt_ids, own.prompt_mask
    with synced(models.rollout_engine, models.actor) as engine:
        stale = _stale_weights(models.actor.module, engine.generator)
        greedy = engine.generate(Request(*prompts), sampling)
        sampled = engine.generate(Request(*prompts, noise), sampling)
    stale = sorted(set().union(*process_group.gather_objects(stale)))
    if stale:
        raise Fault(
            f"{len(stale)} weights of the generator are not those of the trained model (first "
            f"{stale[0]}): it is stale or damaged; see utils/generation/weights.py"
        )
    kept = greedy.response_mask.to(probe.device)
    seen = distributions(probe, _answered(own, greedy))
    short = worst(float((seen.best - seen.logprobs)[kept].max()))[0]
    # Written so that nan fails.
    if not short <= 10 * probe.tolerance:
        raise Fault(
            f"greedy tokens of the decode loop are up to {short:.2g} nats below the best "
            "token of the training forward: cache, position ids or left padding are wrong "
            "for this model; see utils/generation/sampling.py"
        )
    equal = f"greedy tokens equal up to {short:.1e} nats"
    if sampled.logprobs is None:
        return f"{equal} ({engine.name} tells no log-probabilities)"
    kept = sampled.response_mask
    return f"{equal}, " + probe.must_agree(
        train_forward(probe, _answered(own, sampled)).cpu()[kept],
        sampled.logprobs[kept],
        "log-probabilities of sampled tokens, decode loop and training forward,",
        "cache, position ids, left padding or temperature; see utils/generation/sampling.py",
    )


def _answered(rollout, samples):
    """`rollout` with other answers to its prompts."""
    answers = {"response_ids": samples.response_ids, "response_mask": samples.response_mask}
    return dataclasses.replace(rollout, **answers)


@check(AFTER, "generator equals the stepped model")
def generator_after_the_steps(steps) -> str:
    """Fresh weights reach the generator."""
    return generator_equals_model(steps.probe)


@torch.no_grad()
def _stale_weights(module, generator) -> list[str]:
    """Names of the generator's weights that are not bit for bit those of `module`."""
    if generator is module or generator is None:  # None: it is in another process
        return []
    twins, stale = dict(generator.named_parameters()), []
    for name, p in module.named_parameters():
        with zero.gathered([p]):
            if not torch.equal(p.detach(), twins[name].detach()):
                stale.append(name)
    return stale


def _logprobs(model, ids, mask):
    """(N,T) → (N,T−1), position t that of token t + 1."""
    return language_model.response_logprobs(model, ids, mask, ids.shape[1] - 1)[0]


def _values(model, ids, mask):
    return model(ids, mask)


def _scores(model, ids, mask):
    return scorer.sequence_scores(model, ids, mask)[:, None].expand(ids.shape)


@check(BEFORE, "padding changes nothing")
@torch.no_grad()
def padding_invariance(probe: Probe) -> str:
    """Log-probabilities, values and scores of a row alone and with pads on either side."""
    models, pads, most = probe.models, 14, 0.0
    readings = [
        ("actor's logprobs", models.actor, _logprobs),
        ("reference's logprobs", models.reference, _logprobs),
    ]
    if models.critic is not None:
        readings.append(("critic's values", models.critic, _values))
    if models.reward is not None and not models.reward.by_text:
        readings.append(("reward model's scores", models.reward.model, _scores))
    for row in range(0, len(probe.rollout.scores), COPIES * process_group.world_size()):
        one = probe.rollout.select([row])
        alone = torch.cat([one.prompt_ids, one.response_ids], 1).to(probe.device)
        start, end = one.prompt_ids.shape[1] - 1, alone.shape[1] - 1
        lefts = (0, 1, 7, pads)
        ids = alone.new_full((len(lefts), alone.shape[1] + pads), models.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, left in enumerate(lefts):
            ids[i, left : left + alone.shape[1]] = alone
            mask[i, left : left + alone.shape[1]] = True
        for what, model, read in readings:
            plain = read(model, alone, torch.ones_like(alone, dtype=torch.bool))[:, start:end]
            padded = read(model, ids, mask)
            padded = torch.stack([padded[i, n + start : n + end] for i, n in enumerate(lefts)])
            plain = plain.expand_as(padded)
            probe.must_agree(
                plain,
                padded,
                f"the {what} of one row with 0, 1, 7 and {pads} left pads",
                "attention mask or position ids do not follow the padding; see "
                "language_model.forward_inputs, or another --attn_implementation",
            )
            most = max(most, apart(plain, padded)[1])
    return f"every model within {most:.1e} for 0 to {pads} pads on either side"


@check(BEFORE, "dropout is off")
def dropout_is_off(probe: Probe) -> str:
    """Two passes of the same rows, in the mode that updates use, must be one."""
    trained = probe.models.trained()
    for name in trained:
        rows = probe.own_rows()
        first, second = (train_forward(probe, rows, name == "critic") for _ in range(2))
        probe.must_agree(
            first,
            second,
            f"two passes of the {name}",
            "dropout is on, so old and new log-probabilities differ by noise; see "
            "loading.prepare_training and the model's config (…dropout)",
        )
    return f"two passes of {' and '.join(trained)} are equal"


@check(BEFORE, "rollouts are on-policy")
def rollouts_are_on_policy(probe: Probe) -> str:
    """What rollouts store is what updates recompute."""
    own = probe.own_rows()
    kept = own.response_mask
    said = probe.must_agree(
        own.logprobs[kept],
        train_forward(probe, own).cpu()[kept],
        "stored and recomputed log-probabilities",
        "the ratio would not start at 1; dropout, temperature or another mode of the model",
    )
    if probe.models.critic is None:
        return said
    values = train_forward(probe, own, critic=True).cpu()
    what, cause = "stored and recomputed values", "the value clip would not start at 0"
    return f"{said}; " + probe.must_agree(own.values[kept], values[kept], what, cause)


@check(BEFORE, "reference at the temperature")
def reference_at_the_temperature(probe: Probe) -> str:
    """The KL is to the reference as it is at --temperature, whatever model it is."""
    own = probe.own_rows()
    seen = distributions(probe, own, probe.models.reference).logprobs.cpu()
    at = f"at temperature {probe.config.temperature:g}"
    return probe.must_agree(
        seen[own.response_mask],
        own.ref_logprobs[own.response_mask],
        f"log-probabilities of the reference, by a softmax of its logits {at} and as stored,",
        "the KL would be to another distribution; see rollout.collect and --temperature",
    )


@check(AT_START, "KL 0 at the start")
def no_kl_at_the_start(probe: Probe) -> str:
    """Actor and reference are one, where they are loaded from the same folder."""
    config, rollout = probe.config, probe.rollout
    if config.reference_model not in ("", config.model_name_or_path):
        return f"the reference is another model, {config.reference_model}"
    kept = rollout.response_mask
    what = "log-probabilities of actor and reference"
    cause = "the KL would not start at 0, though both are loaded from the same folder"
    return probe.must_agree(rollout.logprobs[kept], rollout.ref_logprobs[kept], what, cause)
