"""Step 1 against TRL 1.12's SFTTrainer: tokens a second of optimizer steps on rows of many lengths.

    python benchmarks/sft_throughput.py                          # about 3 minutes
    python benchmarks/sft_throughput.py --device cuda --shape qwen2.5-0.5b --systems ours-bf16

Same model, rows, batch (32 rows of 80 to 256 tokens, 8 a forward pass), AdamW, clip 1.0, loss on
the answers. Ours is step1_sft/main.py as it is; TRL's trainer has its defaults, without gradient
checkpointing. bf16: ours keeps fp32 weights beside bf16 ones, TRL's computes under autocast.
The floor is the arithmetic of the real tokens at the machine's GEMM rate: its inverse is the MFU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

from benchmarks import training_throughput, workload


def to_row(row: tuple) -> dict:
    prompt, answer, _ = row
    # The template ends the answer with the stop token itself.
    return {"prompt": workload.words(prompt), "completion": workload.words(answer[:-1])}


def peer_rows(row: tuple) -> tuple:
    return row[:2]


def flops_of(shape: workload.Shape, rows: list[tuple]) -> tuple[float, int]:
    lengths = [len(prompt) + len(answer) for prompt, answer, _ in rows]
    answers = sum(len(answer) for _, answer, _ in rows)
    return 3 * workload.flops(shape, lengths, answers), sum(lengths)


def extra_flags(data: Path) -> list[str]:
    return ["--sft_data", str(data), "--sample_answers", "0"]


if __name__ == "__main__":
    training_throughput.run("sft", __doc__, "step1_sft", extra_flags, to_row, peer_rows, flops_of)
