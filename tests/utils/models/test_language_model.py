"""Log-probabilities of every family, those too that change their logits after the head."""

import pytest
import torch
import transformers

from tests.helpers.families import FAMILIES, LLAMA_LIKE
from utils.kernels import packing, vocabulary_head
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


# Of the first group all rows begin alike, two of them with three tokens of the answer; the second
# is one row, the third's answers differ in length alone.
GROUPS = [
    [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 11, 12], [5, 6, 13]],
    [[14, 15, 16, 17]],
    [[18, 19, 20], [18, 19, 20, 21, 22]],
]
BEGINS = [[2, 2, 2], [1], [2, 2]]


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Qwen2"])
@pytest.mark.parametrize("packed", [False, True])
def test_answers_that_begin_alike_have_the_logprobs_they_have_alone(family, packed):
    torch.manual_seed(0)
    settings = dict(vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family], **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.get_output_embeddings().weight.data.normal_(0, 0.5)
    rows = [row for group in GROUPS for row in group]
    begins = [begin for group in BEGINS for begin in group]
    expected = []
    for row, begin in zip(rows, begins, strict=True):
        logs = model(input_ids=torch.tensor([row])).logits[0].double().log_softmax(-1)
        expected.append(sum(logs[t - 1, row[t]] for t in range(begin, len(row))))
    expected = torch.stack(expected)
    if packed:
        packing.turn_on(model)
    actual = language_model.answer_logprobs(model, GROUPS, BEGINS, torch.device("cpu"))
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)
    weights = torch.linspace(-1, 1, len(rows), dtype=torch.float64)
    parameters = list(model.parameters())
    for a, e in zip(
        torch.autograd.grad((actual * weights).sum(), parameters, allow_unused=True),
        torch.autograd.grad((expected * weights).sum(), parameters, allow_unused=True),
        strict=True,
    ):
        if e is not None:
            torch.testing.assert_close(a, e, rtol=1e-4, atol=2e-5)


def test_a_beginning_goes_through_the_packed_model_once():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**FAMILIES["Llama"], vocab_size=96, pad_token_id=0)
    model, seen = transformers.AutoModelForCausalLM.from_config(config).eval(), []
    packing.turn_on(model)
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    language_model.answer_logprobs(model, GROUPS, BEGINS, torch.device("cpu"))
    # Two of the first group share two tokens with the first row, one of the third group two.
    assert seen[-1] == sum(len(row) for group in GROUPS for row in group) - 2 * 2 - 2
