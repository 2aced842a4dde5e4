"""tests/gpu.sh: what it reads off a run's output, and that it never passes without a GPU."""

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.gpu_logs import FALLBACKS, Setting, missing, unexpected
from tests.helpers.running import ROOT, run_without_a_gpu

ON_GPU = Setting(zero_stage=2, tools=True)
BARE = Setting(zero_stage=2, tools=False)
GOOD = """\
step 1, SFT: 60 steps, bf16, ZeRO-2, batch 32 = 16 × 1 × 2
step 3, PPO: 2 rollouts of 128 prompts × 1 samples; an action is a token; bf16, ZeRO-2 (critic 2)
rollouts: native engine; ZeRO-2, the trained module itself generates
old log-probabilities from the forward: decode loop and scoring pass differ by up to 3.0e-02 nats
  passed  generator equals the stepped model: greedy tokens equal up to 0.0e+00 nats
verifier, 512 held-out prompts            0.439
"""
# As the code, or DeepSpeed's, prints them.
PLANTED = [
    "UserWarning: decode=auto goes on without CUDA graphs, which this model refused: x",
    "rollouts: native engine; ZeRO-3 weights layer by layer (slow): 3 GiB of them",
    "old log-probabilities from the forward: the engine that samples returns none",
    "offload_frozen: the models are in CPU memory anyway",
    "plan: not estimated: KeyError: 'x'",
    "plan: WARNING: it will likely run out of memory; no change of micro batch",
    "checkpoint at step 3 could not be written: no space. Training goes on",
    "kept for a repro: out/bad_steps/step-3.pt",
    "[WARNING] Setting accelerator to CPU. If you have GPU or other accelerator",
    "Detected VISIBLE_DEVICES=4,5 but ignoring it because one or several of --include were used",
    "UserWarning: Flash attention is not supported, falling back to math",
]
NO_TOOLS = "no c++ and no ninja here: nothing is compiled; AdamW is torch's own"


def test_a_run_that_went_the_fast_way_is_passed():
    assert unexpected(GOOD, ON_GPU) == [] and missing(GOOD, ON_GPU) == []


@pytest.mark.parametrize("line", PLANTED, ids=lambda line: line[:40])
def test_each_fallback_is_found(line):
    assert unexpected(GOOD + line + "\n", ON_GPU) == [line]


def test_what_a_machine_lacks_explains_some_lines_and_only_there():
    assert unexpected(NO_TOOLS, ON_GPU) == [NO_TOOLS] and unexpected(NO_TOOLS, BARE) == []
    walk = Setting(2, tools=True, walk=True)
    line = "offload_frozen: the models are in CPU memory anyway"
    assert unexpected(line, BARE) == [line] and unexpected(line, walk) == []


def test_a_line_that_is_missing_is_told():
    needed = missing("", ON_GPU)
    assert len(needed) == 5 and missing(GOOD.replace("bf16", "fp32"), ON_GPU) == needed[:2]
    assert missing(GOOD, Setting(3, True))[2].startswith("rollouts: native engine; ZeRO-3")


def test_the_lines_are_those_of_the_code():
    """One that is reworded, and a warning that nobody listed, would pass unseen."""
    folders = [ROOT / "utils", *ROOT.glob("step*_*")]
    sources = [p.read_text() for folder in folders for p in folder.rglob("*.*") if p.is_file()
               and p.suffix in (".py", ".sh")]  # fmt: skip
    # A text may go on in the next line of the source.
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))
    ours = FALLBACKS[: [part for part, _ in FALLBACKS].index("Setting accelerator to CPU")]
    assert len(ours) >= 10
    for part, _ in ours:
        assert part.strip(" :") in code, f"nothing says {part!r} any more"
    for warned in re.findall(r'warnings\.warn\(\s*f?"([^"]*)"', code):
        assert any(part in warned for part, _ in ours), (
            f"tests/helpers/gpu_logs.py does not know {warned!r}"
        )


def test_without_a_gpu_the_script_fails_and_says_so(tmp_path):
    done = run_without_a_gpu("tests/gpu.sh", tmp_path)
    assert done.returncode == 4 and "torch sees no GPU here" in done.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_the_walk_goes_through(tmp_path):
    """Every line of the script but the kernels, one ZeRO stage for three."""
    environment = os.environ | {"OUTPUT": str(tmp_path), "STAGES": "3"}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    del environment["OMP_NUM_THREADS"]  # conftest.py's
    done = subprocess.run(
        ["bash", ROOT / "tests/gpu.sh", "--walk"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2400,
    )
    assert done.returncode == 0, done.stdout
    report = (tmp_path / "report.md").read_text()
    for name in ("tests", "zero3", "zero3: no fallback", "without-toolkit: no fallback"):
        assert re.search(rf"^\| {name} \| \d+ \| passed \|$", report, re.M), report
    assert "a walk on the CPU" in report
