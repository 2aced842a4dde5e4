"""What lies in the output folder of a run, finished or not: its steps in their order, each with
settings, metrics, result, log and samples."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pipeline import METHODS
from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig
from step3_preference.config import PreferenceConfig
from utils.errors import UserError
from utils.rewards.sums import metric_names
from utils.settings import files
from utils.settings.fields import value_of

# The first line of config.yaml names the class of its settings.
CONFIGS = {c.__name__: c for c in (SFTConfig, RewardConfig, PPOConfig, PreferenceConfig)}
ORDER = ("sft", "reward", "preference", "ppo")
RECIPES = Path(__file__).resolve().parent.parent / "recipes"
# What run_all.sh sets for each step by itself, and no recipe.
OF_THE_RUN = "output_dir date resume overwrite algorithm loss".split()
# A line of the self-check, see utils/verdicts.py.
VERDICT = re.compile(r"  (FAULT|DOUBT|passed)  (.+?): (.*)")


def read_json(path: Path) -> dict:
    """What a file holds; nothing where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_metrics(path: Path) -> list[dict]:
    """The whole lines; a running step may have written half of the next one."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


@dataclass
class Step:
    """One step of a run. kind: a name of ORDER. number: of the round, 0 where there is only one."""

    folder: Path
    config: object  # one of CONFIGS
    number: int = 0

    @property
    def kind(self) -> str:
        return self.config.sections[-1]

    @property
    def method(self) -> str:
        """What trained the policy in step 3; empty before it."""
        if self.kind == "sft":
            return self.folder.name.partition("step3_")[2]
        flag = {"ppo": "algorithm", "preference": "loss"}.get(self.kind)
        return getattr(self.config, flag) if flag else ""

    @property
    def whose(self) -> str:
        """The method; of a reward model that a later round has trained for one, that one."""
        return self.method or self.folder.name.partition("step2_reward_")[2]

    @property
    def title(self) -> str:
        names = {"sft": "step 1: SFT", "reward": "step 2: reward model"}
        name = f"step 3: {self.method.upper()}" if self.method else names[self.kind]
        name += f" for {self.whose.upper()}" if self.whose != self.method else ""
        return name + (f", round {self.number}" if self.number else "")

    @cached_property
    def metrics(self) -> list[dict]:
        return read_metrics(self.folder / "metrics.jsonl")

    @cached_property
    def result(self) -> dict:
        """Empty while the step runs, and where it broke off."""
        return read_json(self.folder / "result.json")

    @cached_property
    def log(self) -> list[str]:
        path = self.folder / "log.txt"
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        return text.replace("\r", "\n").split("\n")

    def verdicts(self) -> list[tuple[str, str, str]]:
        """(FAULT, DOUBT or passed; the check; what it found) of the self-check."""
        found = (VERDICT.fullmatch(line) for line in self.log)
        return [match.groups() for match in found if match]

    def answers(self) -> dict:
        return read_json(self.folder / "samples.json")

    def tokens(self) -> dict:
        return read_json(self.folder / "tokens.json")

    def environment(self) -> dict:
        return read_json(self.folder / "machine.json")

    def bad_rows(self) -> int:
        path = self.folder / "bad_rows.jsonl"
        return len(path.read_bytes().splitlines()) if path.exists() else 0

    def steps_done(self) -> int:
        return max((m["step"] for m in self.metrics), default=0)

    def values(self, name: str) -> list[tuple[int, float]]:
        """(step, value) wherever a metric has one."""
        return [(m["step"], m[name]) for m in self.metrics if m.get(name) is not None]

    def parts(self) -> dict[str, tuple[float, float]]:
        """{part: what it gives of the held-out score, before training and at the newest evaluation}
        where a reward model and functions, or several of these, are added up; else empty. Weights
        are in it, so that the parts sum to the score."""
        rows = [m for m in self.metrics if m.get("eval/score") is not None]
        if self.kind != "ppo" or len(rows) < 2:
            return {}
        config = self.config
        names = metric_names(config.reward_function) + ["url"] * bool(config.reward_url)
        if len(names) + bool(config.reward_model) < 2:
            return {}
        weights = config.reward_weights or [1.0] * len(names)
        weights = {n: config.reward_function_coef * w for n, w in zip(names, weights, strict=True)}

        def at(m: dict) -> list[float]:
            own = [w * m.get(f"eval/score_function/{n}", 0.0) for n, w in weights.items()]
            if len(names) == 1:  # weighted already, and left out where all of it is 0
                own = [m.get("eval/score_function", 0.0)]
            return [m["eval/score"] - sum(own)] * bool(config.reward_model) + own

        titles = ["reward model"] * bool(config.reward_model)
        for name, weight in weights.items():
            title = "reward server" if name == "url" else f"reward function {name}"
            titles.append(title if weight == 1 else f"{title} × {weight:g}")
        return dict(zip(titles, zip(at(rows[0]), at(rows[-1]), strict=True), strict=True))

    def changed_settings(self) -> list[tuple[str, object, object]]:
        """(name, value, default) of each setting that is not at its default."""
        default = type(self.config)()
        both = [(f.name, getattr(self.config, f.name)) for f in dataclasses.fields(default)]
        return [(n, v, getattr(default, n)) for n, v in both if v != getattr(default, n)]


def read_step(folder: Path, number: int = 0) -> Step | None:
    """None where the folder is not of a step."""
    path = folder / "config.yaml"
    first = path.read_text(encoding="utf-8").partition("\n")[0] if path.exists() else ""
    made = CONFIGS.get(first.removeprefix("# ").partition(",")[0])
    if made is None:
        return None
    names = {f.name for f in dataclasses.fields(made)}
    given = {n: v for n, v in files.read(str(path)).items() if n in names}
    return Step(folder, made(**given), number)


@dataclass
class RunFolder:
    """The output of run_all.sh, or of a single step."""

    folder: Path
    steps: list[Step] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @cached_property
    def summary(self) -> dict:
        return read_json(self.folder / "summary.json")

    @cached_property
    def asked(self) -> dict:
        """Recipe and flags of run_all.sh."""
        return read_json(self.folder / "run.json")

    def recipe(self) -> list[str]:
        """The files that run_all.sh read: recipe, then --config; none where one is gone."""
        found = [str(RECIPES / f"{self.asked['recipe']}.yaml")] if self.asked else []
        found += self.asked.get("configs", [])
        return found if all(Path(path).is_file() for path in found) else []

    def differences(self, step: Step) -> list[tuple[str, object, object]]:
        """(name, value, expected) of the settings that differ from the recipe, or from the defaults
        where there is none; without what run_all.sh sets and paths below the run's own folder."""
        made = type(step.config)
        fields = {f.name: f for f in dataclasses.fields(made)}
        sections = METHODS[step.method].sections(step.number)[1:] if step.method else ()
        said = {}
        for path in self.recipe():
            for _, values in files.layers(files.with_sections(path, sections), *made.sections):
                said |= {n: value_of(fields[n], v) for n, v in values.items() if n in fields}
        expected = made(**made.completed(said))
        output = self.asked.get("flags", {}).get("output_dir", [])  # which may have been moved
        own = tuple(f"{place}/" for place in (*output, self.folder))

        def of_the_run(value) -> bool:
            paths = value if isinstance(value, list) else [value]
            return bool(paths) and all(str(path).startswith(own) for path in paths)

        both = [(n, getattr(step.config, n), getattr(expected, n)) for n in fields]
        changed = [(n, v, e) for n, v, e in both if v != e and n not in OF_THE_RUN]
        return [row for row in changed if not of_the_run(row[1])]

    def policies(self) -> list[Step]:
        """The steps that made a policy at the end: the last round of each method, or SFT."""
        last = {step.method: step for step in self.steps if step.method}
        return list(last.values()) or [s for s in self.steps if s.kind == "sft"]

    def seconds(self) -> dict[str, float]:
        """By step; of one that is not finished, what its lines of metrics took."""
        return {
            step.title: step.result.get("seconds") or sum(x for _, x in step.values("seconds"))
            for step in self.steps
        }


def steps_of(folder: Path) -> list[Step]:
    """The step that a folder is of, or the steps of all rounds below it."""
    rounds = sorted(folder.glob("round[0-9]*"), key=lambda path: int(path.name[5:]))
    places = [(path, number) for number, path in enumerate(rounds, 1)]
    places.append((folder, len(rounds) + 1 if rounds else 0))
    found = [read_step(folder), read_step(folder / "step1_sft")]  # which is done once
    for place, number in places:
        for name in ("step2_*", "step3_*"):
            found += [read_step(path, number) for path in sorted(place.glob(name))]
    return [step for step in found if step]


def is_run(folder: Path) -> bool:
    return bool(steps_of(folder))


def read(folder: Path) -> RunFolder:
    """The steps below a folder. UserError where there is none."""
    if not is_run(folder):
        raise UserError(f"{folder}: no step of a run has written there; give its --output_dir")
    return RunFolder(folder, steps_of(folder))
