"""Bytes of one model against running engines and a real KV cache."""

import pytest
import torch
import transformers

from tests.helpers.llama_shape import LLAMA
from tests.helpers.running import run_ranks
from utils.planner import memory, shapes


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_engines_keep_what_the_planner_says(tmp_path, ranks):
    transformers.AutoModelForCausalLM.from_config(LLAMA).save_pretrained(tmp_path)
    assert "all stages counted" in run_ranks([("tests/helpers/plan_checks.py", [tmp_path])], ranks)


def test_the_kv_cache_is_what_a_forward_pass_leaves():
    cache = transformers.DynamicCache(config=LLAMA)
    model = transformers.AutoModelForCausalLM.from_config(LLAMA)
    model(torch.zeros(2, 7, dtype=torch.int64), past_key_values=cache, use_cache=True)
    tokens = sum(x.keys.numel() + x.values.numel() for x in cache.layers)
    shape = shapes.count(LLAMA, False)
    assert memory.generating(shape, 2, 7, "fp32")["KV cache"] == 4 * tokens
