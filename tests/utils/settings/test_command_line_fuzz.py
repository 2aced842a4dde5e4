"""Command lines and setting files of any shape: a config that means what was written, or exit 2.

A few hundred in the default suite; `-m slow` tries thousands and prints how many.
"""

import dataclasses
import json
import math
import sys
from collections import Counter

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.chat import ChatConfig
from evaluation.prompt_eval import PromptEvalConfig
from step1_sft.config import SFTConfig
from step2_reward.collect import CollectConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig
from step3_preference.config import PreferenceConfig
from tests.helpers.fuzzing import NO_PROCESS
from utils.settings import command_line
from utils.settings.command_line import build
from utils.settings.fields import ConfigError

COMMON = "--output_dir out --model_name_or_path model".split()
NEEDED = {
    SFTConfig: [*COMMON, "--sft_data", "d"],
    RewardConfig: [*COMMON, "--preference_data", "d"],
    CollectConfig: "--policy m --prompt_data d --output_file o/c.jsonl".split(),
    PPOConfig: [*COMMON, "--reward_model", "r", "--prompt_data", "d"],
    PreferenceConfig: [*COMMON, "--preference_data", "d"],
    ChatConfig: ["--checkpoint", "m"],
    PromptEvalConfig: ["--checkpoints", "m"],
}
FEW, MANY = settings(NO_PROCESS, max_examples=120), settings(NO_PROCESS, max_examples=3000)
TRIED = Counter()

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NUMBERS = (
    st.integers(-(10**22), 10**22).map(str) | st.floats().map(str) | st.integers(-3, 300).map(str)
)
ODD = st.sampled_from(
    ["", " ", "1e-320", "1e400", "9" * 5000, "0x10", "1:30", "no", "~", "a\0b", "\udcff", "2,4,4"]
    + ["nan", "-inf", "{}", "[1]", "(", "auto", "bf16", "file", "a2c", "beam", "1_0", "x" * 300]
)
WORDS = TEXT | NUMBERS | ODD
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def names_of(config_class):
    return [f.name for f in dataclasses.fields(config_class)]


@st.composite
def command_lines(draw):
    """(config class, words, values of a --config file or its raw text, ranks)."""
    config_class = draw(st.sampled_from(list(NEEDED)))
    name = st.sampled_from([*names_of(config_class), "nope", "", "local_rank"])
    words = list(NEEDED[config_class]) if draw(st.booleans()) else draw(st.lists(WORDS, max_size=1))
    for flag, given_here in draw(
        st.lists(st.tuples(name, st.lists(WORDS, max_size=2)), max_size=4)
    ):
        words += [f"--{flag}", *given_here]
    file = draw(st.none() | st.dictionaries(name, VALUES, max_size=4) | TEXT)
    return config_class, words, file, draw(st.sampled_from([1, 2, 8]))


def built(config_class, words, ranks):
    """The config, or None where every line of the refusal says something."""
    try:
        return build(config_class, words, ranks)
    except ConfigError as error:
        lines = str(error).split("\n  - ")
        assert all(len(line.strip()) > 8 for line in lines), lines
        return None


def assert_refused_or_meant(tmp_path, case) -> None:
    """No other exception; and what is accepted has its types, is finite, and can be saved."""
    TRIED["command lines"] += 1
    config_class, words, file, ranks = case
    if isinstance(file, str):
        (tmp_path / "c.yaml").write_text(file, encoding="utf-8", errors="surrogatepass")
        words = [*words, "--config", str(tmp_path / "c.yaml")]
    elif file is not None:
        (tmp_path / "c.json").write_text(json.dumps(file), encoding="utf-8")
        words = [*words, "--config", str(tmp_path / "c.json")]
    config = built(config_class, words, ranks)
    if config is None:
        return
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        many = f.default is dataclasses.MISSING
        assert type(value) is (list if many else type(f.default)), f.name
        for one in value if many else [value]:
            assert not isinstance(one, float) or math.isfinite(one)
            assert not isinstance(one, str) or ("\0" not in one and one.encode("utf-8") is not None)
    command_line.save(config, tmp_path / "saved", ranks)
    file = str(tmp_path / "saved" / "config.yaml")
    assert build(config_class, ["--config", file], ranks) == config


@given(case=command_lines())
@FEW
def test_any_command_line_is_refused_or_meant(tmp_path, case):
    assert_refused_or_meant(tmp_path, case)


# One wrong value in a command line that works must be refused by its name.


def is_number(text: str) -> bool:
    """A number a step could use, by Python's own reading of it."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


@st.composite
def wrong_values(draw):
    """(config class, name of a setting, a word that is not of its type)."""
    config_class = draw(st.sampled_from(list(NEEDED)))
    f = draw(st.sampled_from(dataclasses.fields(config_class)))
    kind = type(f.default)
    if f.metadata["choices"]:
        word = draw(WORDS.filter(lambda w: w.strip() not in map(str, f.metadata["choices"])))
        word = word if not is_number(word) or kind is not int else "7"
    elif kind is bool:
        word = draw(WORDS.filter(lambda w: w.lower() not in "true false 1 0 yes no".split()))
    elif kind is int:
        wrong = ["1.5"] if f.name == "seed" else ["1.5", "1e12"]
        word = draw(WORDS.filter(lambda w: not is_number(w)) | st.sampled_from(wrong))
    elif kind is float:
        word = draw(WORDS.filter(lambda w: not is_number(w)) | st.just("1e39"))
    else:
        word = draw(st.sampled_from(["a\0b", "\udcff"]))
    return config_class, f.name, word


def assert_wrong_value_is_named(case) -> None:
    TRIED["wrong values"] += 1
    config_class, name, word = case
    with pytest.raises(ConfigError) as caught:
        build(config_class, [*NEEDED[config_class], f"--{name}={word}"], 1)
    assert f"- {name}=" in str(caught.value), caught.value


@given(case=wrong_values())
@FEW
def test_a_wrong_value_is_refused_by_its_name(case):
    assert_wrong_value_is_named(case)


@pytest.mark.parametrize("config_class", NEEDED, ids=lambda c: c.__name__)
def test_the_command_lines_above_work(config_class):
    assert build(config_class, NEEDED[config_class], 1)


# Contradictions and impossible sums, each with a word of its message.

CONTRADICTIONS = [
    (SFTConfig, "--data_weights 1 2", "2 numbers for 1 data sets of --sft_data"),
    (SFTConfig, "--data_weights -1", "data_weights=[-1.0] must be above 0"),
    (SFTConfig, "--data_split 2,4", "data_split='2,4'"),
    (SFTConfig, "--data_split 0,0,0", "data_split='0,0,0'"),
    (SFTConfig, "--sample_answers -1", "sample_answers=-1"),
    (SFTConfig, "--output_dir /dev/null", "/dev/null is no folder"),
    (SFTConfig, "--output_dir /dev/null/out", "/dev/null is no folder"),
    (SFTConfig, "--timeout_minutes 1e18", "timeout_minutes=1e+18 must be at most 1000000.0"),
    (SFTConfig, "--learning_rate 3", "learning_rate=3.0 must be at most 1"),
    (SFTConfig, "--max_steps 1e12", f"max_steps={10**12} must be below {2**31}"),
    (SFTConfig, "--global_batch_size 1e30", "global_batch_size='1e30' is not int"),
    (RewardConfig, "--score_margin -1", "score_margin=-1.0 must be at least 0"),
    (RewardConfig, "--preference_data a b --data_weights 3", "1 numbers for 2 data sets"),
    (CollectConfig, "--num_prompts -1", "num_prompts=-1"),
    (CollectConfig, "--max_response_length 0", "max_response_length=0"),
    (
        CollectConfig,
        "--reward_model r",
        "r is read only with --labeller reward_model",
    ),
    (
        CollectConfig,
        "--labeller none --agreement 0.8",
        "only with --labeller verifier (now 'none')",
    ),
    (CollectConfig, "--output_file /tmp", "is a folder"),
    (PPOConfig, "--kl_target 3 --kl_coef 0", "kl_coef=0, which stays 0"),
    (PPOConfig, "--kl_horizon -1", "kl_horizon=-1.0"),
    (PPOConfig, "--algorithm reinforce --critic_model c", "reinforce does not read critic_model"),
    (
        PPOConfig,
        "--reward_function_coef 2",
        "2.0 is read only with --reward_function",
    ),
    (PPOConfig, "--temperature 1e-320", "beyond the range of fp32"),
    (ChatConfig, "--seed -1", "seed=-1"),
    (PromptEvalConfig, "--seed 1e19", "seed=10000000000000000000"),
    (ChatConfig, "--checkpoint ./" + "9" * 5000, "does not exist"),
]


@pytest.mark.parametrize("config_class, words, said", CONTRADICTIONS)
def test_contradictions_are_refused(config_class, words, said):
    with pytest.raises(ConfigError) as caught:
        build(config_class, [*NEEDED[config_class], *words.split()], 1)
    assert said in str(caught.value)


# Files: what YAML 1.1 would read as something else.


@pytest.mark.parametrize(
    "text, said",
    [
        ("seed: 1\nseed: 2\n", "'seed' stands there twice, again in line 2"),
        ("seed: 1:30\n", "seed='1:30' is not int"),
        ("output_dir: 3\n", "output_dir=3 is not str; put it in quotes"),
        ("output_dir: true\n", "output_dir=True is not str; put it in quotes"),
        ("output_dir: !!binary aGk=\n", "output_dir=b'hi' is not str"),
        ("? [a]\n: 1\n", "--config"),
        ("a: &a [*a]\nsft_data: *a\n", "sft_data=[[[...]]] is not str"),
        ("[" * 5000, "--config"),
        ("a: &x {<<: *x}\n", "--config"),
    ],
)
def test_yaml_that_means_something_else_is_refused(tmp_path, text, said):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        build(SFTConfig, [*NEEDED[SFTConfig], "--config", str(tmp_path / "c.yaml")], 1)
    assert said in str(caught.value)


def test_yaml_words_stay_words(tmp_path):
    text = "output_dir: no\nmodel_name_or_path: 2024-01-01\nseed: 010\nsft_data: [0o7, 1_0, 1e5]\n"
    (tmp_path / "c.yaml").write_text(text)
    config = build(SFTConfig, ["--config", str(tmp_path / "c.yaml")], 1)
    assert (config.output_dir, config.model_name_or_path) == ("no", "2024-01-01")
    assert config.seed == 10 and config.sft_data == ["0o7", "1_0", "1e5"]


def test_a_few_lines_of_yaml_that_stand_for_gigabytes(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "sft_data: *a11"]))
    with pytest.raises(ConfigError) as caught:
        build(SFTConfig, [*NEEDED[SFTConfig], "--config", str(tmp_path / "c.yaml")], 1)
    assert len(str(caught.value)) < 2000


def test_a_json_object_with_a_name_twice_is_refused(tmp_path):
    (tmp_path / "c.json").write_text('{"seed": 1, "seed": 2}')
    with pytest.raises(ConfigError, match="'seed' stands there twice"):
        build(SFTConfig, [*NEEDED[SFTConfig], "--config", str(tmp_path / "c.json")], 1)


@pytest.mark.parametrize("ranks", ["", "x", "-1", "0", "1.5"])
def test_a_number_of_ranks_that_is_none(ranks, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setattr(sys, "argv", ["main.py", *NEEDED[SFTConfig]])
    with pytest.raises(SystemExit, match="WORLD_SIZE"):
        command_line.parse(SFTConfig, "")


def test_saved_text_is_yaml_for_everybody(tmp_path):
    """Other programs read config.yaml with YAML 1.1."""
    config = build(
        SFTConfig, [*NEEDED[SFTConfig], "--output_dir", "no", "--data_split", "1,2,3"], 1
    )
    command_line.save(config, tmp_path, 1)
    read = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert read["output_dir"] == "no" and read == dataclasses.asdict(config)


@pytest.mark.slow
def test_thousands_of_command_lines(tmp_path, capsys):
    @given(case=command_lines())
    @MANY
    def any_command_line(case):
        assert_refused_or_meant(tmp_path, case)

    any_command_line()
    MANY(given(case=wrong_values())(assert_wrong_value_is_named))()
    assert sum(TRIED.values()) >= 6000
    with capsys.disabled():
        print(f"\ngenerated: {dict(TRIED)}")
