"""The handle of a GPU tensor comes back from JSON as it was."""

import inspect
import json

import pytest
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from utils.generation.gpu_handles import from_json, to_json

HANDLE = (
    torch.Tensor,
    torch.Size([7]),
    (1,),
    0,
    torch.storage.TypedStorage,
    torch.uint8,
    3,
    b"\x00\xffhandle",
    512,
    256,
    False,
    b"counter",
    0,
    b"event",
    True,
)


def test_what_torch_needs_comes_back():
    assert len(HANDLE) == len(inspect.signature(rebuild_cuda_tensor).parameters)
    found = from_json(json.loads(json.dumps(to_json(HANDLE))))
    assert found == HANDLE and [type(x) for x in found[6:]] == [type(x) for x in HANDLE[6:]]
    hash(found)  # vLLM keeps what it has mapped by it


@pytest.mark.parametrize("place, other", [(0, torch.nn.Parameter), (5, torch.float32)])
def test_other_tensors_are_refused(place, other):
    with pytest.raises(ValueError, match="not of a tensor of bytes"):
        to_json(HANDLE[:place] + (other,) + HANDLE[place + 1 :])
