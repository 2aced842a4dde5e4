"""The self-check's questions about the first optimizer steps: ratio, gradients, averages."""

import torch

from step3_ppo.checks.models import Doubt, Fault, checksum
from utils.checkpoints import engine_state
from utils.distributed import process_group


def on_policy_at_the_first_update(check) -> str:
    """The first minibatch of the first epoch: ratio 1, KL 0, values as stored."""
    found = {
        name: check.metrics.get(f"first_{name}") for name in ("ratio", "approx_kl", "value_gap")
    }
    if found["ratio"] is None:
        raise Doubt("the first optimizer step was skipped; see the lines above")
    gaps = {"ratio": abs(found["ratio"] - 1.0), "approx_kl": found["approx_kl"]}
    if found["value_gap"] is not None:
        gaps["value_gap"] = found["value_gap"]
    # An answer's log-probability is a sum over its tokens, whose roundings add up as a random walk.
    sequence = check.config.action_level == "sequence"
    steps = check.metrics["response_length"] if sequence else 1.0
    # KL is of second order in what log-probabilities differ by.
    limits = {"ratio": steps**0.5, "approx_kl": steps * check.tolerance, "value_gap": 10.0}
    text = ", ".join(f"{name} {value:.3g}" for name, value in found.items() if value is not None)
    for name, gap in gaps.items():
        if not gap <= limits[name] * 10 * check.tolerance:
            raise Fault(
                f"first minibatch, first epoch: {text}; {name} should be {int(name == 'ratio')}: "
                "the update does not see the policy that sampled (dropout, temperature, stale or "
                "shuffled rows)"
            )
    return f"first minibatch: {text}"


def masters(engine) -> int:
    """Checksum of this rank's part of a zero.TrainEngine's fp32 weights, which move by less than
    bf16 shows."""
    return checksum(run.tensors["weight"] for run in engine_state.runs_of(engine))


def weights_move(check) -> str:
    """Where there was a gradient and a rate, and no step was skipped, weights are not as before."""
    said, config = [], check.config
    peaks = {"actor": config.learning_rate}
    peaks["critic"] = config.rate_of_critic()
    for name, engine in check.models.trained().items():
        moved = any(process_group.gather_objects(masters(engine) != check.masters[name]))
        norm, rate = (check.metrics[f"{name}_{x}"] for x in ("grad_norm", "learning_rate"))
        if moved:
            said.append(f"the {name}'s at a learning rate of {rate:.2g}")
        elif check.metrics[f"{name}_skipped"] == 1.0:
            raise Doubt(f"every step of the {name} was skipped; see the lines above")
        elif norm == 0.0:
            said.append(f"not the {name}'s, whose gradient was 0")
        else:
            flag = "learning_rate" if name == "actor" else "critic_learning_rate"
            raise Fault(
                f"no weight of the {name} has moved, with gradients of norm {norm:.2g}: its "
                f"learning rate was {rate:.2g}, of at most {peaks[name]:.2g} (--{flag}); a rate "
                "that rounding swallows, or an optimizer that does not step these weights"
            )
    return f"weights moved: {', '.join(said)}"


def average_moves(check) -> str:
    """The EMA has moved towards the weights, as far as its decay says and no further."""
    ema = check.models.ema
    if ema is None:
        return "no average is kept (--ema_decay 0)"
    own = dict(check.models.actor.module.named_parameters())
    steps, decay = check.config.ppo_epochs * check.config.minibatches(), check.config.ema_decay
    come = 1 - decay**steps  # after n steps an average has come 1 − decayⁿ of the way to …
    moved, followed, astray = 0.0, 0.0, 0.0
    for name, (shadow, weight) in check.watched.items():
        now = getattr(own[name], "ds_tensor", own[name]).detach().float()
        moved = max(moved, float((now - weight).abs().max()))
        followed = max(followed, float((ema.shadow[name] - shadow).abs().max()))
        # … where the weights stood before (of a resumed run, not where the average stood), …
        off = (ema.shadow[name] - shadow - come * (weight - shadow)).abs().nan_to_num(torch.inf)
        rounding = steps * torch.finfo(torch.float32).eps * shadow.abs()
        astray = max(astray, float((off - rounding).max()))
    if moved == 0.0:
        return "the weights themselves have not moved yet at this learning rate and dtype"
    # … give or take that share of their own way since; thrice, for what they went and came back.
    if followed == 0.0 or not astray <= min(1.0, 3 * come) * moved * (1 + 1e-3):
        raise Fault(
            f"the weights moved by up to {moved:.2e} and their average by {followed:.2e}, up to "
            f"{astray:.2e} from where it should be: what is saved as actor_ema is not their "
            f"average at --ema_decay {decay}; see utils/models/ema.py"
        )
    return f"weights moved by up to {moved:.1e}, their average by {followed:.1e}"


def gradients_reach(check) -> str:
    """Every weight that should train has had a gradient; no frozen one has, nor has it changed."""
    counts = []
    for name, engine in check.models.trained().items():
        weights = [n for n, _ in engine.module.named_parameters()]
        missing = [n for n in weights if n not in check.gradients[name]]
        if missing:
            raise Fault(
                f"{len(missing)} of {len(weights)} weights of the {name} had no gradient (first "
                f"{missing[0]}): they are frozen or not on the path to the loss and will not train"
            )
        counts.append(f"{len(weights)} of the {name}")
    for name, model in check.models.frozen().items():
        trained = [n for n, p in model.named_parameters() if p.requires_grad or p.grad is not None]
        if trained:
            raise Fault(f"the {name} is to be frozen, and {trained[0]} is trained")
        now = checksum(model.parameters())
        if now != check.sums[name]:
            raise Fault(
                f"the {name} is to be frozen, and its weights changed (checksum "
                f"{check.sums[name]:x} → {now:x}): does it share tensors with a trained model?"
            )
    unchanged = ", ".join(check.models.frozen())
    return f"gradients reached all {' and all '.join(counts)}; {unchanged} unchanged"
