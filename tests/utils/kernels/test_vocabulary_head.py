"""Log-probabilities in chunks against log-softmax over whole logits in float64, and their
gradients."""

import pytest
import torch
from torch import nn

from utils.kernels import vocabulary_head

TOKENS, WIDTH, VOCABULARY = 37, 12, 101


def numbers(dtype, biased):
    """hidden (N,H), weight (V,H), bias (V,) or None, targets (N,), a gradient for each of N."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    hidden, weight = draw(TOKENS, WIDTH), draw(VOCABULARY, WIDTH)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    slopes = torch.randn(TOKENS, generator=generator)
    return hidden, weight, draw(VOCABULARY) if biased else None, targets, slopes


@pytest.mark.parametrize("kept", [0, 10**9], ids=["recomputed", "kept"])
@pytest.mark.parametrize("chunk", [1, 5 * VOCABULARY, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_chunks_give_the_numbers_and_gradients_of_whole_logits(
    monkeypatch, kept, chunk, dtype, biased
):
    monkeypatch.setitem(vocabulary_head.CHUNK, "cpu", chunk)
    monkeypatch.setattr(vocabulary_head, "KEPT", kept)
    hidden, weight, bias, targets, slopes = numbers(dtype, biased)
    temperature = 0.7
    head = vocabulary_head.VocabularyHead(WIDTH, VOCABULARY, bias=biased)
    head.weight = nn.Parameter(weight.detach())
    if biased:
        head.bias = nn.Parameter(bias.detach())
    everywhere = torch.arange(TOKENS)
    settings = everywhere, targets, temperature, True
    actual, entropies = head.logprobs(hidden[None], *settings)
    (actual * slopes).sum().backward()

    exact = [None if x is None else x.detach().double() for x in (hidden, weight, bias)]
    exact = [x if x is None else x.requires_grad_() for x in exact]
    logs = (nn.functional.linear(*exact) / temperature).log_softmax(-1)
    expected = torch.stack([logs[i, y] for i, y in enumerate(targets.tolist())])
    (expected * slopes).sum().backward()
    # bf16 logits of size 10 are off by 0.03.
    close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.05, atol=0.08)
    assert actual.dtype == entropies.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, **close)
    torch.testing.assert_close(entropies.double(), -(logs.exp() * logs).sum(-1), **close)
    assert not entropies.requires_grad
    for mine, theirs in zip((hidden, head.weight, head.bias), exact, strict=True):
        if theirs is not None:
            assert theirs.grad.abs().max() > 0.1
            torch.testing.assert_close(mine.grad.double(), theirs.grad, **close)


def test_no_token_wanted_is_no_gradient():
    head = vocabulary_head.VocabularyHead(WIDTH, VOCABULARY)
    hidden = torch.randn(2, 3, WIDTH, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    with head.giving(lambda hidden: head.logprobs(hidden, none, none)[0]):
        answer = head(hidden)
    answer.sum().backward()
    assert answer.shape == (0,) and not hidden.grad.any() and not head.weight.grad.any()
    assert head(hidden).shape == (2, 3, VOCABULARY), "logits again"
