"""Step 3 by preferences as a whole: one trajectory, resumed runs, the reference's numbers."""

import numpy as np
import pytest

from tests.helpers.jobs import preference
from tests.helpers.running import assert_same_path, built_once, metrics_of, run_ranks

# Every way to divide the same rows: (ranks, flags).
WAYS = {
    "plain": (1, []),
    "packed, one row": (1, ["--packing", "on", "--micro_batch_size", 1]),
    "tokens": (1, ["--micro_batch_tokens", 300, "--packing", "on"]),
    "two ranks": (2, ["--packing", "on"]),
    "two ranks in shards": (2, ["--zero_stage", 3]),
    "two ranks in shards, packed": (2, ["--zero_stage", 3, "--packing", "on", "--offload", "all"]),
}
LOSS = ["loss", "grad_norm", "margin", "chosen_logprob", "rejected_logprob"]


@pytest.fixture(scope="module")
def walked(tiny, chain, tmp_path_factory):
    """{way: its folder}."""

    def build(root):
        for ranks in (1, 2):
            run_ranks(
                [
                    preference(tiny, chain / "sft", root / name, *flags)
                    for name, (n, flags) in WAYS.items()
                    if n == ranks
                ],
                ranks,
            )

    root = built_once(tmp_path_factory, "preferences", build)
    return {name: root / name for name in WAYS}


def test_one_path_on_any_ranks_stages_and_micro_batches(walked):
    assert_same_path(walked, LOSS)
    assert metrics_of(walked["plain"], "loss")[0] == pytest.approx(np.log(2), abs=1e-9)


def test_the_margin_is_nothing_before_the_first_step(walked):
    for name, folder in walked.items():
        assert abs(metrics_of(folder, "margin")[0]) < 1e-4, name
