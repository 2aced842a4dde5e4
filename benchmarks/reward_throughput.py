"""Step 2 against TRL 1.12's RewardTrainer: tokens a second of optimizer steps on pairs of answers.

    python benchmarks/reward_throughput.py                       # about 4 minutes
    python benchmarks/reward_throughput.py --device cuda --shape qwen2.5-0.5b --systems ours-bf16

Same model, pairs, batch (32 pairs, 8 a forward pass, rows of 80 to 256 tokens), AdamW, clip 1.0.
Ours is step2_reward/main.py as it is; TRL's trainer has its defaults, without gradient
checkpointing. The floor is the arithmetic of the real tokens at the machine's GEMM rate: its
inverse is the MFU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

from benchmarks import training_throughput, workload


def to_row(row: tuple) -> dict:
    prompt, *answers = row
    # The template ends an answer with the stop token itself.
    texts = [workload.words(a[:-1]) for a in answers]
    return {"prompt": workload.words(prompt), "responses": texts, "scores": [1.0, 0.0]}


def peer_rows(row: tuple) -> tuple:
    return row


def flops_of(shape: workload.Shape, rows: list[tuple]) -> tuple[float, int]:
    lengths = [len(prompt) + len(a) for prompt, *answers in rows for a in answers]
    return 3 * workload.flops(shape, lengths, 0), sum(lengths)


def extra_flags(data: Path) -> list[str]:
    return ["--preference_data", str(data)]


if __name__ == "__main__":
    training_throughput.run(
        "reward", __doc__, "step2_reward", extra_flags, to_row, peer_rows, flops_of
    )
