"""The commands a user types: launchers, run_all.sh, launch/ scripts, and what the README says."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT, free_port
from test_steps import sft

from step1_sft.config import SFTConfig
from step2_reward.collect import CollectConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig

README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": [BIN / "deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())],
    "torchrun": [BIN / "torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())],
    "python": [sys.executable],
}


def run(command, cwd, **environment):
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ
        | {"DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}
        | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,  # a shared machine may take six times as long as a free one
    )
    return result.returncode, result.stdout


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_step_runs_from_any_directory(tiny, tmp_path, launcher):
    program, argv = sft(tiny, tmp_path / "out", "--max_steps", 2)
    code, output = run([*LAUNCHERS[launcher], ROOT / program, *argv], cwd=tmp_path)
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
    assert len(text.splitlines()) <= 15 and os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    config = {"step1_sft": SFTConfig, "step2_reward": RewardConfig, "step3_ppo": PPOConfig}
    known = {f.name for f in fields(config[script.parent.parent.name])}
    known |= {"num_gpus", "hostfile", "data"} | {f.name for f in fields(CollectConfig)}
    assert set(re.findall(r"--([a-z_0-9]+)", text)) <= known
    assert {p.name for p in script.parent.iterdir()} == {
        "tiny.sh",
        "single_gpu.sh",
        "zero2.sh",
        "zero3.sh",
        "zero3_offload.sh",
        "multi_node.sh",
    }


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").iterdir()), ids=lambda p: p.stem)
def test_recipes_name_real_settings(recipe):
    text = recipe.read_text()
    assert subprocess.run(["bash", "-n", recipe]).returncode == 0
    classes = {
        "SFT": [SFTConfig],
        "REWARD": [RewardConfig],
        "PPO": [PPOConfig],
        "COLLECT": [CollectConfig],
        "COMMON": [SFTConfig, RewardConfig, PPOConfig],
    }
    found = re.findall(r"([A-Z]+)_FLAGS=\((.*?)\)", text, re.S)
    assert {name for name, _ in found} >= {"SFT", "REWARD", "PPO"}
    for name, flags in found:
        for config in classes.get(name, []):
            assert set(re.findall(r"--([a-z_0-9]+)", flags)) <= {f.name for f in fields(config)}


def test_run_all_walks_the_whole_way(tmp_path):
    """The main job with a few steps each: every stage runs and the summary holds its numbers."""
    command = [
        "bash",
        ROOT / "run_all.sh",
        "--output_dir",
        tmp_path / "out",
        "--seed",
        "3",
        "--sft.max_steps",
        "150",
        "--collect.num_prompts",
        "200",
        "--reward.max_steps",
        "8",
        "--ppo.max_steps",
        "2",
        "--ppo.max_eval_rows",
        "16",
    ]
    code, output = run(command, tmp_path)
    assert code == 0, output
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["sft"]["eval_loss_after"] < summary["sft"]["eval_loss_before"] - 1
    assert 0 <= summary["reward"]["accuracy"] <= 1
    assert 0 <= summary["reward"]["accuracy_longer_answer"] <= 1
    assert {"score_before", "score_after", "kl"} <= summary["ppo"].keys()
    assert {"sft", "ppo", "ppo_ema"} <= summary["verifier"].keys()
    assert summary["verifier"]["prompts"] >= 256
    assert {"sft", "reward", "ppo", "total"} <= summary["seconds"].keys()
    out = tmp_path / "out"
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
    assert (out / "round1/step3_ppo/actor/model.safetensors").exists()  # the recipe has two rounds
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "verifier, 512 held-out prompts" in output


def test_run_all_stops_at_the_first_failure_with_its_code(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a", "output": ""}\n')
    command = [
        "bash",
        ROOT / "run_all.sh",
        "--sft_data",
        bad,
        "--preference_data",
        bad,
        "--output_dir",
        tmp_path / "out",
    ]
    code, output = run(command, tmp_path)
    assert code == 1 and f"{bad}:1: " in output and "failed with exit code 1" in output
    assert "step 1" not in output
    for words, message in (
        (["--ppo.bogus", "1"], "unknown flag --bogus"),
        (["--output_dir"], "--output_dir takes one value, not 0"),
        (["--rounds", "x"], "--rounds x"),
        (["--micro_batch_size=5"], "not divisible by micro_batch_size"),
    ):
        code, output = run(["bash", ROOT / "run_all.sh", *words], tmp_path)
        assert code == 2 and message in output and "===" not in output, output
    assert not (tmp_path / "output").exists()
    code, output = run(["bash", ROOT / "run_all.sh", "nope"], tmp_path)
    assert code == 2 and "no recipe nope" in output and "tiny" in output


def test_readme_names_real_flags_and_files():
    known = {f.name for c in (SFTConfig, RewardConfig, PPOConfig, CollectConfig) for f in fields(c)}
    known |= {"help", "config", "num_accelerators", "rounds", "hostfile", "wat", "settings"}
    known |= {
        "check_config",
        "strategy",
        "master_port",
        "checkpoints",
        "checkpoint",
        "prompts",
        "tokenizer",
        "data",
        "row",
        "step",  # the planner's
    }
    assert "@@" not in README, "a figure is still to be filled in"
    flags = set(re.findall(r"--([a-z][a-z_0-9]+)", README))
    assert flags - known - {"sft", "reward", "ppo", "collect"} == set()
    tree = README[README.index("## The house") :].split("```")[1]
    for name in re.findall(r"[\w/]+\.(?:py|sh)", tree):
        found = [p for p in ROOT.rglob(Path(name).name) if ".venv" not in p.parts]
        assert found, f"{name} is not in the repository"


def test_readme_shows_the_refusal_as_it_is(tmp_path):
    block = next(b for b in README.split("```") if "these settings cannot work" in b)
    command, expected = block.strip().split("\n", 1)
    words = command.removeprefix("$ python ").split()
    code, output = run([sys.executable, ROOT / words[0], *words[1:]], tmp_path)
    assert code == 2
    assert output.strip().splitlines()[-len(expected.splitlines()) :] == expected.splitlines()
