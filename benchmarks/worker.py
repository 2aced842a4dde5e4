"""One side of a comparison: a process that builds its side, then waits for its turns.

    python -m benchmarks.worker MODULE:FUNCTION '{"argument": …}'      (measure.System starts it)

FUNCTION(turns, **arguments) calls turns.ready() once it is built, then does one piece of work after
another, each ended with turns.done(). Between a `done` and the next `go` the process sleeps, so
sides that share a core take turns on it. Lines of JSON go out on stdout; whatever else the process
prints goes to stderr.
"""

import importlib
import json
import os
import resource
import sys
import time


class Turns:
    def __init__(self):
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.started = self._cpu = 0.0

    def ready(self, **facts) -> None:
        """Built; `facts` about it. Returns when the first turn begins."""
        self._say(facts | versions() | {"memory": memory_now()})
        self._wait()

    def done(self, **measured) -> None:
        """A turn is over; `measured` beside its seconds. Returns when the next one begins."""
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
            sys.modules["torch"].cuda.synchronize()
        seconds = time.perf_counter() - self.started
        # Below 1 on one thread means that something else had the core meanwhile.
        share = (time.process_time() - self._cpu) / seconds
        self._say(measured | {"seconds": seconds, "core": share, "peak_memory": peak_memory()})
        self._wait()

    def _say(self, message: dict) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()

    def _wait(self) -> None:
        if sys.stdin.readline().strip() != "go":
            os._exit(0)  # no more turns; destructors of engines and process groups can wait
        self.started, self._cpu = time.perf_counter(), time.process_time()


def memory_now() -> int:
    """Bytes this process holds: on the device where it has one, else resident."""
    torch = sys.modules["torch"]
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


def peak_memory() -> int:
    torch = sys.modules["torch"]
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions() -> dict[str, str]:
    return {
        name: sys.modules[name].__version__
        for name in ("torch", "transformers", "deepspeed", "trl")
        if name in sys.modules
    }


def main() -> None:
    module, function = sys.argv[1].split(":")
    turns = Turns()
    getattr(importlib.import_module(module), function)(turns, **json.loads(sys.argv[2]))


if __name__ == "__main__":
    main()
