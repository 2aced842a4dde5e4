"""Log-probabilities in chunks against log-softmax over whole logits in float64, and their
gradients; models that do something to their logits after the head."""

import pytest
import torch
import transformers
from torch import nn

from tests.helpers.families import FAMILIES, LLAMA_LIKE
from utils.kernels import vocabulary_head
from utils.models import language_model

TOKENS, WIDTH, VOCABULARY = 37, 12, 101
# These cap or scale what the head gives.
CHANGE_THEIR_LOGITS = {
    "Gemma2": LLAMA_LIKE | {"head_dim": 8, "final_logit_softcapping": 2.0},
    "Cohere": LLAMA_LIKE | {"logit_scale": 0.3},
    "Granite": LLAMA_LIKE | {"logits_scaling": 3.0},
}


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


@pytest.mark.parametrize("family", [*FAMILIES, *CHANGE_THEIR_LOGITS])
def test_every_family_gives_the_logprobs_of_its_logits(family):
    torch.manual_seed(0)
    settings = dict(vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    sizes = (FAMILIES | CHANGE_THEIR_LOGITS)[family]
    config = getattr(transformers, f"{family}Config")(**sizes, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    # Logits far from 0, so that a cap of 2 changes them.
    model.get_output_embeddings().weight.data.normal_(0, 0.5)
    rows = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18, 19]]
    left, width = [1, 3, 0], 8
    ids = torch.tensor(
        [[0] * n + r + [0] * (width - n - len(r)) for n, r in zip(left, rows, strict=True)]
    )
    mask = torch.tensor(
        [[n <= t < n + len(r) for t in range(width)] for n, r in zip(left, rows, strict=True)]
    )
    wanted = mask.clone()
    for row, n in enumerate(left):
        wanted[row, : n + 1 + row] = False  # the first one, two and three tokens
    actual, entropies = language_model.wanted_logprobs(
        model, ids, mask, wanted, temperature=1.3, with_entropies=True
    )
    expected, spread = [], []
    for i, row in enumerate(rows):
        logs = (model(input_ids=torch.tensor([row])).logits[0].double() / 1.3).log_softmax(-1)
        for t in range(1 + i, len(row)):
            expected.append(logs[t - 1, row[t]])
            spread.append(-(logs[t - 1].exp() * logs[t - 1]).sum())
    torch.testing.assert_close(actual.double(), torch.stack(expected), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(entropies.double(), torch.stack(spread), rtol=1e-5, atol=2e-5)
    head = vocabulary_head.of(model)
    assert head.changes_logits == (family in CHANGE_THEIR_LOGITS)
    weight = model.get_input_embeddings().weight
    torch.testing.assert_close(
        torch.autograd.grad(actual.sum(), weight)[0],
        torch.autograd.grad(torch.stack(expected).sum(), weight)[0].float(),
        rtol=1e-4,
        atol=1e-5,
    )
