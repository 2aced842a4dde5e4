"""Step 3 against TRL 1.12 on the common work W: response tokens a second, phase by phase.

    python benchmarks/ppo_throughput.py                          # PPO, W and W-var: about 8 minutes
    python benchmarks/ppo_throughput.py --algorithm grpo         # or rloo
    python benchmarks/ppo_throughput.py --sweep vocabulary       # or batch, length, model, ranks
    python benchmarks/ppo_throughput.py --device cuda --shape qwen2.5-0.5b

W: benchmarks/workload.py. Ours is step3_ppo/main.py as it is, through DeepSpeed engines; TRL's is
PPOTrainer with one optimizer step a minibatch, or its GRPOTrainer or RLOOTrainer, where the 32 rows
are 8 answers to each of 4 prompts (the first run makes its environment, some minutes). One core,
one thread, all sides in turn. Prints tables, writes OUTPUT/ALGORITHM_throughput.json.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

from benchmarks import figures, measure, trl_environment, workload
from benchmarks.measure import System
from benchmarks.workload import Shape

PHASES = ("generate", "score", "train")
ON_CPU = ("ours-fp32", "ours-bf16", "trl-fp32", "generate-fp32", "generate-bf16")
ON_GPU = ("ours-bf16", "generate-bf16", "compiled-bf16")
# Flags of ours that make the algorithm what TRL's trainer of this name does.
ALGORITHMS = {
    "ppo": [],
    "grpo": ["--algorithm", "grpo"],
    "rloo": ["--algorithm", "rloo", "--action_level", "sequence"],  # its ratio is of whole answers
}
SAMPLES = 8  # answers to a prompt, where they are compared with each other
W = workload.Work()
SWEEPS = {
    "batch": {n: replace(W, prompts=n) for n in (8, 16, 32, 64)},
    "length": {n: replace(W, new_tokens=n) for n in (64, 128, 256, 512)},
    "vocabulary": {
        n: replace(W, shape=replace(W.shape, vocabulary=n)) for n in (8192, 32768, 151936)
    },
    "model": {
        f"{n} × {h}": replace(W, shape=Shape(8192, h, i, n, h // 32, h // 32))
        for n, h, i in ((4, 128, 344), (6, 256, 688), (8, 512, 1376))
    },
    "ranks": {"1 and 2": W},
}


def flags(
    work: workload.Work, models: Path, prompts: Path, output: Path, dtype: str, ranks=1
) -> list[str]:
    """Step 3's flags for `work`: one epoch of four minibatches, AdamW, clip 1.0, all else as it
    comes. TRL keeps no average of the weights and checks nothing, so neither do we."""
    minibatch = work.prompts // 4
    values = dict(
        model_name_or_path=models / "policy",
        reward_model=models / "reward",
        prompt_data=prompts,
        output_dir=output,
        overwrite=True,
        max_prompt_length=work.prompt_length,
        max_response_length=work.new_tokens,
        prompts_per_rollout=work.asked(),
        samples_per_prompt=work.samples,
        global_batch_size=minibatch,
        micro_batch_size=minibatch // ranks,
        ppo_epochs=1,
        gradient_clipping=1.0,
        learning_rate=1e-6,  # the policy must go on counting
        lr_schedule="constant",
        max_steps=100_000,  # the benchmark ends it
        dtype=dtype,
        ema_decay=0,
        eval_fraction=workload.HELD_OUT,
        sample_answers=0,
        self_check="off",
        tensorboard=False,
        log_every=1_000_000,
    )
    return [str(word) for name, value in values.items() for word in (f"--{name}", value)]


def sides(names, work, models: Path, output: Path, arguments, ranks=(1,)) -> list[System]:
    """The systems called `names`: ours once for each number of ranks."""
    prompts, found = workload.prompt_rows(work), []
    file = workload.write_prompts(work, output / "data")
    for name in names:
        who, dtype = name.split("-")
        for count in ranks if who == "ours" else (1,):
            called = name if len(ranks) == 1 else f"{name}, {count} rank{'s'[: count > 1]}"
            folder = output / "runs" / called.replace(", ", "-").replace(" ", "")
            argv = flags(work, models, file, folder, dtype, count)
            argv += ALGORITHMS[arguments.algorithm] + arguments.flags
            python = sys.executable
            if who == "ours":
                function = "benchmarks.sides:step"
                given = {"module": "step3_ppo.main", "argv": argv}
            elif who == "trl":
                python = trl_environment.make_environment()
                given = {"argv": argv, "prompts": prompts}
                function = "benchmarks.peers_trl:ppo"
                if arguments.algorithm != "ppo":
                    function = "benchmarks.peers_trl:online"
                    given["name"] = arguments.algorithm
            else:
                function = "benchmarks.sides:generate"
                repeated = [ids for ids in prompts for _ in range(work.samples)]
                given = {"folder": str(models / "policy"), "prompts": repeated, "dtype": dtype}
                given["new_tokens"] = work.new_tokens
                given["cache"] = "static" if who == "compiled" else None
            cores = measure.cores_of(arguments, count)
            where = (output / "logs", cores, arguments.device, count, str(python))
            found.append(System(called, function, given, *where))
    return found


def numbers(system: System, work: workload.Work) -> dict[str, list[float]]:
    """{"total" or phase: seconds of each turn}. Refuses a turn that answered another number of
    tokens than the work asks for: its seconds would compare with nobody's."""
    due, found = sum(work.answers()), {}
    for turn in system.turns:
        inside = turn.get("metrics", turn)
        tokens = turn.get("tokens") or round(inside["response_length"] * work.prompts)
        if tokens != due:
            raise SystemExit(f"{system.name} answered {tokens} tokens where {due} were due")
        phases = {p: inside[f"seconds_{p}"] for p in PHASES if f"seconds_{p}" in inside}
        if len(phases) > 1:
            phases["total"] = turn["seconds"]
        for name, seconds in phases.items():
            found.setdefault(name, []).append(seconds)
    return found


def floors(
    work: workload.Work, dtype: str, rate: dict[str, float], critic: bool
) -> dict[str, float]:
    """Least seconds of each phase by the GEMM rate of the run, and on a GPU by its memory."""
    found = {phase: f / rate[dtype] for phase, f in workload.ppo_flops(work, critic).items()}
    if "memory" in rate:
        least = workload.decode_bytes(work, 4 if dtype == "fp32" else 2) / rate["memory"]
        found["generate"] = max(found["generate"], least)
    return found | {"total": sum(found.values())}


def peers_of(name: str) -> list[str]:
    """TRL in fp32 and in the same dtype; for the decode plain generate, with a growing cache and
    with a static one; for two ranks one of the same."""
    who, _, more = name.partition(",")
    if more:
        return [f"{who}, 1 rank"]
    same = [f"{peer}-{figures.dtype_of(name)}" for peer in ("trl", "generate", "compiled")]
    return list(dict.fromkeys(["trl-fp32", *same]))


def main() -> None:
    parser = measure.parser(__doc__, repeats=4)
    parser.add_argument(
        "--systems", nargs="+", choices=sorted({*ON_CPU, *ON_GPU, "trl-bf16"}), default=[]
    )
    parser.add_argument("--work", nargs="+", choices=("W", "W-var"), default=["W", "W-var"])
    parser.add_argument("--sweep", choices=SWEEPS, help="instead: growth with one size, ours alone")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="ppo")
    parser.add_argument("--shape", choices=workload.SHAPES, default="w")
    arguments = parser.parse_args()
    output = Path(arguments.output_dir).resolve()
    usual = ON_GPU if arguments.device == "cuda" else ON_CPU
    names = arguments.systems or (("ours-fp32", "ours-bf16") if arguments.sweep else usual)
    ranks = (1, 2) if arguments.sweep == "ranks" else (1,)
    shape = workload.SHAPES[arguments.shape]
    critic = arguments.algorithm == "ppo"
    grouped = dict(shape=shape, samples=1 if critic else SAMPLES)
    works = {"W": workload.Work(**grouped), "W-var": workload.Work(**grouped, shortest=16)}
    chosen = {name: works[name] for name in arguments.work}
    if arguments.sweep:
        chosen = {f"{arguments.sweep} {label}": w for label, w in SWEEPS[arguments.sweep].items()}
    here = figures.machine(measure.cores_of(arguments, max(ranks)), arguments.device)
    print(figures.described(here))
    results = []
    for title, work in chosen.items():
        kept_as = "bf16" if arguments.device == "cuda" else "fp32"
        models = workload.save_models(work, output / "models", kept_as)
        found = figures.compare(
            title,
            sides(names, work, models, output, arguments, ranks),
            lambda system, work=work: numbers(system, work),
            lambda dtype, rate, work=work: floors(work, dtype, rate, critic),
            peers_of,
            sum(work.answers()),
            arguments,
        )
        results.append(found | {"work": asdict(work)})
    name = f"{arguments.algorithm}_throughput" + (f"_{arguments.sweep}" if arguments.sweep else "")
    print(f"\nwritten: {figures.write(name, arguments, here, results)}")


if __name__ == "__main__":
    main()
