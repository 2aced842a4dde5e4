"""Layers that run from packed weights, and attention of one token, against torch's own."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from tests.helpers.families import FAMILIES
from utils.kernels import cpu_products, packed_linear, token_attention

pytestmark = pytest.mark.usefixtures("onednn_wherever_it_can")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(1,), (5,), (32,), (3, 70)])
def test_packed_layers_multiply_as_before(dtype, tolerance, shape):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96), nn.Linear(96, 16, bias=False)).to(dtype)
    x = torch.randn(*shape, 48, generator=generator).to(dtype)
    hidden = F.linear(x.double(), *(p.double() for p in model[0].parameters())).to(dtype).double()
    expected = F.linear(hidden, model[1].weight.double())
    with torch.no_grad(), packed_linear.packed(model):
        packs = cpu_products.PRODUCTS.onednn("decoding", dtype)  # bf16: not on every CPU
        assert all(("forward" in vars(layer)) == packs for layer in model)
        assert packs or dtype == torch.bfloat16
        got = model(x)
    assert got.dtype == dtype and got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_weights_are_packed_anew_each_time_and_let_go_even_on_an_error():
    layer = nn.Linear(8, 8, bias=False)
    x = torch.eye(8)
    for value in (1.0, 2.0):
        layer.weight.data.fill_(value)
        with torch.no_grad(), packed_linear.packed(layer):
            assert torch.equal(layer(x), torch.full((8, 8), value))
    with pytest.raises(RuntimeError, match="a planted error"), packed_linear.packed(layer):
        raise RuntimeError("a planted error")
    assert "forward" not in vars(layer) and layer(x).requires_grad


def test_layers_of_other_classes_and_types_stay_as_they_are():
    class Special(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(Special(4, 4), nn.Linear(4, 4).double(), nn.Linear(4, 4))
    with packed_linear.packed(model):
        assert [("forward" in vars(layer)) for layer in model] == [False, False, True]


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
