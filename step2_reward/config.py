"""Settings of step 2."""

import re
from dataclasses import dataclass

from utils.settings.fields import RunConfig, setting


@dataclass
class RewardConfig(RunConfig):
    """A batch counts comparisons: one prompt with its K answers, which go forward together."""

    weighted = "preference_data"
    preference_data: list[str] = setting([], "pairs or rankings: files, folders or hub names")
    sft_data: list[str] = setting(
        [], "demonstrations that shall score 0 on average (none: the held-out preferred answers)"
    )
    max_length: int = setting(1024, "tokens of prompt and answer (see --long_prompts)")
    epochs: float = setting(1.0, "passes over the comparisons (see --max_steps)")
    score_margin: float = setting(0.0, "a pair's margin: this × the difference of its labels")
    label_smoothing: float = setting(0.0, "probability that a label is wrong")
    centring: float = setting(0.0, "weight of (s_w + s_l)², which keeps scores near 0")
    trainable_modules: list[str] = setting(
        [], r"train only weights whose name matches one of these patterns, e.g. layers\.(30|31)\."
    )

    def problems(self, world_size: int) -> list[str]:
        found = super().problems(world_size)
        if not self.preference_data:
            found.append("preference_data is empty; name at least one with --preference_data")
        if not 0 <= self.label_smoothing < 0.5:
            found.append(f"label_smoothing={self.label_smoothing} must lie in [0, 0.5)")
        for name in ("score_margin", "centring"):
            if getattr(self, name) < 0:
                found.append(f"{name}={getattr(self, name)} must not be negative; set --{name}")
        for pattern in self.trainable_modules:
            try:
                re.compile(pattern)
            except re.error as error:
                found.append(f"trainable_modules: {pattern!r} is no pattern: {error}")
        if self.max_length < 8:
            found.append(f"max_length={self.max_length} leaves no room; set --max_length ≥ 8")
        if self.epochs <= 0 and self.max_steps == 0:
            found.append(f"epochs={self.epochs} gives no step; set --epochs or --max_steps")
        if self.epochs > 1e6:
            found.append(f"epochs={self.epochs} is more than any run; set --epochs")
        return found
