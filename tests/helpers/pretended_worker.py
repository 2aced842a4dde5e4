"""Walks programs on a pretended GPU (see pretended_cuda.py), one after another in one process.

argument: JSON, [{"name", "program", "argv", "plant": names of functions, "breaks": bool}, …]

Those are planted for one job: from not_finite_faults.py, or misplaced tensors of this file, which
must break it.
"""

import dataclasses
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import deepspeed  # noqa: E402

from step3_ppo import rollout  # noqa: E402
from step3_ppo.checks import probe
from tests.helpers import (
    not_finite_faults,  # noqa: E402
    pretended_cuda,  # noqa: E402
    pretended_device,  # noqa: E402
)
from tests.helpers.planting import around  # noqa: E402
from utils.distributed import process_group, zero  # noqa: E402
from utils.distributed.program import run  # noqa: E402
from utils.models import language_model  # noqa: E402


def typed_lines(patch):
    """What evaluation/chat.py reads."""
    lines = iter(["Hi dog!", "What is 3 + 4?", "/exit"])
    patch.setattr("builtins.input", lambda prompt: next(lines))
    patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))


# Misplaced tensors.


def probe_left_on_the_host(patch):
    """The self-check gives the models what lies on the CPU."""

    def read(real, given, *more):
        return real(dataclasses.replace(given, device=pretended_device.HOST), *more)

    around(patch, probe, "_read", read)


def positions_on_the_host(patch):
    around(patch, language_model, "positions", lambda real, mask: real(mask).cpu())


def reference_left_on_the_host(patch):
    def frozen(real, model, **settings):
        return real(model, **settings | {"device": pretended_device.HOST})

    around(patch, zero, "frozen", frozen)


def answers_left_on_the_device(patch):
    around(patch, rollout, "gather", lambda real, *args: _on_device(real(*args)))


def _on_device(found):
    found.scores = found.scores.cuda()
    return found


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as on every CPU
    with pretended_cuda.answering():
        device = process_group.init()
        assert device == pretended_device.DEVICE, device
        leave = process_group.shut_down
        process_group.init = lambda timeout_minutes=30.0: device
        process_group.shut_down = process_group.barrier
        for job in json.loads(sys.argv[1]):
            walk(**job)
    leave()


def walk(name: str, program: str, argv: list[str], plant=(), breaks=False) -> None:
    spec = importlib.util.spec_from_file_location(program.replace("/", "_"), ROOT / program)
    module = importlib.util.module_from_spec(spec)
    before, said = pretended_device.operations, ""
    pretended_cuda.counts.clear()
    print(f"walking {name}", flush=True)
    with pytest.MonkeyPatch.context() as patch:
        for fault in plant:
            (globals().get(fault) or getattr(not_finite_faults, fault))(patch)
        patch.setattr(sys, "argv", [program, *argv])
        spec.loader.exec_module(module)
        if breaks:
            with pytest.raises((RuntimeError, TypeError)) as caught:
                module.main()
            said = f", broken by {caught.value}"
        else:
            module.main()
    count = pretended_device.operations - before
    found = {"operations": count, **pretended_cuda.counts}
    print(f"walked {name}: {json.dumps(found)}{said}", flush=True)


if __name__ == "__main__":
    run(main)
