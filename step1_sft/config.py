"""Settings of step 1."""

from dataclasses import dataclass

from utils.settings.fields import RunConfig, setting


@dataclass
class SFTConfig(RunConfig):
    weighted = "sft_data"
    sft_data: list[str] = setting([], "demonstrations: files, folders or hub names")
    max_length: int = setting(1024, "tokens a row (see --long_prompts)")
    long_answers: str = setting(
        "drop", "an answer too long even so: drop the row, or cut it", choices=("drop", "cut")
    )
    epochs: float = setting(2.0, "passes over the demonstrations (see --max_steps)")
    sample_answers: int = setting(3, "held-out prompts answered before and after, for people")

    def problems(self, world_size: int) -> list[str]:
        found = super().problems(world_size)
        if not self.sft_data:
            found.append("sft_data is empty; name at least one data set with --sft_data")
        if self.max_length < 8:
            found.append(f"max_length={self.max_length} leaves no room; set --max_length ≥ 8")
        if self.sample_answers < 0:
            found.append(f"sample_answers={self.sample_answers}: set --sample_answers ≥ 0")
        if self.epochs <= 0 and self.max_steps == 0:
            found.append(f"epochs={self.epochs} gives no step; set --epochs or --max_steps")
        if self.epochs > 1e6:
            found.append(f"epochs={self.epochs} is more than any run; set --epochs")
        return found
