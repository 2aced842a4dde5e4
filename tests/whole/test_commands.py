"""The documentation is true. Every command of README.md and docs/, and every recipe, is parsed by
the program's own parser and (slow) walked for a few steps from a folder in which hub names are
folders of the hub's layout. Every flag, file, module and test that a page names exists."""

import dataclasses
import functools
import json
import os
import re
import shlex
import sys

import pytest

import pipeline
import run_all
from evaluation import annotate
from evaluation.annotate import AnnotateConfig
from evaluation.benchmarks import BenchmarksConfig
from evaluation.chat import ChatConfig
from evaluation.html_report import ReportConfig
from evaluation.methods import MethodsConfig
from evaluation.prompt_eval import PromptEvalConfig
from evaluation.reward_report import RewardReportConfig
from evaluation.win_rate import WinRateConfig
from step1_sft.config import SFTConfig
from step2_reward.collect import CollectConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig
from step3_preference.config import PreferenceConfig
from tests.helpers.running import ROOT
from tests.launch.test_launch import LAUNCHERS, RECORDER, run
from utils.models.serve_reward import ServeConfig
from utils.settings import command_line, files
from utils.settings.fields import ConfigError

CONFIGS = {
    "step1_sft/main.py": SFTConfig,
    "step2_reward/main.py": RewardConfig,
    "step2_reward/collect.py": CollectConfig,
    "step3_ppo/main.py": PPOConfig,
    "step3_preference/main.py": PreferenceConfig,
    "evaluation/methods.py": MethodsConfig,
    "evaluation/prompt_eval.py": PromptEvalConfig,
    "evaluation/win_rate.py": WinRateConfig,
    "evaluation/benchmarks.py": BenchmarksConfig,
    "evaluation/annotate.py": AnnotateConfig,
    "evaluation/reward_report.py": RewardReportConfig,
    "evaluation/chat.py": ChatConfig,
    "evaluation/html_report.py": ReportConfig,
    "utils/models/serve_reward.py": ServeConfig,
}
SET = "HuggingFaceH4/ultrafeedback_binarized"
# The other recipes are those of the guides' commands.
WALKED = {"tiny", "best_of_n", "calculator", "scratch", "qwen2.5-0.5b"}
NODES = sorted({path.stem for path in (ROOT / "recipes").iterdir()} - WALKED)
SHARED = {"step1_sft/main.py", "step2_reward/main.py"}
README = (ROOT / "README.md").read_text()
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*GUIDES, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "README.zh.md"))]
PAGES.append(ROOT / "benchmarks/README.md")


def commands_of_the_guides() -> list[list[str]]:
    """The words of each command in README and docs/, each once, but of those for several nodes
    (tests/nodes.sh runs them) and the one that shows a refusal, which begins with "$"."""
    commands, placeholders = [], {"DATA": SET, "MODEL": "Qwen/Qwen2.5-0.5B"}
    placeholders["VENV/bin/python"] = sys.executable
    for block in (b for page in GUIDES for b in page.read_text().split("```")[1::2]):
        lines = [] if "HOSTS" in block else block.replace("\\\n", " ").splitlines()
        for line in lines:
            if re.match(r"(bash run_all|deepspeed|python) ?", line):
                words = [placeholders.get(w, w) for w in shlex.split(line, comments=True)]
                commands += [words] if words not in commands else []
    return commands


def named(commands) -> list:
    return [pytest.param(c, id=f"{n}_{re.sub(r'.*/', '', c[1])}") for n, c in enumerate(commands)]


def is_benchmark(command) -> bool:
    return command[1].startswith("benchmarks/")  # an hour each; tests/benchmarks/ runs them


RUN_ALL = [c for c in commands_of_the_guides() if c[1] == "run_all.sh"]
OTHERS = [c for c in commands_of_the_guides() if c[1] != "run_all.sh"]


def check(program: str, argv: list[str], ranks: int) -> None:
    """The program takes these flags, whether or not the folders are there."""
    if program not in CONFIGS:
        return
    try:
        command_line.build(CONFIGS[program], argv, ranks)
    except ConfigError as error:
        absent = re.compile("does not exist|no such folder|is no (folder|file)|is not installed")
        problems = [x for x in str(error).split("\n") if not absent.search(x)]
        assert not problems, f"{program} {' '.join(argv)}"


def recorded(folder, command, **environment) -> list[tuple[str, list[str]]]:
    """(program, its flags) of each program that a shell script starts; none of them runs."""
    (folder / "bin").mkdir(exist_ok=True)
    python, commands = folder / "bin/python3", folder / "commands"
    commands.write_text("")
    python.write_text(RECORDER.format(python=sys.executable, commands=commands))
    python.chmod(0o755)
    path = f"{python.parent}:{os.environ['PATH']}"
    code, output = run(command, folder, PATH=path, **environment)
    assert code == 0, output
    started = []
    for line in commands.read_text().splitlines():
        program = re.search(r"(?:^| )(?:-m )?(\S+\.py|utils\S+|evaluation\S+)", line)
        started.append((program[1].removeprefix(f"{ROOT}/"), line[program.end() :].split()))
    return started


@pytest.mark.parametrize("command", named(OTHERS))
def test_commands_are_what_the_programs_take(tmp_path, command):
    assert command[1] in CONFIGS or command[1] == "-m" or is_benchmark(command)
    # The settings of a run, which its command of the guides has saved: here no run has been.
    saved = RewardConfig(preference_data=[SET], output_dir="output/tiny/step2_reward")
    command_line.save(saved, tmp_path, world_size=1)
    runs = {f"{saved.output_dir}/config.yaml": str(tmp_path / "config.yaml")}
    check(command[1], [runs.get(word, word) for word in command[2:]], ranks=1)


@pytest.mark.parametrize("command", named(RUN_ALL + [["bash", "run_all.sh", r] for r in NODES]))
def test_run_all_starts_programs_with_flags_they_take(tmp_path, command):
    started = recorded(tmp_path, ["bash", ROOT / "run_all.sh", *command[2:]])
    programs = {program for program, _ in started}
    settings = run_all.Job(command[2:]).settings
    scored = settings.trains_reward_model()
    assert programs >= SHARED - (set() if scored else {"step2_reward/main.py"})
    assert programs >= {pipeline.PROGRAMS[method.step] for method in settings.methods()}
    ranks = 8 if command[-1] in NODES else 2
    for program, argv in started:
        check(program, [a for a in argv if a != "--check_config"], ranks)


def test_launch_scripts_start_programs_with_flags_they_take(tmp_path):
    (tmp_path / "hosts").write_text("localhost slots=8\n")
    scripts = [s for s in ROOT.glob("step*/launch/*.sh") if s.stem not in ("tiny", "slurm")]
    started = [recorded(tmp_path, ["bash", script]) for script in sorted(scripts)]
    assert len(started) == 20 and all(len(programs) == 1 for programs in started)
    for ((program, argv),) in started:
        check(program, argv, ranks=8)


# What pages name.

TOP = [
    path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ("output", ".venv")
]
FILES = [path for top in TOP if top[0] != "." for path in (ROOT / top).rglob("*.*")]
# Not what Python wrote there, nor an environment below benchmarks/.
FILES = [p for p in FILES if "__pycache__" not in p.parts and ".venv_trl" not in p.parts]
OF_OTHERS = set(  # of sbatch, torchrun, DeepSpeed's launcher, alpaca_eval; README's mistaken one
    "nodes ntasks gpus signal nnodes node_rank nproc_per_node master_addr master_port "
    "num_accelerators num_gpus hostfile model_outputs wat".split()
)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


@functools.cache
def known_flags() -> set[str]:
    flags = {f.name for config in CONFIGS.values() for f in dataclasses.fields(config)} | OF_OTHERS
    flags |= {
        "help",
        "config",
        "check_config",
        *files.SECTIONS,
        *pipeline.METHODS,
        *pipeline.FAMILIES,
    }
    for path in [ROOT / "run_all.sh", *(p for p in FILES if p.suffix in (".py", ".sh"))]:
        pattern = r"--([a-z]\w+)" if path.suffix == ".sh" else r"""add_argument\(\s*"--(\w+)"""
        flags |= set(re.findall(pattern, path.read_text()))
    return flags


def module_exists(dotted: str) -> bool:
    """Whether a.b.c is a module, or something in the module a.b."""
    places = [ROOT / dotted.replace(".", "/"), ROOT / dotted.rpartition(".")[0].replace(".", "/")]
    return places[0].is_dir() or any(p.with_name(f"{p.name}.py").exists() for p in places)


@pages
def test_pages_name_real_flags_and_no_gap(page):
    text = page.read_text()
    assert "@@" not in text, "a figure is still to be filled in"
    assert set(re.findall(r"--([a-z][a-z_0-9]+)", text)) - known_flags() == set()


@pages
def test_files_modules_and_tests_that_pages_name_exist(page):
    text, tops = page.read_text(), "|".join(TOP)
    text = re.sub(r"[\w/]*(FOLDER|MODULE)[\w/.]*", "", text)  # placeholders
    paths = re.findall(rf"(?<![\w/.}}-])((?:{tops})/[\w./*-]*)", text)
    paths = [path.rstrip("./") for path in paths if "/." not in path]  # .venv_trl may be made
    missing = {path for path in paths if not any(ROOT.glob(path))}
    names = {path.name for path in FILES} | {path.name for path in ROOT.iterdir()}
    scripts = re.findall(r"[\w-]+\.(?:py|sh)\b", text)
    users = {"my_rewards.py", "my_environment.py"}
    missing |= {name for name in scripts if name not in names | users}
    links = re.findall(r"\]\(([^):#]+)", text)
    missing |= {link for link in links if not (page.parent / link).exists()}
    modules = re.findall(rf"(?<![\w/.])(?:{tops})(?:\.[a-z_]\w*)+", text)
    modules = [m for m in modules if not re.search(r"\.(py|sh|md|png|yaml|json\w*)$", m)]
    missing |= {m for m in modules if not module_exists(m)}
    code = "\n".join(path.read_text() for path in FILES if path.name.startswith("test_"))
    tests = re.findall(r"`(test_\w+)`", text)
    missing |= {test for test in tests if f"def {test}(" not in code}
    assert missing == set()


def test_the_refusal_is_shown_as_it_is(tmp_path):
    blocks = [b for page in GUIDES for b in page.read_text().split("```")]
    block = next(b for b in blocks if "these settings cannot work" in b)
    command, expected = block.strip().split("\n", 1)
    words = command.removeprefix("$ python ").split()
    code, output = run([sys.executable, ROOT / words[0], *words[1:]], tmp_path)
    assert code == 2
    assert output.strip().splitlines()[-len(expected.splitlines()) :] == expected.splitlines()


def test_readme_is_short():
    assert len(README.split()) <= 1800


# Walked.


def rows_of(first: int, count: int) -> list[dict]:
    """Rows of HuggingFaceH4/ultrafeedback_binarized, whose columns each of its splits has."""
    rows = []
    for n in range(first, first + count):
        prompt = f"What comes after the number {n}?"
        talks = [
            [{"content": prompt, "role": "user"}, {"content": text, "role": "assistant"}]
            for text in (f"After {n} comes {n + 1}.", f"{n}")
        ]
        rows.append(
            {"prompt": prompt, "prompt_id": f"{n:064x}", "chosen": talks[0], "rejected": talks[1]}
            | {"messages": talks[0], "score_chosen": 8.0, "score_rejected": 4.5}
            | {"ground_truth": f"{n + 1}"}  # that a verifier reads
        )
    return rows


EMPTY = (17, 140)  # as 28 of Alpaca's 52,002 outputs are


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The repository with what its commands name: data as the hub lays it out, models."""
    from datasets import Dataset

    from utils.models import from_scratch

    root = tmp_path_factory.mktemp("walked")
    for path in ROOT.iterdir():
        if path.name not in ("output", ".git"):
            (root / path.name).symlink_to(path)
    for kind, first, count in (("train", 0, 96), ("test", 96, 16)):
        for use in ("prefs", "sft", "gen"):
            file = root / SET / f"data/{kind}_{use}-00000-of-00001.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            Dataset.from_list(rows_of(first, count)).to_parquet(file)
    (root / "ultrafeedback_binarized").symlink_to(root / SET)
    alpaca = [
        {"instruction": f"Name a number above {n}.", "input": "", "output": f"{n + 2}"}
        for n in range(240)
    ]
    for n in EMPTY:
        alpaca[n]["output"] = ""
    file = root / "tatsu-lab/alpaca/data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"
    file.parent.mkdir(parents=True)
    Dataset.from_list([r | {"text": str(r)} for r in alpaca]).to_parquet(file)
    (root / "alpaca_en.json").write_text(json.dumps(alpaca))
    lines = [
        json.dumps(r | {"instruction": f"说出一个大于{n}的数。"}) for n, r in enumerate(alpaca)
    ]
    (root / "Belle_open_source_zh.json").write_text("\n".join(lines))
    (root / "my_rewards.py").write_text(
        " ".join(re.search(r"`(def brevity.*?)`", README, re.S)[1].split())
    )
    from_scratch.build(
        root / "Qwen/Qwen2.5-0.5B",
        (f"{r['prompt']} {r['chosen'][1]['content']}" for r in rows_of(0, 96)),
        vocab_size=400,
        hidden_size=32,
        layers=2,
        heads=4,
        intermediate_size=64,
        max_positions=2048,
        seed=0,
    )
    for size in ("7B", "72B"):
        (root / f"Qwen/Qwen2.5-{size}").symlink_to(root / "Qwen/Qwen2.5-0.5B")
    return root


# The same commands in a few steps of few rows.
SHORT = "--dtype fp32 --global_batch_size 8 --micro_batch_size 2 --max_eval_rows 8".split()
FEW = {
    "run_all.sh": "--sft.max_steps 3 --reward.max_steps 3 "
    "--ppo.max_steps 2 --ppo.prompts_per_rollout 8 --ppo.ppo_epochs 1 "
    "--ppo.max_response_length 16 --ppo.self_check warn --preference.max_steps 2 "
    "--best_of_n.max_steps 2",
    "step1_sft/main.py": "--max_steps 3",
    "step2_reward/main.py": "--max_steps 3",
    "step3_preference/main.py": "--max_steps 3",
    "step2_reward/collect.py": "--num_prompts 8 --max_response_length 16",
    "step3_ppo/main.py": "--max_steps 2 --prompts_per_rollout 8 --max_response_length 16 "
    "--self_check warn",
}


def of_this_run(words: list[str], short: list[str]) -> list[str]:
    """`short` without flags of steps that a command of run_all.sh does not have."""
    read = {s for stage in run_all.Job(words).all_stages() for s in stage.sections}
    flags = command_line.split_flags([*short, "--collect.num_prompts", "40"], [])
    kept = {n: v for n, v in flags.items() if "." not in n or n.partition(".")[0] in read}
    return run_all.words_of(kept)


def walk(folder, command) -> str:
    program, *rest = command[1:]
    launcher = {"deepspeed": LAUNCHERS["deepspeed"](), "python": [sys.executable]}
    start = [*launcher.get(command[0], ["bash"]), program]
    short = [*SHORT, *FEW[program].split()] if program in FEW else []
    if program == "run_all.sh":
        short = of_this_run(rest, short)
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    code, output = run([*start, *rest, *short], folder, **environment)
    assert code == 0, f"{' '.join(command)}\n{output}"
    return output


def ranked_by_people(folder) -> None:
    rows = [json.loads(line) for line in (folder / "to_rank.jsonl").read_text().splitlines()]
    ranked = [r | {"ranks": list(range(1, len(r["responses"]) + 1))} for r in rows]
    (folder / "to_rank.jsonl").write_text("\n".join(map(json.dumps, ranked)))
    (folder / "comparisons.jsonl").unlink()  # the reward model's, of the command before


def ranked_on_the_page(folder) -> None:
    """What evaluation/annotate.py would have written, of more prompts than were sampled here."""
    rows = annotate.load(str(folder / "to_page.jsonl"))
    many = [
        row | {"prompt": [*row["prompt"][:-1], row["prompt"][-1] | {"content": f"{n}?"}]}
        for n, row in enumerate(rows * 12)
    ]
    kept = annotate.Annotations(many, folder / "rankings.jsonl")
    for n, row in enumerate(many):
        for answer in range(len(row["responses"])):
            kept.click("ana", n, "ranks", answer, answer + 1)


@pytest.mark.slow
def test_commands_walk(folder):
    for command in [c for c in RUN_ALL + OTHERS if not is_benchmark(c)]:
        if command[1] == "evaluation/annotate.py":
            ranked_on_the_page(folder)
        if command[1] == "evaluation/annotate.py" or "--web" in command:
            continue  # they serve until they are stopped
        if "people" in command:
            continue  # nobody has ranked these answers: tests/evaluation/test_win_rate.py does
        if "--rankings" in command:
            ranked_by_people(folder)
        walk(folder, command)
    for name in ("tiny", "qwen2.5-0.5b", "scratch"):
        assert (folder / f"output/{name}/summary.json").stat().st_size > 0
    left_out = folder / "output/scratch/step1_sft/bad_rows.jsonl"
    assert len(left_out.read_text().splitlines()) == 2 * len(EMPTY), "of Alpaca and Belle"
    assert len((folder / "comparisons.jsonl").read_text().splitlines()) == 8
    assert (folder / "output/brevity/actor/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", NODES)
def test_recipes_of_nodes_walk(folder, recipe):
    """With Alpaca for demonstrations, whose empty answers are left out, counted and kept."""
    command = ["bash", "run_all.sh", recipe, "--sft_data", "tatsu-lab/alpaca"]
    output = walk(folder, command)
    assert "left out 2 bad row(s) of 240" in output and "PPO score, " in output
    out = folder / "output" / recipe
    kept = [json.loads(x) for x in (out / "step1_sft/bad_rows.jsonl").read_text().splitlines()]
    assert len(kept) == len(EMPTY) and "output is empty" in str(kept[0])
    last = json.loads((out / "step3_ppo/metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= last["score_clipped"] <= 1
