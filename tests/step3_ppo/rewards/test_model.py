"""A reward model of another family, tokenizer and template than the policy's reads text."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from step2_reward.config import RewardConfig
from step3_ppo.rewards.model import RewardModel, differences
from step3_ppo.rollout import Prompt
from tests.helpers.jobs import ppo
from tests.helpers.running import metrics_of, run_ranks
from utils.data import chat_template
from utils.models import scalar_model
from utils.models.reward_reader import Reader


def test_scores_are_those_of_the_text_in_its_own_template(tiny, other):
    tokenizer = chat_template.load_tokenizer(str(other))
    policy = chat_template.load_tokenizer(str(tiny / "base_model"))
    assert differences(policy, tokenizer) == ["vocabulary", "chat template"]
    model = scalar_model.load(RewardConfig(), str(other), dtype="fp32", zero_stage=0).eval()
    prompts = [
        Prompt(({"role": "user", "content": "What is 3 + 4?"},), "", {}, [5, 6]),
        Prompt(({"role": "user", "content": "从小到大排列：1 7 6"},), "", {}, [5, 6, 9]),
        Prompt(({"role": "user", "content": "Spell the word lamp."},), "", {}, [5]),
    ]
    answers, finished = ["7", "1 6 7", "l a<|im_end|> m"], torch.tensor([True, False, True])
    texts = [
        "user<|im_start|>What is 3 + 4?|assistant<|im_start|>7<|im_end|>",
        "user<|im_start|>从小到大排列：1 7 6|assistant<|im_start|>1 6 7",
        "user<|im_start|>Spell the word lamp.|assistant<|im_start|>l a m<|im_end|>",
    ]
    # What the policy's ids are must not matter.
    ids = torch.randint(3, 400, (3, 12))
    reader = Reader.load(str(other))
    assert (reader.max_length, reader.read_at) == (1024, "stop")  # it has a bias
    reward = RewardModel(model, reader, by_text=True)
    found = reward.scores(prompts, answers, finished, ids, torch.ones_like(ids).bool(), 2)
    plain = AutoModelForSequenceClassification.from_pretrained(other).eval()
    expected = []
    for prompt, answer, done, text in zip(prompts, answers, finished, texts, strict=True):
        encoded = tokenizer(text, add_special_tokens=False).input_ids
        assert reader.encode(prompt.messages, answer, bool(done)) == encoded
        assert (encoded[-1] == tokenizer.eos_token_id) == done
        assert encoded.count(tokenizer.eos_token_id) == done
        with torch.no_grad():
            expected.append(plain(input_ids=torch.tensor([encoded])).logits[0, 0] - 0.25)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert len({round(x, 3) for x in found.tolist()}) == 3
    short = Reader(tokenizer, 5, "stop")
    kept = reader.encode(prompts[0].messages, "7", True)[-5:]
    assert short.encode(prompts[0].messages, "7", True) == kept


def test_ppo_runs_with_it_under_every_sharding(tiny, chain, other, tmp_path):
    """The critic then starts from the SFT model: the reward model cannot read the policy's ids."""
    flags = ("--max_steps", 2, "--prompts_per_rollout", 8)
    jobs = [
        ppo(tiny, chain / "sft", other, tmp_path / str(stage), "--zero_stage", stage, *flags)
        for stage in (0, 3)
    ]
    said = run_ranks(jobs, 1)
    assert said.count("the reward model has another tokenizer or template") == 2
    assert "FAULT" not in said and "DOUBT" not in said
    scores = [metrics_of(tmp_path / str(stage), "score") for stage in (0, 3)]
    assert len(scores[0]) == 2 and scores[0][0] != 0 and scores[0] == pytest.approx(scores[1])
    for stage in (0, 3):
        config = json.loads((tmp_path / str(stage) / "critic/config.json").read_text())
        assert config["architectures"] == ["LlamaForSequenceClassification"]
        critic = chat_template.load_tokenizer(str(tmp_path / str(stage) / "critic"))
        assert not differences(critic, chat_template.load_tokenizer(str(chain / "sft")))
