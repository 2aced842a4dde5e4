"""The commands a user types: launchers, run_all.sh, launch/ scripts."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import pipeline
import run_all
from step1_sft.config import SFTConfig
from step2_reward.collect import CollectConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig
from step3_preference.config import PreferenceConfig
from tests.helpers.jobs import sft
from tests.helpers.running import ROOT
from utils import launch
from utils.distributed.process_group import free_port
from utils.settings import files

BIN = Path(sys.executable).parent
# Ports are asked for when they are used: minutes earlier another program may have taken them.
LAUNCHERS = {
    "deepspeed": lambda: [BIN / "deepspeed", "--num_accelerators", 2, *at_a_free_port()],
    "torchrun": lambda: [BIN / "torchrun", "--nproc_per_node", 2, *at_a_free_port()],
    "python": lambda: [sys.executable],
}


def at_a_free_port():
    return "--master_port", free_port()


def run(command, cwd, **environment):
    shared = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}  # conftest.py's
    shared |= {"DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=shared | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,  # a shared machine may take six times as long as a free one
    )
    return result.returncode, result.stdout


@pytest.mark.parametrize("limit, ranks", [("", 2), ("0", 2), ("1", 1), ("9", 2)])
def test_a_cpu_takes_two_ranks_unless_fewer_are_asked_for(monkeypatch, limit, ranks):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("MAX_RANKS", limit)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert launch.ranks_here() == ranks


# run_all.sh's walk starts its ranks by deepspeed, and other tests start a step by python.
@pytest.mark.parametrize(
    "launcher",
    [
        name if name == "torchrun" else pytest.param(name, marks=pytest.mark.slow)
        for name in LAUNCHERS
    ],
)
def test_a_step_runs_from_any_directory(tiny, tmp_path, launcher):
    program, argv = sft(tiny, tmp_path / "out", "--max_steps", 2)
    code, output = run([*LAUNCHERS[launcher](), ROOT / program, *argv], cwd=tmp_path)
    assert code == 0, output
    assert "accumulation" in output and (tmp_path / "out/model.safetensors").exists()
    ranks = 1 if launcher == "python" else 2
    assert f"× ranks {ranks}" in output


def test_a_launch_script_keeps_output_and_exit_code(tiny, tmp_path):
    script = ROOT / "step1_sft/launch/zero3.sh"
    small = [
        "--dtype",
        "fp32",
        "--max_steps",
        "1",
        "--global_batch_size",
        "4",
        "--micro_batch_size",
        "2",
        "--max_length",
        "96",
    ]
    environment = {
        "LAUNCH": f"--num_accelerators 2 --master_port {free_port()}",
        "MODEL": str(tiny / "base_model"),
        "DATA": str(tiny / "data/sft.jsonl"),
        "OUTPUT": str(tmp_path / "out"),
    }
    code, output = run(["bash", script, *small], tmp_path, **environment)
    assert code == 0, output
    assert "ZeRO-3" in output and "ZeRO-3" in (tmp_path / "out/log.txt").read_text()
    code, output = run(["bash", script, "--dtype", "fp64"], tmp_path, **environment)
    assert code != 0 and "dtype=fp64 is not one of auto, fp32, bf16, fp16" in output


@pytest.mark.parametrize("script", sorted(ROOT.glob("step*/launch/*.sh")), ids=lambda p: p.name)
def test_launch_scripts_are_short_and_name_real_flags(script):
    text = script.read_text()
    assert len(text.splitlines()) <= 10 and os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    config = {"step1_sft": SFTConfig, "step2_reward": RewardConfig, "step3_ppo": PPOConfig}
    config["step3_preference"] = PreferenceConfig
    known = {f.name for f in fields(config[script.parent.parent.name])}
    scratch = files.read(str(ROOT / "recipes/tiny.yaml"))["scratch"]
    known |= (
        {"num_gpus", "hostfile", "data", "config"}
        | scratch.keys()
        | {f.name for f in fields(CollectConfig)}
    )
    known |= set("signal requeue open nodes ntasks gpus".split())  # sbatch's
    assert set(re.findall(r"--([a-z_0-9]+)", text)) <= known
    for name, value in scratch.items():
        assert name not in text or f"--{name} {value} " in text, "not the recipe's"
    assert {p.name for p in script.parent.iterdir()} == {
        "tiny.sh",
        "single_gpu.sh",
        "zero2.sh",
        "zero3.sh",
        "zero3_offload.sh",
        "multi_node.sh",
        "slurm.sh",
    }


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").iterdir()), ids=lambda p: p.stem)
def test_recipes_name_real_settings(recipe):
    sections = files.read(str(recipe))
    scored_by = sections["run"].get("scored_by", "reward")
    step_3 = {"methods"} if sections["run"].get("method") == ["best_of_n"] else {"ppo"}
    assert sections.keys() >= {"run", "sft", scored_by} - {"reward_function"} | step_3
    assert recipe.suffix == ".yaml"
    read = {SFTConfig: "sft", PPOConfig: "ppo", PreferenceConfig: "preference"}
    for config in (*read, CollectConfig, RewardConfig, run_all.Pipeline):
        methods = [m for m in pipeline.METHODS.values() if m.step == read.get(config)]
        for more in [m.sections(2)[1:] for m in methods] or [()]:
            word = files.with_sections(str(recipe), more)
            for place, settings in files.layers(word, *config.sections):
                assert settings.keys() <= {f.name for f in fields(config)}, place


# Two rounds for real take half as long again, and each part of the second has a test: what it is
# given in the next one here, that it works in test_steps.py.
@pytest.mark.parametrize("rounds", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_run_all_walks_the_whole_way(tmp_path, rounds):
    """The main job with a few steps each: every stage runs and the summary holds its numbers."""
    out = tmp_path / "out"
    flags = ["--output_dir", out, "--rounds", rounds, "--seed", 3, "--sft.max_steps", 60]
    flags += ["--collect.num_prompts", 100, "--reward.max_steps", 6, "--ppo.max_steps", 2]
    flags += ["--ppo.ppo_epochs", 1, "--ppo.max_eval_rows", 16]
    code, output = run(["bash", ROOT / "run_all.sh", *flags], tmp_path)
    assert code == 0, output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["sft"]["eval_loss_after"] < summary["sft"]["eval_loss_before"] - 1
    assert 0 <= summary["reward"]["accuracy"] <= 1
    assert 0 <= summary["reward"]["accuracy_longer_answer"] <= 1
    assert {"score_before", "score_after", "kl"} <= summary["ppo"].keys()
    assert {"sft", "ppo", "ppo_ema"} <= summary["verifier"].keys()
    assert summary["verifier"]["prompts"] >= 256
    assert {"sft", "reward", "ppo", "total"} <= summary["seconds"].keys()
    for folder in ("step1_sft", "step2_reward", "step3_ppo"):
        for name in ("metrics.jsonl", "config.yaml", "log.txt", "result.json"):
            assert (out / folder / name).stat().st_size > 0, f"{folder}/{name}"
    for folder in ("actor", "actor_ema", "critic"):
        names = {p.name for p in (out / "step3_ppo" / folder).iterdir()}
        assert {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "config.yaml",
            "chat_template.jinja",
        } <= names
    assert (out / "round1/step3_ppo/actor/model.safetensors").exists() == (rounds == 2)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "verifier, 512 held-out prompts" in output


@pytest.mark.slow
def test_run_all_compares_methods_and_goes_on_with_more(tmp_path):
    """Three methods in two rounds, then a fourth in the same folder: what is finished stays."""
    out, few = tmp_path / "out", "--sft.max_steps 60 --collect.num_prompts 100 --reward.max_steps 6"
    few += " --ppo.max_steps 2 --later_ppo.max_steps 2 --ppo.ppo_epochs 1 --ppo.max_eval_rows 16"
    few += " --preference.max_steps 4 --round_prompts disjoint --replay_share 0.5"
    flags = ["--output_dir", out, "--rounds", 2, *few.split(), "--method", "grpo", "dpo", "simpo"]
    code, output = run(["bash", ROOT / "run_all.sh", *flags], tmp_path)
    assert code == 0, output
    weights = out / "step3_dpo/model.safetensors"
    made, summary = weights.stat().st_mtime, json.loads((out / "summary.json").read_text())
    assert list(summary["methods"]) == ["sft", "grpo", "dpo", "simpo"]
    assert summary["methods"]["sft"]["kl"] == 0 != summary["methods"]["dpo"]["kl"]
    assert {"shared", "grpo", "dpo", "simpo"} == summary["seconds"].keys()
    flags += ["best_of_n", "--best_of_n.max_steps", 4]
    code, output = run(["bash", ROOT / "run_all.sh", *flags], tmp_path)
    assert code == 0 and "best_of_n  " in output, output
    assert weights.stat().st_mtime == made
    assert "best_of_n" in json.loads((out / "summary.json").read_text())["methods"]
    code, output = run(["bash", ROOT / "run_all.sh", *flags], tmp_path)
    assert code == 0 and "finished before" in output


SECTIONS = {program: name for name, program in pipeline.PROGRAMS.items()}
SECTIONS["evaluation/methods.py"] = "collect"
# Stands for Python: is it in run_all.py and launch.py, and writes down all else.
RECORDER = """#!/bin/bash
case $1 in - | -c | */run_all.py | */launch.py) exec {python} "$@" ;; esac
echo "$*" >>{commands}
while [ $# -gt 0 ]; do
    [ "$1" = --output_dir ] && mkdir -p "$2"
    shift
done
"""


def stages_of_run_all(folder, *flags) -> list[tuple[str, dict[str, str]]]:
    """(program, its flags' values) of each stage, in its turn; nothing is run."""
    (folder / "bin").mkdir()
    python, commands = folder / "bin/python3", folder / "commands"
    python.write_text(RECORDER.format(python=sys.executable, commands=commands))
    python.chmod(0o755)
    path = f"{python.parent}:{os.environ['PATH']}"
    code, output = run(["bash", ROOT / "run_all.sh", *flags], folder, PATH=path)
    assert code == 0, output
    stages = []
    for line in commands.read_text().splitlines():
        if "--check_config" not in line:
            words = line.split()
            program = next((w for w in words if w.endswith(".py")), words[1])
            found = re.findall(r" --(\w+)((?: (?!--)\S+)*)", line.partition(program)[2])
            flags = {flag: values.strip() for flag, values in found}
            stages.append((program, of_config(program, flags) | flags))
    return stages


def of_config(program: str, flags: dict[str, str]) -> dict[str, str]:
    """What the files of --config say to a step, by PyYAML's own reading of them."""
    said = {}
    for word in flags.get("config", "").split():
        path, *more = word.split(":")
        sections = yaml.safe_load(Path(path).read_text())
        for name in ("all", SECTIONS[program.removeprefix(f"{ROOT}/")], *more):
            there = sections.get("methods", {}) if name.startswith("methods.") else sections
            own = there.get(name.removeprefix("methods."), {})
            said |= {n: str(value) for n, value in own.items()}
    return said


def test_run_all_gives_each_round_what_the_last_one_made(tmp_path):
    """In the tiny recipe, which has two."""
    out, found = tmp_path / "out", []
    for program, flags in stages_of_run_all(tmp_path, "--output_dir", out):
        short = {k: v.replace(f"{out}/", "") for k, v in flags.items()}
        found.append((program.removeprefix(f"{ROOT}/"), short))
    first = "data/comparisons_1.jsonl"
    both = f"{first} data/comparisons_2.jsonl"
    expected = [
        ("utils.data.toy_tasks", "output_dir=data.writing"),
        ("utils.models.from_scratch", "data=data/sft.jsonl"),
        ("step1_sft/main.py", "model_name_or_path=base_model"),
        ("step2_reward/collect.py", f"policy=step1_sft, output_file={first}"),
        ("step2_reward/main.py", f"model_name_or_path=step1_sft, preference_data={first}"),
        ("step3_ppo/main.py", "model_name_or_path=step1_sft, reward_model=round1/step2_reward")
        + (f"preference_data={first}, reference_model=step1_sft, output_dir=round1/step3_ppo",)
        + ("max_steps=25",),
        ("step2_reward/collect.py", "policy=round1/step3_ppo/actor"),
        ("step2_reward/main.py", f"model_name_or_path=step1_sft, preference_data={both}"),
        ("step3_ppo/main.py", "model_name_or_path=round1/step3_ppo/actor")
        + (f"preference_data={both}, reference_model=step1_sft, output_dir=step3_ppo",)
        + ("reward_model=step2_reward, prompt_data=data/prompts.jsonl, max_steps=32",),
        ("evaluation.summary", "verifier_data=data/held_out.jsonl"),
    ]
    assert [program for program, _ in found] == [program for program, *_ in expected]
    for (program, flags), (_, *wanted) in zip(found, expected, strict=True):
        for flag, value in (pair.split("=") for pair in ", ".join(wanted).split(", ")):
            assert flags[flag] == value, f"{program} --{flag}"


def test_a_flag_of_the_users_wins_in_every_round(tmp_path):
    stages = stages_of_run_all(tmp_path, "--output_dir", tmp_path / "out", "--ppo.max_steps", 7)
    steps = [
        flags["max_steps"] for program, flags in stages if program.endswith("step3_ppo/main.py")
    ]
    assert steps == ["7", "7"]


def test_a_file_of_the_users_wins_over_the_recipe_and_flags_over_both(tmp_path):
    """recipe's all < recipe's step < the user's all < the user's step < flags."""
    own = tmp_path / "own.yaml"
    own.write_text(
        "run: {rounds: 1}\nall: {log_every: 7, ppo_epochs: 9}\nppo: {max_steps: 8, log_every: 6}\n"
    )
    out = tmp_path / "out"
    stages = stages_of_run_all(tmp_path, "--output_dir", out, "--config", own, "--ppo.kl_coef", 0.3)
    steps = [flags for program, flags in stages if program.endswith("main.py")]
    assert len(steps) == 3
    assert [flags["log_every"] for flags in steps] == ["7", "7", "6"]
    assert (steps[2]["max_steps"], steps[2]["ppo_epochs"], steps[2]["kl_coef"]) == ("8", "9", "0.3")


def test_overwrite_deletes_what_a_run_made_and_no_folder_that_a_link_names(tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (out / "round1/step2_reward").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "weights").touch()
    (out / "step3_ppo").symlink_to(elsewhere)
    for name, text in ((".seed", "7"), (".seconds", ""), ("own.txt", "")):
        (out / name).write_text(text)
    run_all.Job(["tiny", "--output_dir", str(out), "--overwrite"]).begin()
    assert {path.name for path in out.iterdir()} == {".seed", ".date", "run.json", "own.txt"}
    assert (elsewhere / "weights").exists() and (out / ".seed").read_text() == "42"


def test_a_run_goes_on_after_a_kill_while_its_seconds_were_written(tmp_path):
    (tmp_path / ".seconds").touch()
    job = run_all.Job(["tiny", "--output_dir", str(tmp_path)])
    job.begin()
    assert job.times == {}


def test_the_seed_of_a_users_file_is_that_of_all_stages(tmp_path):
    (tmp_path / "own.yaml").write_text("seed: 7\n")
    out = ["tiny", "--output_dir", str(tmp_path), "--config", str(tmp_path / "own.yaml")]
    assert run_all.Job(out).settings.seed == 7
    assert run_all.Job([*out, "--seed", "8"]).settings.seed == 8


def test_the_shape_of_a_new_model_is_the_recipes_unless_a_file_says_another(tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text("scratch:\n")
    (tmp_path / "more.yaml").write_text("scratch: {vocab_size: 512}\n")
    own = ["--config", *(str(tmp_path / f"{name}.yaml") for name in ("own", "more"))]
    job = run_all.Job(["tiny", "--output_dir", str(tmp_path / "out"), *own])
    made = {}
    monkeypatch.setattr(job, "make", lambda name, *_, **flags: made.update({name: flags}))
    monkeypatch.setattr(pipeline.Plan, "stages", lambda plan: ())
    monkeypatch.setattr(job, "evaluate", lambda: None)
    job.run()
    assert (made["base model"]["vocab_size"], made["base model"]["max_positions"]) == (512, 256)


def test_run_all_stops_at_the_first_failure_with_its_code(tmp_path):
    bad, out = tmp_path / "bad.jsonl", tmp_path / "out"
    bad.write_text('{"instruction": "a", "output": ""}\n')
    own = ["--sft_data", bad, "--preference_data", bad, "--output_dir", out]
    code, output = run(["bash", ROOT / "run_all.sh", *own], tmp_path)
    assert code == 1 and f"{bad}:1: " in output and "failed with exit code 1" in output
    assert "step 1" not in output
    wrong = ["--ppo.bogus", 1, "--max_epochs", 1, "--micro_batch_size=5"]
    code, output = run(["bash", ROOT / "run_all.sh", *wrong], tmp_path)
    assert code == 2 and "===" not in output, output
    assert "unknown flag --bogus (step3_ppo/main.py)" in output
    assert "--max_epochs; did you mean --epochs? (step1_sft/main.py, step2" in output
    assert "not divisible by micro_batch_size" in output
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--output_dir"], "--output_dir has no value; it takes one"),
        (["--output_dir", ""], "output_dir is empty; set --output_dir"),
        (["--model_name_or_path="], "model_name_or_path is empty; set --model_name_or_path"),
        (["--rounds", "x"], "rounds='x' is not int"),
        (["tiny", "word"], "'word' stands before any flag"),
        (["scratch", "--sft_data", "a.jsonl"], "needs --preference_data"),
        (["nope"], "no recipe nope; there are: 70b-offload 7b-zero3"),
    ],
)
def test_words_that_run_all_cannot_read_end_it(capfd, words, message):
    with pytest.raises(SystemExit) as end:
        run_all.Job(words)
    assert end.value.code == 2 and message in capfd.readouterr().err
