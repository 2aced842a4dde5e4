"""DPO against TRL 1.12's DPOTrainer: tokens a second of optimizer steps on pairs of answers.

    python benchmarks/dpo_throughput.py                          # about 4 minutes

Same model, pairs of work W (32 pairs, 64 tokens of prompt and 128 of each answer, 8 pairs a forward
pass), AdamW, clip 1.0, β 0.1. Ours is step3_preference/main.py as it is, which computes the
reference's log-probabilities once, before what is timed; TRL does so in every step (trl), or once
too if asked to (cached). The floor is the arithmetic of the real tokens, the prompts of a pair
counted once, at the machine's GEMM rate.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

from benchmarks import training_throughput, workload
from benchmarks.reward_throughput import peer_rows, to_row

SIZE = dict(prompts=32, prompt_length=64, new_tokens=128)


def flops_of(shape: workload.Shape, rows: list[tuple]) -> tuple[float, int]:
    """Tokens are counted as they go forward without sharing: a prompt for each answer."""
    answers = [len(a) for _, *both in rows for a in both]
    # A prompt's tokens go forward once; each answer attends to all of them.
    whole = sum(
        workload.flops(shape, [len(prompt) + len(a) for a in both], sum(map(len, both)))
        - workload.flops(shape, [len(prompt)] * (len(both) - 1), 0)
        for prompt, *both in rows
    )
    return 3 * whole, sum(answers) + sum(len(prompt) * len(both) for prompt, *both in rows)


def extra_flags(data: Path) -> list[str]:
    return ["--preference_data", str(data), "--loss", "dpo"]


if __name__ == "__main__":
    peers = {"trl": {"cached": False}, "cached": {"cached": True}}
    training_throughput.run(
        "dpo", __doc__, "step3_preference", extra_flags, to_row, peer_rows, flops_of, SIZE, peers
    )
