"""The answers and tokens that a run keeps for people to read."""

import json
from types import SimpleNamespace

import pytest
import torch

from step3_ppo import samples
from utils.data import chat_template
from utils.data.prompts import Prompt


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return chat_template.load_tokenizer(str(tiny / "base_model"))


@pytest.mark.parametrize("text", ["Red, blue.", "  a  b\n", "三只猫 and 🐈!", "é\u0301x", ""])
def test_pieces_laid_end_to_end_are_the_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
    found = samples.pieces(tokenizer, ids)
    assert "".join(found) == text + tokenizer.eos_token and len(found) == len(ids)
    assert found[-1] == tokenizer.eos_token


def test_a_character_of_several_tokens_stands_at_its_last(tokenizer):
    ids = tokenizer.encode("🐈", add_special_tokens=False)
    assert len(ids) > 1 and samples.pieces(tokenizer, ids) == [""] * (len(ids) - 1) + ["🐈"]


def test_a_tokenizer_that_drops_the_first_space_keeps_those_between(monkeypatch):
    words = [" The", " cat", " ", " sat", "."]
    decode = lambda ids: "".join(words[i] for i in ids).removeprefix(" ")  # noqa: E731
    found = samples.pieces(SimpleNamespace(decode=decode), list(range(5)))
    assert "".join(found) == "The cat  sat." and found[1] == " cat"


def rollout_of(texts, tokenizer, scores):
    encoded = [tokenizer.encode(t, add_special_tokens=False) for t in texts]
    width = max(map(len, encoded))
    mask = torch.tensor([[i < len(ids) for i in range(width)] for ids in encoded])
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in encoded])
    numbers = torch.arange(ids.numel()).view(ids.shape).float()
    return SimpleNamespace(
        response_ids=ids,
        response_mask=mask,
        action_mask=mask.clone(),
        logprobs=-numbers * mask,
        ref_logprobs=-2 * numbers * mask,
        scores=torch.tensor(scores),
        finished=torch.ones(len(texts), dtype=torch.bool),
        earlier=[()] * len(texts),
    )


@pytest.fixture
def experience(tokenizer):
    """Eight answers, scored 7, 6, … 0; the first token of each is an environment's."""
    texts = [f"{n} fish and a cat" for n in range(8)]
    rollout = rollout_of(texts, tokenizer, [7.0 - n for n in range(8)])
    rollout.action_mask[:, 0] = False
    x = rollout.action_mask.float()
    return SimpleNamespace(rollout=rollout, rewards=2 * x, values=0 * x, advantages=-3 * x)


def prompts(count):
    return [Prompt(({"role": "user", "content": f"p{i}"},), "", {}) for i in range(count)]


def test_rollouts_from_the_worst_to_the_best_with_their_numbers(tokenizer, experience):
    rows = samples.token_by_token(tokenizer, experience, prompts(8))
    assert [r["score"] for r in rows] == [0.0, 1.0, 3.0, 4.0, 6.0, 7.0]
    assert [r["prompt"][0]["content"] for r in rows] == ["p7", "p6", "p4", "p3", "p1", "p0"]
    row, width = rows[-1], experience.rollout.response_ids.shape[1]
    assert "".join(row["pieces"]) == "0 fish and a cat"
    assert row["reward"][:2] == [None, 2.0] and row["advantage"][1] == -3.0
    assert row["kl"][1:] == [float(n) for n in range(1, width)][: len(row["kl"]) - 1]
    assert "value" not in row, "there is no critic"
    experience.values = experience.values + 1
    assert samples.token_by_token(tokenizer, experience, prompts(8))[0]["value"][1] == 1.0


def test_numbers_of_a_whole_answer_stand_at_each_token(tokenizer, experience):
    experience.rewards = torch.arange(8.0)[:, None]
    rows = samples.token_by_token(tokenizer, experience, prompts(8))
    assert set(rows[0]["reward"][1:]) == {7.0} and len(rows[0]["reward"]) == len(rows[0]["kl"])


def test_long_answers_are_cut_and_say_how_long_they_were(tokenizer, experience, monkeypatch):
    monkeypatch.setattr(samples, "TOKENS", 2)
    row = samples.token_by_token(tokenizer, experience, prompts(8))[0]
    assert len(row["pieces"]) == len(row["kl"]) == 2 < row["length"]


def test_held_out_answers_of_both_moments_are_kept_whole(tokenizer, experience, tmp_path):
    rollout, asked = experience.rollout, prompts(20)
    rollout.earlier[1] = ({"role": "assistant", "content": "<calc>"},)
    rows = samples.held_out(asked[:8], list("abcdefgh"), rollout, [0.5] * 8)
    assert rows[1]["prompt"][-1]["content"] == "<calc>" and rows[0]["verifier"] == 0.5
    assert rows[2]["answer"] == "c" and rows[2]["score"] == 5.0
    assert "verifier" not in samples.held_out(asked[:8], list("abcdefgh"), rollout, [])[0]
    samples.write_answers(str(tmp_path), {"answers_before": rows, "scores_before": [1.0]})
    samples.write_answers(str(tmp_path), {"answers_before": rows, "answers_after": rows[:1]})
    kept = json.loads((tmp_path / "samples.json").read_text())
    assert kept == {"before": rows, "after": rows[:1]}
