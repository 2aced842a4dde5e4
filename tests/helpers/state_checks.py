"""Saving and restoring an engine under each layout; run on every rank by test_resume.py.

arguments: base model folder, folder to write in, and the numbers of the layouts (default: all)
"""

import sys
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tests.helpers.bad_step_checks import step
from tests.helpers.distributed_checks import whole
from tests.helpers.engine_builder import engine_of
from utils.checkpoints import engine_state, manifest
from utils.checkpoints.background import Copies, Writing
from utils.distributed import process_group, zero
from utils.models.ema import EMA

LAYOUTS = [
    (stage, dtype, offload)
    for dtype in ("fp32", "bf16")
    for stage, offload in (
        (0, "none"),
        (1, "none"),
        (2, "none"),
        (3, "none"),
        (2, "optimizer"),
        (3, "all"),
    )
]


def fresh(folder: str, stage: int, dtype: str, offload: str):
    """An engine and its average, before the first step; two weights are frozen."""
    frozen = "layers.0.mlp"
    engine = engine_of(
        folder, stage, dtype, offload, total_steps=6, frozen=frozen, warmup_ratio=0.3
    )
    return engine, EMA(engine.module, 0.9)


def train(engine, average, steps: range) -> list[dict]:
    found = []
    for i in steps:
        ids = torch.randint(10, 300, (8, 12), generator=torch.Generator().manual_seed(i))
        found.append(step(engine, ids, 1.0))
        average.update()
    return found


def in_fp32(copy: zero.Copy) -> zero.Copy:
    """Of averages, whose low bits a cast to the weights' dtype would hide."""
    return lambda tensor, _: copy(tensor, torch.float32)


def write(engine, average, copies: Copies, folder: Path, go: threading.Event) -> Writing:
    """Copies this rank's state and has its file written in the background once `go` is set, and
    rank 0's of the whole weights and averages as users get them."""
    copies.begin()
    wholes = zero.whole_state_dict(engine.module, copies) | {
        f"average of {k}": v for k, v in average.state_dict(in_fp32(copies)).items()
    }
    tensors = engine_state.to_write("model", engine_state.spans_of(engine))
    tensors |= engine_state.to_write("average", engine_state.spans_of(average))
    tensors = {name: copies(t) for name, t in tensors.items()}

    def work() -> dict:
        assert go.wait(60)
        folder.mkdir(parents=True, exist_ok=True)
        rank = process_group.rank()
        if rank == 0:
            manifest.write_tensors(folder / "wholes", wholes)
        return manifest.write_tensors(folder / f"{rank}.safetensors", tensors)

    return Writing(work)


def load(engine, average, reader, record) -> None:
    engine_state.restore(engine, "model", reader, record)
    engine_state.restore(average, "average", reader, None)


def all_of(engine, average) -> dict[str, torch.Tensor]:
    averages = average.state_dict(in_fp32(zero.to_cpu))
    return whole(engine.module) | {f"average of {k}": v for k, v in averages.items()}


def assert_equal(found: dict, expected: dict, what: str) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), f"{what}: {name}"


def main() -> None:
    base, out = sys.argv[1], Path(sys.argv[2])
    for number in map(int, sys.argv[3:] or range(len(LAYOUTS))):
        layout = LAYOUTS[number]
        engine, average = fresh(base, *layout)
        train(engine, average, range(2))
        copies, go = Copies(), threading.Event()
        go.set()
        write(engine, average, copies, out / f"before{number}", go).result()
        go.clear()
        train(engine, average, range(2, 3))
        writing = write(engine, average, copies, out / str(number), go)
        record, saved = engine_state.record_of(engine), all_of(engine, average)
        # Training goes on and changes everything; what is written must be the state before it.
        metrics = train(engine, average, range(3, 6))
        end = all_of(engine, average)
        go.set()
        name = f"{process_group.rank()}.safetensors"
        assert writing.result()["bytes"] == (out / str(number) / name).stat().st_size
        names = process_group.gather_objects(name)
        if process_group.is_main():
            wholes = load_file(out / str(number) / "wholes")
            assert_equal({k: wholes[k] for k in saved}, saved, f"{layout}, as written")

        reader = manifest.Reader(out / str(number), names)
        engine, average = fresh(base, *layout)
        load(engine, average, reader, record)
        assert_equal(all_of(engine, average), saved, f"{layout}, as loaded")
        assert train(engine, average, range(3, 6)) == metrics, layout
        assert_equal(all_of(engine, average), end, f"{layout}, three steps later")

        other = LAYOUTS[(number + 1) % 6 + 6 * (number // 6)]  # of the same dtype
        engine, average = fresh(base, *other)
        load(engine, average, reader, record)
        assert_equal(all_of(engine, average), saved, f"{layout} read by {other}")
        found = train(engine, average, range(3, 6))
        assert [m["learning_rate"] for m in found] == [m["learning_rate"] for m in metrics]
        norms = [[m["grad_norm"] for m in run] for run in (found, metrics)]
        close = 1e-4 if layout[1] == "fp32" else 0.03
        torch.testing.assert_close(*map(torch.tensor, norms), rtol=close, atol=0, msg=str(norms))
        print(f"held: {layout}, and read by {other}")


if __name__ == "__main__":
    main()
