"""Which programs run_all.sh starts, on what and in which order, for the methods and rounds asked
for; run_all.py starts them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from step3_ppo.algorithm import ALGORITHMS
from step3_preference.losses import LOSSES
from utils.settings import files
from utils.settings.fields import Settings, setting

PROGRAMS = {
    "sft": "step1_sft/main.py",
    "collect": "step2_reward/collect.py",
    "reward": "step2_reward/main.py",
    "ppo": "step3_ppo/main.py",
    "preference": "step3_preference/main.py",
}


# Flags without a section that mean one step; what they set, no other has.
OF_STEP_3 = (
    "rollout_engine vllm_python rollout_url rollout_devices rollout_memory rollout_timeout "
    "rollout_ahead engine_gap_limit"
).split()


@dataclass(frozen=True)
class Method:
    """step: which program trains. flag: the one that names the method there. families: sections of
    settings that its kind shares, read between the step's and its own."""

    name: str
    step: str
    flag: str = ""
    families: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        return f"step3_{self.name}"

    @property
    def policy(self) -> str:
        """Where its policy stands at the end."""
        return f"{self.folder}/actor" if self.step == "ppo" else self.folder

    @property
    def suffix(self) -> str:
        """Of what later rounds make for this method alone."""
        return "" if self.name == "ppo" else f"_{self.name}"

    def sections(self, number: int) -> tuple[str, ...]:
        """Of settings, in round `number`; the last one counts."""
        later = [f"later_{self.step}"] if number > 1 else []
        found = (self.step, *self.families, self.name, *(s for s in later if s in files.SECTIONS))
        return tuple(dict.fromkeys(found))


# What methods of one kind share has a section of its own, beside theirs.
CRITIC_FREE, GROUPS, NO_REFERENCE = FAMILIES = ("critic_free", "groups", "no_reference")


def _methods() -> Iterator[Method]:
    """All there are: every --algorithm of step 3, every --loss of preferences, and best of n."""
    for name, entry in ALGORITHMS.items():
        families = ((CRITIC_FREE, not entry.critic), (GROUPS, entry.groups))
        yield Method(name, "ppo", "algorithm", tuple(family for family, so in families if so))
    for name, loss in LOSSES.items():
        yield Method(name, "preference", "loss", () if loss.reads_reference else (NO_REFERENCE,))
    yield Method("best_of_n", "sft")


METHODS = {method.name: method for method in _methods()}
ALL = "ppo grpo rloo dpo kto best_of_n".split()  # what --method all means


def check_methods(names: list[str]) -> None:
    unknown = [name for name in names if name not in METHODS]
    if unknown and names != ["all"]:
        raise ValueError(
            f"no method is called {', '.join(unknown)}; there are all, or of these: "
            + " ".join(METHODS)
        )
    if len(set(names)) < len(names):
        raise ValueError("a method stands there twice")


@dataclass
class Pipeline(Settings):
    """What run_all.sh itself reads: these flags, and the section `run` of recipes."""

    sections = ("run",)
    output_dir: str = setting("", "folder of the whole run; empty: output/RECIPE")
    model_name_or_path: str = setting("", "where step 1 starts; empty: from random weights")
    sft_data: list[str] = setting([], "demonstrations")
    preference_data: list[str] = setting([], "comparisons")
    prompt_data: list[str] = setting([], "prompts of step 3; empty: those of the comparisons")
    method: list[str] = setting(["ppo"], "how the policy is aligned", check=check_methods)
    scored_by: str = setting(
        "reward_model",
        "what scores answers in step 3: a reward model trained on comparisons; or what "
        "--ppo.reward_function and --ppo.reward_url name, alone and without step 2",
        choices=("reward_model", "reward_function"),
    )
    embedded: bool = setting(False, "the embedded task, whose data are made on the spot")
    task: str = setting(
        "toy_tasks",
        "which module of utils/data makes them",
        choices=("toy_tasks", "calculator_task"),
        only_with="embedded",
    )
    rounds: int = setting(1, "how often new answers are collected and learned from", at_least=1)
    labeller: str = setting(
        "auto",
        "what ranks new answers; auto: the verifier of the embedded task, else the reward model",
        choices=("auto", "verifier", "reward_model", "reward_function", "judge"),
    )
    replay_share: float = setting(
        1.0, "how much of older rounds' answers is learned from again beside the new", at_most=1
    )
    round_prompts: str = setting(
        "same",
        "are new answers sampled to the same prompts in each round, or to disjoint parts?",
        choices=("same", "disjoint"),
    )
    max_ranks: int = setting(0, "the most ranks that are of use; 0: any number")
    report_every: float = setting(
        0.0, "minutes after which OUTPUT/report.html is written again while it runs; 0: at its end"
    )
    seed: int = setting(42, "seed of everything random", below=2**63)
    overwrite: bool = setting(False, "begin anew in a folder that holds a run, which is deleted")

    def methods(self) -> list[Method]:
        names = ALL if self.method == ["all"] else self.method
        return [METHODS[name] for name in names if name in METHODS]

    def ranked_by(self) -> str:
        if self.labeller != "auto":
            return self.labeller
        return "verifier" if self.embedded else "reward_model"

    def _samples(self) -> bool:
        """Does collect.py have a stage in this run?"""
        demonstrated = any(method.step == "sft" for method in self.methods())
        return self.embedded or self.rounds > 1 or demonstrated

    def trains_reward_model(self) -> bool:
        return self.scored_by == "reward_model"

    def is_compared(self) -> bool:
        """Do all policies answer the same prompts in the end? Else step 3 has measured them."""
        return self.method != ["ppo"] and self.trains_reward_model()

    def without_comparisons(self) -> Iterator[str]:
        """What cannot be where answers are scored by functions alone."""
        others = [m.name for m in self.methods() if m.step != "ppo"]
        if others:
            yield (
                f"scored_by=reward_function is for algorithms of rollouts, and {', '.join(others)} "
                "learn from collected answers; leave out --scored_by, or choose --method grpo"
            )
        given = {"preference_data": [], "rounds": 1, "labeller": "auto"}
        given |= {"replay_share": 1.0, "round_prompts": "same"}
        for name in (n for n, default in given.items() if getattr(self, n) != default):
            yield (
                f"scored_by=reward_function collects and reads no comparisons, for which "
                f"{name}={getattr(self, name)} is; leave out --{name}"
            )

    def contradictions(self, world_size: int) -> Iterator[str]:
        compared = "preference_data" if self.trains_reward_model() else "prompt_data"
        for name in ("sft_data", compared):
            if not self.embedded and not getattr(self, name):
                yield f"this recipe needs --{name}"
        if not self.trains_reward_model():
            yield from self.without_comparisons()
            return
        if not self.embedded and self.labeller == "verifier":
            yield "labeller=verifier judges the embedded task only; leave out --labeller"
        elif self.labeller != "auto" and not self._samples():
            yield (
                f"labeller={self.labeller} ranks new answers, and rounds=1 of these methods "
                "collects none; leave out --labeller, or set --rounds or --method best_of_n"
            )
        scored = [m.name for m in self.methods() if m.step == "ppo"]
        if self.rounds > 1 and scored and self.ranked_by() == "reward_model":
            yield (
                f"rounds={self.rounds} of {', '.join(scored)} train a new reward model on new "
                "answers, which the old one cannot label: set --labeller reward_function with "
                "--collect.reward_function, or judge with --collect.judge_url, or let people rank "
                "them (docs/online.md)"
            )
        if self.rounds == 1:
            for name, default in (("replay_share", 1.0), ("round_prompts", "same")):
                if getattr(self, name) != default:
                    yield f"{name}={getattr(self, name)} is read only with --rounds above 1"


@dataclass(frozen=True)
class Stage:
    """A program, its flags by name, and the sections of settings that it reads: the last counts.

    method: the one that it is done for; empty where all share what it makes. program: where it is
    not that of the first section.
    """

    name: str
    sections: tuple[str, ...]
    flags: dict
    method: str = ""
    program: str = ""

    @property
    def script(self) -> str:
        return self.program or PROGRAMS[self.sections[0]]


@dataclass(frozen=True)
class Plan:
    """The stages of a run. model: where step 1 starts. sft_data, prompts: of the run, or made."""

    given: Pipeline
    output: Path
    model: str | Path
    sft_data: list
    prompts: list

    @property
    def sft(self) -> Path:
        return self.output / "step1_sft"

    @property
    def reward(self) -> Path:
        """The reward model of round 1, which all methods share."""
        return self.folder(1) / "step2_reward"

    @property
    def compared(self) -> list:
        """The comparisons that all methods begin with."""
        made = self.output / "data/comparisons_1.jsonl"
        return [made] if self.given.embedded else list(self.given.preference_data)

    def folder(self, number: int) -> Path:
        """The last round's models stand where a single round's would."""
        return self.output if number == self.given.rounds else self.output / f"round{number}"

    def stages(self) -> Iterator[Stage]:
        """All of them, each on what those before it make."""
        flags = {"model_name_or_path": self.model, "output_dir": self.sft}
        yield Stage("step 1: SFT", ("sft",), flags | {"sft_data": self.sft_data})
        if self.given.trains_reward_model():
            if self.given.embedded:
                # There is no reward model yet.
                by = self.given.ranked_by().replace("reward_model", "verifier")
                flags = self.sampling(1, 1, self.sft, by) | {"output_file": self.compared[0]}
                yield Stage("round 1: comparisons", ("collect",), flags)
            yield self.reward_model(self.reward, {"preference_data": self.compared}, "")
        for method in self.given.methods():
            yield from self.rounds_of(method)

    def rounds_of(self, method: Method) -> Iterator[Stage]:
        policy, demonstrates, reward = self.sft, method.step == "sft", self.reward
        learned = [] if demonstrates else self.compared
        first = 1 if demonstrates or self.given.embedded else 2  # round that samples
        for number in range(1, self.given.rounds + 1):
            folder, older = self.folder(number), len(learned)
            if demonstrates or number > 1:
                what = "best" if demonstrates else "comparisons"
                suffix = "" if demonstrates else method.suffix
                file = self.output / f"data/{what}_{number}{suffix}.jsonl"
                flags = self.sampling(number, first, policy, self.given.ranked_by())
                flags |= {"keep": "best"} if demonstrates else {}
                flags |= {"output_file": file}
                name = f"round {number}: {'best answers' if demonstrates else what}"
                yield Stage(name, ("collect",), flags, method.name)
                learned = [*learned, file]
            flag = "sft_data" if demonstrates else "preference_data"
            data = self.with_replay(flag, learned, older if number > 1 else 0)
            flags = {"model_name_or_path": policy, "output_dir": folder / method.folder}
            flags |= {method.flag: method.name} if method.flag else {}
            if method.flag and NO_REFERENCE not in method.families:
                flags["reference_model"] = self.sft
            if method.step != "ppo":
                flags |= data
                if method.step == "preference" and self.given.embedded:
                    # The verifier judges its answers to those that it holds out of both files.
                    flags["prompt_data"] = self.prompts
            else:
                if number > 1:
                    reward = folder / f"step2_reward{method.suffix}"
                    yield self.reward_model(reward, data, method.name)
                flags["prompt_data"] = self.prompts or self.compared
                if self.given.trains_reward_model():
                    flags |= {"reward_model": reward, "preference_data": learned}
            name = f"step 3: {method.name.upper()}"
            yield Stage(name, method.sections(number), flags, method.name)
            policy = folder / method.policy

    def reward_model(self, folder: Path, data: dict, method: str) -> Stage:
        flags = {"model_name_or_path": self.sft, **data, "sft_data": self.sft_data}
        return Stage("step 2: reward model", ("reward",), flags | {"output_dir": folder}, method)

    def sampling(self, number: int, first: int, policy: Path, labeller: str) -> dict:
        """Flags of collect.py for new answers of a policy, in round `number` of those from `first`
        on."""
        flags = {"policy": policy, "prompt_data": self.prompts or self.compared}
        flags |= {"labeller": labeller, "round": number}
        if labeller == "reward_model":
            flags["reward_model"] = self.reward
        if self.given.round_prompts == "disjoint":
            before = first - 1
            flags["prompt_part"] = f"{number - before}/{self.given.rounds - before}"
        return flags

    def with_replay(self, flag: str, sets: list, older: int) -> dict:
        """Flags for data sets of which the first `older` are those of earlier rounds."""
        share = self.given.replay_share
        if older == 0 or share == 1:
            return {flag: sets}
        if share == 0:
            return {flag: sets[older:]}
        return {flag: sets, "data_weights": [share] * older + [1.0] * (len(sets) - older)}

    def comparison(self) -> Stage:
        """The stage that measures all policies alike."""
        out, last = self.output, self.folder(self.given.rounds)
        policies = [f"sft={self.sft}"]
        policies += [f"{m.name}={last / m.policy}" for m in self.given.methods()]
        flags = {
            "policies": policies,
            "judge_model": self.reward,
            "output_file": out / "methods.json",
            # The section `collect` may hold settings that are refused with another labeller.
            "labeller": self.given.ranked_by(),
        }
        if self.given.embedded:
            flags["held_out_data"] = out / "data/held_out.jsonl"
        else:
            flags["prompt_data"] = self.prompts or self.compared
        return Stage("answers of all", ("collect",), flags, program="evaluation/methods.py")


def paths_made(output: Path, embedded: bool) -> Iterator[Path]:
    """What a run, of any methods and rounds, makes in its output folder."""
    names = "base_model step1_sft step2_reward summary.json summary.txt methods.json".split()
    names = [
        *names,
        "report.html",
        "run.json",
        ".seed",
        ".seconds",
        ".methods",
        *(method.folder for method in METHODS.values()),
    ]
    names += [f"step2_reward{m.suffix}" for m in METHODS.values() if m.step == "ppo" and m.suffix]
    yield from (output / name for name in names)
    yield from (path for path in output.glob("round*") if path.name[5:].isdecimal())
    if embedded:
        yield output / "data"
    else:  # a folder of that name may be the user's
        yield from output.glob("data/comparisons_[0-9]*")
        yield from output.glob("data/best_[0-9]*")
