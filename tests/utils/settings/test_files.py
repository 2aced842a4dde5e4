"""Config files: what they may hold, how they are refused, and that a saved one repeats the run."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig
from step3_preference.config import PreferenceConfig
from tests.utils.settings.test_command_line import ALL, NEEDED, problems_of, sft, write
from utils.settings import command_line
from utils.settings.command_line import build

# Reading.


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("c.yaml", "a: [", "--config"),
        ("c.yaml", "- a\n- b\n", "found a list"),
        ("c.yaml", "seed\n", "found a str"),
        ("c.json", '{"seed": 1,}', "--config"),
        ("c.yaml", "seed: [1, 2]\n", "seed=[1, 2] is not int"),
        ("c.yaml", "seed:\n", "seed=None is not int"),
        ("c.yaml", "seed: true\n", "seed=True is not int"),
        ("c.yaml", "output_dir:\n", "output_dir=None is not str"),
        ("c.yaml", "data_weights: [1, x]\n", "data_weights='x' is not float"),
        ("c.yaml", "sft_data: {a: 1}\n", "sft_data={'a': 1} is not str"),
        ("c.yaml", "tensorboard: 2\n", "tensorboard=2 is not bool"),
        ("c.yaml", "3: 4\n", "unknown setting 3"),
        ("c.yaml", "epochs: .inf\n", "epochs=inf is not a finite number"),
    ],
)
def test_files_that_cannot_work(tmp_path, name, text, said):
    (problem,) = [
        line
        for line in problems_of(
            SFTConfig, [*NEEDED[SFTConfig], "--config", write(tmp_path / name, text), "--nope"]
        )
        if said in line
    ]
    assert problem


def test_a_missing_file_is_named_with_the_other_problems(tmp_path):
    path = str(tmp_path / "no.yaml")
    found = problems_of(SFTConfig, [*NEEDED[SFTConfig], "--config", path, "--nope"])
    assert found == [f"--config {path!r}: No such file or directory", "unknown flag --nope"]
    found = problems_of(SFTConfig, [*NEEDED[SFTConfig], "--config", str(tmp_path)])
    assert found == [f"--config {str(tmp_path)!r}: Is a directory"]


@pytest.mark.parametrize("argv", [["--config", ""], ["--config="], ["--config"]])
def test_a_config_flag_without_a_file_is_refused(argv):
    (problem,) = problems_of(SFTConfig, [*NEEDED[SFTConfig], *argv])
    assert problem.startswith("--config")


def test_a_file_that_is_not_utf_8_is_told(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"output_dir: caf\xe9\n")
    path = str(tmp_path / "c.yaml")
    found = problems_of(SFTConfig, [*NEEDED[SFTConfig], "--config", path, "--nope"])
    assert found == [f"--config {path!r}: not UTF-8 at byte 15", "unknown flag --nope"]


def test_an_integer_beyond_all_floats_is_told(tmp_path):
    number = "1" + "0" * 400
    file = write(tmp_path / "c.yaml", f"seed: {number}\nepochs: {number}\n")
    shown = f"1{'0' * 17}...{'0' * 19}"
    assert problems_of(SFTConfig, [*NEEDED[SFTConfig], "--config", file]) == [
        f"seed={shown} is not int",
        f"epochs={shown} is beyond the range of fp32; set --epochs",
    ]
    (problem,) = problems_of(SFTConfig, [*NEEDED[SFTConfig], "--seed", number])
    assert problem.startswith("seed='1000") and problem.endswith("000' is not int")


def test_large_integers_keep_their_value():
    for seed in (2**53 + 1, 2**63 - 1):
        assert sft("--seed", str(seed)).seed == seed


# Files with sections.

PIPELINE = """
run: {embedded: true}
all: {seed: 5, zero_stage: 2}
sft: {epochs: 3, zero_stage: 3}
ppo: {seed: 6, max_steps: 25, ppo_epochs: 4}
later_ppo:
  max_steps: 32
reward:
"""


def test_a_program_reads_the_section_for_all_and_its_own(tmp_path):
    file = write(tmp_path / "c.yaml", PIPELINE)
    config = sft("--config", file)
    assert (config.seed, config.zero_stage, config.epochs) == (5, 3, 3.0)
    config = build(PPOConfig, [*NEEDED[PPOConfig], "--config", file], 1)
    assert (config.seed, config.zero_stage, config.max_steps) == (6, 2, 25)
    later = build(PPOConfig, [*NEEDED[PPOConfig], "--config", f"{file}:later_ppo"], 1)
    assert (later.seed, later.max_steps, later.ppo_epochs) == (6, 32, 4)
    config = build(RewardConfig, [*NEEDED[RewardConfig], "--config", file, "--seed", "1"], 1)
    assert (config.seed, config.zero_stage) == (1, 2)


def test_a_later_file_wins_over_an_earlier_one(tmp_path):
    first = write(tmp_path / "a.yaml", PIPELINE)
    second = write(tmp_path / "b.yaml", "seed: 7\n")
    assert sft("--config", first, second).seed == 7
    assert sft("--config", second, first).seed == 5
    assert sft("--config", first, second, "--seed", "8").seed == 8
    outside = write(tmp_path / "c.yaml", "seed: 9\nmax_steps: 4\n" + PIPELINE)
    assert (sft("--config", outside).seed, sft("--config", outside).max_steps) == (5, 4)


def test_unknown_sections_and_settings_are_told_together(tmp_path):
    text = "all: {sed: 2}\nsftt: {epochs: 1}\nsft: {max_steps: x}\nepochs: 2\nppo: {a: 1}\n"
    file = write(tmp_path / "c.yaml", text)
    assert problems_of(SFTConfig, [*NEEDED[SFTConfig], "--config", file]) == [
        f"unknown setting 'sftt' in {file}; did you mean sft_data?",
        f"unknown setting 'sed' in {file}, all; did you mean seed?",
        "max_steps='x' is not int",
    ]


# Saving.

CHANGED = {
    SFTConfig: "--sft_data a b --epochs 1.5 --learning_rate 3e-6 --data_weights 1 0.5 "
    "--tensorboard false --long_answers cut --zero_stage 3 --offload all",
    RewardConfig: r"--trainable_modules layers\.(30|31)\. score: --centring 0.001 --seed 0 "
    "--data_split 2,4,4 --gradient_checkpointing",
    PPOConfig: "--kl_coef 1e-7 --critic_zero_stage -1 --reference_zero_stage 3 --gamma 0.5 "
    "--prompts_per_rollout 128 --score_clip 5 --output_dir 007 --reward_model null",
    PreferenceConfig: "--loss simpo --beta 2.5 --margin 0 --sft_coef 0.1 --pairs best_worst",
}


@pytest.mark.parametrize("changed", [False, True])
@ALL
def test_a_saved_config_repeats_the_run(config_class, changed, tmp_path):
    argv = NEEDED[config_class] + (CHANGED[config_class].split() if changed else [])
    config = build(config_class, argv, 2)
    if changed:
        assert config != build(config_class, NEEDED[config_class], 2)
    command_line.save(config, tmp_path / "new" / "folder", 2)
    file = tmp_path / "new" / "folder" / "config.yaml"
    again = build(config_class, ["--config", str(file)], 2)
    assert again == config
    for f in dataclasses.fields(config):
        assert type(getattr(again, f.name)) is type(getattr(config, f.name))
    header = file.read_text(encoding="utf-8").split("\n")[0]
    assert header == f"# {config_class.__name__}, run on 2 ranks"


@given(
    st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12
    ).filter(str.strip),
    st.lists(st.sampled_from(["1e-5", "no", "null", "~", "#x", "a: b", "猫 ", "- a", "2:30"])),
    st.floats(1e-12, 1.0),
    st.integers(0, 2**63 - 1),
)
@settings(max_examples=150, derandomize=True, deadline=None)
def test_any_value_survives_saving(tmp_path_factory, text, names, rate, seed):
    config = SFTConfig(
        output_dir=text,
        model_name_or_path="true",
        sft_data=[text, *names],
        learning_rate=rate,
        seed=seed,
    )
    folder = tmp_path_factory.mktemp("saved")
    command_line.save(config, folder, 1)
    assert build(SFTConfig, ["--config", str(folder / "config.yaml")], 1) == config
