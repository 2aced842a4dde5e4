"""Step 2's own functions."""

import pytest
import torch

from tests.helpers.running import ROOT


def test_training_only_some_weights():
    import importlib.util

    spec = importlib.util.spec_from_file_location("step2", ROOT / "step2_reward/main.py")
    step2 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(step2)
    model = torch.nn.Module()
    model.classifier = torch.nn.Module()
    model.classifier.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])
    model.classifier.score = torch.nn.Linear(2, 1, bias=False)
    step2.freeze(model, [r"layers\.(1|2)\.weight"])
    free = {name for name, p in model.named_parameters() if p.requires_grad}
    assert free == {
        "classifier.layers.1.weight",
        "classifier.layers.2.weight",
        "classifier.score.weight",
    }
    step2.freeze(model, [])
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(SystemExit, match="matches no weight; names look like"):
        step2.freeze(model, ["nothing"])
