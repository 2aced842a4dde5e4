"""The self-check's checksum of frozen weights, by its definition in Python's whole numbers."""

import struct

import pytest
import torch

from step3_ppo.checks import updates
from tests.helpers.pretended_device import Pretended

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]
BYTES = {torch.float32: "i", torch.bfloat16: "h", torch.float16: "h", torch.float64: "q"}


def model_of(dtype=torch.float32, seed=0):
    """Weights from 1e-6 to 1e6, of either sign."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 20))
    for p in model.parameters():
        scale = torch.logspace(-6, 6, p.numel()).clamp(max=1e4).view_as(p)
        p.data = (torch.randn_like(p) * scale).to(dtype)
    return model


def bits_of(p) -> torch.Tensor:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return p.data.view(kinds[p.element_size()]).view(-1)


@pytest.mark.parametrize("dtype", BYTES, ids=str)
def test_is_the_sum_of_bits_by_odd_places(dtype, monkeypatch):
    model, expected, place = model_of(dtype), 0, 0
    for p in model.parameters():
        raw = p.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for (bits,) in struct.iter_unpack(BYTES[dtype], raw):
            expected += bits * (2 * place + 1)
            place += 1
    before = [p.clone() for p in model.parameters()]
    assert place == 1850 and updates.checksum(model.parameters()) == expected % 2**64
    monkeypatch.setattr(updates, "CHECKSUM_CHUNK", 7)
    assert updates.checksum(model.parameters()) == expected % 2**64
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", BYTES, ids=str)
def test_one_bit_of_one_weight_is_noticed(dtype):
    model = model_of(dtype)
    before, width = updates.checksum(model.parameters()), 8 * dtype.itemsize
    weights = list(model.parameters())
    for p, element in ((weights[0], 0), (weights[0], 777), (weights[3], 19)):
        for bit in range(width):
            flip = -(2 ** (width - 1)) if bit == width - 1 else 2**bit  # the last one is the sign
            bits_of(p)[element] ^= flip
            assert updates.checksum(model.parameters()) != before, (element, bit)
            bits_of(p)[element] ^= flip
    assert updates.checksum(model.parameters()) == before


def test_weights_that_change_places_are_noticed():
    """Two numbers, two rows, two weights of one shape: no sum of magnitudes could tell."""
    model = torch.nn.Sequential(*(torch.nn.Linear(12, 12) for _ in range(2)))
    before, (first, second) = (
        updates.checksum(model.parameters()),
        (model[0].weight, model[1].weight),
    )

    def numbers():
        flat = first.data.view(-1)
        flat[[3, 100]] = flat[[100, 3]]

    def rows():
        first.data[[0, 5]] = first.data[[5, 0]]

    def matrices():
        first.data, second.data = second.data, first.data

    for change in (numbers, rows, matrices):
        change()
        assert updates.checksum(model.parameters()) != before, change.__name__
        change()
        assert updates.checksum(model.parameters()) == before, change.__name__


@pytest.mark.parametrize("device", ["pretended", pytest.param("cuda", marks=GPU)])
def test_is_the_same_on_every_device(device):
    """A GPU adds in another order, which no floating sum survives."""
    model = model_of()[0]
    at_home = updates.checksum(model.parameters())
    if device == "cuda":
        assert updates.checksum(model.to("cuda").parameters()) == at_home
        return
    with Pretended():
        assert updates.checksum(model.to("cuda").parameters()) == at_home
        assert next(model.parameters()).is_cuda


def test_shards_are_read_where_they_lie():
    """Under ZeRO-3 a weight is empty and its shard is beside it."""
    whole, sharded = model_of(), model_of()
    for p in sharded.parameters():
        p.ds_tensor, p.data = p.data.flatten(), torch.empty(0)
    assert updates.checksum(sharded.parameters()) == updates.checksum(whole.parameters())
    next(sharded.parameters()).ds_tensor[5] *= -1
    assert updates.checksum(sharded.parameters()) != updates.checksum(whole.parameters())
