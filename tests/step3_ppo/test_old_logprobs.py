"""Whose log-probabilities an update starts from."""

import pytest
import torch

from step3_ppo import old_logprobs


@pytest.mark.parametrize(
    "gap, source", [(5e-5, "decode"), (2e-4, "forward"), (torch.nan, "forward")]
)
@pytest.mark.parametrize("which", [0, 1])
def test_decode_speaks_where_it_agrees_with_the_scoring_pass(gap, source, which):
    scored = [torch.zeros(3, 4), torch.ones(3, 4)]
    decoded = [x.clone() for x in scored]
    decoded[which][1, 2] += gap
    said = []
    assert old_logprobs.compare(decoded, scored, said.append) == source
    assert f"from the {source}: decode loop" in said[0]
