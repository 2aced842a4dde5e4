"""The stages of run_all.sh, one after the other; how it is used stands there."""

import datetime
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from utils import launch
from utils.settings import command_line, files
from utils.settings.fields import ConfigError, Settings, setting

ROOT = Path(__file__).resolve().parent
PROGRAMS = {
    "sft": "step1_sft/main.py",
    "collect": "step2_reward/collect.py",
    "reward": "step2_reward/main.py",
    "ppo": "step3_ppo/main.py",
}
MADE = "data base_model step1_sft step2_reward step3_ppo summary.json summary.txt .seed .seconds"


@dataclass
class Pipeline(Settings):
    """What run_all.sh itself reads: these flags, and the section `run` of recipes."""

    sections = ("run",)
    output_dir: str = setting("", "folder of the whole run; empty: output/RECIPE")
    model_name_or_path: str = setting("", "where step 1 starts; empty: from random weights")
    sft_data: list[str] = setting([], "demonstrations")
    preference_data: list[str] = setting([], "comparisons")
    prompt_data: list[str] = setting([], "prompts of step 3; empty: those of the comparisons")
    embedded: bool = setting(False, "the embedded task, whose data are made on the spot")
    rounds: int = setting(1, "how often comparisons are collected and learned from", at_least=1)
    max_ranks: int = setting(0, "the most ranks that are of use; 0: any number")
    seed: int = setting(42, "seed of everything random", below=2**63)
    overwrite: bool = setting(False, "begin anew in a folder that holds a run, which is deleted")

    def contradictions(self, world_size: int) -> Iterator[str]:
        for name in ("sft_data", "preference_data"):
            if not self.embedded and not getattr(self, name):
                yield f"this recipe needs --{name}"
        if not self.embedded and self.rounds > 1:
            yield "--rounds needs the embedded task, whose verifier ranks new answers"


def end(text: str, code: int = 2):
    print(f"run_all.sh: {text}", file=sys.stderr)
    raise SystemExit(code)


def words_of(flags: dict) -> list[str]:
    """{name: value or list of values} → a command line."""
    listed = {name: v if isinstance(v, list) else [v] for name, v in flags.items()}
    return [str(word) for name, values in listed.items() for word in (f"--{name}", *values)]


def recipe_of(name: str, flags: dict) -> Path:
    if not name:
        name = "scratch" if flags.keys() & {"sft_data", "preference_data"} else "tiny"
        name = "qwen2.5-0.5b" if "model_name_or_path" in flags else name
    for path in (ROOT / f"recipes/{name}.yaml", Path(name)):
        if path.is_file():
            return path
    there = " ".join(sorted(path.stem for path in (ROOT / "recipes").iterdir()))
    return end(f"no recipe {name}; there are: {there}")


class Job:
    """One command line of run_all.sh."""

    def __init__(self, words: list[str]):
        named = bool(words) and not words[0].startswith("--")
        problems: list[str] = []
        self.flags = command_line.split_flags(words[named:], problems)
        recipe = recipe_of(words[0] if named else "", self.flags)
        self.configs = [str(recipe), *self.flags.pop("config", [])]
        own = {f.name: self.flags[f.name] for f in fields(Pipeline) if f.name in self.flags}
        # Not the default: a variable of the user's shell was empty.
        problems += [f"  - {n} is empty; set --{n}" for n, words in own.items() if words == [""]]
        try:
            argv = ["--config", *self.configs, *words_of(own)]
            self.settings = command_line.build(Pipeline, argv, world_size=1)
        except ConfigError as error:
            problems.append(str(error))
        if problems:
            end("these settings cannot work:\n" + "\n".join(problems))
        if "seed" not in own:  # the steps read it in `all` too
            for _, values in (x for p in self.configs for x in files.layers(p, "all", "run")):
                self.settings.seed = values.get("seed", self.settings.seed)
        self.flags = {n: v for n, v in self.flags.items() if n not in own or n == "seed"}
        self.name, self.began = recipe.stem, time.monotonic()
        self.output = Path(self.settings.output_dir or f"output/{self.name}")
        # Chat templates may state the day: every stage, and every resume, states that of the start.
        self.day = datetime.date.today().isoformat()
        if not self.settings.overwrite:
            self.day = self.kept(".date", self.day)
        self.sft_data, self.prompts = self.settings.sft_data, self.settings.prompt_data
        self.model = self.settings.model_name_or_path or self.output / "base_model"
        if self.settings.embedded:
            self.sft_data = [self.output / "data/sft.jsonl"]
            self.prompts = [self.output / "data/prompts.jsonl"]

    def kept(self, name: str, otherwise: str) -> str:
        """What an earlier run has written down."""
        path = self.output / name
        return path.read_text().strip() if path.is_file() else otherwise

    def flags_of(self, section: str, later: bool) -> list[str]:
        """Recipe, --config files, flags for every step, flags for this one: the last one counts."""
        words = ["--config", *(f"{path}:later_ppo" if later else path for path in self.configs)]
        words += ["--overwrite"] if self.settings.overwrite else ["--resume", "auto"]
        others = {n: v for n, v in self.flags.items() if n.partition(".")[0] not in PROGRAMS}
        own = {n: v for n, v in self.flags.items() if n.startswith(f"{section}.")}
        own = {n.partition(".")[2]: v for n, v in own.items()}
        return words + words_of({"date": self.day}) + words_of(others) + words_of(own)

    def steps(self) -> Iterator[tuple[str, str, list[str]]]:
        """(name, program, its flags) of all steps, each on what those before it make."""
        out, rounds = self.output, self.settings.rounds
        compared, sft_data = list(self.settings.preference_data), {"sft_data": self.sft_data}

        def step(name: str, section: str, later: bool = False, **flags):
            return name, PROGRAMS[section], words_of(flags) + self.flags_of(section, later)

        policy = sft = out / "step1_sft"
        yield step("step 1: SFT", "sft", model_name_or_path=self.model, output_dir=sft, **sft_data)
        for number in range(1, rounds + 1):
            # The last round's models stand where a single round's would.
            folder = out if number == rounds else out / f"round{number}"
            if self.settings.embedded:
                file = out / f"data/comparisons_{number}.jsonl"
                flags = {"policy": policy, "prompt_data": self.prompts, "output_file": file}
                yield step(f"round {number}: comparisons", "collect", **flags)
                compared.append(file)
            flags = {"model_name_or_path": sft, "preference_data": compared, **sft_data}
            flags["output_dir"] = reward = folder / "step2_reward"
            yield step("step 2: reward model", "reward", **flags)
            flags = {"model_name_or_path": policy, "reference_model": sft, "reward_model": reward}
            flags |= {"prompt_data": self.prompts or compared, "preference_data": compared}
            flags["output_dir"] = folder / "step3_ppo"
            yield step("step 3: PPO", "ppo", later=number > 1, **flags)
            policy = folder / "step3_ppo/actor"

    def check(self, ranks: int) -> None:
        """A flag that step 3 does not know should not cost the hours of steps 1 and 2."""
        environment = os.environ | {"WORLD_SIZE": str(ranks or 1)}
        last = {(program, ":later_ppo" in str(words)): words for _, program, words in self.steps()}
        shown = dict(env=environment, stderr=subprocess.PIPE, text=True)
        checks = [  # at once: each is a second or two of imports
            subprocess.Popen([launch.PYTHON, ROOT / p, "--check_config", *words], **shown)
            for (p, _), words in last.items()
        ]
        told: dict[str, list[str]] = {}  # what several programs say is said once
        for (program, _), check in zip(last, checks, strict=True):
            for line in check.communicate()[1].splitlines():
                told[line] = [p for p in told.get(line, []) if p != program] + [program]
        problems = [f"{p} ({', '.join(of)})" for p, of in told.items() if p.startswith("  - ")]
        if problems:
            end("these settings cannot work:\n" + "\n".join(problems))
        print(*(f"{line}\n" for line in told), sep="", end="", file=sys.stderr)
        if any(check.returncode for check in checks):
            raise SystemExit(2)

    def begin(self) -> None:
        """Take the output folder, anew or where the last run stopped."""
        seed = str(self.settings.seed)
        if self.settings.overwrite:
            made = [self.output / name for name in MADE.split()]
            for path in (*made, *self.output.glob("round[0-9]*")):
                whole = path.is_dir() and not path.is_symlink()
                shutil.rmtree(path) if whole else path.unlink(missing_ok=True)
        self.output.mkdir(parents=True, exist_ok=True)
        if (other := self.kept(".seed", seed)) != seed:
            end(f"{self.output} was begun with --seed {other}, not {seed}; --overwrite begins anew")
        self.began -= int(self.kept(".seconds", "") or 0)
        (self.output / ".seed").write_text(seed)
        (self.output / ".date").write_text(self.day)

    def seconds(self) -> int:
        """Of this run and of those that it goes on from."""
        return int(time.monotonic() - self.began)

    def stage(self, name: str, run: Callable[[], int]) -> None:
        """Ends the job at the first failure, with its code."""
        print(f"\n=== {name}", flush=True)
        began = time.monotonic()
        code = run()
        (self.output / ".seconds").write_text(str(self.seconds()))
        where = self.output
        if code == 75:
            end(f"{name} stopped as asked and is saved in {where}; the same command goes on", code)
        if code:
            end(f"{name} failed with exit code {code}; what was written stays in {where}", code)
        print(f"=== {name} took {time.monotonic() - began:.0f} s", flush=True)

    def make(self, name: str, folder: Path, module: str, **flags) -> None:
        """Made under another name, as it has no checkpoints: what has its name is whole."""
        if not folder.is_dir():
            writing = Path(f"{folder}.writing")
            words = words_of({"output_dir": writing, "seed": self.settings.seed, **flags})
            self.stage(name, lambda: python(module, *words).returncode)
            writing.rename(folder)

    def evaluate(self) -> None:
        summary = self.output / "summary.txt"
        if summary.exists():
            print(f"\n=== finished before (--overwrite begins anew)\n{summary.read_text()}", end="")
            return
        flags = {"output_dir": self.output, "seed": self.settings.seed, "seconds": self.seconds()}
        if self.settings.embedded:
            flags["verifier_data"] = self.output / "data/held_out.jsonl"

        def run() -> int:
            done = python("evaluation.summary", *words_of(flags), stdout=subprocess.PIPE)
            print(done.stdout, end="", flush=True)
            if not done.returncode:
                summary.write_text(done.stdout)
            return done.returncode

        self.stage("evaluation", run)

    def run(self) -> None:
        if self.settings.embedded:
            self.make("data", self.output / "data", "utils.data.toy_tasks")
        if not self.settings.model_name_or_path:
            shape = {"data": [*self.sft_data, *self.settings.preference_data]}
            for _, values in (layer for p in self.configs for layer in files.layers(p, "scratch")):
                shape |= values
            shape |= {name: v for name, v in self.flags.items() if name == "columns"}
            self.make("base model", self.model, "utils.models.from_scratch", **shape)
        for name, program, words in self.steps():
            self.stage(name, lambda p=program, w=words: launch.launch(p, w))
        self.evaluate()


def python(module: str, *words: str, **more) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    command = [launch.PYTHON, "-m", module, *words]
    return subprocess.run(command, env=environment, text=True, **more)


def main() -> None:
    job = Job(sys.argv[1:])
    if job.settings.max_ranks:
        os.environ["MAX_RANKS"] = str(job.settings.max_ranks)
    launcher = launch.launcher_words()
    print(f"recipe {job.name} → {job.output}; launcher: {' '.join(launcher)}", flush=True)
    job.check(launch.ranks_of(launcher))
    job.begin()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        # During a stage without steps, which is done again; launch() asks its ranks instead.
        signal.signal(number, lambda *_: sys.exit(75))
    job.run()


if __name__ == "__main__":
    main()
