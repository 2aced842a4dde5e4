"""What must hold before PPO may train, as the worst failures are silent.

The first part runs before the first step on a probe of a few held-out prompts; the second looks at
the run's own first rollout and the optimizer steps on it, so that no state has to be put back. A
resumed run may be on another machine, with other libraries or ranks, so it is checked too, once
its checkpoint is read. No check draws random numbers that its rollouts would miss.
"""

import dataclasses

import step3_ppo.checks.data  # noqa: F401  (registers its checks)
import step3_ppo.checks.models  # noqa: F401
from step3_ppo import rollout as rollouts
from step3_ppo.checks import alignment, probe, updates
from step3_ppo.checks.probe import AFTER, AT_START, BEFORE, FirstSteps, Probe
from utils import verdicts
from utils.distributed import process_group, zero
from utils.seeding import undisturbed

PROBE_PROMPTS = 8
TOLERANCE = {"fp32": 5e-5, "fp16": 4e-3, "bf16": 2e-2}  # that rounding explains, see Probe


class SelfCheck:
    """Runs the checks. train, held: Prompts; say: prints on the main rank.

    follow: looks on at the first optimizer step; None afterwards, and where --self_check is off.
    """

    def __init__(self, models, train, held, config, device, say):
        self.models, self.train, self.held = models, train, held
        self.config, self.device, self.say = config, device, say
        self.follow = None if config.self_check == "off" else alignment.LossTrace()
        self.probe: Probe | None = None
        self.weights: updates.WeightsBefore | None = None

    def before_the_first_step(self, done: int) -> None:
        """The first part, after `done` rollouts: of the run, when it is resumed. Raises StopRun
        with every fault, where --self_check is on."""
        if self.follow is None:
            return
        with undisturbed(self.device):  # a reward function of the user's may draw too
            self.probe = self._draw()
            if done:
                less = f"left out, true of untrained weights alone: {', '.join(AT_START)}"
                self._run(BEFORE, self.probe, f"resumed at rollout {done + 1} ({less})")
            else:
                self._run(BEFORE | AT_START, self.probe, "before the first step")
            self.weights = updates.WeightsBefore(self.models)

    def after_the_first_rollout(self, asked, experience, metrics: dict[str, float]) -> None:
        """The second part, once. asked: the prompts of the rollout's rows."""
        if self.follow is None:
            return
        self.weights.stop_watching()
        steps = FirstSteps(self.probe, experience, asked, metrics, self.follow, self.weights)
        with undisturbed(self.device):
            self._run(AFTER, steps, "after the first rollout's updates")
        self.follow = self.probe = self.weights = None

    def _draw(self) -> Probe:
        """Answers to prompts of all lengths."""
        short = min(self.config.max_response_length, probe.MOST_TOKENS)
        small = dataclasses.replace(self.config, max_response_length=short)
        ordered = sorted(self.held, key=lambda p: len(p.ids))
        some = ordered[:: -(-len(ordered) // PROBE_PROMPTS)]
        asked = [p for p in some for _ in range(probe.COPIES * process_group.world_size())]
        rollout, seconds = rollouts.collect(self.models, asked, small, self.device, probe.NOISE)
        tolerance = TOLERANCE[zero.resolve_dtype(self.config.dtype, self.device)]
        settings = (self.models, self.config, self.device, tolerance, self.train, self.held)
        return Probe(*settings, rollout, asked, seconds["seconds_score"])

    def _run(self, checks: dict, given: Probe | FirstSteps, when: str) -> None:
        faults = verdicts.run(checks, given, when, self.say)
        if self.models.frozen_offload is not None:
            self.models.frozen_offload.park()  # the models that the checks brought to the GPU
        if self.config.self_check == "on":
            verdicts.stop_at(faults)
