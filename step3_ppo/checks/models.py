"""The self-check's questions about models: generation, padding, modes.

A check takes the running SelfCheck, returns what it measured, or raises Fault (the run stops,
unless --self_check warn) or Doubt (a warning).
"""

import dataclasses
from dataclasses import dataclass

import torch

from step3_ppo.rollout import Rollout
from utils.distributed import process_group, zero
from utils.generation import sampling as generation
from utils.models import language_model, scorer

WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
CHECKSUM_CHUNK = 2**22  # weights summed at once: 32 MB of positions
PROBE_COPIES, PROBE_TOKENS, PROBE_NOISE = 4, 32, 2**31 + 7  # a noise that no rollout draws
LOGITS_AT_ONCE = 2**26  # numbers; 256 MiB in fp32


class Fault(Exception):
    """What is wrong, the values, the likely cause, and what mends it."""


class Doubt(Exception):
    """As Fault, of what may be meant."""


@torch.no_grad()
def checksum(weights) -> int:
    """Of this rank's tensors and of where they stand: Σ bits × (2·position + 1), modulo 2⁶⁴.

    Sums of whole numbers are the same in any order, so on any device. One bit that flips always
    changes it (odd × 2ᵏ is not 0), and so do two numbers of up to 32 bits that change places.
    """
    total = position = 0
    for p in weights:
        weight = getattr(p, "ds_tensor", p).detach().reshape(-1)
        for bits in weight.view(WHOLE_NUMBERS[weight.element_size()]).split(CHECKSUM_CHUNK):
            place = torch.arange(position, position + len(bits), device=bits.device)
            total += int(place.mul_(2).add_(1).mul_(bits).sum())
            position += len(bits)
    return total % 2**64


def apart(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """(mean, maximum) of |a − b| relative to 1 + |a|; infinite where either is not finite."""
    gap = ((a.float() - b.float()).abs() / (1 + a.float().abs())).nan_to_num(torch.inf, torch.inf)
    return (float(gap.mean()), float(gap.max())) if gap.numel() else (0.0, 0.0)


def worst(*gaps: float) -> list[float]:
    """The largest of each over the ranks: one that stopped alone would leave the others waiting."""
    return [max(gap) for gap in zip(*process_group.gather_objects(gaps), strict=True)]


def must_agree(check, a, b, what: str, cause: str) -> str:
    mean, most = worst(*apart(a, b))
    if mean > check.tolerance or most > 10 * check.tolerance:
        raise Fault(
            f"{what} differ by {mean:.2g} on average and {most:.2g} at most (allowed "
            f"{check.tolerance:.0e} and {10 * check.tolerance:.0e}): {cause}"
        )
    return f"{what} within {most:.1e}"


def own_rows(check) -> Rollout:
    """The probe's rows that this rank has drawn, as many on every rank. A check that runs a model
    runs it on these, so what it costs does not grow with the ranks."""
    rank, world = process_group.rank(), process_group.world_size()
    return check.probe.select(list(range(rank, len(check.probe.scores), world)))


def _batch(check, rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,P+R) ids and mask on the device. A rollout lies on the CPU, what was just decoded does
    not."""
    ids = (rollout.prompt_ids, rollout.response_ids)
    masks = (rollout.prompt_mask, rollout.response_mask)
    return tuple(torch.cat([x.to(check.device) for x in pair], 1) for pair in (ids, masks))


@torch.no_grad()
def train_forward(check, rollout, critic: bool = False) -> torch.Tensor:
    """(B,R) log-probabilities (or values) by the forward pass that updates take, in train mode."""
    ids, mask = _batch(check, rollout)
    length, pieces = rollout.response_ids.shape[1], []
    micro = check.config.micro_batch_size
    for i, m in zip(ids.split(micro), mask.split(micro), strict=True):
        if critic:
            pieces.append(check.models.critic(i, m)[:, -length - 1 : -1])
        else:
            settings = (length, check.config.temperature)
            pieces.append(language_model.new_logprobs(check.models.actor, i, m, *settings))
    return torch.cat(pieces)


@dataclass
class Distributions:
    """What the training forward says of each response position: (B,R) fp32 each, in nats."""

    logprobs: torch.Tensor  # of the token that stands there
    best: torch.Tensor  # of the likeliest token
    entropies: torch.Tensor
    variances: torch.Tensor  # of −log p under p


@torch.no_grad()
def distributions(check, rollout, model=None) -> Distributions:
    """Of the actor, or of `model`. Logits exist for a few rows at a time: all of them would be
    gigabytes."""
    model = model or check.models.actor
    ids, mask = _batch(check, rollout)
    length = rollout.response_ids.shape[1]
    # Reckoned with the limit and not with this rank's length, so that ranks go in step.
    row = PROBE_TOKENS * check.models.actor.module.config.vocab_size
    micro = max(1, min(check.config.micro_batch_size, LOGITS_AT_ONCE // row))
    pieces = []
    for i, m in zip(ids.split(micro), mask.split(micro), strict=True):
        logits = language_model.response_logits(model, i, m, length)
        # Impossible tokens (−∞) add 0 to the sums, where 0 × −∞ would be no number.
        logs = (logits.float() / check.config.temperature).log_softmax(-1).clamp(min=-1e4)
        own = logs.gather(-1, i[:, -length:, None]).squeeze(-1)
        p = logs.exp()
        entropy = -torch.linalg.vecdot(p, logs)
        variance = torch.linalg.vecdot(p, logs.square()) - entropy.square()
        pieces.append((own, logs.amax(-1), entropy, variance.clamp(min=0)))
    return Distributions(*map(torch.cat, zip(*pieces, strict=True)))


def generator_equals_model(check) -> str:
    """Greedy tokens and the log-probabilities of sampled ones, decode loop against training."""
    probe, models = own_rows(check), check.models
    limit = min(check.config.max_response_length, PROBE_TOKENS)
    shape = (len(check.probe.scores), limit, check.config.seed, PROBE_NOISE + 1)
    noise = generation.uniform_noise(*shape)[process_group.rank() :: process_group.world_size()]
    drawn, engine = {}, models.rollout_engine
    with models.hybrid.generating() as generator:
        stale = _stale_weights(models.actor.module, generator)
        drawn["greedy"] = _decode(check, probe, limit, None)
        drawn["sampled"] = _decode(check, probe, limit, noise)
    stale = sorted(set().union(*process_group.gather_objects(stale)))
    if stale:
        raise Fault(
            f"{len(stale)} weights of the generator are not those of the trained model (first "
            f"{stale[0]}): it is stale or damaged; see utils/generation/hybrid_engine.py"
        )
    responses, _ = drawn["greedy"]
    kept = generation.mask_through_stop(responses, models.tokenizer.eos_token_id)
    seen = distributions(
        check, dataclasses.replace(probe, response_ids=responses, response_mask=kept)
    )
    short = worst(float((seen.best - seen.logprobs)[kept].max()))[0]
    # Written so that nan fails.
    if not short <= 10 * check.tolerance:
        raise Fault(
            f"greedy tokens of the decode loop are up to {short:.2g} nats below the best "
            "token of the training forward: cache, position ids or left padding are wrong "
            "for this model; see utils/generation/sampling.py"
        )
    responses, logprobs = drawn["sampled"]
    if logprobs is None:
        return (
            f"greedy tokens equal up to {short:.1e} nats ({engine.name} tells no log-probabilities)"
        )
    kept = generation.mask_through_stop(responses, models.tokenizer.eos_token_id)
    sampled = dataclasses.replace(probe, response_ids=responses, response_mask=kept)
    found = must_agree(
        check,
        train_forward(check, sampled)[kept],
        logprobs[kept],
        "log-probabilities of sampled tokens, decode loop and training forward,",
        "cache, position ids, left padding or temperature; see utils/generation/sampling.py",
    )
    return f"greedy tokens equal up to {short:.1e} nats, {found}"


def _decode(check, probe, limit: int, noise: torch.Tensor | None):
    """(B,P) prompts of `probe` → (B,R) responses and their log-probabilities (or None), in batches
    as large as a rollout's. noise: (B,R), or None for greedy tokens."""
    from utils.generation.engine import Request, Sampling

    tokenizer = check.models.tokenizer
    ids, mask = probe.prompt_ids.to(check.device), probe.prompt_mask.to(check.device)
    settings = Sampling(
        limit,
        check.config.temperature,
        stop_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        logprobs=True,
    )
    widths, found = probe.prompt_mask.sum(1).tolist(), []
    for rows in generation.batches_of(widths, limit, check.config.generation_tokens):
        left = ids.shape[1] - max(widths[rows])  # pads that none of them needs
        request = Request(
            ids[rows, left:], mask[rows, left:], None if noise is None else noise[rows]
        )
        batch = check.models.rollout_engine.generate(request, settings)
        found.append((batch.response_ids, batch.logprobs))
    return [None if x[0] is None else torch.cat(x) for x in zip(*found, strict=True)]


@torch.no_grad()
def _stale_weights(module, generator) -> list[str]:
    """Names of the generator's weights that are not bit for bit those of `module`."""
    twins, found = dict(generator.named_parameters()), []
    if generator is module:
        return found
    for name, p in module.named_parameters():
        with zero.gathered([p]):
            if not torch.equal(p.detach(), twins[name].detach()):
                found.append(name)
    return found


@torch.no_grad()
def padding_invariance(check) -> str:
    """Log-probabilities, values and scores of a row alone and with pads on either side."""
    models, pads, most = check.models, 14, 0.0
    pad_id = models.tokenizer.pad_token_id
    for row in range(0, len(check.probe.scores), PROBE_COPIES * process_group.world_size()):
        one = check.probe.select([row])
        alone = torch.cat([one.prompt_ids, one.response_ids], 1)[0].tolist()
        start, end = one.prompt_ids.shape[1], len(alone)
        lefts = (0, 1, 7, pads)
        padded = [[pad_id] * left + alone + [pad_id] * (pads - left) for left in lefts]
        flags = [[False] * n + [True] * end + [False] * (pads - n) for n in lefts]

        def read(model, kind, ids, mask, lefts=(0,), start=start, end=end):
            ids, mask = torch.tensor(ids).to(check.device), torch.tensor(mask).to(check.device)
            if kind == "score":
                return scorer.sequence_scores(model, ids, mask)[:, None]
            if kind == "value":
                found = model(ids, mask)
            else:
                found = language_model.new_logprobs(model, ids, mask, ids.shape[1] - 1, 1.0)
            return torch.stack([found[i, n + start - 1 : n + end - 1] for i, n in enumerate(lefts)])

        asked = [("actor", "logprob", models.actor), ("reference", "logprob", models.reference)]
        if models.critic is not None:
            asked.append(("critic", "value", models.critic))
        if models.reward is not None and not models.reward.by_text:
            asked.append(("reward model", "score", models.reward.model))
        for name, kind, model in asked:
            plain = read(model, kind, [alone], [[True] * end])
            moved = read(model, kind, padded, flags, lefts)
            must_agree(
                check,
                plain.expand_as(moved),
                moved,
                f"the {name}'s {kind}s of one row with 0, 1, 7 and {pads} left pads",
                "attention mask or position ids do not follow the padding; see "
                "language_model.forward_inputs, or another --attn_implementation",
            )
            most = max(most, apart(plain.expand_as(moved), moved)[1])
    return f"every model within {most:.1e} for 0 to {pads} pads on either side"


def dropout_is_off(check) -> str:
    """Two passes of the same rows, in the mode that updates use, must be one."""
    for name in check.models.trained():
        rows = own_rows(check)
        first, second = (train_forward(check, rows, name == "critic") for _ in range(2))
        must_agree(
            check,
            first,
            second,
            f"two passes of the {name}",
            "dropout is on, so old and new log-probabilities differ by noise; see "
            "loading.prepare_training and the model's config (…dropout)",
        )
    return f"two passes of {' and '.join(check.models.trained())} are equal"


def rollouts_are_on_policy(check) -> str:
    """What rollouts store is what updates recompute."""
    probe = own_rows(check)
    kept = probe.response_mask
    logprobs = train_forward(check, probe).cpu()
    found = [
        must_agree(
            check,
            probe.logprobs[kept],
            logprobs[kept],
            "stored and recomputed log-probabilities",
            "the ratio would not start at 1; dropout, temperature or another mode of the model",
        )
    ]
    if check.models.critic is not None:
        values = train_forward(check, probe, critic=True).cpu()
        what, cause = "stored and recomputed values", "the value clip would not start at 0"
        found.append(must_agree(check, probe.values[kept], values[kept], what, cause))
    return "; ".join(found)


def reference_at_the_temperature(check) -> str:
    """The KL is to the reference as it is at --temperature, whatever model it is."""
    probe = own_rows(check)
    kept = probe.response_mask
    seen = distributions(check, probe, check.models.reference).logprobs.cpu()
    at = f"at temperature {check.config.temperature:g}"
    return must_agree(
        check,
        seen[kept],
        probe.ref_logprobs[kept],
        f"log-probabilities of the reference, by a softmax of its logits {at} and as stored,",
        "the KL would be to another distribution; see rollout.collect and --temperature",
    )


def no_kl_at_the_start(check) -> str:
    """Actor and reference are one, where they are loaded from the same folder."""
    if check.config.reference_model not in ("", check.config.model_name_or_path):
        return f"the reference is another model, {check.config.reference_model}"
    probe = check.probe
    kept = probe.response_mask
    what = "log-probabilities of actor and reference"
    cause = "the KL would not start at 0, though both are loaded from the same folder"
    return must_agree(check, probe.logprobs[kept], probe.ref_logprobs[kept], what, cause)


def generator_after_the_step(check) -> str:
    """Fresh weights reach the generator."""
    return generator_equals_model(check)
