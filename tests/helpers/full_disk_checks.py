"""The last rank's disk is full while its thread writes; run on every rank by test_resume.py.

arguments: folder to write in
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from step1_sft.config import SFTConfig
from tests.helpers import small_runs
from utils.checkpoints import manifest
from utils.distributed import process_group


def main() -> None:
    config = SFTConfig(output_dir=sys.argv[1], save_every=1)
    run, write = small_runs.follow(config), manifest.write_tensors

    def full(path, tensors):
        if process_group.rank() == process_group.world_size() - 1:
            raise OSError(28, "No space left on device")
        return write(path, tensors)

    with run:
        run.after_step(1, {})
        run._pending.writing.join()
        run.after_step(1, {})
        manifest.write_tensors = full
        try:
            run.after_step(2, {})
            run._pending.writing.join()
        finally:
            manifest.write_tensors = write
        run.after_step(3, {})
    assert sorted(os.listdir(Path(sys.argv[1], "checkpoints"))) == ["step-000001", "step-000003"]
    if process_group.is_main():
        print(run.report.lines[1])
    print("went on after a full disk")


if __name__ == "__main__":
    main()
