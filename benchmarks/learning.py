"""What PPO learns on the embedded task over seeds: mean and spread of the verifier it never sees.

    python benchmarks/learning.py [--output_dir output/learning] [--seeds 1 2 3 4 5] [--max_steps N]

From the SFT model and the reward model of the tiny recipe (made once a seed), PPO with one setting
changed at a time: the KL coefficient, the epochs, the algorithm, what an action is, rounds of new
comparisons. What a folder already holds is not run again, so a killed run goes on. Writes
learning.md (the tables), learning.json and learning.png (verifier and score against KL).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluation.summary import read_metrics, read_result, verdicts  # noqa: E402
from pipeline import METHODS  # noqa: E402


def recipe_flags(section: str) -> list[str]:
    """Flags of a section of the tiny recipe."""
    given = yaml.safe_load((ROOT / "recipes/tiny.yaml").read_text(encoding="utf-8"))
    given = (given | given["methods"])[section]
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def method_flags(name: str) -> list[str]:
    """What run_all.sh --method NAME gives its step beside the step's own section of the recipe."""
    there = yaml.safe_load((ROOT / "recipes/tiny.yaml").read_text(encoding="utf-8"))
    there = there | there["methods"]
    method = METHODS[name]
    flags = [f"--{method.flag}", name] if method.flag else []
    sections = [section for section in method.sections(1)[1:] if section in there]
    return flags + [word for section in sections for word in recipe_flags(section)]


VARIANTS: dict[str, list[str]] = {
    "recipe": [],
    "β 0": ["--kl_coef", "0"],
    "β 0.02": ["--kl_coef", "0.02"],
    "β 0.05": ["--kl_coef", "0.05"],
    "β 0.2": ["--kl_coef", "0.2"],
    "1 epoch": ["--ppo_epochs", "1"],
    "sequence-level PPO": ["--action_level", "sequence"],
    "A2C": method_flags("a2c"),
    "REINFORCE": method_flags("reinforce"),
}
CURVES = {"β 0": "0", "β 0.02": "0.02", "β 0.05": "0.05", "recipe": "0.1", "β 0.2": "0.2"}
ROUNDS = 3


def run(program: str, *flags, done: Path) -> None:
    """One step as one process on one core, unless `done` is there; its output goes beside it, and
    what it took, summed over the starts of a run that was stopped and went on: CPU seconds, and
    bytes of memory at the most."""
    if done.exists():
        return
    done.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *program.split(), *map(str, flags)]
    if program.startswith("step"):
        command += ["--resume", "auto"]
    stem = Path(program.split()[-1]).stem
    log, cost = (done.parent / f"{stem}_{what}" for what in ("log.txt", "cost.json"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(log, "w", encoding="utf-8") as out:
        both = dict(stdout=out, stderr=subprocess.STDOUT)
        process = subprocess.Popen(command, cwd=ROOT, env=environment, **both)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = code = os.waitstatus_to_exitcode(status)
    before = json.loads(cost.read_text()) if cost.exists() else {"seconds": 0.0, "memory": 0}
    seconds = before["seconds"] + used.ru_utime + used.ru_stime
    memory = max(before["memory"], used.ru_maxrss * 1024)  # KiB on Linux
    cost.write_text(json.dumps({"seconds": seconds, "memory": memory}))
    if code:
        raise SystemExit(f"{program} failed with exit code {code}; see {log}")


def collect(base: Path, policy: Path, out: Path, seed: int, flags: Sequence = ()) -> None:
    where = ["--policy", policy, "--prompt_data", base / "data/prompts.jsonl"]
    where += ["--output_file", out, "--seed", seed]
    run("step2_reward/collect.py", *where, *recipe_flags("collect"), *flags, done=out)


def train_reward_model(base: Path, comparisons: list[Path], out: Path, seed: int) -> None:
    flags = ["--model_name_or_path", base / "step1_sft", "--sft_data", base / "data/sft.jsonl"]
    flags += ["--preference_data", *comparisons, "--output_dir", out, "--seed", seed]
    run("step2_reward/main.py", *flags, *recipe_flags("reward"), done=out / "result.json")


def ppo(base: Path, policy: Path, reward: Path, out: Path, seed: int, flags: list[str]) -> None:
    where = ["--model_name_or_path", policy, "--reference_model", base / "step1_sft"]
    where += ["--reward_model", reward, "--prompt_data", base / "data/prompts.jsonl"]
    where += ["--output_dir", out, "--seed", seed, "--sample_answers", 0]
    where += ["--tensorboard", "false"]
    run("step3_ppo/main.py", *where, *recipe_flags("ppo"), *flags, done=out / "result.json")


def build_base(base: Path, seed: int) -> None:
    """Data, base model, SFT, comparisons and reward model of one seed, as run_all.sh makes them."""
    data = base / "data"
    run(
        "-m utils.data.toy_tasks",
        *("--output_dir", data, "--seed", seed),
        done=data / "held_out.jsonl",
    )
    run(
        "-m utils.models.from_scratch",
        *("--output_dir", base / "base_model", "--data", data / "sft.jsonl", "--seed", seed),
        *recipe_flags("scratch"),
        done=base / "base_model/config.json",
    )
    run(
        "step1_sft/main.py",
        *("--model_name_or_path", base / "base_model", "--sft_data", data / "sft.jsonl"),
        *("--output_dir", base / "step1_sft", "--seed", seed, *recipe_flags("sft")),
        done=base / "step1_sft/result.json",
    )
    collect(base, base / "step1_sft", data / "comparisons_1.jsonl", seed)
    train_reward_model(base, [data / "comparisons_1.jsonl"], base / "step2_reward", seed)


def run_rounds(base: Path, seed: int, rounds: int, flags: list[str]) -> None:
    """Rounds 2 to `rounds`: comparisons of the newest policy, a new reward model on all of them."""
    policy, comparisons = base / "recipe", [base / "data/comparisons_1.jsonl"]
    for number in range(2, rounds + 1):
        folder = base / f"round {number}"
        comparisons.append(folder / "comparisons.jsonl")
        collect(base, policy / "actor", comparisons[-1], seed + number)
        train_reward_model(base, comparisons, folder / "step2_reward", seed)
        more = [*recipe_flags("later_ppo"), *flags]
        ppo(base, policy / "actor", folder / "step2_reward", folder, seed + number, more)
        policy = folder


def judged(base: Path, folder: Path, seed: int) -> dict[str, float]:
    """Verifier of actor and average on the held-out prompts, cached in verifier.json."""
    cache = folder / "verifier.json"
    if not cache.exists():
        lines = (base / "data/held_out.jsonl").read_text(encoding="utf-8").splitlines()
        held = [json.loads(line) for line in lines]
        names = [n for n in ("actor", "actor_ema") if (folder / n).exists()] or ["."]
        found = {n: statistics.mean(verdicts(folder / n, held, seed)) for n in names}
        cache.write_text(json.dumps(found), encoding="utf-8")
    return json.loads(cache.read_text(encoding="utf-8"))


def spread(values: Iterable[float]) -> str:
    """Mean ± standard deviation, which a single value does not have."""
    values = list(values)
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def table(output: Path, seeds: list[int]) -> tuple[str, dict]:
    """Markdown rows a variant: verifier of SFT, PPO and its average, least rise, score, KL."""
    lines = [
        "| setting | seeds | verifier after PPO | its average (EMA) | least rise | score | KL |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    bases = {s: output / f"seed{s}" for s in seeds}
    start = {s: judged(b, b / "step1_sft", s)["."] for s, b in bases.items()}
    numbers: dict = {"sft": start}
    for name in [*VARIANTS, *(f"round {n}" for n in range(2, ROUNDS + 1))]:
        ready = {s: b for s, b in bases.items() if (b / name / "result.json").exists()}
        if not ready:
            continue
        found = {s: judged(b, b / name, s) for s, b in ready.items()}
        results = {s: read_result(b / name) for s, b in ready.items()}
        rise = min(found[s]["actor"] - start[s] for s in ready)
        lines.append(
            f"| {name} | {len(ready)} | {spread(f['actor'] for f in found.values())} | "
            f"{spread(f['actor_ema'] for f in found.values())} | {rise:+.3f} | "
            f"{spread(r['score_after'] for r in results.values())} | "
            f"{spread(r['kl_after'] for r in results.values())} |"
        )
        numbers[name] = {s: found[s] | {"kl": results[s]["kl_after"]} for s in ready}
    head = f"Means over seeds ± standard deviation; SFT {spread(start.values())}.\n"
    return "\n".join([head, *lines]), numbers


def curve(output: Path, seeds: list[int], name: str) -> list[tuple[float, float, float]]:
    """(KL, verifier, score) at each evaluation, means over the seeds."""
    folders = [output / f"seed{s}" / name for s in seeds]
    runs = [
        [m for m in read_metrics(folder) if "eval/verifier" in m]
        for folder in folders
        if (folder / "result.json").exists()
    ]
    keys = ("eval/kl", "eval/verifier", "eval/score")
    return [
        tuple(statistics.mean(m[key] for m in points) for key in keys)
        for points in zip(*runs, strict=True)
    ]


def plot(output: Path, curves: dict[str, list[tuple[float, float, float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for beta, points in curves.items():
        kl, verifier, score = zip(*points, strict=True)
        axes[0].plot(kl, verifier, marker="o", markersize=3, label=f"β = {beta}")
        axes[1].plot(kl, score, marker="o", markersize=3, label=f"β = {beta}")
    for axis, title in zip(axes, ("verifier, which PPO never sees", "reward model"), strict=True):
        axis.set(title=title, xlabel="KL to the reference, nats a response")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(output / "learning.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", default="output/learning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--max_steps", type=int, default=0, help="rollouts; 0: the recipe's")
    parser.add_argument("--settings", nargs="*", default=list(VARIANTS), help="of the table")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="1: no round after the first")
    parser.add_argument("--report_only", action="store_true", help="run nothing, tell what is")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes at once")
    arguments = parser.parse_args()
    output, seeds = Path(arguments.output_dir).resolve(), arguments.seeds
    steps = ["--max_steps", str(arguments.max_steps)] if arguments.max_steps else []
    bases = {seed: output / f"seed{seed}" for seed in seeds}

    def variant(job: tuple[int, str]) -> None:
        seed, name = job
        base = bases[seed]
        sft, reward = base / "step1_sft", base / "step2_reward"
        ppo(base, sft, reward, base / name, seed, [*VARIANTS[name], *steps])
        print(f"seed {seed}: {name} done", flush=True)

    jobs = (
        [] if arguments.report_only else [(s, name) for name in arguments.settings for s in seeds]
    )
    to_run = [] if arguments.report_only else seeds
    with ThreadPoolExecutor(arguments.workers) as pool:
        list(pool.map(lambda seed: build_base(bases[seed], seed), to_run))
        list(pool.map(variant, jobs))
        list(pool.map(lambda s: run_rounds(bases[s], s, arguments.rounds, steps), to_run))
    text, numbers = table(output, seeds)
    curves = {beta: curve(output, seeds, name) for name, beta in CURVES.items()}
    curves = {beta: points for beta, points in curves.items() if points}
    plot(output, curves)
    (output / "learning.json").write_text(json.dumps({"verifier": numbers, "curves": curves}))
    (output / "learning.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
