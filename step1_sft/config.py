"""Settings of step 1."""

from dataclasses import dataclass

from utils.planner.workload import Role, Workload
from utils.settings.fields import free, setting
from utils.settings.run_config import RunConfig


@dataclass
class SFTConfig(RunConfig):
    sections = ("all", "sft")
    weighted = "sft_data"
    sft_data: list[str] = setting([], "demonstrations: files, folders or hub names", needed=True)
    max_length: int = setting(1024, "tokens a row (see --long_prompts)", at_least=8)
    long_answers: str = setting(
        "drop", "an answer too long even so: drop the row, or cut it", choices=("drop", "cut")
    )
    epochs: float = setting(2.0, "passes over the data (see --max_steps)", above=0, at_most=1e6)
    sample_answers: int = free(3, "held-out prompts answered before and after, for people")

    def workload(self) -> Workload:
        """What the planner computes memory and time from."""
        model = Role("model", self.model_name_or_path, trained=True)
        return self.pick(
            Workload, roles=(model,), length=self.max_length, predicted=self.max_length
        )
