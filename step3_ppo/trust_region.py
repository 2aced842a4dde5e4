"""TRPO's trust region around an optimizer step: a line search on the measured KL (Schulman et al.
2015, appendix C).

The direction is the optimizer's own, as in PPO, and not the natural gradient, whose products with
the Fisher matrix would need second derivatives through sharded weights. What is TRPO's: the step is
halved until the policy stays within --trust_region of the one that sampled and the surrogate loss
has not risen, and taken back where no part of it does.
"""

from collections.abc import Callable

import torch

from utils.checkpoints import engine_state

HALVINGS = 10


class Before:
    """Weights and moments of an engine as they are now: on each rank three more numbers for each
    weight that it steps on."""

    def __init__(self, engine):
        self.optimizer = engine.engine.optimizer
        self.spans = engine_state.spans_of(engine, create=lambda name: True)
        self.kept = [{kind: t.clone() for kind, t in s.tensors.items()} for s in self.spans]

    @torch.no_grad()
    def take(self, share: float, after: list[torch.Tensor]) -> None:
        """Weights at before + share × (after − before)."""
        for span, kept, end in zip(self.spans, self.kept, after, strict=True):
            span.tensors["weight"].copy_(torch.lerp(kept["weight"], end, share))
        engine_state.publish(self.optimizer)

    @torch.no_grad()
    def restore(self) -> None:
        """As if no step had been made, but for the learning rate's schedule."""
        for span, kept in zip(self.spans, self.kept, strict=True):
            for kind, t in span.tensors.items():
                t.copy_(kept[kind])
        engine_state.publish(self.optimizer)

    def weights(self) -> list[torch.Tensor]:
        """Copies of what the weights are by now."""
        return [span.tensors["weight"].clone() for span in self.spans]


def search(
    before: Before, measure: Callable[[], tuple[float, float]], loss: float, limit: float
) -> dict[str, float]:
    """Shorten the step that was made since `before`, where it must be. A collective.

    measure() → (KL of the policy that sampled to the policy as it is, nats an action; its surrogate
    loss), the same on every rank. loss: the surrogate loss before the step. limit: of the KL.
    """
    after, share = before.weights(), 1.0
    for _ in range(HALVINGS + 1):
        if share < 1.0:
            before.take(share, after)
        kl, now = measure()
        if kl <= limit and now <= loss:  # false for a NaN too
            return {"trust_region_step": share, "trust_region_kl": kl}
        share /= 2
    before.restore()
    kl, _ = measure()
    return {"trust_region_step": 0.0, "trust_region_kl": kl}
