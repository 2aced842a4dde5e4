"""The rollout of step 3 against plain `generate`: response tokens a second of the decode.

    python benchmarks/rollout_throughput.py                      # about 6 minutes
    python benchmarks/rollout_throughput.py --device cuda --dtypes bf16 --shape qwen2.5-0.5b
    python benchmarks/rollout_throughput.py --device cuda --dtypes bf16 --shape qwen2.5-7b \\
        --zero_stages 3 --flags --offload optimizer
    VLLM_PYTHON=… python benchmarks/rollout_throughput.py --engines native vllm --zero_stages 0

W and W-var of benchmarks/workload.py; ours is step3_ppo's rollout.collect with ZeRO-0 and ZeRO-3,
of which the decode is timed, weights gathered for it included. One core, one thread, all sides in
turn. On a GPU the floor is the memory's: each step reads all weights, and rows' keys and values.
"""

import itertools
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

from benchmarks import figures, measure, ppo_throughput, workload
from benchmarks.measure import System

PHASE = "generate"


def sides(work, models: Path, output: Path, arguments) -> list[System]:
    """Plain generate (with a static cache too, if asked for), and ours and vLLM's, ZeRO-0 and
    ZeRO-3, in each dtype."""
    prompts, found = workload.prompt_rows(work), []
    where = (output / "logs", measure.cores_of(arguments), arguments.device)
    file = workload.write_prompts(work, output / "data")
    for dtype in arguments.dtypes:
        given = {"folder": str(models / "policy"), "prompts": prompts, "dtype": dtype}
        given["new_tokens"] = work.new_tokens
        for peer in arguments.peers:
            cache = {"cache": "static" if peer == "compiled" else None}
            name = f"{peer}-{dtype}"
            found.append(System(name, "benchmarks.sides:generate", given | cache, *where))
        for engine, stage in itertools.product(arguments.engines, arguments.zero_stages):
            name = f"{engine.replace('native', 'ours')}-{dtype}, ZeRO-{stage}"
            folder = output / "runs" / f"rollout-{engine}-{dtype}-{stage}"
            argv = ppo_throughput.flags(work, models, file, folder, dtype)
            # Neither critic nor reward model: what follows the decode is not measured here.
            argv += ["--zero_stage", str(stage), "--algorithm", "reinforce", "--reward_model", ""]
            argv += ["--reward_function", "step3_ppo.rewards.shipped:length_target"]
            argv += ["--global_batch_size", str(work.prompts), "--rollout_engine", engine]
            argv += arguments.flags
            found.append(System(name, "benchmarks.sides:rollout", {"argv": argv}, *where))
    return found


def main() -> None:
    parser = measure.parser(__doc__, repeats=4)
    parser.add_argument("--work", nargs="+", choices=("W", "W-var"), default=["W", "W-var"])
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--zero_stages", nargs="+", type=int, default=[0, 3])
    parser.add_argument("--engines", nargs="+", choices=("native", "vllm"), default=["native"])
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=("generate", "compiled"),
        default=["generate"],
        help="compiled: generate with a static cache, whose step transformers compiles on a GPU",
    )
    parser.add_argument("--shape", choices=workload.SHAPES, default="w")
    arguments = parser.parse_args()
    output, shape = Path(arguments.output_dir).resolve(), workload.SHAPES[arguments.shape]
    here = figures.machine(measure.cores_of(arguments), arguments.device)
    print(figures.described(here))
    works = {"W": workload.Work(shape=shape), "W-var": workload.Work(shape=shape, shortest=16)}
    kept_as, results = "bf16" if arguments.device == "cuda" else "fp32", []
    for title in arguments.work:
        work = works[title]
        models = workload.save_models(work, output / "models", kept_as)
        found = figures.compare(
            title,
            sides(work, models, output, arguments),
            lambda system, work=work: {PHASE: ppo_throughput.numbers(system, work)[PHASE]},
            lambda dtype, rate, work=work: ppo_throughput.floors(work, dtype, rate, False),
            lambda name: [f"{peer}-{figures.dtype_of(name)}" for peer in arguments.peers],
            sum(work.answers()),
            arguments,
        )
        results.append(found | {"work": asdict(work)})
    print(f"\nwritten: {figures.write('rollout_throughput', arguments, here, results)}")


if __name__ == "__main__":
    main()
