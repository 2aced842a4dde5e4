"""Run by step_worker.py: AdamW with moments in 8 bits under each layout. The first step is that of
AdamW, as moments are rounded after it; a run goes on from its checkpoint to the last bit, and
another layout is refused."""

import sys
import threading
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tests.helpers.distributed_checks import whole
from tests.helpers.engine_builder import RATE, engine_of
from tests.helpers.state_checks import LAYOUTS, assert_equal, load, train, write
from utils.checkpoints import engine_state, manifest
from utils.checkpoints.background import Copies
from utils.distributed import process_group
from utils.models.ema import EMA


def fresh(folder: str, layout, optimizer: str):
    stage, dtype, offload = layout
    settings = dict(frozen="layers.0.mlp", warmup_ratio=0.3, weight_decay=0.1, optimizer=optimizer)
    engine = engine_of(folder, stage, dtype, offload, total_steps=6, **settings)
    return engine, EMA(engine.module, 0.9)


def main() -> None:
    folder, out = sys.argv[1], Path(sys.argv[2])
    for number, layout in enumerate(LAYOUTS):
        engine, average = fresh(folder, layout, "adamw8bit")
        other, other_average = fresh(folder, layout, "adamw")
        before = whole(engine.module)
        train(engine, average, range(1))
        train(other, other_average, range(1))
        if layout[1] == "fp32":
            for name, weight in whole(other.module).items():
                found = whole(engine.module)[name]
                torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-6 * RATE, msg=name)
                frozen = "layers.0.mlp" in name
                assert torch.equal(found, before[name]) == frozen, name
        sizes = [t.numel() for t in engine.masters()]
        # bitsandbytes keeps the moments of small tensors whole.
        promised = sum(8 * n if n < 4096 else 2 * n + 8 * -(-n // 256) for n in sizes)
        state = engine.adamw.state.values()
        kept = sum(s[k].nbytes for s in state for k in engine_state.optimizers.STATE if k in s)
        assert engine.moments_to_come(torch.device("cpu")) == 0 and kept == promised
        train(engine, average, range(1, 3))
        go = threading.Event()
        go.set()
        writing = write(engine, average, Copies(), out / str(number), go)
        record, saved = engine_state.record_of(engine), whole(engine.module)
        writing.result()
        metrics = train(engine, average, range(3, 6))
        end = whole(engine.module)
        names = process_group.gather_objects(f"{process_group.rank()}.safetensors")
        reader = manifest.Reader(out / str(number), names)
        engine, average = fresh(folder, layout, "adamw8bit")
        load(engine, average, reader, record)
        assert_equal(whole(engine.module), saved, f"{layout}, as loaded")
        assert train(engine, average, range(3, 6)) == metrics, layout
        assert_equal(whole(engine.module), end, f"{layout}, three steps later")
        for elsewhere, optimizer in ((LAYOUTS[number - 1], "adamw8bit"), (layout, "adamw")):
            engine, average = fresh(folder, elsewhere, optimizer)
            try:
                load(engine, average, reader, record)
            except manifest.Damaged as problem:
                assert "its moments are in 8 bits, ZeRO-" in str(problem), problem
            else:
                raise AssertionError(f"{layout} read by {elsewhere}, {optimizer}")
        print(f"held: {layout}")


if __name__ == "__main__":
    main()
