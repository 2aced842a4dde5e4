"""oneDNN or torch's own products: by what the CPU can and what was measured, one for all ranks."""

import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from tests.helpers.running import ROOT
from utils.distributed import process_group
from utils.kernels import cpu_products, onednn_linear, packed_linear
from utils.kernels.cpu_products import Products

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def products(monkeypatch):
    """What nothing has been asked of yet, in the place of the process's own."""
    fresh = Products()
    for module in (cpu_products, onednn_linear, packed_linear):
        monkeypatch.setattr(module, "PRODUCTS", fresh)
    return fresh


def calls_of_onednn(monkeypatch):
    seen, multiply = [], cpu_products.multiply

    def watched(x, weight, bias=None):
        seen.append(tuple(x.shape))
        return multiply(x, weight, bias)

    for module in (onednn_linear, packed_linear):
        monkeypatch.setattr(module, "multiply", watched)
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
    onednn_linear.use(layer)
    layer(torch.ones(3, 8))
    with torch.no_grad(), packed_linear.packed(layer):
        layer(torch.ones(5, 8))
    assert len(seen) == calls


def test_a_cpu_without_the_kernel_is_not_asked_for_it(products, monkeypatch):
    def refuse(weight):
        raise RuntimeError("bf16 path needs the cpu support avx_ne_convert or avx512bw")

    monkeypatch.setattr(cpu_products, "pack", refuse)
    monkeypatch.setattr(packed_linear, "pack", refuse)
    layer, x = nn.Linear(8, 4).to(BF16), torch.ones(3, 8, dtype=BF16)
    with torch.no_grad(), packed_linear.packed(layer):
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


OLDER = """
import torch
from torch import nn
from utils.distributed import zero
from utils.kernels import packed_linear
assert zero.resolve_dtype("auto", torch.device("cpu")) == "fp32"
layer, x = nn.Linear(64, 32).bfloat16(), torch.ones(3, 64).bfloat16()
plain = layer(x)
with torch.no_grad(), packed_linear.packed(layer):
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
