"""Reward models and critics: scores, heads and biases."""

import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from utils.data import chat_template
from utils.models import scalar_model, scorer
from utils.models.loading import Loading


def load_scalar(folder, **kwargs):
    return scalar_model.load(Loading(), str(folder), dtype="fp32", **kwargs)


def test_scores_are_transformers_logits_before_the_bias(tiny, tmp_path):
    tokenizer = chat_template.load_tokenizer(str(tiny / "base_model"))
    model = load_scalar(tiny / "base_model", tokenizer=tokenizer, head="normal").eval()
    model.set_bias(0.75)
    model.classifier.save_pretrained(tmp_path)
    rows = [[20, 21, 22, 4], [30, 4], [23, 24, 25, 26, 27, 4]]
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    expected = torch.cat([plain(input_ids=torch.tensor([r])).logits[0] for r in rows]) - 0.75
    again = load_scalar(tmp_path).eval()
    assert again.bias == 0.75
    for left in (True, False):
        for extra in (0, 3):
            width = max(map(len, rows)) + extra
            pad = tokenizer.pad_token_id
            fill = [[pad] * (width - len(r)) for r in rows]
            pairs = zip(rows, fill, strict=True)
            ids = torch.tensor([f + r if left else r + f for r, f in pairs])
            mask = ids != pad
            for m in (model, again):
                got = scorer.sequence_scores(m, ids, mask)
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_heads_are_drawn_zeroed_or_refused(tiny):
    width = 32
    normal = load_scalar(tiny / "base_model", head="normal").classifier.score.weight
    assert normal.shape == (1, width)
    assert 0.6 < normal.std() * math.sqrt(width + 1) < 1.5
    drawn = []
    for seed, before in ((3, 0), (3, 5), (4, 0)):
        torch.manual_seed(seed)
        torch.randn(before)  # as where the model is built on another device, which draws there
        drawn.append(load_scalar(tiny / "base_model", head="normal").classifier.score.weight)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    zero = load_scalar(tiny / "base_model", head="zero").classifier.score.weight
    assert (zero == 0).all()
    with pytest.raises(SystemExit, match="has no reward head"):
        load_scalar(tiny / "base_model")
