"""Runs a step's main as step_worker does, and stops it after a step: by a signal, or as a crash.

arguments: program, step, how (SIGTERM, SIGUSR1 or crash), then the program's own. The signal goes
to the last rank alone.
"""

import importlib.util
import os
import signal
import sys

from utils import report as reporting
from utils.distributed import preemption, process_group


class Crash(Exception):
    """What a killed run looks like to this process, which lives on for the next run."""


def main() -> None:
    program, step, how, *argv = sys.argv[1:]
    log = reporting.Report.log

    def stopping_log(self, number, metrics, show=()):
        log(self, number, metrics, show)
        if number == int(step):
            if how == "crash":
                raise Crash
            if process_group.rank() == process_group.world_size() - 1:
                os.kill(os.getpid(), getattr(signal, how))

    spec = importlib.util.spec_from_file_location("stopped", program)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.argv = [program, *argv]
    reporting.Report.log = stopping_log
    try:
        module.main()
    except Crash:
        print(f"crashed after step {step}")
    except SystemExit as stopped:
        assert how != "crash" and stopped.code == preemption.EXIT_CODE, stopped.code
    else:
        raise AssertionError(f"{program} was to stop after step {step} and ran on")
    finally:
        reporting.Report.log = log
