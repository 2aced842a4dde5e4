"""Frozen models that wait in CPU memory."""

import torch

from utils.distributed.host_memory import FrozenOffload


def test_frozen_models_leave_and_come_back():
    """With the CPU in the place of a device: a copy of the weights is made, used and forgotten."""
    models = [torch.nn.Linear(3, 3).requires_grad_(False) for _ in range(2)]
    ids = torch.randn(2, 3)
    expected = [m(ids) for m in models]
    parking = FrozenOffload(models, torch.device("cpu"))
    at_home = [m.weight.data_ptr() for m in models]
    assert not parking.present
    for _ in range(2):
        assert torch.equal(models[0](ids), expected[0])
        away = models[0].weight.data_ptr()
        assert parking.present == {models[0]} and away != at_home[0]
        assert torch.equal(models[0](ids), expected[0]) and models[0].weight.data_ptr() == away
        assert models[1].weight.data_ptr() == at_home[1]
        parking.park()
        assert not parking.present and [m.weight.data_ptr() for m in models] == at_home
    assert torch.equal(models[1](ids), expected[1])
