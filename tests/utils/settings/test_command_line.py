"""Flags, files and defaults; every problem in one message; nothing loaded before that."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig
from step3_preference.config import PreferenceConfig
from utils.settings import command_line
from utils.settings.command_line import build
from utils.settings.fields import ConfigError

ROOT = Path(__file__).resolve().parents[3]
COMMON = "--output_dir out --model_name_or_path model".split()
NEEDED = {
    SFTConfig: [*COMMON, "--sft_data", "d"],
    RewardConfig: [*COMMON, "--preference_data", "d"],
    PPOConfig: [*COMMON, "--reward_model", "r", "--prompt_data", "d"],
    PreferenceConfig: [*COMMON, "--preference_data", "d"],
}
OUTPUT_DIR_HELP = "folder for weights, metrics.jsonl and config.yaml"
ALL = pytest.mark.parametrize("config_class", NEEDED, ids=lambda c: c.__name__)


def sft(*argv, world_size=1):
    return build(SFTConfig, [*NEEDED[SFTConfig], *argv], world_size)


def problems_of(config_class, argv, world_size=1):
    """The lines of the message."""
    with pytest.raises(ConfigError) as caught:
        build(config_class, list(argv), world_size)
    return [line.removeprefix("  - ") for line in str(caught.value).split("\n")]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


# Precedence and types.


@pytest.mark.parametrize(
    "file, argv, overwrite, resume",
    [
        ("resume: auto\nresume_anyway: true", ["--overwrite"], True, "no"),
        ("resume: auto\nresume_anyway: true", ["--overwrite", "--resume_anyway=no"], True, "no"),
        ("resume: auto", ["--overwrite", "false"], False, "auto"),
        ("overwrite: true", ["--resume", "auto"], False, "auto"),
        ("overwrite: true", ["--resume", "no"], True, "no"),
        ("overwrite: true", ["--resume", "."], False, "."),
        ("resume: .", ["--overwrite"], True, "no"),
        ("overwrite: true", [], True, "no"),
    ],
)
def test_overwrite_and_resume_of_a_saved_file_give_way_to_flags(
    tmp_path, file, argv, overwrite, resume
):
    config = sft("--config", write(tmp_path / "c.yaml", file), *argv)
    assert (config.overwrite, config.resume, config.resume_anyway) == (overwrite, resume, False)


@pytest.mark.parametrize(
    "file, argv",
    [
        ("overwrite: true\nresume: auto", []),
        ("resume: auto", ["--overwrite", "--resume", "auto"]),
        ("", ["--overwrite", "--resume", "auto"]),
    ],
)
def test_overwrite_and_resume_said_together_are_refused(tmp_path, file, argv):
    argv = ["--config", write(tmp_path / "c.yaml", file), *argv]
    (problem,) = problems_of(SFTConfig, [*NEEDED[SFTConfig], *argv])
    assert "overwrite begins anew and resume=auto goes on" in problem


@ALL
def test_defaults(config_class):
    config = build(config_class, NEEDED[config_class], 1)
    given_here = {flag.removeprefix("--") for flag in NEEDED[config_class][::2]}
    for f in dataclasses.fields(config_class):
        if f.name not in given_here:
            default = f.default_factory() if f.default is dataclasses.MISSING else f.default
            assert getattr(config, f.name) == default, f.name


def test_flags_beat_the_file_and_the_file_beats_the_defaults(tmp_path):
    file = write(tmp_path / "c.yaml", "seed: 7\nepochs: 3\noutput_dir: from_file\n")
    config = build(
        SFTConfig,
        ["--model_name_or_path", "m", "--sft_data", "d", "--config", file, "--seed", "9"],
        1,
    )
    assert (config.seed, config.epochs, config.output_dir) == (9, 3.0, "from_file")
    assert config.max_length == 1024
    # Even a flag that says the default again, and wherever it stands.
    assert sft("--seed", "42", "--config", file).seed == 42
    assert sft("--config", file).seed == 7 and sft("--config", file).output_dir == "out"
    assert sft("--seed", "1", "--seed", "2").seed == 2


@pytest.mark.parametrize(
    "text", ["learning_rate: 1e-5", "learning_rate: 1.0e-5", "learning_rate: '1e-5'"]
)
def test_yaml_numbers_are_floats(tmp_path, text):
    config = sft("--config", write(tmp_path / "c.yaml", text + "\nepochs: 3\nseed: 1e3\n"))
    assert config.learning_rate == 1e-5 and type(config.learning_rate) is float
    assert config.epochs == 3.0 and type(config.epochs) is float
    assert config.seed == 1000 and type(config.seed) is int


def test_a_setting_is_known_by_its_former_name(tmp_path):
    (tmp_path / "old.yaml").write_text("hybrid_engine: deepspeed")
    for argv in (["--hybrid_engine", "deepspeed"], ["--config", str(tmp_path / "old.yaml")]):
        config = build(PPOConfig, [*NEEDED[PPOConfig], *argv], 1)
        assert config.rollout_engine == "deepspeed"
    assert config.on_resume()["hybrid_engine"] == config.on_resume()["rollout_engine"]


def test_json_files(tmp_path):
    text = '{"learning_rate": 1e-5, "tensorboard": false, "sft_data": ["a", "b"]}'
    config = build(SFTConfig, [*COMMON, "--config", write(tmp_path / "c.json", text)], 1)
    assert (config.learning_rate, config.tensorboard, config.sft_data) == (1e-5, False, ["a", "b"])


def test_an_empty_file_changes_nothing(tmp_path):
    assert sft("--config", write(tmp_path / "c.yaml", "# nothing\n")) == sft()


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--tensorboard", "false"], False),
        (["--tensorboard=False"], False),
        (["--tensorboard", "0"], False),
        (["--tensorboard", "no"], False),
        (["--tensorboard", "TRUE"], True),
        (["--tensorboard", "1"], True),
        (["--tensorboard", "yes"], True),
        (["--tensorboard"], True),
        ([], True),
    ],
)
def test_booleans(argv, expected):
    assert sft(*argv).tensorboard is expected


def test_a_bare_boolean_flag_is_true_before_another_flag():
    config = sft("--gradient_checkpointing", "--seed", "3")
    assert config.gradient_checkpointing is True and config.seed == 3


def test_lists(tmp_path):
    config = sft("--sft_data", "a", "b c", "--data_weights", "1", "0.5")
    assert config.sft_data == ["a", "b c"] and config.data_weights == [1.0, 0.5]
    assert all(type(w) is float for w in config.data_weights)
    file = write(tmp_path / "c.yaml", "sft_data: only\ndata_weights: 2e0\n")
    config = build(SFTConfig, [*COMMON, "--config", file], 1)
    assert config.sft_data == ["only"] and config.data_weights == [2.0]
    # Not shared between configs.
    sft().data_weights.append(1.0)
    assert sft().data_weights == []


@pytest.mark.parametrize("argv", [["--local_rank", "3"], ["--local_rank=3"]])
@ALL
def test_the_launchers_local_rank_is_accepted(config_class, argv):
    needed = NEEDED[config_class]
    assert build(config_class, [*argv, *needed], 1) == build(config_class, needed, 1)


# Problems.


def test_all_problems_come_in_one_message(tmp_path):
    file = write(tmp_path / "c.yaml", "learning_rat: 1\nmax_length: long\nseed: 5\n")
    found = problems_of(
        SFTConfig,
        [*COMMON, "--config", file]
        + "--nope 3 --epochs many --zero_stage 7 --dtype fp8 --tensorboard maybe".split()
        + "--global_batch_size 64 --micro_batch_size 3".split(),
        world_size=8,
    )
    assert found == [
        f"unknown setting 'learning_rat' in {file}; did you mean learning_rate?",
        "max_length='long' is not int",
        "unknown flag --nope",
        "epochs='many' is not float",
        "zero_stage=7 is not one of 0, 1, 2, 3",
        "dtype=fp8 is not one of auto, fp32, bf16, fp16",
        "tensorboard='maybe' is not bool",
        "sft_data is empty; set --sft_data (demonstrations: files, folders or hub names)",
        "global_batch_size=64 is not divisible by micro_batch_size × ranks = 3 × 8 = 24; set "
        "--global_batch_size to a multiple, e.g. 72, or lower --micro_batch_size",
    ]


@ALL
def test_an_empty_command_line_names_all_that_is_missing(config_class):
    found = "\n".join(problems_of(config_class, []))
    for flag in NEEDED[config_class][::2]:
        assert flag in found


def test_check_config_names_each_broken_bound(tmp_path):
    words = "--max_length 1 --learning_rate 2 --eval_fraction 1 --seed -1 --keep_last -1".split()
    done = run_main(tmp_path, *NEEDED[SFTConfig], "--check_config", *words)
    assert done.returncode == 2
    for flag in words[::2]:
        assert f"- {flag[2:]}=" in done.stderr and f"set {flag}" in done.stderr


def test_a_choice_that_begins_with_a_minus_sign():
    argv = [*NEEDED[PPOConfig], "--critic_zero_stage", "-1", "--zero_stage", "2"]
    config = build(PPOConfig, argv, 1)
    assert config.critic_zero_stage == -1 and config.stage_of_critic() == 2


def test_a_word_that_begins_with_one_minus_sign_is_a_value():
    config = sft("--output_dir", "-x", "--sft_data", "-a", "b", "-1e-5")
    assert config.output_dir == "-x" and config.sft_data == ["-a", "b", "-1e-5"]


def test_name_equals_value():
    config = sft("--seed=3", "--output_dir=a=b", "--learning_rate=1e-4", "--sft_data=x", "y")
    assert (config.seed, config.output_dir, config.learning_rate) == (3, "a=b", 1e-4)
    assert config.sft_data == ["x", "y"]
    (problem,) = problems_of(SFTConfig, [*NEEDED[SFTConfig], "--output_dir="])
    assert problem.startswith("output_dir is empty")


@pytest.mark.parametrize(
    "argv, problem",
    [
        (["--see", "3"], "unknown flag --see; did you mean --seed?"),  # no abbreviations
        (["--see=3"], "unknown flag --see; did you mean --seed?"),
        (["--out", "x"], "unknown flag --out"),
        (["--nope"], "unknown flag --nope"),
        (["--nope", "-3"], "unknown flag --nope"),
        (["--nope", "a", "b"], "unknown flag --nope"),
        (["--nope", "a", "--nope", "b"], "unknown flag --nope"),
        (["--Seed", "3"], "unknown flag --Seed; did you mean --seed?"),
        (["--batch-sizes", "3"], "unknown flag --batch-sizes; did you mean --micro_batch_size?"),
        (["--", "3"], "unknown flag --"),
    ],
)
def test_an_unknown_flag_is_told_once_and_takes_its_values_along(argv, problem):
    assert problems_of(SFTConfig, [*argv, *NEEDED[SFTConfig]]) == [problem]
    assert problems_of(SFTConfig, [*NEEDED[SFTConfig], *argv]) == [problem]


@pytest.mark.parametrize("words", [["stray"], ["-s", "3"], ["seed=3", ""]])
def test_words_before_any_flag(words):
    found = problems_of(SFTConfig, [*words, *NEEDED[SFTConfig]])
    assert found == [f"{word!r} stands before any flag" for word in words]


@pytest.mark.parametrize(
    "argv, problem",
    [
        (["--seed"], "--seed has no value; it takes one"),
        (["--seed", "--epochs", "1"], "--seed has no value; it takes one"),
        (["--output_dir"], "--output_dir has no value; it takes one"),
        (["--seed", "1", "2"], "--seed has 2 values: 1 2; it takes one"),
        (["--seed=1", "2", "-3"], "--seed has 3 values: 1 2 -3; it takes one"),
        (["--tensorboard", "true", "x"], "--tensorboard has 2 values: true x; it takes one"),
    ],
)
def test_a_flag_takes_one_value(argv, problem):
    # NEEDED first, so that an --output_dir without a value is the one that counts.
    found = problems_of(SFTConfig, [*NEEDED[SFTConfig], *argv])
    assert found[0] == problem
    assert found[1:] == (
        [f"output_dir is empty; set --output_dir ({OUTPUT_DIR_HELP})"]
        if argv == ["--output_dir"]
        else []
    )


def test_a_flag_without_a_value_is_told_with_the_other_problems():
    assert problems_of(SFTConfig, ["word", *NEEDED[SFTConfig], "--nope", "--seed"]) == [
        "'word' stands before any flag",
        "unknown flag --nope",
        "--seed has no value; it takes one",
    ]


# The command line.


@ALL
def test_help_tells_every_setting(config_class):
    text = " ".join(command_line.help_text(config_class, "main.py", "What it does.").split())
    assert text.startswith("usage: main.py ") and "What it does." in text and "--config " in text
    for f in dataclasses.fields(config_class):
        assert f"--{f.name} " in text
        assert " ".join(f.metadata["help"].split())[:40] in text, f.name


@pytest.mark.parametrize("argv", [["--help"], ["--nope", "-h"]])
def test_parse_prints_the_help_and_ends(argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step1_sft/main.py", *argv])
    with pytest.raises(SystemExit) as caught:
        command_line.parse(SFTConfig, "What it does.")
    assert caught.value.code == 0
    said = capsys.readouterr()
    assert said.out == command_line.help_text(SFTConfig, "main.py", "What it does.") + "\n"
    assert said.err == ""


def test_parse_prints_on_rank_0_only(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step1_sft/main.py", "--nope"])
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as caught:
            command_line.parse(SFTConfig, "")
        assert caught.value.code == 2
        said = capsys.readouterr().err
        assert (
            "step1_sft/main.py: these settings cannot work:\n  - unknown flag --nope" in said
        ) == (rank == "0")


def test_parse_counts_the_ranks(monkeypatch, capsys):
    argv = [*NEEDED[SFTConfig], "--global_batch_size", "4", "--micro_batch_size", "4"]
    monkeypatch.setattr(sys, "argv", ["main.py", *argv])
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert command_line.parse(SFTConfig, "").global_batch_size == 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        command_line.parse(SFTConfig, "")
    assert "4 × 2 = 8" in capsys.readouterr().err


def run_main(tmp_path, *argv):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "step1_sft" / "main.py"), *argv],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_wrong_flag_ends_the_program_before_anything_is_loaded(tmp_path):
    """The model's folder is empty: whoever tried to load it would say so."""
    (tmp_path / "model").mkdir()
    done = run_main(tmp_path, *NEEDED[SFTConfig], "--nope")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr == "step1_sft/main.py: these settings cannot work:\n  - unknown flag --nope\n"
    )
    assert os.listdir(tmp_path) == ["model"], "nothing written"
