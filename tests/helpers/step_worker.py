"""Runs steps' main functions one after another in one process group (see conftest.run_ranks).

Starting Python, torch and DeepSpeed takes longer than a step of a tiny model, so the tests of many
ZeRO stages share one start.
"""

import importlib.util
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from utils.distributed import process_group  # noqa: E402
from utils.distributed.program import run  # noqa: E402


def main() -> None:
    device = process_group.init()
    leave = process_group.shut_down
    process_group.init = lambda timeout_minutes=30.0: device
    process_group.shut_down = process_group.barrier
    for program, argv in json.loads(sys.argv[1]):
        spec = importlib.util.spec_from_file_location(program.replace("/", "_"), ROOT / program)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.argv = [program, *argv]
        try:
            module.main()
        except SystemExit as ended:
            if ended.code != 0:  # 0: the run is finished already
                raise
    leave()


if __name__ == "__main__":
    run(main)
