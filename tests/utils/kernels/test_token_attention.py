"""Attention of one token against the formula, and against torch's own in a model."""

import pytest
import torch
import transformers

from tests.helpers.families import FAMILIES
from utils.kernels import token_attention

pytestmark = pytest.mark.usefixtures("onednn_wherever_it_can")


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("masked", [True, False])
def test_one_token_attends_as_by_the_formula(groups, masked):
    """On views into longer rows, as the cache hands them out."""
    generator, rows, heads, size = torch.Generator().manual_seed(0), 3, 4, 8
    query = torch.randn(rows, heads, 1, size, generator=generator)
    keys, values = torch.randn(2, rows, groups, 20, size, generator=generator)[:, :, :, 5:16]
    mask = torch.rand(rows, 1, 1, 11, generator=generator) > 0.4 if masked else None
    bias = None if mask is None else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    got, _ = token_attention.attend(None, query, keys, values, bias, scaling=0.3)
    assert got.shape == (rows, 1, heads, size)
    for row in range(rows):
        for head in range(heads):
            of = head * groups // heads
            scores = keys[row, of].double() @ query[row, head, 0].double() * 0.3
            if masked:
                scores[~mask[row, 0, 0]] = -torch.inf
            expected = scores.softmax(0) @ values[row, of].double()
            torch.testing.assert_close(got[row, 0, head].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_models_on_a_cpu_attend_so_while_they_decode(dtype, tolerance):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**FAMILIES["Llama"]))
    model = model.to(dtype).eval()
    ids = torch.arange(12).view(2, 6) + 5
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask).logits[:, -1]
        with token_attention.used_by(model):
            assert model.config._attn_implementation == token_attention.NAME
            cache = transformers.DynamicCache(config=model.config)
            model(input_ids=ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
            last = model(input_ids=ids[:, 5:], attention_mask=mask, past_key_values=cache).logits
    assert model.config._attn_implementation == "sdpa"
    assert (last[:, -1] - whole)[1].abs().max().item() < tolerance < whole.std().item()


def test_models_of_their_own_attention_keep_it():
    config = transformers.LlamaConfig(**FAMILIES["Llama"], attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config)
    with token_attention.used_by(model):
        assert model.config._attn_implementation == "eager"
        assert token_attention.block_of(model) == 0
