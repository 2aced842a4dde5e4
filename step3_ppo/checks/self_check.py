"""What must hold before PPO may train, one function a check. The worst failures are silent.

A check returns what it measured, or raises Fault (the run stops, unless --self_check warn) or Doubt
(a warning). The first part runs before the first step on a probe of a few held-out prompts; the
second looks at the run's own first rollout and the optimizer steps on it, so that no state has to
be put back. Every rank runs every check on the same rows and takes part in every collective.

A resumed run may be on another machine, with other libraries or ranks, so it is checked too, once
its checkpoint is read. No check draws what its rollouts would miss: it ends as if never stopped.
"""

import dataclasses
import sys

from step3_ppo import rollout as rollouts
from step3_ppo.checks import (
    alignment as check_alignment,
)
from step3_ppo.checks import (
    data as check_data,
)
from step3_ppo.checks import (
    models as check_models,
)
from step3_ppo.checks import (
    updates as check_updates,
)
from step3_ppo.checks.models import PROBE_COPIES, PROBE_NOISE, PROBE_TOKENS, Doubt, Fault
from utils.distributed import process_group, zero
from utils.distributed.process_group import StopRun
from utils.seeding import undisturbed

PROBE_PROMPTS = 8
# Mean difference, relative to 1 + |x|, that rounding explains; one token may have ten times it.
TOLERANCE = {"fp32": 5e-5, "fp16": 4e-3, "bf16": 2e-2}


BEFORE = {
    "generator equals model": check_models.generator_equals_model,
    "padding changes nothing": check_models.padding_invariance,
    "dropout is off": check_models.dropout_is_off,
    "rollouts are on-policy": check_models.rollouts_are_on_policy,
    "reference at the temperature": check_models.reference_at_the_temperature,
    "scores belong to their answers": check_alignment.scores_of_the_probe,
    "samples follow the policy": check_data.samples_follow_the_policy,
    "ranks and rows draw apart": check_data.ranks_and_rows_draw_apart,
    "stop token": check_data.stop_token,
    "same language": check_data.same_language,
    "reward model": check_data.reward_model_sanity,
    "data": check_data.prompts_are_apart,
}
# Of weights that nothing has been trained yet. A resumed run leaves these out.
AT_START = {
    "KL 0 at the start": check_models.no_kl_at_the_start,
}
AFTER = {
    "on-policy at the first update": check_updates.on_policy_at_the_first_update,
    "scores of the rollout": check_alignment.scores_of_the_rollout,
    "advantages reach their tokens": check_alignment.advantages_reach_their_tokens,
    "generator equals the stepped model": check_models.generator_after_the_step,
    "gradients": check_updates.gradients_reach,
    "weights move": check_updates.weights_move,
    "average": check_updates.average_moves,
}


class SelfCheck:
    """Runs the checks. prompts, held: lists of rollout.Prompt; say: prints on the main rank."""

    def __init__(self, models, prompts, held, config, device, say):
        self.models, self.prompts, self.held = models, prompts, held
        self.config, self.device, self.say = config, device, say
        self.tolerance = TOLERANCE[zero.resolve_dtype(config.dtype, device)]
        self.probe = self.experience = self.rollout = None
        self.asked: list = []  # the probe's prompts, one a row
        self.probe_seconds: dict[str, float] = {}
        self.sampled: list = []  # the first rollout's
        self.followed = check_alignment.Followed()
        self.metrics: dict[str, float] = {}
        self.gradients: dict[str, set[str]] = {"actor": set(), "critic": set()}
        self.hooks: list = []
        self.sums: dict[str, int] = {}
        self.masters: dict[str, int] = {}
        self.watched: dict[str, tuple] = {}

    def before_the_first_step(self, done: int) -> None:
        """The first part, after `done` rollouts: of the run, when it is resumed. Raises StopRun
        with every fault, where --self_check is on."""
        if self.config.self_check == "off":
            return
        with undisturbed(self.device):  # a reward function of the user's may draw too
            self._before(done)

    def _before(self, done: int) -> None:
        short = min(self.config.max_response_length, PROBE_TOKENS)
        small = dataclasses.replace(self.config, max_response_length=short)
        ordered = sorted(self.held, key=lambda p: len(p.ids))
        some = ordered[:: -(-len(ordered) // PROBE_PROMPTS)]
        self.asked = [p for p in some for _ in range(PROBE_COPIES * process_group.world_size())]
        self.probe, self.probe_seconds = rollouts.collect(
            self.models, self.asked, small, self.device, PROBE_NOISE
        )
        if done:
            less = f"left out, true of untrained weights alone: {', '.join(AT_START)}"
            self._run(BEFORE, f"resumed at rollout {done + 1} ({less})")
        else:
            self._run(BEFORE | AT_START, "before the first step")
        for name, engine in self.models.trained().items():
            for weight, p in engine.module.named_parameters():
                if p.requires_grad:
                    seen = self.gradients[name]
                    self.hooks.append(p.register_hook(lambda _, w=weight, s=seen: s.add(w)))
        frozen = self.models.frozen().items()
        self.sums = {name: check_models.checksum(model.parameters()) for name, model in frozen}
        self.masters = {name: check_updates.masters(e) for name, e in self.models.trained().items()}
        self.watched = self._averages()

    @property
    def follow(self) -> check_alignment.Followed | None:
        """Who looks on at the first optimizer step; None at any later one."""
        return None if self.config.self_check == "off" or self.rollout else self.followed

    def after_the_first_rollout(self, sampled, experience, metrics: dict[str, float]) -> None:
        """The second part, once. sampled: the prompts of the rollout's rows."""
        if self.config.self_check == "off" or self.rollout is not None:
            return
        self.sampled, self.experience, self.metrics = sampled, experience, metrics
        self.rollout = experience.rollout
        for hook in self.hooks:
            hook.remove()
        with undisturbed(self.device):
            self._run(AFTER, "after the first rollout's updates")
        self.probe, self.experience, self.watched = None, None, {}
        self.followed.seen.clear()

    def _averages(self) -> dict[str, tuple]:
        """A few matrices of the EMA and of the actor, by name: (shadow, weight), copies."""
        if self.models.ema is None:
            return {}
        own = {n: p for n, p in self.models.actor.module.named_parameters() if zero.rank_of(p) > 1}
        own = {n: getattr(p, "ds_tensor", p).detach() for n, p in own.items()}
        few = sorted((n for n in own if own[n].numel()), key=lambda n: (own[n].numel(), n))[:4]
        shadow = self.models.ema.shadow
        return {n: (shadow[n].clone(), own[n].float().clone()) for n in few}

    def _run(self, checks: dict, when: str) -> None:
        self.say(f"self-check, {when}:")
        faults = []
        for name, check in checks.items():
            verdict = None
            try:
                verdict = ("passed", check(self))
            except Doubt as doubt:
                verdict = ("DOUBT", str(doubt))
            except Fault as fault:
                verdict = ("FAULT", str(fault))
            finally:
                if verdict is None:  # another error ends the run, as it would anywhere
                    rank = process_group.rank()
                    told = f"self-check, {when}: {name!r} broke off on rank {rank}, no verdict:"
                    print(told, file=sys.stderr, flush=True)
            # One rank's fault is everybody's: all ranks stop, at the same place.
            verdicts = process_group.gather_objects(verdict)
            level, text = min(verdicts, key=lambda v: ("FAULT", "DOUBT", "passed").index(v[0]))
            self.say(f"  {level}  {name}: {text}")
            if level == "FAULT":
                faults.append(f"{name}: {text}")
        if self.models.frozen_offload is not None:
            self.models.frozen_offload.park()  # what the questions brought to the GPU
        if faults and self.config.self_check == "on":
            raise StopRun(
                f"the self-check found {len(faults)} fault{'s'[: len(faults) > 1]}, nothing was "
                "trained on past this point (--self_check warn goes on all the same):\n  - "
                + "\n  - ".join(faults)
            )
