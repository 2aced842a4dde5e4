"""Settings of step 3 without a reward model."""

from collections.abc import Iterator
from dataclasses import dataclass

from step3_preference.losses import LOSSES, NUMBERS, How
from utils.data.preferences import PAIRS
from utils.planner.workload import Role, Workload
from utils.settings.fields import free, setting
from utils.settings.run_config import RunConfig

ABOVE_0 = ("beta", "tau", "target_rate")
OWN = -1.0  # of a number: the one that the loss has in LOSSES


def own(name: str) -> str:
    """The values of LOSSES for a setting, as its help tells them."""
    values: dict[float, list[str]] = {}
    for loss, entry in LOSSES.items():
        if getattr(entry, name) is not None:
            values.setdefault(getattr(entry, name), []).append(loss)
    return "; ".join(f"{value:g} for {', '.join(losses)}" for value, losses in values.items())


@dataclass
class PreferenceConfig(RunConfig):
    """A batch counts rows: one prompt with its K answers, which go forward together."""

    sections = ("all", "preference")
    weighted = "preference_data"
    loss: str = setting(
        "dpo",
        "; ".join(f"{name}: {entry.meaning}" for name, entry in LOSSES.items()),
        choices=tuple(LOSSES),
    )
    preference_data: list[str] = setting(
        [],
        "pairs or rankings, for kto also single answers with label true or false: files, folders, "
        "hub names",
        needed=True,
    )
    reference_model: str = setting("", "what log-ratios are to (default: the start model)")
    prompt_data: list[str] = free(
        [],
        "prompts, of which the policy answers those held out at each evaluation, for the embedded "
        "task's program or --judge_model to judge; none: it answers none",
    )
    judge_model: str = free(
        "", "a reward model that only judges these answers", only_with="prompt_data"
    )
    max_prompt_length: int = free(512, "tokens of these prompts", at_least=1)
    max_response_length: int = free(512, "tokens of these answers at most", at_least=1)
    max_length: int = setting(1024, "tokens of prompt and answer (see --long_prompts)", at_least=8)
    epochs: float = setting(1.0, "passes over the data (see --max_steps)", above=0, at_most=1e6)
    pairs: str = setting(
        "all",
        "of a ranking of K answers: all pairs, which weigh 1 together, or its best against its "
        "worst or a random one below it",
        choices=PAIRS,
    )
    pair_margin: float = setting(
        0.0, "rankings whose best and worst kept answer differ by no more in score are left out"
    )
    learning_rate: float = setting(
        1e-6, "peak: for billions of weights (one of a million: 1e-4)", above=0, at_most=1
    )
    beta: float = setting(
        OWN, f"what scores are multiplied by; -1: {own('beta')}", at_least=OWN, at_most=1e6
    )
    margin: float = setting(
        OWN, f"by which scores are to be apart; -1: {own('margin')}", at_least=OWN, at_most=1e6
    )
    label_smoothing: float = setting(
        OWN,
        f"probability that a label is wrong; -1: {own('label_smoothing')}",
        at_least=OWN,
        below=0.5,
    )
    sft_coef: float = setting(
        OWN,
        "weight of the chosen answers' negative log-likelihood, a mean over their tokens; -1: "
        f"{own('sft_coef')}",
        at_least=OWN,
        at_most=1e6,
    )
    desirable_weight: float = setting(
        OWN,
        f"what a good answer's loss weighs; -1: {own('desirable_weight')}",
        at_least=OWN,
        at_most=1e6,
    )
    undesirable_weight: float = setting(
        OWN,
        f"what a bad answer's loss weighs; -1: {own('undesirable_weight')}",
        at_least=OWN,
        at_most=1e6,
    )
    gamma: float = setting(
        OWN, f"what a value one token on counts; -1: {own('gamma')}", at_least=OWN, at_most=1
    )
    tau: float = setting(
        OWN,
        "the expectile of Q that V is, 0.5 the mean and near 1 the best; -1: " + own("tau"),
        at_least=OWN,
        below=1,
    )
    cql_coef: float = setting(
        OWN,
        f"weight of what keeps Q of other tokens low; -1: {own('cql_coef')}",
        at_least=OWN,
        at_most=1e6,
    )
    awac_coef: float = setting(
        OWN,
        f"weight of the language model's own loss on all answers; -1: {own('awac_coef')}",
        at_least=OWN,
        at_most=1e6,
    )
    awac_beta: float = setting(
        OWN,
        "how much more of it tokens of high advantage get, as exp(this · (Q − V)); -1: "
        + own("awac_beta"),
        at_least=OWN,
        at_most=1e3,
    )
    target_rate: float = setting(
        OWN,
        f"how far the targets go to the Q heads, an optimizer step; -1: {own('target_rate')}",
        at_least=OWN,
        at_most=1,
    )
    self_check: str = free(
        "on", "what must hold before training; warn: say and go on", choices=("on", "warn", "off")
    )
    ema_decay: float = setting(0.0, "of the averaged model, an optimizer step; 0: none", below=1)

    def how(self) -> How:
        """The numbers of the loss: those set here, else its own."""
        entry = LOSSES[self.loss]
        given = {name: getattr(self, name) for name in NUMBERS}
        taken = {n: getattr(entry, n) or 0.0 if v == OWN else v for n, v in given.items()}
        return How(**taken)

    def contradictions(self, world_size: int) -> Iterator[str]:
        yield from super().contradictions(world_size)
        entry = LOSSES[self.loss]
        for name in NUMBERS:
            value = getattr(self, name)
            if value <= OWN:  # the bounds refuse what is below
                continue
            if value < 0 or (name in ABOVE_0 and value == 0):
                bound = "above 0" if name in ABOVE_0 else "at least 0"
                yield f"{name}={value} must be {bound}, or -1 for the loss's own; set --{name}"
            elif getattr(entry, name) is None:
                others = [n for n, other in LOSSES.items() if getattr(other, name) is not None]
                yield (
                    f"loss={self.loss} reads no {name} (now {value}); leave out --{name}, or set "
                    f"--loss to one that does: {', '.join(others)}"
                )
        if self.lora_dropout:
            yield (
                f"lora_dropout={self.lora_dropout}: log-ratios compare the policy with a reference "
                "without dropout; leave it out, or give --sft.lora_dropout to run_all.sh"
            )
        if self.loss == "ilql" and self.lora_rank:
            yield (
                f"loss=ilql trains value heads beside all weights, and lora_rank={self.lora_rank} "
                "adapters alone; leave out --lora_rank"
            )
        if self.reference_model and not entry.reads_reference:
            yield f"loss={self.loss} has no reference; leave out --reference_model"

    def workload(self) -> Workload:
        """What the planner computes memory and time from, for rows of two answers. The reference
        model is gone before training begins."""
        return self.pick(
            Workload,
            roles=(Role("model", self.model_name_or_path, trained=True),),
            length=self.max_length,
            predicted=self.max_length,
            rows_a_sample=2,
            value_heads=self.loss == "ilql",
        )
