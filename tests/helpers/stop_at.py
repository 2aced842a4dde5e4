"""Runs a step's main as step_worker does, and stops it after a step: by a signal, or as a crash.

arguments: program, step, how (SIGTERM, SIGUSR1 or crash), then the program's own. The signal goes
to the last rank alone. The crash comes once the checkpoint that was being written is whole.
"""

import importlib.util
import os
import signal
import sys
import threading

from utils import report as reporting
from utils.checkpoints import background, manifest
from utils.checkpoints.checkpoints import Checkpoints
from utils.distributed import preemption, process_group


class Crash(Exception):
    """What a killed run looks like to this process, which lives on for the next run."""


def main() -> None:
    program, step, how, *argv = sys.argv[1:]
    log, after_step = reporting.Report.log, Checkpoints.after_step

    def stopping_log(self, number, metrics, show=()):
        log(self, number, metrics, show)
        last = process_group.rank() == process_group.world_size() - 1
        if number == int(step) and how != "crash" and last:
            os.kill(os.getpid(), getattr(signal, how))

    def crashing_after_step(self, number, metrics):
        if number == int(step) and how == "crash":
            self._pending.writing.join()  # it is written in the background, as users' runs do
        after_step(self, number, metrics)
        if number == int(step) and how == "crash":
            assert manifest.steps_in(self.saving.output_dir)
            raise Crash

    spec = importlib.util.spec_from_file_location("stopped", program)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.argv = [program, *argv]
    reporting.Report.log, Checkpoints.after_step = stopping_log, crashing_after_step
    try:
        module.main()
    except Crash:
        # The next job may run in this process, where a thread of the last one would write on.
        for thread in threading.enumerate():
            if isinstance(thread, background.Writing):
                thread.join()
        print(f"crashed after step {step}")
    except SystemExit as stopped:
        assert how != "crash" and stopped.code == preemption.EXIT_CODE, stopped.code
    else:
        raise AssertionError(f"{program} was to stop after step {step} and ran on")
    finally:
        reporting.Report.log, Checkpoints.after_step = log, after_step
