"""Every number that a run records: its row of one table, and how many parts become one number.

A step registers the rows of what it measures. utils/report.py refuses a name without a row, so the
table is complete; docs/metrics.md prints it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from utils.distributed import process_group

# What may stand before a name. The number is then the same measure of something else.
PREFIXES = {
    "eval/": "of held-out data",
    "actor_": "of the actor's optimizer steps",
    "critic_": "of the critic's optimizer steps",
    "first_": "of the first optimizer step on a rollout",
}


@dataclass(frozen=True)
class Metric:
    """A name that ends with … stands for all that begin so. look_twice: when the value is a reason
    to stop and think, and what to do then."""

    name: str
    unit: str
    meaning: str
    look_twice: str = ""


TABLE: dict[str, dict[str, Metric]] = {}  # "step 1" or so → name → row


def register(step: str, *rows: Metric) -> None:
    """Add rows. The same name may mean something else in another step."""
    for row in rows:
        if TABLE.setdefault(step, {}).setdefault(row.name, row) != row:
            raise ValueError(f"metric {row.name!r} has two rows in {step}")


def known(name: str) -> bool:
    names = {name, *(name.removeprefix(prefix) for prefix in PREFIXES)}
    names |= {name.partition("/")[0] + "/…" for name in names}
    return any(names & rows.keys() for rows in TABLE.values())


def check(names: Iterable[str]) -> None:
    """Raises KeyError with the names that have no row."""
    if missing := [name for name in names if not known(name)]:
        raise KeyError(
            f"metrics without a row in the table: {', '.join(missing)}; add one with "
            "metrics.register(step, Metric(...)) where they are computed"
        )


class Sums:
    """Statistics that are sums over tokens, added up over micro-batches and then over ranks.

    They stay on `device` in fp64 until the end: to read one earlier would wait for the device.
    Every rank must add the same names.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, statistics: dict[str, torch.Tensor | float]) -> None:
        for name, value in statistics.items():
            value = torch.as_tensor(value, dtype=torch.float64, device=self.device).detach()
            self._sums[name] = self._sums.get(name, 0.0) + value

    def over(self, count: float) -> dict[str, float]:
        """The sums of all ranks, divided by `count`. A collective."""
        here = torch.stack(list(self._sums.values())).tolist()
        everywhere = process_group.sum_over_ranks(here, self.device)
        return {name: s / count for name, s in zip(self._sums, everywhere, strict=True)}


def mean_over(updates: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the updates where it is finite; NaN where it never is."""
    means = {}
    for name in updates[0]:
        finite = [u[name] for u in updates if math.isfinite(u[name])]
        means[name] = sum(finite) / len(finite) if finite else float("nan")
    return means


register(
    "every step",
    Metric("learning_rate", "", "of this optimizer step"),
    Metric("grad_norm", "", "norm of the gradient before it is clipped", "spikes: lower the rate"),
    Metric(
        "skipped",
        "share",
        "optimizer steps left out, for a loss or gradient that was not finite",
        "above 0 again and again: lower `--learning_rate`, or `--dtype fp32`",
    ),
    Metric("seconds", "s", "of this step, without its evaluation"),
)


def over_optimised(evaluations: list[dict], proxy: str) -> tuple[str, dict, dict] | None:
    """The first of verifier and judge that fell from its best evaluation to the last one while
    `proxy` rose, with both evaluations; None where neither did."""
    # What a fall is measured by: a verifier gives 0 to 1, a judge's scores may span anything.
    for name, deviation in (("eval/verifier", ""), ("eval/judge", "eval/judge_std")):
        seen = [m for m in evaluations if (deviation or name) in m]
        if len(seen) < 2:
            continue
        best, now = max(seen, key=lambda m: m[name]), seen[-1]
        spread = best[deviation] if deviation else 1.0
        if now[proxy] > best[proxy] and now[name] < best[name] - 0.04 * spread:
            return name, best, now
    return None
