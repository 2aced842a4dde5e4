"""A policy and a reward model of a few thousand random weights, for evaluation and the chat."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from evaluation import prompt_eval, questions
from evaluation.prompt_eval import Answer, PromptEvalConfig
from utils.models import from_scratch
from utils.settings import command_line
from utils.settings.fields import ConfigError

ROOT = Path(__file__).resolve().parent.parent.parent
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Why does the sun rise in the east? Because the earth turns towards it every morning.",
    "Write a short letter to a friend who moved to another town last year.",
    "今天天气很好,我们去公园散步吧。请写一首关于秋天的诗。",
    "Seven plus eight is fifteen; nine times six is fifty-four.",
] * 4
PROMPTS = [
    "Hi!",
    "Why does the sun rise in the east?",
    "Write a letter to a friend who moved to another town, and tell him of the lazy dog.",
    "请写一首关于秋天的诗。",
    "Seven plus eight?",
]
BIAS = 0.75


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "policy"
    from_scratch.build(
        folder,
        TEXTS,
        vocab_size=400,
        hidden_size=32,
        layers=2,
        heads=2,
        intermediate_size=64,
        max_positions=512,
        seed=0,
    )
    # At the usual scale an untrained model repeats the last token whatever was asked.
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.mul_(12)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reward_model(policy) -> str:
    folder = Path(policy).with_name("reward")
    base = LlamaConfig.from_pretrained(policy)
    base.num_labels = 1
    base.reward_bias = BIAS
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(base)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(10)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompt_file(tmp_path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    return str(path)


def configured(**settings) -> PromptEvalConfig:
    config = PromptEvalConfig(**{"dtype": "fp32", "max_new_tokens": 12} | settings)
    assert not config.problems(1)
    return config


def answers_of(policy, prompts, **settings) -> list[list[Answer]]:
    config = configured(checkpoints=[policy], prompts=prompts, **settings)
    return prompt_eval.answer_all(config, policy, questions.load(prompts, config.max_prompts))[0]


def texts_of(groups) -> list[list[str]]:
    return [[a.answer for a in group] for group in groups]


def blocks_of(markdown: str) -> tuple[list[str], list[str]]:
    """(contents of the fenced blocks, lines outside), by CommonMark's rule for closing one."""
    inside, outside, opened, current = [], [], "", []
    for line in re.split("\r\n|\r|\n", markdown):
        if not opened and (found := re.match(r" {0,3}(`{3,}|~{3,})[^`]*$", line)):
            opened, current = found[1], []
        elif opened and re.fullmatch(f" {{0,3}}{opened[0]}{{{len(opened)},}}[ \t]*", line):
            inside.append("\n".join(current))
            opened = ""
        else:
            (current if opened else outside).append(line)
    assert not opened
    return inside, outside


def problems_of(*flags: str, of=PromptEvalConfig, world_size=1) -> str:
    with pytest.raises(ConfigError) as caught:
        command_line.build(of, list(flags), world_size)
    return str(caught.value)


def run_script(script, *flags, cwd=ROOT, **settings):
    return subprocess.run(
        [sys.executable, str(ROOT / "evaluation" / script), *flags],
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        **settings,
    )
