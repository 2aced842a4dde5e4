"""The checksum of a weight: equal for equal bits, another for other bits or other places."""

import pytest
import torch

from utils.generation import checksum as module
from utils.generation.checksum import checksum


def by_hand(words: list[int]) -> int:
    parts = [words[i : i + module.PART] for i in range(0, len(words), module.PART)]
    return sum(n * p * w for n, part in enumerate(parts, 1) for p, w in enumerate(part, 1)) % 2**64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_it_sees_every_bit_and_place(dtype, monkeypatch):
    monkeypatch.setattr(module, "PART", 5)
    weight = torch.arange(24).view(4, 6).to(dtype)
    words = weight.view(-1).view(torch.int16 if dtype.itemsize > 1 else torch.int8).tolist()
    known = checksum(weight)
    assert known == by_hand(words) == checksum(weight.clone())
    for word in range(len(words)):
        changed = weight.clone()
        changed.view(-1).view(torch.int16 if dtype.itemsize > 1 else torch.int8)[word] ^= 1
        assert checksum(changed) != known, word
    assert checksum(weight[[1, 0, 2, 3]]) != known and checksum(weight.T) != known
    assert checksum(weight[:, ::2]) == checksum(weight[:, ::2].contiguous())
    assert checksum(weight[:0]) == 0


def test_large_words_do_not_overflow():
    weight = torch.full((module.PART + 3,), -(2**15), dtype=torch.int16).view(torch.float16)
    assert checksum(weight) == by_hand([-(2**15)] * (module.PART + 3))
