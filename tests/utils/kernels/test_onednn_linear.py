"""fp32 linear layers by oneDNN: what torch's own give, forward and backward."""

import copy

import pytest
import torch
import transformers
from torch import nn

from step1_sft.config import SFTConfig
from tests.helpers.families import FAMILIES
from utils.kernels import onednn_linear
from utils.models import language_model

pytestmark = pytest.mark.usefixtures("onednn_wherever_it_can")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (24,)])
def test_values_and_gradients_are_those_of_a_linear_layer(shape, bias):
    torch.manual_seed(0)
    plain = nn.Linear(24, 11, bias=bias)
    ours = copy.deepcopy(plain)
    onednn_linear.use(ours)
    assert type(ours) is onednn_linear.OneDNNLinear
    found = []
    for layer in (plain, ours):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = layer(x)
        (y.square() * torch.arange(11)).sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    assert [t.shape for t in found[0]] == [t.shape for t in found[1]]
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_what_needs_no_gradient_gets_none():
    layer = nn.Linear(8, 4).requires_grad_(False)
    onednn_linear.use(layer)
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 8))
    assert layer.weight.grad is None and layer.bias.grad is None
    layer.requires_grad_(True)
    layer(torch.randn(3, 8)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((4,), 3.0))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trained_with_it_computes_the_same(family):
    """GPT-2 keeps its weights in another kind of layer and loses nothing."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=96, **FAMILIES[family])
    plain = transformers.AutoModelForCausalLM.from_config(config).float()
    ours = copy.deepcopy(plain)
    for model in (plain, ours):
        language_model.prepare_training(model, SFTConfig())
    for layer in plain.modules():
        if type(layer) is onednn_linear.OneDNNLinear:
            layer.__class__ = nn.Linear
    swapped = [m for m in ours.modules() if type(m) is onednn_linear.OneDNNLinear]
    assert len(swapped) > 8 or family == "GPT2"
    ids = torch.randint(3, 96, (2, 9))
    for model in (plain, ours):
        model(input_ids=ids, labels=ids).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(
            q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m
        )


def test_half_precision_is_left_to_torch():
    layer = nn.Linear(8, 4).bfloat16()
    onednn_linear.use(layer)
    assert type(layer) is nn.Linear
