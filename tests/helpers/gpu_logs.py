"""What a run on a GPU did in another way than the fast one, read off its output.

    python tests/helpers/gpu_logs.py LOG --zero_stage 2 --tools yes [--walk]

Ends with exit code 1 and the lines, where one of them was not to be expected on this machine, or
one that shows the way taken is missing. tests/gpu.sh asks it after each run.
"""

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Setting:
    """Of a run: zero_stage; tools: a C++ compiler and ninja? walk: without a GPU, on a CPU."""

    zero_stage: int
    tools: bool
    walk: bool = False


def never(line: str, run: Setting) -> bool:
    return False


# (what the line holds, when it is to be expected). Ours first, each as the code says it.
FALLBACKS: list[tuple[str, Callable[[str, Setting], bool]]] = [
    ("goes on without CUDA graphs", never),
    ("packing=auto: rows are padded", never),
    ("layer by layer (slow)", never),
    (": nothing is compiled", lambda line, run: not run.tools),
    ("old log-probabilities from the ", lambda line, run: "the engine that samples" not in line),
    ("offload_frozen: the models are in CPU memory anyway", lambda line, run: run.walk),
    ("plan: not estimated", never),
    ("plan: WARNING", never),
    ("could not be written: ", never),
    ("kept for a repro: ", never),
    ("set-up: newer than what was tested", lambda line, run: True),
    # DeepSpeed's and other libraries'.
    ("Setting accelerator to CPU", never),
    ("ignoring it because one or several of --include", never),
]
LIBRARIES = re.compile(r"fall(s|ing|en)? ?back|\bfallback\b|not compiled with|without CUDA\b", re.I)
# What each run must say, or it did not walk the way that it was to walk.
NEEDED = [
    r"step 1, SFT: \d+ steps, bf16, ZeRO-{zero_stage}",
    r"step 3, PPO: .*bf16, ZeRO-{zero_stage}",
    r"rollouts: native engine; {gather}",
    r"passed  generator equals the stepped model",
    r"verifier, \d+ held-out prompts",
]
GATHER = "ZeRO-3 weights gathered whole, once a rollout"


def unexpected(text: str, run: Setting) -> list[str]:
    """Lines that tell of a way which was not to be expected."""
    found = []
    for line in text.splitlines():
        ours = [expected for part, expected in FALLBACKS if part in line]
        if any(not expected(line, run) for expected in ours) or not ours and LIBRARIES.search(line):
            found.append(line)
    return found


def missing(text: str, run: Setting) -> list[str]:
    """Patterns of lines that should be there."""
    gather = GATHER if run.zero_stage == 3 else f"ZeRO-{run.zero_stage}, the trained module itself"
    needed = [n.format(zero_stage=run.zero_stage, gather=gather) for n in NEEDED]
    return [n for n in needed if not re.search(n, text)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path)
    parser.add_argument("--zero_stage", type=int, required=True)
    parser.add_argument("--tools", choices=("yes", "no"), required=True)
    parser.add_argument("--walk", action="store_true")
    asked = parser.parse_args()
    run = Setting(asked.zero_stage, asked.tools == "yes", asked.walk)
    text = asked.log.read_text(encoding="utf-8", errors="replace")
    lines, absent = unexpected(text, run), missing(text, run)
    for line in lines:
        print(f"gpu.sh: a fallback that was not to be expected: {line}")
    for pattern in absent:
        print(f"gpu.sh: no line of the run says: {pattern}")
    if lines or absent:
        sys.exit(1)


if __name__ == "__main__":
    main()
