"""A gradient that is not finite, under each ZeRO stage; run on every rank by test_watch.py.

arguments: base model folder
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from step1_sft.config import SFTConfig
from tests.helpers.distributed_checks import whole
from tests.helpers.engine_builder import RATE, engine_of
from utils.distributed import process_group, zero
from utils.models import language_model

STAGES = (
    (0, "fp32", "none"),
    (1, "fp32", "none"),
    (2, "fp32", "none"),
    (3, "fp32", "none"),
    (2, "fp32", "optimizer"),
    (0, "bf16", "none"),
    (2, "bf16", "none"),
    (3, "bf16", "none"),
)
STEPS, BAD = 6, {1: float("nan"), 3: float("inf")}


def step(engine, ids, factor: float) -> dict[str, float]:
    """Two micro-batches a rank; the last one of the last rank has its loss times `factor`."""
    rank, world = process_group.rank(), process_group.world_size()
    micro = ids[rank::world].split(2)
    for i, rows in enumerate(micro):
        mask = torch.ones_like(rows, dtype=torch.bool)
        logits = engine(**language_model.forward_inputs(engine.module, rows, mask)).logits
        loss = -language_model.token_logprobs(logits[:, :-1], rows[:, 1:]).sum()
        if rank == world - 1 and i == len(micro) - 1:
            loss = loss * factor
        engine.backward(loss, normaliser=ids.numel())
    return engine.step()


def moments(engine) -> list[torch.Tensor]:
    """What the optimizer remembers of this rank's share."""
    optimizer = getattr(engine.engine.optimizer, "optimizer", engine.engine.optimizer)
    states = optimizer.state.values()
    return [v.clone() for state in states for v in state.values() if torch.is_tensor(v)]


def check(folder: str, stage: int, dtype: str, offload: str) -> dict[str, torch.Tensor]:
    name = f"stage {stage}, {dtype}, offload {offload}"
    engine = engine_of(folder, stage, dtype, offload, total_steps=STEPS, warmup_ratio=0.3)
    ids = torch.randint(10, 300, (8, 12), generator=torch.Generator().manual_seed(0))
    before, remembered = whole(engine.module), moments(engine)
    for i in range(STEPS):
        metrics = step(engine, ids, BAD.get(i, 1.0))
        after, remembers = whole(engine.module), moments(engine)
        told = f"{name}, step {i}: {metrics}"
        assert metrics["skipped"] == float(i in BAD), told
        # The schedule goes on through skipped steps, in every stage alike.
        expected = RATE * zero.lr_factor(i, STEPS, 2, SFTConfig().lr_schedule)
        assert abs(metrics["learning_rate"] - expected) < 1e-9, told
        assert all(w.isfinite().all() for w in after.values()), told
        same = [torch.equal(before[key], after[key]) for key in before]
        assert all(same) if i in BAD else not all(same), told
        if i in BAD:
            pairs = zip(remembered, remembers, strict=True)
            assert remembers and all(torch.equal(a, b) for a, b in pairs), told
        before, remembered = after, remembers
    return before


def main() -> None:
    first = None
    for stage, dtype, offload in STAGES:
        weights = check(sys.argv[1], stage, dtype, offload)
        first = first or weights
        if dtype == "fp32":
            for key, value in weights.items():
                torch.testing.assert_close(value, first[key], rtol=1e-3, atol=1e-4, msg=key)
        print(f"held: stage {stage}, {dtype}, offload {offload}")


if __name__ == "__main__":
    main()
