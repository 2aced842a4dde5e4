"""EMA, saved weights and the generator under every ZeRO stage (see distributed_checks.py)."""

import pytest
from conftest import run_ranks


@pytest.mark.parametrize("ranks", [1, 2])
def test_average_weights_and_generator_under_every_stage(tiny, ranks):
    output = run_ranks([("tests/distributed_checks.py", [tiny / "base_model"])], ranks)
    assert output.count("held: stage") == 8 * ranks, output
