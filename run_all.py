"""The stages of run_all.sh, one after the other; how it is used stands there."""

import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

from pipeline import FAMILIES, METHODS, OF_STEP_3, Pipeline, Plan, Stage, paths_made
from utils import launch, whole_files
from utils.settings import command_line, files
from utils.settings.fields import ConfigError
from utils.settings.secrets import hidden

ROOT = Path(__file__).resolve().parent


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
        self.own = own
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
        self.flags = {
            f"ppo.{n}" if n in OF_STEP_3 else n: v
            for n, v in self.flags.items()
            if n not in own or n == "seed"
        }
        self.name, self.began = recipe.stem, time.monotonic()
        self.output = Path(self.settings.output_dir or f"output/{self.name}")
        # Chat templates may state the day: every stage, and every resume, states that of the start.
        self.day = datetime.date.today().isoformat()
        if not self.settings.overwrite:
            self.day = self.kept(".date", self.day)
        sft_data, prompts = self.settings.sft_data, self.settings.prompt_data
        model = self.settings.model_name_or_path or self.output / "base_model"
        if self.settings.embedded:
            sft_data = [self.output / "data/sft.jsonl"]
            prompts = [self.output / "data/prompts.jsonl"]
        self.plan = Plan(self.settings, self.output, model, sft_data, prompts)
        self.methods = [method.name for method in self.settings.methods()]
        self.refuse_unread_flags()

    def refuse_unread_flags(self) -> None:
        """A flag for a step or method that this run does not have would be passed over silently."""
        read = {name for stage in self.all_stages() for name in stage.sections}
        problems = [
            f"  - --{flag}: no step of this run reads {flag.partition('.')[0]}; there are "
            + ", ".join(sorted(read))
            for flag in self.flags
            if "." in flag and flag.partition(".")[0] not in read
        ]
        there = {*METHODS, *FAMILIES}
        problems += [
            f"  - {path}: methods.{name} is no method; there are " + ", ".join(sorted(there))
            for path in self.configs
            for name in sorted(files.methods_in(path) - there)
        ]
        if problems:
            end("these settings cannot work:\n" + "\n".join(problems))

    def all_stages(self) -> list[Stage]:
        compared = [self.plan.comparison()] if self.settings.is_compared() else []
        return [*self.plan.stages(), *compared]

    def kept(self, name: str, otherwise: str) -> str:
        """What an earlier run has written down."""
        path = self.output / name
        return path.read_text().strip() if path.is_file() else otherwise

    def words_for(self, stage: Stage) -> list[str]:
        """Its own flags, then recipe and --config files, flags for every step, flags for the
        sections that it reads: the last one counts."""
        configs = [files.with_sections(path, stage.sections[1:]) for path in self.configs]
        words = words_of(stage.flags) + ["--config", *configs]
        words += ["--overwrite"] if self.settings.overwrite else ["--resume", "auto"]
        given = {n: v for n, v in self.flags.items() if "." not in n}
        for section in stage.sections:
            own = {n: v for n, v in self.flags.items() if n.startswith(f"{section}.")}
            given |= {n.partition(".")[2]: v for n, v in own.items()}
        return words + words_of({"date": self.day}) + words_of(given)

    def check(self, ranks: int) -> None:
        """A flag that step 3 does not know should not cost the hours of steps 1 and 2."""
        environment = os.environ | {"WORLD_SIZE": str(ranks or 1)}
        last = {(stage.script, stage.sections): stage for stage in self.all_stages()}
        shown = dict(env=environment, stderr=subprocess.PIPE, text=True)
        checks = [  # at once: each is a second or two of imports
            subprocess.Popen(
                [launch.PYTHON, ROOT / stage.script, "--check_config", *self.words_for(stage)],
                **shown,
            )
            for stage in last.values()
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
            for path in list(paths_made(self.output, self.settings.embedded)):
                whole = path.is_dir() and not path.is_symlink()
                shutil.rmtree(path) if whole else path.unlink(missing_ok=True)
        self.output.mkdir(parents=True, exist_ok=True)
        if (other := self.kept(".seed", seed)) != seed:
            end(f"{self.output} was begun with --seed {other}, not {seed}; --overwrite begins anew")
        self.times = json.loads(self.kept(".seconds", "") or "{}")
        (self.output / ".seed").write_text(seed)
        (self.output / ".date").write_text(self.day)
        asked = {"recipe": self.name, "configs": self.configs[1:], "flags": self.flags | self.own}
        whole_files.write_text(self.output / "run.json", hidden(json.dumps(asked, indent=2)) + "\n")

    def stage(self, name: str, run: Callable[[], int], method: str = "shared"):
        """Ends the job at the first failure, with its code. Its seconds count for a method, or for
        what all methods share, in the runs that this one goes on from too."""
        print(f"\n=== {name}", flush=True)
        began = time.monotonic()
        code = run()
        seconds = time.monotonic() - began
        self.times[method] = self.times.get(method, 0.0) + seconds
        (self.output / ".seconds").write_text(json.dumps(self.times))
        where = self.output
        if code == 75:
            end(f"{name} stopped as asked and is saved in {where}; the same command goes on", code)
        if code:
            end(f"{name} failed with exit code {code}; what was written stays in {where}", code)
        print(f"=== {name} took {seconds:.0f} s", flush=True)

    def make(self, name: str, folder: Path, module: str, **flags) -> None:
        """Made under another name, as it has no checkpoints: what has its name is whole."""
        if not folder.is_dir():
            writing = Path(f"{folder}.writing")
            words = words_of({"output_dir": writing, "seed": self.settings.seed, **flags})
            self.stage(name, lambda: python(module, *words).returncode)
            writing.rename(folder)

    def evaluate(self) -> None:
        summary = self.output / "summary.txt"
        if summary.exists() and self.kept(".methods", "ppo").split() == self.methods:
            print(f"\n=== finished before (--overwrite begins anew)\n{summary.read_text()}", end="")
            return
        if self.settings.is_compared():
            self.start(self.plan.comparison())
        flags = {"output_dir": self.output, "seed": self.settings.seed, "methods": self.methods}
        if self.settings.trains_reward_model():
            flags["reward"] = self.plan.reward
        flags["seconds"] = [f"{name}={took:.0f}" for name, took in self.times.items()]
        if self.settings.embedded:
            flags["verifier_data"] = self.output / "data/held_out.jsonl"

        def run() -> int:
            done = python("evaluation.summary", *words_of(flags), stdout=subprocess.PIPE)
            print(done.stdout, end="", flush=True)
            if not done.returncode:
                # Of which methods it is, before it is there: it says that all is finished.
                summary.unlink(missing_ok=True)
                (self.output / ".methods").write_text(" ".join(self.methods))
                whole_files.write_text(summary, done.stdout)
            return done.returncode

        self.stage("evaluation", run)

    @contextlib.contextmanager
    def page_refreshed(self) -> Iterator[None]:
        """Write report.html again every --report_every minutes, beside the stages."""
        every = self.settings.report_every
        if not every:
            yield
            return
        flags = words_of({"output_dir": self.output, "report_every": every})
        words = [launch.PYTHON, "-m", "evaluation.html_report", *flags]
        writer = subprocess.Popen(words, env=environment_of_python())
        try:
            yield
        finally:
            writer.terminate()
            writer.wait()

    def start(self, stage: Stage) -> None:
        words = self.words_for(stage)
        self.stage(stage.name, lambda: launch.launch(stage.script, words), stage.method or "shared")

    def run(self) -> None:
        if self.settings.embedded:
            self.make("data", self.output / "data", f"utils.data.{self.settings.task}")
        if not self.settings.model_name_or_path:
            shape = {"data": [*self.plan.sft_data, *self.settings.preference_data]}
            for _, values in (layer for p in self.configs for layer in files.layers(p, "scratch")):
                shape |= values
            shape |= {name: v for name, v in self.flags.items() if name == "columns"}
            self.make("base model", self.plan.model, "utils.models.from_scratch", **shape)
        with self.page_refreshed():
            for stage in self.plan.stages():
                self.start(stage)
        self.evaluate()


def environment_of_python() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path}


def python(module: str, *words: str, **more) -> subprocess.CompletedProcess:
    command = [launch.PYTHON, "-m", module, *words]
    return subprocess.run(command, env=environment_of_python(), text=True, **more)


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
