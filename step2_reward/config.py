"""Settings of step 2."""

from dataclasses import dataclass

from utils.planner.workload import Role, Workload
from utils.settings.fields import setting
from utils.settings.run_config import RunConfig, check_patterns


@dataclass
class RewardConfig(RunConfig):
    """A batch counts comparisons: one prompt with its K answers, which go forward together."""

    sections = ("all", "reward")
    weighted = "preference_data"
    preference_data: list[str] = setting(
        [], "pairs or rankings: files, folders, hub names", needed=True
    )
    sft_data: list[str] = setting(
        [], "demonstrations that shall score 0 on average (none: the held-out preferred answers)"
    )
    max_length: int = setting(1024, "tokens of prompt and answer (see --long_prompts)", at_least=8)
    epochs: float = setting(1.0, "passes over the data (see --max_steps)", above=0, at_most=1e6)
    score_margin: float = setting(0.0, "a pair's margin: this × the difference of its labels")
    label_smoothing: float = setting(0.0, "probability that a label is wrong", below=0.5)
    centring: float = setting(0.0, "weight of (s_w + s_l)², which keeps scores near 0")
    trainable_modules: list[str] = setting(
        [],
        r"train only weights that match one of these, e.g. layers\.(30|31)\.",
        check=check_patterns,
    )

    def workload(self) -> Workload:
        """What the planner computes memory and time from, for comparisons of two answers."""
        return self.pick(
            Workload,
            roles=(Role("model", self.model_name_or_path, scalar=True, trained=True),),
            length=self.max_length,
            predicted=self.max_length,
            rows_a_sample=2,
        )
