"""What sft_throughput.py, reward_throughput.py and dpo_throughput.py share: a step of ours against
a trainer of TRL, on the same model, rows, batch and optimizer, in turns on one core."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks import figures, measure, trl_environment, workload
from benchmarks.measure import System

# 32 rows of 80 to 256 tokens: 64 of prompt, the rest answer.
ROWS = dict(prompts=32, prompt_length=64, new_tokens=192, shortest=16)
MICRO = 8  # rows of data a forward pass
LEARNING_RATE = 1e-5


def flags(models: Path, output: Path, dtype: str, work: workload.Work) -> list[str]:
    """What both steps are told; a batch is all of the rows."""
    values = dict(
        model_name_or_path=models / "policy",
        output_dir=output,
        overwrite=True,
        max_length=work.prompt_length + work.new_tokens,
        global_batch_size=work.prompts,
        micro_batch_size=MICRO,
        learning_rate=LEARNING_RATE,
        lr_schedule="constant",
        warmup_ratio=0,
        gradient_clipping=1.0,
        max_steps=100_000,  # the benchmark ends it
        dtype=dtype,
        eval_fraction=workload.HELD_OUT,
        tensorboard=False,
        log_every=1_000_000,
    )
    return [str(word) for name, value in values.items() for word in (f"--{name}", value)]


def run(
    name: str,
    description: str,
    module: str,
    extra_flags: Callable[[Path], list[str]],
    to_row: Callable[[tuple], dict],
    peer_rows: Callable[[tuple], tuple],
    flops_of: Callable[[workload.Shape, list[tuple]], tuple[float, int]],
    size: dict = ROWS,
    peers: dict[str, dict] | None = None,
) -> None:
    """The whole command. extra_flags(data file) → the step's own flags; to_row, peer_rows: a row of
    workload.answered_rows as data of ours and of TRL's; flops_of(shape, rows) → (least arithmetic
    of one optimizer step, tokens in it). size: of the work; peers: name → arguments of TRL's sides.
    """
    peers = peers or {"trl": {}}
    names = [f"{who}-{dtype}" for who in ("ours", *peers) for dtype in ("fp32", "bf16")]
    parser = measure.parser(description, repeats=6)
    parser.add_argument("--systems", nargs="+", choices=names, default=names)
    parser.add_argument("--shape", choices=workload.SHAPES, default="w")
    arguments = parser.parse_args()
    output = Path(arguments.output_dir).resolve()
    here = figures.machine(measure.cores_of(arguments), arguments.device)
    print(figures.described(here))
    work = workload.Work(shape=workload.SHAPES[arguments.shape], **size)
    models = workload.save_models(work, output / "models")
    rows = workload.answered_rows(work)
    data = output / "data" / f"{name}.jsonl"
    workload.write_rows(data, [to_row(r) for r in rows], work.shape, seed=42)
    for_peers = output / "data" / f"{name}_peers.json"
    for_peers.write_text(json.dumps([peer_rows(r) for r in rows]), encoding="utf-8")
    where = (output / "logs", measure.cores_of(arguments), arguments.device)
    systems = []
    for called in arguments.systems:
        who, dtype = called.split("-")
        folder = output / "runs" / f"{name}-{called}"
        if who == "ours":
            argv = flags(models, folder, dtype, work) + extra_flags(data) + arguments.flags
            given = {"module": f"{module}.main", "argv": argv}
            systems.append(System(called, "benchmarks.sides:step", given, *where))
            continue
        given = {"folder": str(models / "policy"), "rows": str(for_peers), "dtype": dtype}
        given |= peers[who] | {
            "output_dir": str(folder),
            "micro": MICRO,
            "learning_rate": LEARNING_RATE,
        }
        function, python = f"benchmarks.peers_trl:{name}", str(trl_environment.make_environment())
        systems.append(System(called, function, given, *where, python=python))
    flops, tokens = flops_of(work.shape, rows)
    found = figures.compare(
        f"{name}: {work.prompts} rows an optimizer step, {MICRO} a forward pass, {tokens} tokens",
        systems,
        lambda system: {"total": [t["seconds"] for t in system.turns]},
        lambda dtype, rate: {"total": flops / rate[dtype]},
        lambda called: [f"{peer}-{figures.dtype_of(called)}" for peer in peers],
        tokens,
        arguments,
    )
    results = [found | {"work": asdict(work)}]
    print(f"\nwritten: {figures.write(f'{name}_throughput', arguments, here, results)}")
    sys.stdout.flush()
