"""A step that is shortened and one that is taken back, under ZeRO stages; run on every rank by
test_trust_region.py.

arguments: base model folder
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from step3_ppo.trust_region import Before
from tests.helpers.bad_step_checks import step
from tests.helpers.distributed_checks import whole
from tests.helpers.engine_builder import engine_of

LAYOUTS = [(0, "fp32", "none"), (2, "bf16", "none"), (3, "fp32", "none"), (3, "bf16", "all")]


def ids_of(number: int) -> torch.Tensor:
    return torch.randint(10, 300, (8, 12), generator=torch.Generator().manual_seed(number))


def assert_equal(found: dict, expected: dict, what: str) -> None:
    for name in expected:
        assert torch.equal(found[name], expected[name]), f"{what}: {name}"


def main() -> None:
    # A constant rate: its schedule is not taken back.
    settings = dict(total_steps=9, frozen="layers.0.mlp", lr_schedule="constant", warmup_ratio=0.0)
    for layout in LAYOUTS:
        engine, untouched = (engine_of(sys.argv[1], *layout, **settings) for _ in range(2))
        # The first step makes AdamW's moments; a later one finds them there.
        for number in range(2):
            before, start = Before(engine), whole(engine.module)
            step(engine, ids_of(10 + number), 1.0)
            end = whole(engine.module)
            moved = max(float((end[n] - start[n]).abs().max()) for n in start)
            assert moved > 1e-3, moved
            before.take(0.25, before.weights())
            ulp = torch.finfo(next(iter(end.values())).dtype).eps
            for name, w in whole(engine.module).items():
                expected = start[name].double() + 0.25 * (end[name].double() - start[name].double())
                gap = (w.double() - expected).abs().max()
                # In bf16 the ends are rounded, which the fp32 weights between them are not.
                assert gap <= 2 * ulp * expected.abs().max(), f"{layout}: {name} is off by {gap}"
            before.restore()
            assert_equal(whole(engine.module), start, f"{layout}, taken back")
            # Nothing of the step is left that a later one would show.
            first, second = (step(e, ids_of(number), 1.0) for e in (engine, untouched))
            assert first["grad_norm"] == second["grad_norm"], layout
            now = whole(untouched.module)
            assert_equal(whole(engine.module), now, f"{layout}, one step later")
        print(f"held: {layout}")


if __name__ == "__main__":
    main()
