"""Checks of models: generation, padding, modes, reference."""

import dataclasses

import torch
from torch.nn.functional import pad

from step3_ppo.checks.probe import (
    AFTER,
    AT_START,
    BEFORE,
    COPIES,
    MOST_TOKENS,
    NOISE,
    Fault,
    Probe,
    check,
    distributions,
    train_forward,
    worst,
)
from utils.distributed import process_group, zero
from utils.generation import sampling as generation
from utils.generation.engine import Request, Sampling, synced

PADS = 7  # on either side, beside those that rows of different lengths need


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
        masked = dataclasses.replace(sampling, nucleus=models.nucleus)
        sampled = engine.generate(Request(*prompts, noise), masked)
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
        return f"{equal} ({engine.name} returns no log-probabilities)"
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
    answers["action_mask"] = samples.response_mask
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


@check(BEFORE, "padding changes nothing")
def padding_invariance(probe: Probe) -> str:
    """Log-probabilities, values and scores of rows alone and together with pads on either side."""
    models, some, said = probe.models, probe.own_rows(), []
    rows = range(0, len(some.scores), COPIES)  # one answer to each prompt
    some = some.select(list(rows))
    left, right, pad_id = (PADS, 0), (0, PADS), models.tokenizer.pad_token_id
    padded = dataclasses.replace(
        some,
        prompt_ids=pad(some.prompt_ids, left, value=pad_id),
        prompt_mask=pad(some.prompt_mask, left),
        response_ids=pad(some.response_ids, right, value=pad_id),
        response_mask=pad(some.response_mask, right),
    )
    names = [*models.trained(), "reference"]
    if models.reward is not None and not models.reward.by_text:
        names.append("reward model")
    for name in names:
        alone = [train_forward(probe, some.select([i]), name)[0] for i in range(len(rows))]
        among = train_forward(probe, padded, name)[padded.response_mask.to(probe.device)]
        said.append(
            probe.must_agree(
                torch.cat(alone),
                among,
                f"the {name} on rows alone and among pads",
                "attention mask or position ids do not follow the padding; see "
                "language_model.forward_inputs, or another --attn_implementation",
            )
        )
    return "; ".join(said)


@check(BEFORE, "dropout is off")
def dropout_is_off(probe: Probe) -> str:
    """Two passes of the same rows, in the mode that updates use, must be one."""
    own, trained = probe.own_rows(), probe.models.trained()
    for name in trained:
        probe.must_agree(
            *(train_forward(probe, own, name) for _ in range(2)),
            f"two passes of the {name}",
            "dropout is on, so old and new log-probabilities differ by noise; see "
            "loading.prepare_training and the model's config (…dropout)",
        )
    return f"two passes of {' and '.join(trained)} are equal"


@check(BEFORE, "rollouts are on-policy")
def rollouts_are_on_policy(probe: Probe) -> str:
    """What rollouts store is what updates recompute."""
    own = probe.own_rows()
    kept = own.action_mask
    said = probe.must_agree(
        own.logprobs[kept],
        train_forward(probe, own).cpu()[kept],
        "stored and recomputed log-probabilities",
        "the ratio would not start at 1; dropout, temperature or another mode of the model",
    )
    if probe.models.critic is None:
        return said
    values = train_forward(probe, own, "critic").cpu()
    what, cause = "stored and recomputed values", "the value clip would not start at 0"
    return f"{said}; " + probe.must_agree(own.values[kept], values[kept], what, cause)


@check(BEFORE, "reference at the temperature")
def reference_at_the_temperature(probe: Probe) -> str:
    """The KL is to the reference as it is at --temperature, whatever model it is."""
    own = probe.own_rows()
    seen = distributions(probe, own, probe.models.reference).logprobs.cpu()
    at = f"at temperature {probe.config.temperature:g}"
    return probe.must_agree(
        seen[own.action_mask],
        own.ref_logprobs[own.action_mask],
        f"log-probabilities of the reference, by a softmax of its logits {at} and as stored,",
        "the KL would be to another distribution; see rollout.collect and --temperature",
    )


@check(AT_START, "KL 0 at the start")
def no_kl_at_the_start(probe: Probe) -> str:
    """Actor and reference are one, where they are loaded from the same folder."""
    config, rollout = probe.config, probe.rollout
    if config.reference_model not in ("", config.model_name_or_path):
        return f"the reference is another model, {config.reference_model}"
    if probe.models.nucleus is not None:
        return "the actor leaves tokens out (nlpo), and the KL begins at what that makes"
    kept = rollout.action_mask
    what = "log-probabilities of actor and reference"
    cause = "the KL would not start at 0, though both are loaded from the same folder"
    return probe.must_agree(rollout.logprobs[kept], rollout.ref_logprobs[kept], what, cause)
