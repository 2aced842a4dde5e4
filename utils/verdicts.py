"""Checks of a run: what each returns or raises, and how their verdicts are told.

A check is a function that returns what it measured, or raises Fault or Doubt. Every rank runs every
check on the same rows and takes part in every collective.
"""

import sys
from collections.abc import Callable

from utils.distributed import process_group
from utils.distributed.process_group import StopRun

LEVELS = ("FAULT", "DOUBT", "passed")


class Fault(Exception):
    """Something is wrong: what, the values, the likely cause, the remedy. Stops the run, unless
    --self_check warn."""


class Doubt(Exception):
    """Something that may be wrong or intended, told like a Fault. The run goes on."""


def run(checks: dict[str, Callable], given, when: str, say: Callable[[str], None]) -> list[str]:
    """Run {name: check} on `given`, say each verdict; → the faults, the same on every rank."""
    say(f"self-check, {when}:")
    faults = []
    for name, check in checks.items():
        verdict = None
        try:
            verdict = ("passed", check(given))
        except Doubt as doubt:
            verdict = ("DOUBT", str(doubt))
        except Fault as fault:
            verdict = ("FAULT", str(fault))
        finally:
            if verdict is None:  # another error ends the run, as it would anywhere
                rank = process_group.rank()
                broken = f"self-check, {when}: {name!r} broke off on rank {rank}, no verdict:"
                print(broken, file=sys.stderr, flush=True)
        # A fault on one rank stops all of them, at the same place.
        verdicts = process_group.gather_objects(verdict)
        level, text = min(verdicts, key=lambda v: LEVELS.index(v[0]))
        say(f"  {level}  {name}: {text}")
        if level == "FAULT":
            faults.append(f"{name}: {text}")
    return faults


def stop_at(faults: list[str]) -> None:
    """Raises StopRun with every fault, where there are any."""
    if faults:
        raise StopRun(
            f"the self-check found {len(faults)} fault{'s'[: len(faults) > 1]}, nothing was "
            "trained on past this point (--self_check warn goes on all the same):\n  - "
            + "\n  - ".join(faults)
        )
