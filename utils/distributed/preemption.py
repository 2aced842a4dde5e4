"""SIGTERM and SIGUSR1 (a preempted node, Slurm): the run ends at the next step boundary."""

import contextlib
import os
import signal

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again with --resume auto
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_received: list[int] = []
# The numbers of signals, as they come: handlers wait until the main thread leaves a library's code.
_arrived, _written = os.pipe()
os.set_blocking(_arrived, False)
os.set_blocking(_written, False)


def watch() -> None:
    """Before the first step there is nothing to save: the process ends at once."""
    for number in SIGNALS:
        signal.signal(number, _end)
    signal.set_wakeup_fd(_written, warn_on_full_buffer=False)


def note() -> None:
    """From now on the signals are noted, and the main loop asks for them."""
    _received.clear()
    for number in SIGNALS:
        signal.signal(number, lambda n, frame: _received.append(n))


def stop() -> None:
    """A run that ends by an error is ended by its launcher's SIGTERM too: say nothing then."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def received() -> str:
    """The signal's name; empty where none came. Of this rank: ranks must agree before they act."""
    return signal.Signals(_received[0]).name if _received else ""


def asked() -> bool:
    """Has a signal come since the last call, even one that no handler has seen yet?"""
    with contextlib.suppress(BlockingIOError):
        return not set(SIGNALS).isdisjoint(os.read(_arrived, 4096))
    return False


def _end(number: int, frame) -> None:
    name = signal.Signals(number).name
    os.write(1, f"{name} before the first step: nothing to save (exit code {EXIT_CODE})\n".encode())
    os._exit(EXIT_CODE)
