"""Log-probabilities of every family, those too that change their logits after the head."""

import pytest
import torch
import transformers

from tests.helpers.families import FAMILIES, LLAMA_LIKE
from utils.kernels import vocabulary_head
from utils.models import language_model

# These cap or scale what the head gives.
CHANGE_THEIR_LOGITS = {
    "Gemma2": LLAMA_LIKE | {"head_dim": 8, "final_logit_softcapping": 2.0},
    "Cohere": LLAMA_LIKE | {"logit_scale": 0.3},
    "Granite": LLAMA_LIKE | {"logits_scaling": 3.0},
}


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
