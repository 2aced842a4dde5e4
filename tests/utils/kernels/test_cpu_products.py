"""Products by oneDNN: chosen by what the CPU can and what was measured, one for all ranks; the same
numbers and gradients as torch's own, in layers that train and in layers that decode."""

import copy
import subprocess
import sys
import time

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from tests.helpers.families import FAMILIES
from tests.helpers.running import ROOT
from utils.distributed import process_group
from utils.kernels import cpu_products
from utils.kernels.cpu_products import Products
from utils.models import loading

FP32, BF16 = torch.float32, torch.bfloat16
ONEDNN = pytest.mark.usefixtures("onednn_wherever_it_can")


@pytest.fixture
def products(monkeypatch):
    """What nothing has been asked of yet, in the place of the process's own."""
    fresh = Products()
    monkeypatch.setattr(cpu_products, "PRODUCTS", fresh)
    return fresh


def calls_of_onednn(monkeypatch):
    seen, multiply = [], cpu_products.multiply

    def watched(x, weight, bias=None):
        seen.append(tuple(x.shape))
        return multiply(x, weight, bias)

    monkeypatch.setattr(cpu_products, "multiply", watched)
    return seen


@pytest.mark.parametrize("slower, calls", [("torch", 2), ("oneDNN", 0)])
def test_the_faster_one_multiplies(products, monkeypatch, slower, calls):
    """Training and decoding; whichever of the two is made to wait loses."""
    plain, multiply = torch.nn.functional.linear, cpu_products.multiply

    def late(product):
        def wait(*arguments):
            started = time.process_time()
            while time.process_time() - started < 1e-3:
                pass
            return product(*arguments)

        return wait

    slow = {
        "torch": (cpu_products.F, "linear", plain),
        "oneDNN": (cpu_products, "multiply", multiply),
    }
    with monkeypatch.context() as during:
        place, name, product = slow[slower]
        during.setattr(place, name, late(product))
        for use in cpu_products.USES:
            assert products.onednn(use, FP32) == bool(calls)
    seen, layer = calls_of_onednn(monkeypatch), nn.Linear(8, 4)
    cpu_products.train_with(layer)
    layer(torch.ones(3, 8))
    with torch.no_grad(), cpu_products.packed(layer):
        layer(torch.ones(5, 8))
    assert len(seen) == calls


def test_a_cpu_without_the_kernel_is_not_asked_for_it(products, monkeypatch):
    def refuse(weight):
        raise RuntimeError("bf16 path needs the cpu support avx_ne_convert or avx512bw")

    monkeypatch.setattr(cpu_products, "pack", refuse)
    layer, x = nn.Linear(8, 4).to(BF16), torch.ones(3, 8, dtype=BF16)
    with torch.no_grad(), cpu_products.packed(layer):
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_without_onednn_nothing_is_asked_of_it(products, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(cpu_products, "multiply", None)
    assert not any(products.onednn(use, FP32) for use in cpu_products.USES)


def test_the_rank_that_gains_least_decides_for_all(products, monkeypatch):
    products._gains = {f"training {FP32}": 2.0, f"decoding {FP32}": 1.2}
    others = {"training": 1.01, "decoding": 1.5}
    monkeypatch.setattr(process_group, "gather_objects", lambda ours: [ours, others])
    products.agree(FP32)
    assert not products.onednn("training", FP32) and products.onednn("decoding", FP32)
    assert products.state_dict() == {f"training {FP32}": 1.01, f"decoding {FP32}": 1.2}


def test_a_resumed_run_multiplies_as_it_began_where_it_can(products):
    """What is measured now would round otherwise, and the run would not end as if never stopped."""
    products._gains = {f"training {FP32}": 1.3, f"decoding {FP32}": 1.0, f"decoding {BF16}": 0.0}
    products.load_state_dict(
        {f"training {FP32}": 1.01, f"decoding {FP32}": 1.3, f"decoding {BF16}": 1.4}
    )
    assert not products.onednn("training", FP32) and products.onednn("decoding", FP32)
    assert not products.onednn("decoding", BF16), "this machine has no such kernel"


def test_measuring_draws_no_random_number(products):
    state = torch.get_rng_state()
    assert products.onednn("decoding", FP32) in (True, False)
    assert torch.equal(state, torch.get_rng_state())


# Layers that train.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (24,)])
@ONEDNN
def test_values_and_gradients_are_those_of_a_linear_layer(shape, bias):
    torch.manual_seed(0)
    plain = nn.Linear(24, 11, bias=bias)
    ours = copy.deepcopy(plain)
    cpu_products.train_with(ours)
    assert type(ours) is cpu_products.OneDNNLinear
    found = []
    for layer in (plain, ours):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = layer(x)
        (y.square() * torch.arange(11)).sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    assert [t.shape for t in found[0]] == [t.shape for t in found[1]]
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@ONEDNN
def test_what_needs_no_gradient_gets_none():
    layer = nn.Linear(8, 4).requires_grad_(False)
    cpu_products.train_with(layer)
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 8))
    assert layer.weight.grad is None and layer.bias.grad is None
    layer.requires_grad_(True)
    layer(torch.randn(3, 8)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((4,), 3.0))


@pytest.mark.parametrize("family", FAMILIES)
@ONEDNN
def test_a_family_trained_with_it_computes_the_same(family):
    """GPT-2 keeps its weights in another kind of layer and loses nothing."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=96, **FAMILIES[family])
    plain = transformers.AutoModelForCausalLM.from_config(config).float()
    ours = copy.deepcopy(plain)
    for model in (plain, ours):
        loading.prepare_training(model)
    for layer in plain.modules():
        if type(layer) is cpu_products.OneDNNLinear:
            layer.__class__ = nn.Linear
    swapped = [m for m in ours.modules() if type(m) is cpu_products.OneDNNLinear]
    assert len(swapped) > 8 or family == "GPT2"
    ids = torch.randint(3, 96, (2, 9))
    for model in (plain, ours):
        model(input_ids=ids, labels=ids).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(
            q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m
        )


@ONEDNN
def test_half_precision_is_left_to_torch():
    layer = nn.Linear(8, 4).bfloat16()
    cpu_products.train_with(layer)
    assert type(layer) is nn.Linear


# Layers that decode.


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(1,), (5,), (32,), (3, 70)])
@ONEDNN
def test_packed_layers_multiply_as_before(dtype, tolerance, shape):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96), nn.Linear(96, 16, bias=False)).to(dtype)
    x = torch.randn(*shape, 48, generator=generator).to(dtype)
    hidden = F.linear(x.double(), *(p.double() for p in model[0].parameters())).to(dtype).double()
    expected = F.linear(hidden, model[1].weight.double())
    with torch.no_grad(), cpu_products.packed(model):
        packs = cpu_products.PRODUCTS.onednn("decoding", dtype)  # bf16: not on every CPU
        assert all(("forward" in vars(layer)) == packs for layer in model)
        assert packs or dtype == torch.bfloat16
        got = model(x)
    assert got.dtype == dtype and got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@ONEDNN
def test_weights_are_packed_anew_each_time_and_let_go_even_on_an_error():
    layer = nn.Linear(8, 8, bias=False)
    x = torch.eye(8)
    for value in (1.0, 2.0):
        layer.weight.data.fill_(value)
        with torch.no_grad(), cpu_products.packed(layer):
            assert torch.equal(layer(x), torch.full((8, 8), value))
    with pytest.raises(RuntimeError, match="a planted error"), cpu_products.packed(layer):
        raise RuntimeError("a planted error")
    assert "forward" not in vars(layer) and layer(x).requires_grad


@ONEDNN
def test_layers_of_other_classes_and_types_stay_as_they_are():
    class Special(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(Special(4, 4), nn.Linear(4, 4).double(), nn.Linear(4, 4))
    with cpu_products.packed(model):
        assert [("forward" in vars(layer)) for layer in model] == [False, False, True]


OLDER = """
import torch
from torch import nn
from utils.distributed import zero
from utils.kernels import cpu_products
assert zero.resolve_dtype("auto", torch.device("cpu")) == "fp32"
layer, x = nn.Linear(64, 32).bfloat16(), torch.ones(3, 64).bfloat16()
plain = layer(x)
with torch.no_grad(), cpu_products.packed(layer):
    assert torch.equal(layer(x), plain)
print("multiplied")
"""


def test_an_older_cpu_computes_bf16_where_it_is_asked_to(older_cpu):
    """AVX2 alone: bf16 is not the default, and --dtype bf16 decodes by torch's own products."""
    done = subprocess.run(
        [sys.executable, "-c", OLDER],
        cwd=ROOT,
        env=older_cpu,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "multiplied" in done.stdout, done.stderr
