"""The native engine: each family answers as transformers does, in batches of a token budget."""

import pytest
import torch

from tests.helpers.families import FAMILIES
from tests.helpers.running import run_ranks
from tests.utils.generation.test_decoder import batches_of as shapes_of
from tests.utils.generation.test_sampling import LENGTHS, NEW, PAD, left_padded
from tests.utils.generation.test_sampling import tiny as model_of
from utils.generation import sampling as generation
from utils.generation.engine import Request, Sampling, batches_of
from utils.generation.engines.native import NativeEngine


def test_families_answer_as_transformers_generate(tiny):
    worker = "tests/helpers/generation_checks.py"
    output = run_ranks([(worker, [tiny / "base_model", "families"])], 1)
    assert output.count("family held") == 2 * (1 + len(FAMILIES)), output


@pytest.mark.parametrize(
    "most, expected",
    [
        (0, [(0, 6)]),
        (1, [(i, i + 1) for i in range(6)]),  # each is longer than that, and goes alone
        (28, [(0, 2), (2, 4), (4, 5), (5, 6)]),
        (45, [(0, 3), (3, 5), (5, 6)]),
        (114, [(0, 6)]),
        (113, [(0, 5), (5, 6)]),
    ],
)
def test_batches_hold_at_most_a_budget_of_tokens(most, expected):
    found = batches_of([1, 3, 4, 4, 7, 9], 10, most)
    assert [(s.start, s.stop) for s in found] == expected


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Bloom"])
def test_a_token_budget_changes_batches_and_nothing_else(family, monkeypatch):
    ids, mask = left_padded(sorted(LENGTHS), extra=2)
    noise = generation.uniform_noise(len(LENGTHS), NEW, seed=1, step=2)

    def sampled(most, stop):
        engine = NativeEngine(tokens_at_once=most)
        engine.generator = model_of(family)
        sampling = Sampling(NEW, stop, PAD, temperature=1.3, logprobs=True)
        return engine.generate(Request(ids, mask, noise), sampling)

    stop = sampled(0, -1).response_ids[1, 3].item()  # so that rows end apart
    whole = sampled(0, stop)
    shapes = shapes_of(monkeypatch, family)
    pieces = sampled(2 * (5 + NEW), stop)
    assert [s for s in shapes if s[1] > 1] == [(2, 2), (2, 5), (1, 7), (1, 9)]
    assert pieces.finish_reasons == whole.finish_reasons
    assert whole.finish_reasons[1] == "stop" and whole.response_mask[1].sum() <= 4
    assert torch.equal(pieces.response_ids, whole.response_ids)
    assert torch.equal(pieces.response_mask, whole.response_mask)
    for a, b in ((pieces.logprobs, whole.logprobs), (pieces.entropies, whole.entropies)):
        assert torch.equal(a != 0, whole.response_mask)
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
