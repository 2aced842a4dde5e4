"""Run by step_worker.py: what engines of every ZeRO stage keep, counted tensor by tensor, beside
what the planner says."""

import gc
import importlib.util
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from utils.distributed import process_group, zero
from utils.distributed.optimizers import OPTIMIZERS
from utils.models import freezing, language_model
from utils.models.freezing import Freezing
from utils.planner import memory as plan_memory
from utils.planner import shapes as plan_shapes
from utils.planner.shapes import NOTHING
from utils.settings.run_config import RunConfig

HALF = Freezing(freeze_bottom_layers=3)
CASES = [
    ("bf16", 0, "adamw", NOTHING),
    ("bf16", 2, "adamw", NOTHING),
    ("fp32", 3, "adamw", NOTHING),
    ("fp32", 0, "adamw", HALF),
    ("bf16", 2, "adamw", HALF),
    ("fp32", 3, "adamw", HALF),
]
if importlib.util.find_spec("bitsandbytes"):
    CASES += [("fp32", 3, "adamw8bit", NOTHING), ("fp32", 0, "adamw8bit", NOTHING)]
    CASES += [("bf16", 2, "adamw8bit", HALF), ("bf16", 0, "adamw8bit", NOTHING)]


def tensor_bytes() -> dict[int, int]:
    """Address → bytes of every storage that a tensor of this process refers to."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            for t in (
                thing,
                getattr(thing, "ds_tensor", None),
                thing.grad if thing.is_leaf else None,
            ):
                if t is not None:
                    found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return found


def main() -> None:
    process_group.init()
    folder, ranks = sys.argv[1], process_group.world_size()
    for dtype, stage, stepper, frozen in CASES:
        shape = plan_shapes.read(folder, False, False, frozen)
        before = tensor_bytes()
        config = RunConfig(output_dir="-", model_name_or_path=folder, dtype=dtype, zero_stage=stage)
        model = language_model.load(config, folder, dtype=dtype, zero_stage=stage)
        freezing.apply(model, frozen)
        engine = zero.TrainEngine(
            model,
            config.pick(zero.Training, optimizer=stepper),
            dtype=dtype,
            zero_stage=stage,
            total_steps=2,
        )
        ids = torch.ones(1, 4, dtype=torch.int64)
        for _ in range(2):
            engine.backward(engine(input_ids=ids, use_cache=False).logits.sum(), normaliser=1.0)
            engine.step()
        kept = [n for at, n in tensor_bytes().items() if at not in before]
        # The reduction buffer of ZeRO-3 is 50 million numbers that are hardly touched.
        kept = sum(n for n in kept if n < 50_000_000)
        planned = plan_memory.trained(
            shape, dtype, stage, ranks, "none", False, OPTIMIZERS[stepper]
        )
        said = sum(planned.device.values())
        told = dtype, stage, stepper, frozen, ranks, kept, said
        assert abs(kept / said - 1) < 0.05, told
        del model, engine
    print("plan: all stages counted", flush=True)
    process_group.shut_down()
