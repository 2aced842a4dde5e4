"""One page for a run, or for several side by side: health in words, curves, answers before and
after, tokens in colours, settings. One file that is read without a network.

python evaluation/html_report.py --output_dir output/tiny
python evaluation/html_report.py --compare output/a output/b --output_file comparison.html
"""

import contextlib
import datetime
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

import jinja2

import evaluation.metrics_table  # noqa: F401  registers the metrics of all steps
from evaluation import differences, evaluated, figures, health, run_folder, summary
from evaluation.run_folder import RunFolder, Step
from utils import whole_files
from utils.distributed import program
from utils.metrics import PREFIXES, TABLE, Metric
from utils.report import brief
from utils.settings import command_line
from utils.settings.fields import Settings, setting
from utils.settings.secrets import hidden
from utils.terminal import visible

TEMPLATES = Path(__file__).parent / "templates"
# Which rows of the table of metrics are those of a kind of step.
ROWS = {"sft": "step 1", "reward": "step 2", "ppo": "step 3", "preference": "step 3, preferences"}
PHASES = ("generate", "score", "train")
# What the steps print of their data and of the memory they will take.
OF_DATA = re.compile(
    r"rows kept|left out|comparisons to train on|\(s\) of \d+|cut at|rows, .*kept in"
)
OF_MEMORY = re.compile(r"plan: (.*)")
QUIET = 60.0  # minutes without a change in the folder of a run, which is then taken for dead
NUMBERS = ("reward", "value", "advantage", "kl")  # of tokens


def check_run(folder: str) -> None:
    if not Path(folder).is_dir():
        raise ValueError("no such folder")


def check_runs(folders: list[str]) -> None:
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"{folder} is no folder")


@dataclass
class ReportConfig(Settings):
    output_dir: str = setting("", "--output_dir of run_all.sh, or of one step", check=check_run)
    compare: list[str] = setting([], "such folders of several runs, on one page", check=check_runs)
    output_file: str = setting(
        "", "where the page is written; empty: report.html in --output_dir, or comparison.html here"
    )
    report_every: float = setting(
        0.0, "write it again after so many minutes, until the run has ended; 0: once"
    )

    def contradictions(self, world_size: int) -> Iterator[str]:
        if bool(self.output_dir) == bool(self.compare):
            yield "one of output_dir and compare names the runs; set either"

    def folders(self) -> list[Path]:
        return [Path(folder) for folder in self.compare or [self.output_dir]]

    def file(self) -> Path:
        here = Path("comparison.html") if self.compare else Path(self.output_dir, "report.html")
        return Path(self.output_file) if self.output_file else here


def shown(text) -> str:
    """Text of models, data and logs as it may stand on the page, before HTML is escaped."""
    return visible(hidden(str(text)))


def label(run: RunFolder, step: Step, runs: list[RunFolder], among: list[Step]) -> str:
    """A short name of a step among others of its kind."""
    parts = [run.name] if len(runs) > 1 else []
    parts += [step.whose] if step.whose and len({s.whose for s in among}) > 1 else []
    parts += [f"round {step.number}"] if step.number else []
    return ", ".join(parts) or step.title


def curves(runs: list[RunFolder]) -> list[dict]:
    """The figures of each kind of step, with that step of all runs in each."""
    found = []
    for kind in run_folder.ORDER:
        own = [(run, step) for run in runs for step in run.steps if step.kind == kind]
        among = [step for _, step in own]
        named = [(shown(label(run, step, runs, among)), step) for run, step in own]
        made = figures.all_of(kind, named) if named else []
        if made:
            titles = dict.fromkeys(step.title.partition(",")[0] for step in among)
            found.append({"title": "; ".join(titles), "figures": made})
    return found


def answers(runs: list[RunFolder]) -> list[dict]:
    """Prompts with the answers of all policies: {"prompt": turns, "answers": [{"who", "parts",
    "score", …}]}. Parts that differ from the answer before training are marked."""
    prompts: dict[str, dict] = {}
    for run in runs:
        policies = [s for s in run.policies() if s.answers()]
        for step in policies:
            kept, who = step.answers(), label(run, step, runs, policies)
            several = len(runs) > 1 or len(policies) > 1
            before, after = kept.get("before", []), kept.get("after", [])
            # While nothing is trained yet, there is only what is before.
            pairs = zip(before, after or before, strict=False)
            for old, new in pairs:
                key = str(new["prompt"])
                prompts.setdefault(key, {"prompt": new["prompt"], "answers": []})
                marked = differences.changed(old["answer"], new["answer"])
                moments = list(zip(("before", "after"), (old, new), marked, strict=True))
                for moment, row, parts in moments if after else moments[:1]:
                    name = f"{who}, {moment}" if several else moment
                    prompts[key]["answers"].append(row | {"who": name, "parts": parts})
    return list(prompts.values())


def tokens(runs: list[RunFolder]) -> list[dict]:
    """The newest rollouts, with each number of a token as a share of the largest of its kind."""
    found = []
    for run in runs:
        for step in (s for s in run.policies() if s.tokens()):
            content = step.tokens()
            rows = content["rows"]
            largest = {
                name: max((abs(v or 0) for row in rows for v in row.get(name, [])), default=0) or 1
                for name in NUMBERS
            }
            for row in rows:
                have = [name for name in NUMBERS if name in row]
                row["tokens"] = [
                    {
                        "text": text,
                        "numbers": {n: row[n][i] for n in have if row[n][i] is not None},
                        "shares": {n: round(row[n][i] / largest[n], 3) for n in have if row[n][i]},
                    }
                    for i, text in enumerate(row["pieces"])
                ]
            names = [name for name in NUMBERS if any(name in row for row in rows)]
            title = label(run, step, runs, run.policies())
            found.append(content | {"title": title, "names": names, "largest": largest})
    return found


def phases(step: Step) -> list[tuple[str, float]]:
    """(phase, seconds) of all rollouts of step 3; the rest of its time is the last one."""
    split = [(p, sum(x for _, x in step.values(f"seconds_{p}"))) for p in PHASES]
    total = step.result.get("seconds") or sum(x for _, x in step.values("seconds"))
    rest = max(total - sum(x for _, x in split), 0.0)
    return [*split, ("evaluation, saving, start", rest)] if split[0][1] else []


def row_of(name: str, kind: str) -> Metric:
    """A metric's row of the table, of the name without its prefix where it has none of its own."""
    rows = TABLE["every step"] | TABLE.get(ROWS[kind], {})
    bare = [name, *(name.removeprefix(prefix) for prefix in PREFIXES)]
    names = [*bare, *(f"{n.partition('/')[0]}/…" for n in bare)]
    return next((rows[n] for n in names if n in rows), Metric(name, "", ""))


def measured(step: Step) -> list[tuple[str, str, str, Metric]]:
    """(metric, its first value, its last, its row of the table)"""
    names = dict.fromkeys(name for m in step.metrics for name in m if name != "step")
    values = {name: step.values(name) for name in names}
    return [
        (name, brief(v[0][1]), brief(v[-1][1]), row_of(name, step.kind))
        for name, v in values.items()
        if v
    ]


def scored_by(step: Step) -> list[tuple[str, str]]:
    """(kind, its name) of whatever gave step 3 its rewards."""
    if step.kind != "ppo":
        return []
    named = [("reward model", step.config.reward_model)]
    named += [("reward function", name) for name in step.config.reward_function]
    return [(k, n) for k, n in (*named, ("reward server", step.config.reward_url)) if n]


def story(run: RunFolder, step: Step) -> dict:
    """Settings, data and machine of a step."""
    return {
        "title": step.title,
        "folder": step.folder,
        "differences": run.differences(step),
        "scored_by": scored_by(step),
        "settings": step.changed_settings(),
        "environment": {n: v for n, v in step.environment().items() if v not in ("", None)},
        "data": [line for line in dict.fromkeys(step.log) if OF_DATA.search(line)][:20],
        "bad_rows": step.bad_rows(),
        "memory": list(dict.fromkeys(m[1] for x in step.log if (m := OF_MEMORY.match(x)))),
        "phases": phases(step),
        "metrics": measured(step),
        "verdicts": step.verdicts(),
    }


def differing(runs: list[RunFolder]) -> list[tuple[str, str, list]]:
    """(step, setting, its value in each run) wherever the runs differ."""
    found = []
    for kind in run_folder.ORDER:
        last = [[s for s in run.steps if s.kind == kind][-1:] for run in runs]
        configs = [vars(steps[0].config) if steps else {} for steps in last]
        for name in dict.fromkeys(n for config in configs for n in config):
            values = [config.get(name, "–") for config in configs]
            if any(v != values[0] for v in values) and name != "output_dir":
                found.append((ROWS[kind], name, values))
    return found


def is_over(run: RunFolder) -> bool:
    """Nothing more is going to be written: each of its steps has its result."""
    return all(step.result for step in run.steps) and (
        bool(run.summary) or not (run.folder / ".seed").exists()
    )


def last_change(folders: list[Path], page: Path) -> float:
    """When anything but the page was written below the folders of runs: seconds since the epoch."""
    walked = (found for folder in folders for found in os.walk(folder))
    newest = 0.0
    for path in (Path(root, name) for root, _, names in walked for name in names):
        with contextlib.suppress(FileNotFoundError):  # a checkpoint that makes room for a newer one
            if path.resolve() != page.resolve():
                newest = max(newest, path.stat().st_mtime)
    return newest


def shown_of(run: RunFolder) -> dict:
    """What the page says of one run."""
    told = {id(step): (step, *health.of_step(step)) for step in run.steps}
    policies = run.policies()
    return {
        "name": run.name,
        "asked": run.asked,
        "against": "the recipe" if run.recipe() else "the defaults",
        "verified": "verifier" in run.summary,
        "policies": [told[id(step)] for step in policies],
        "others": [told[id(s)] for s in reversed(run.steps) if not any(s is p for p in policies)],
        "over": is_over(run),
        "seconds": run.seconds(),
        "table": summary.table_of(run.summary) if run.summary else "",
        "steps": [story(run, step) for step in run.steps],
        "evaluated": evaluated.of_run(run.folder),
    }


def render(folders: list[Path], refresh: float = 0.0) -> str:
    """The page. refresh: minutes after which a browser loads it again; 0: never."""
    runs = [run_folder.read(folder) for folder in folders]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "brief": brief}
    return environment.get_template("report.html").render(
        runs=[shown_of(run) for run in runs],
        made=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        refresh=0 if all(map(is_over, runs)) else round(60 * refresh),
        differing=differing(runs) if len(runs) > 1 else [],
        curves=curves(runs),
        answers=answers(runs),
        tokens=tokens(runs),
        words={"bad": "wrong", "doubt": "look twice", "good": "good", "note": "note"},
    )


def write(folders: list[Path], file: Path, refresh: float = 0.0) -> bool:
    """The page, into a file; → were the runs over before, so that it will not change any more?"""
    over = all(is_over(run_folder.read(folder)) for folder in folders)
    text = render(folders, refresh)
    with whole_files.writing(file, "--output_file") as opened:
        opened.write(text)
    return over


def main() -> None:
    config = command_line.parse(ReportConfig, __doc__)
    program.quiet_libraries()
    over, began = False, time.time()
    while not over:
        # run_all.sh starts this before its first step.
        if not config.report_every or all(map(run_folder.is_run, config.folders())):
            over = write(config.folders(), config.file(), config.report_every)
        if not config.report_every:
            break
        changed = max(began, last_change(config.folders(), config.file()))
        quiet = (time.time() - changed) / 60
        if not over and quiet > max(QUIET, 3 * config.report_every):
            print(f"nothing was written for {quiet:.0f} minutes, so the run has broken off")
            break
        time.sleep(60 * config.report_every * (not over))
    print(f"written: {config.file()}")


if __name__ == "__main__":
    program.run(main)
