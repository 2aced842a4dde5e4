"""Operations against those that torch counts."""

import torch
import transformers

from tests.helpers.llama_shape import LLAMA
from utils.planner import shapes, time


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = transformers.AutoModelForCausalLM.from_config(LLAMA, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 32, dtype=torch.int64))
    shape = shapes.count(LLAMA, False)
    said = time.forward_flops(shape, 64, 32, 64)
    # Eager attention multiplies over all of the length, causal attention over half.
    assert said + 64 * 2 * 5 * 128 * 32 == counter.get_total_flops()


def test_a_measured_speed_is_of_this_device():
    speed = time.measure(torch.device("cpu"), torch.float32, seconds=0.05)
    assert speed.measured and 1e8 < speed.flops < 1e14 and 1e8 < speed.bandwidth < 1e13
