"""The weights of rollouts of an actor that trains under ZeRO: modes, memory, collectives."""

import pytest
import torch
import transformers

from tests.helpers.families import FAMILIES
from tests.helpers.running import run_ranks
from utils.generation import weights

WORKER = "tests/helpers/generation_checks.py"


def test_modes_and_the_choice_of_gather(tiny):
    output = run_ranks([(WORKER, [tiny / "base_model", "modes", "choice_of_gather"])], 1)
    assert "held: modes" in output and "held: choice of gather" in output, output


def test_ranks_that_stop_far_apart_finish_and_gather_once(tiny):
    output = run_ranks([(WORKER, [tiny / "base_model", "uneven_rollouts"])], 2)
    assert output.count("held: uneven rollouts") == 2, output


@pytest.mark.parametrize("family", FAMILIES)
def test_size_of_the_cache_is_that_of_transformers(family):
    config = getattr(transformers, f"{family}Config")(vocab_size=96, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    ids = torch.ones(3, 5, dtype=torch.int64)
    layers = model(input_ids=ids, use_cache=True).past_key_values.layers
    real = sum(t.numel() * t.element_size() for one in layers for t in (one.keys, one.values))
    assert weights.cache_bytes(model.config, 3, 5, 4) == real
