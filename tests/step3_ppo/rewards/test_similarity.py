"""Likeness to a reference, against definitions of their own."""

import math
from collections import Counter
from types import SimpleNamespace

import nltk.corpus
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from step3_ppo.rewards import similarity


def chrf_by_hand(response, reference, order=6, beta=2.0):
    """Popović 2015: mean precision and recall over the n-grams of characters, without spaces."""
    texts = [text.replace(" ", "") for text in (response, reference)]
    precisions, recalls = [], []
    for n in range(1, order + 1):
        mine, theirs = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in texts)
        if mine and theirs:
            same = (mine & theirs).total()
            precisions.append(same / mine.total())
            recalls.append(same / theirs.total())
    p, r = (sum(x) / len(x) if x else 0.0 for x in (precisions, recalls))
    return (1 + beta**2) * p * r / (beta**2 * p + r) if p + r else 0.0


@pytest.mark.parametrize(
    "response", ["the cat sat", "a cat", "dogs", "the cat sat on the mat", "x"]
)
def test_chrf(response):
    row = {"reference": "the cat sat on the mat"}
    (score,) = similarity.chrf(["p"], [response], [row])
    assert score == pytest.approx(chrf_by_hand(response, row["reference"]), abs=1e-9)


def test_meteor_without_wordnet_says_what_to_do(monkeypatch):
    def missing():
        raise LookupError("wordnet")

    monkeypatch.setattr(nltk.corpus, "wordnet", SimpleNamespace(ensure_loaded=missing))
    with pytest.raises(LookupError, match="nltk.downloader wordnet, or put .* NLTK_DATA"):
        similarity.meteor(["p"], ["a"], [{"reference": "a"}])


def test_meteor_of_words_and_stems(monkeypatch):
    """Without synonyms: F = 10PR/(R+9P), less half of the cube of chunks over matches."""
    empty = SimpleNamespace(ensure_loaded=lambda: None, synsets=lambda word: [])
    monkeypatch.setattr(nltk.corpus, "wordnet", empty)
    (score,) = similarity.meteor(["p"], ["Cats sat there"], [{"reference": "the cat sat"}])
    p, r = 2 / 3, 2 / 3
    assert score == pytest.approx(p * r / (0.9 * p + 0.1 * r) * (1 - 0.5 * (1 / 2) ** 3))


def test_bert_score_is_the_papers(chain, monkeypatch):
    folder = str(chain / "sft")
    monkeypatch.setenv(similarity.MODEL, f"{folder}:1")
    pairs = [("one two", "two three four"), ("two three four", "two three four"), ("", "one")]
    responses, rows = [r for r, _ in pairs], [{"reference": t} for _, t in pairs]
    found = similarity.bert_score(["p"] * 3, responses, rows)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)

    def vectors(text):
        ids = tokenizer(text).input_ids
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0].tolist()
        return [v for i, v in zip(ids, states, strict=True) if i not in tokenizer.all_special_ids]

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    for (response, reference), score in zip(pairs[:2], found[:2], strict=True):
        mine, theirs = vectors(response), vectors(reference)
        p = sum(max(cosine(a, b) for b in theirs) for a in mine) / len(mine)
        r = sum(max(cosine(a, b) for a in mine) for b in theirs) / len(theirs)
        assert score == pytest.approx(2 * p * r / (p + r), abs=1e-5)
    assert found[1] == pytest.approx(1, abs=1e-5) and found[2] == 0.0 and found[0] < 0.999


def test_bert_score_without_a_model_says_what_to_do(monkeypatch):
    monkeypatch.delenv(similarity.MODEL, raising=False)
    with pytest.raises(ValueError, match="set the environment variable BERTSCORE_MODEL"):
        similarity.bert_score(["p"], ["a"], [{"reference": "a"}])
