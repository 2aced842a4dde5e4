"""Collectives in a ZeRO-3 rollout, counted: one set a rollout, or one for each layer and token.

python benchmarks/zero_gathers.py [--new_tokens 64] [--layers 4] [--ranks 2] [--json FILE]

Starts its own CPU ranks with a random Llama. Rank 0's answers stop at the first token, the others'
at the limit.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Counts the collectives that start inside it, by name, whoever starts them."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def engine_of(model, zero_stage: int = 3):
    """The training engine of one random model."""
    from utils.distributed import zero
    from utils.settings.run_config import RunConfig

    how = RunConfig().pick(zero.Training, learning_rate=1e-3)
    return zero.TrainEngine(model, how, dtype="fp32", zero_stage=zero_stage, total_steps=9)


def rollout(engine, actor, ids, mask, new_tokens: int) -> tuple[torch.Tensor, dict, dict]:
    """One rollout in which rank 0 stops at its first token and the others at the limit.

    Returns (responses, collectives of the whole rollout, collectives inside its decode loop).
    """
    from utils.distributed import process_group
    from utils.generation import sampling as generation
    from utils.generation.engine import synced

    with Collectives() as whole, synced(engine, actor):
        model, settings = engine.generator, dict(stop_id=-1, pad_id=0, in_step=engine.in_step)
        gathered = whole.counts.copy()
        # What greedy decoding gives first is the stop token of rank 0.
        first = generation.generate(model, ids, mask, max_new_tokens=1, **settings)
        probed = whole.counts - gathered
        if process_group.rank() == 0:
            settings["stop_id"] = first[0, 0].item()
        inside = whole.counts.copy()
        responses = generation.generate(model, ids, mask, max_new_tokens=new_tokens, **settings)
        inside = whole.counts - inside
    return responses, dict(whole.counts - probed), dict(inside)


def measure(arguments) -> None:
    """What each rank does; rank 0 prints."""
    import transformers

    from utils.distributed import process_group
    from utils.generation.engines.native import NativeEngine

    process_group.init()
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=384,  # matrices above the size that ZeRO-3 keeps whole (100,000 weights)
        intermediate_size=768,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
    )
    torch.manual_seed(0)
    actor = engine_of(transformers.AutoModelForCausalLM.from_config(config).float())
    ids = torch.randint(3, 512, (1, 16), generator=torch.Generator().manual_seed(0))
    mask, rows = torch.ones_like(ids, dtype=torch.bool), []
    for gather in ("rollout", "layer"):
        engine = NativeEngine(gather)
        _, whole, inside = rollout(engine, actor, ids, mask, arguments.new_tokens)
        rows.append(
            {
                "gather": gather,
                "collectives": sum(whole.values()),
                "in_decode_loop": sum(inside.values()),
                "per_token": sum(inside.values()) / arguments.new_tokens,
                "by_name": whole,
            }
        )
    if process_group.is_main():
        report(rows, arguments)
    process_group.shut_down()
    process_group.end_process()


def report(rows: list[dict], arguments) -> None:
    print(
        f"ZeRO-3, {arguments.ranks} CPU ranks, Llama of {arguments.layers} layers, "
        f"{arguments.new_tokens} tokens"
    )
    print(f"{'rollout_gather':<16}{'collectives':>12}{'in the loop':>13}{'a token':>9}  which")
    for row in rows:
        names = ", ".join(f"{name} {n}" for name, n in row["by_name"].items())
        print(
            f"{row['gather']:<16}{row['collectives']:>12}{row['in_decode_loop']:>13}"
            f"{row['per_token']:>9.1f}  {names}"
        )
    if arguments.json:
        text = json.dumps(vars(arguments) | {"rows": rows}, indent=2)
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")


def start_ranks(ranks: int) -> int:
    """This program once more on each rank; the largest of their exit codes."""
    from utils.distributed import process_group

    port = process_group.free_port()
    shared = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env=os.environ
            | {k: str(v) for k, v in (shared | {"RANK": r, "LOCAL_RANK": r}).items()},
        )
        for r in range(ranks)
    ]
    return max(abs(p.wait()) for p in processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--json", default="", help="file for the figures")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(arguments)
    else:
        raise SystemExit(start_ranks(arguments.ranks))


if __name__ == "__main__":
    main()
