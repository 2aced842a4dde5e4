"""Checks of the first optimizer steps: ratio, gradients, weights, averages."""

import torch

from step3_ppo.checks.probe import AFTER, FirstSteps, check
from utils.checkpoints import engine_state
from utils.distributed import process_group, zero
from utils.models import adapters, freezing
from utils.models.freezing import Freezing
from utils.verdicts import Doubt, Fault

WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
CHECKSUM_CHUNK = 2**22  # weights summed at once: 32 MB of positions
AVERAGES_KEPT = 4  # small matrices, of which copies are kept


@torch.no_grad()
def checksum(weights) -> int:
    """Of this rank's tensors and of where they stand: Σ bits × (2·position + 1), modulo 2⁶⁴.

    Sums of whole numbers are the same in any order, so on any device. One bit that flips always
    changes it (odd × 2ᵏ is not 0), and so do two numbers of up to 32 bits that change places.
    """
    total = position = 0
    for p in weights:
        weight = zero.local(p).reshape(-1)
        for bits in weight.view(WHOLE_NUMBERS[weight.element_size()]).split(CHECKSUM_CHUNK):
            place = torch.arange(position, position + len(bits), device=bits.device)
            total += int(place.mul_(2).add_(1).mul_(bits).sum())
            position += len(bits)
    return total % 2**64


def masters(engine) -> int:
    """Checksum of this rank's part of a zero.TrainEngine's fp32 weights, which move by less than
    bf16 shows."""
    spans = engine_state.spans_of(engine)
    return checksum(s.tensors["weight"] for s in spans if "weight" in s.tensors)


def held_still(models) -> dict[str, dict[str, torch.Tensor]]:
    """The weights that no step may change, by whose they are and name: those of frozen models, and
    what stands beside adapters."""
    found = {name: dict(model.named_parameters()) for name, model in models.frozen().items()}
    for name, engine in models.trained().items():
        own = dict(adapters.own_of(engine.module))
        base = {n: p for n, p in engine.module.named_parameters() if n not in own}
        found |= {f"{name}'s base": base} if base else {}
    return found


class WeightsBefore:
    """The weights as they are before the first optimizer step, and from then on which of the
    trained ones get a gradient."""

    def __init__(self, models):
        self.gradients: dict[str, set[str]] = {name: set() for name in models.trained()}
        self._hooks = []
        for name, engine in models.trained().items():
            for weight, p in engine.module.named_parameters():
                if p.requires_grad:
                    seen = self.gradients[name]
                    hook = p.register_hook(lambda _, weight=weight, seen=seen: seen.add(weight))
                    self._hooks.append(hook)
        self.masters = {name: masters(engine) for name, engine in models.trained().items()}
        self.frozen = {name: checksum(of.values()) for name, of in held_still(models).items()}
        self.averaged: dict[str, tuple] = {}  # name → copies of an EMA's matrix and of the actor's
        if models.ema is not None:
            own = models.actor.module.named_parameters()
            own = {
                n: zero.local(p) for n, p in own if zero.rank_of(p) > 1 and zero.local(p).numel()
            }
            few = sorted(own, key=lambda n: (own[n].numel(), n))[:AVERAGES_KEPT]
            shadow = models.ema.shadow
            self.averaged = {n: (shadow[n].clone(), own[n].float().clone()) for n in few}

    def stop_watching(self) -> None:
        for hook in self._hooks:
            hook.remove()


@check(AFTER, "on-policy at the first update")
def on_policy_at_the_first_update(steps: FirstSteps) -> str:
    """The first minibatch of the first epoch: ratio 1, KL 0, values as stored."""
    metrics, tolerance = steps.metrics, steps.probe.tolerance
    # An answer's log-probability is a sum over its tokens, whose roundings add up as a random walk.
    sequence = steps.probe.config.action_level == "sequence"
    tokens = metrics["response_length"] if sequence else 1.0
    # name: (expected, tolerances that it may be off). KL is of second order in the differences.
    allowed = {
        "ratio": (1, 10 * tokens**0.5),
        "approx_kl": (0, 10 * tokens * tolerance),
        "value_gap": (0, 100),
    }
    first = {n: metrics[f"first_{n}"] for n in allowed if f"first_{n}" in metrics}
    if "ratio" not in first:
        raise Doubt("the first optimizer step was skipped; see the lines above")
    if first["ratio"] == 0:  # the mean over no action
        raise Doubt("every answer of the first minibatch is cut, and --mask_cut_answers is set")
    text = ", ".join(f"{name} {value:.3g}" for name, value in first.items())
    for name, value in first.items():
        expected, limit = allowed[name]
        if not abs(value - expected) <= limit * tolerance:
            raise Fault(
                f"first minibatch, first epoch: {text}; {name} should be {expected}: the update "
                "does not see the policy that sampled (dropout, temperature, stale or shuffled "
                "rows)"
            )
    return f"first minibatch: {text}"


@check(AFTER, "gradients")
def gradients_reach(steps: FirstSteps) -> str:
    """Every weight that should train has had a gradient; no frozen one has, nor has it changed."""
    models, before, counts = steps.probe.models, steps.weights, []
    held = freezing.frozen_by(models.actor.module, steps.probe.config.pick(Freezing))
    for name, engine in models.trained().items():
        weights = {n for n, _ in adapters.own_of(engine.module)}
        weights = sorted(weights - held if name == "actor" else weights)
        missing = [n for n in weights if n not in before.gradients[name]]
        if missing:
            raise Fault(
                f"{len(missing)} of {len(weights)} weights of the {name} had no gradient (first "
                f"{missing[0]}): they are frozen or not on the path to the loss and will not train"
            )
        counts.append(f"{len(weights)} of the {name}")
    if held & before.gradients["actor"]:
        raise Fault("weights that --freeze… names had a gradient: they are trained")
    for name, weights in held_still(models).items():
        trained = [n for n, p in weights.items() if p.requires_grad or p.grad is not None]
        if trained:
            raise Fault(f"the {name} is to be frozen, and {trained[0]} is trained")
        now = checksum(weights.values())
        if now != before.frozen[name]:
            raise Fault(
                f"the {name} is to be frozen, and its weights changed (checksum "
                f"{before.frozen[name]:x} → {now:x}): does it share tensors with a trained model?"
            )
    unchanged = ", ".join(before.frozen)
    return f"gradients reached all {' and all '.join(counts)}; {unchanged} unchanged"


@check(AFTER, "weights move")
def weights_move(steps: FirstSteps) -> str:
    """Where there was a gradient and a rate, and no step was skipped, weights are not as before."""
    said, metrics = [], steps.metrics
    for name, engine in steps.probe.models.trained().items():
        changed = masters(engine) != steps.weights.masters[name]
        norm, rate = (metrics[f"{name}_{x}"] for x in ("grad_norm", "learning_rate"))
        if any(process_group.gather_objects(changed)):
            said.append(f"the {name}'s at a learning rate of {rate:.2g}")
        elif metrics[f"{name}_skipped"] == 1.0:
            raise Doubt(f"every step of the {name} was skipped; see the lines above")
        elif name == "actor" and metrics.get("trust_region_step") == 0.0:
            said.append("not the actor's, as no part of a step kept to --trust_region")
        elif norm == 0.0:
            said.append(f"not the {name}'s, whose gradient was 0")
        else:
            flag = "learning_rate" if name == "actor" else "critic_learning_rate"
            raise Fault(
                f"no weight of the {name} has moved, with gradients of norm {norm:.2g} at --{flag} "
                f"{rate:.2g}: rounding swallows such a rate, or the optimizer steps other weights"
            )
    return f"weights moved: {', '.join(said)}"


@check(AFTER, "average")
def average_moves(steps: FirstSteps) -> str:
    """The EMA has moved towards the weights, as far as its decay says and no further."""
    models, config = steps.probe.models, steps.probe.config
    if models.ema is None:
        return "no average is kept (--ema_decay 0)"
    own = dict(models.actor.module.named_parameters())
    updates = config.ppo_epochs * config.minibatches()
    share = 1 - config.ema_decay**updates  # of the way to the weights, after so many updates
    moved, followed, astray = 0.0, 0.0, 0.0
    for name, (shadow, weight) in steps.weights.averaged.items():
        average = models.ema.shadow[name]
        moved = max(moved, float((zero.local(own[name]).float() - weight).abs().max()))
        followed = max(followed, float((average - shadow).abs().max()))
        # Taken to where the weights stood before; a resumed run's average may lie elsewhere.
        off = (average - shadow - share * (weight - shadow)).abs().nan_to_num(torch.inf)
        rounding = updates * torch.finfo(torch.float32).eps * shadow.abs()
        astray = max(astray, float((off - rounding).max()))
    if moved == 0.0:
        return "the weights themselves have not moved yet at this learning rate and dtype"
    # They have moved since, and the average by the same share of that; three times as much, as they
    # may have gone and come back.
    if followed == 0.0 or not astray <= min(1.0, 3 * share) * moved * (1 + 1e-3):
        raise Fault(
            f"the weights moved by up to {moved:.2e} and their average by {followed:.2e}, up to "
            f"{astray:.2e} from where it should be: what is saved as actor_ema is not their "
            f"average at --ema_decay {config.ema_decay}; see utils/models/ema.py"
        )
    return f"weights moved by up to {moved:.1e}, their average by {followed:.1e}"
