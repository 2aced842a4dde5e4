"""What each setting says of its own values, and what several of them make impossible."""

import dataclasses
import math

import pytest

from evaluation.chat import ChatConfig
from evaluation.prompt_eval import PromptEvalConfig
from step1_sft.config import SFTConfig
from step2_reward.collect import CollectConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig
from step3_preference.config import PreferenceConfig
from step3_preference.losses import How
from tests.utils.settings.test_command_line import NEEDED, problems_of
from utils.settings.command_line import build


@pytest.mark.parametrize(
    "config_class, argv, said",
    [
        (
            SFTConfig,
            ["--weight_decay", "-1"],
            "weight_decay=-1.0 must be at least 0; set",
        ),
        (SFTConfig, ["--learning_rate", "-1e-5"], "learning_rate=-1e-05 must be above 0;"),
        (SFTConfig, ["--learning_rate=-1e-5"], "learning_rate=-1e-05 must be above 0;"),
        (SFTConfig, ["--epochs", "-inf"], "epochs='-inf' is not a finite number"),
        (SFTConfig, ["--seed", "-1"], "seed=-1 must be at least 0"),
        (SFTConfig, ["--seed", str(2**63)], f"seed={2**63} must be below {2**63}"),
        (SFTConfig, ["--micro_batch_size", "0"], "micro_batch_size=0 must be at least 1"),
        (SFTConfig, ["--global_batch_size", "-8"], "global_batch_size=-8 must be at least 1"),
        (SFTConfig, ["--eval_fraction", "1"], "eval_fraction=1.0 must be below 1"),
        (SFTConfig, ["--offload", "all"], "--zero_stage 3"),
        (SFTConfig, ["--offload", "optimizer"], "--zero_stage 1, 2 or 3"),
        (SFTConfig, ["--epochs", "nan"], "epochs='nan' is not a finite number"),
        (SFTConfig, ["--epochs", "inf"], "epochs='inf' is not a finite number"),
        (SFTConfig, ["--seed", "1.5"], "seed='1.5' is not int"),
        (SFTConfig, ["--seed", ""], "seed='' is not int"),
        (SFTConfig, ["--max_length", "4"], "max_length=4 must be at least 8"),
        (SFTConfig, ["--date", "31.1.2026"], "date='31.1.2026': Invalid isoformat string"),
        (SFTConfig, ["--epochs", "0"], "epochs=0.0 must be above 0"),
        (RewardConfig, ["--label_smoothing", "0.5"], "label_smoothing=0.5 must be below 0.5"),
        (RewardConfig, ["--trainable_modules", "("], "'(' is no pattern"),
        (PPOConfig, ["--missing_eos_penalty", "-1"], "missing_eos_penalty=-1.0 must be at least 0"),
        (PPOConfig, ["--gamma", "1.1"], "gamma=1.1 must be at most 1"),
        (PPOConfig, ["--lam", "-0.5"], "lam=-0.5 must be at least 0"),
        (PPOConfig, ["--clip_ratio", "-0.1"], "clip_ratio=-0.1 must be at least 0"),
        (PPOConfig, ["--clip_value", "-1"], "clip_value=-1.0 must be at least 0"),
        (PPOConfig, ["--temperature", "0"], "temperature=0.0 must be above 0"),
        (PPOConfig, ["--ema_decay", "1"], "ema_decay=1.0 must be below 1"),
        (
            PPOConfig,
            ["--reward_function", "step3_ppo.reward_functions:rouge_l"],
            "otherwise now: step3_ppo.rewards.shipped:rouge_l; set --reward_function",
        ),
        (PPOConfig, ["--reward_function", "a:b", "c:d", "a:b"], "a:b stands there twice;"),
        (
            PPOConfig,
            ["--reward_function", "a:b", "c:d", "--reward_weights", "1"],
            "reward_weights=[1.0] has 1 numbers for 2 of --reward_function and --reward_url; give",
        ),
        (PPOConfig, ["--critic_zero_stage", "4"], "critic_zero_stage=4 is not one of -1, 0"),
        (
            PreferenceConfig,
            ["--loss", "cdpo", "--label_smoothing", "0.5"],
            "label_smoothing=0.5 must be below 0.5",
        ),
        (PreferenceConfig, ["--beta", "0"], "beta=0.0 must be above 0, or -1 for the loss's own"),
        (PreferenceConfig, ["--sft_coef", "-0.5"], "sft_coef=-0.5 must be at least 0, or -1"),
        (
            PreferenceConfig,
            ["--margin", "0.5"],
            "loss=dpo reads no margin (now 0.5); leave out --margin, or set --loss to one that "
            "does: simpo, slic",
        ),
        (PreferenceConfig, ["--loss", "kto", "--label_smoothing", "0.1"], "cdpo, robust_dpo"),
        (
            PreferenceConfig,
            ["--loss", "orpo", "--reference_model", "m"],
            "loss=orpo has no reference; leave out --reference_model",
        ),
    ],
)
def test_values_that_cannot_work(config_class, argv, said):
    (problem,) = problems_of(config_class, [*NEEDED[config_class], *argv])
    assert said in problem


def test_what_a_reward_function_measures_may_cost():
    argv = ["--reward_function", "a:b", "--reward_function_coef", "-0.5"]
    assert build(PPOConfig, [*NEEDED[PPOConfig], *argv], 1).reward_function_coef == -0.5


def test_an_empty_text_in_a_file_is_a_list_of_none(tmp_path):
    """Older config.yaml have reward_function: '', where one name was taken."""
    (tmp_path / "c.yaml").write_text("reward_function: ''\nreward_weights: ''\n")
    config = build(PPOConfig, ["--config", str(tmp_path / "c.yaml"), *NEEDED[PPOConfig]], 1)
    assert config.reward_function == [] and config.reward_weights == []


def test_a_preference_loss_takes_its_own_numbers_unless_they_are_set():
    def how(*argv):
        return build(PreferenceConfig, [*NEEDED[PreferenceConfig], *argv], 1).how()

    assert how() == How(beta=0.1)
    assert how("--loss", "simpo", "--margin", "0") == How(beta=2.0)
    own = How(beta=0.3, desirable_weight=1.0, undesirable_weight=0.5)
    assert how("--loss", "kto", "--beta", "0.3", "--undesirable_weight", "0.5") == own
    assert how("--loss", "orpo", "--sft_coef", "0") == How(beta=0.1)
    own = How(1.0, gamma=0.99, tau=0.9, cql_coef=0.1, awac_coef=1.0, target_rate=0.005)
    assert how("--loss", "ilql", "--tau", "0.9") == own
    asked = "--loss ilql --margin 1 --sft_coef 0.1 --lora_rank 4 --tau 0 --reference_model m"
    found = "\n".join(problems_of(PreferenceConfig, [*NEEDED[PreferenceConfig], *asked.split()]))
    for said in (
        "loss=ilql reads no margin (now 1.0)",
        "loss=ilql reads no sft_coef (now 0.1)",
        "tau=0.0 must be above 0",
        "loss=ilql trains value heads beside all weights, and lora_rank=4 adapters alone",
        "loss=ilql has no reference",
    ):
        assert said in found, found


def beyond_bounds(f):
    """Words for setting `f`, each just beyond one of its bounds."""
    whole = f.type is int
    step = 1 if whole else 2**-20
    limits = f.metadata
    for name, away in (("at_least", -step), ("above", 0), ("at_most", step), ("below", 0)):
        if limits[name] is not None and math.isfinite(limits[name]):
            yield repr((int if whole else float)(limits[name] + away)), name.replace("_", " ")


@pytest.mark.parametrize("config_class", [*NEEDED, CollectConfig, ChatConfig, PromptEvalConfig])
def test_every_bound_is_enforced(config_class):
    tried = 0
    for f in dataclasses.fields(config_class):
        assert f.metadata["on_resume"] in ("learned", "rounding", "free"), f.name
        for word, bound in beyond_bounds(f):
            argv = [*NEEDED.get(config_class, []), f"--{f.name}={word}"]
            found = problems_of(config_class, argv)
            told = [p for p in found if p.startswith(f"{f.name}=") and f"must be {bound}" in p]
            assert len(told) == 1 and f"set --{f.name}" in told[0], (f.name, word, found)
            tried += 1
        numbers = f.type in (int, float) and not f.metadata["choices"]
        assert not numbers or f.metadata["at_least"] is not None or f.metadata["above"] is not None
    assert tried >= (3 if config_class is ChatConfig else 8)
