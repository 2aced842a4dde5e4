"""What step 3 learns from vLLM's rollouts, beside our own decode loop's, and how long it takes.

    VLLM_PYTHON=… python benchmarks/engines.py [--output_dir output/engines] [--seeds 1 2 3]
        [--settings native vllm "one ahead"] [--max_steps N]

Data, SFT model and reward model of the tiny recipe once a seed, as benchmarks/learning.py makes
them; then its PPO once with each engine, and once with vLLM sampling a rollout ahead. One run at a
time, and what a folder holds is not run again: seconds compare only where nothing else runs. Writes
engines.md and engines.json: the verifier on the held-out prompts over the seeds, its distance from
the first setting's with two standard errors (seed by seed, as both begin at the same models),
seconds of a rollout with its updates (the median of a run), and the largest `engine_gap`.
"""

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import figures, learning  # noqa: E402
from benchmarks.learning import spread  # noqa: E402
from evaluation.summary import read_metrics  # noqa: E402

VLLM = ["--rollout_engine", "vllm"]
SETTINGS = {
    "native": ["--rollout_engine", "native"],
    "vllm": VLLM,
    "one ahead": [*VLLM, "--rollout_ahead", "1", "--importance_cap", "2"],
}
NOT_TIMED = 2  # rollouts that a run warms up in


def measured(base: Path, folder: Path, seed: int) -> dict[str, float]:
    """What one run reached, and its seconds."""
    rollouts = read_metrics(folder)[1:]  # the first line is the evaluation before
    return {
        "verifier": learning.judged(base, folder, seed)["actor"],
        "seconds": statistics.median(m["seconds"] for m in rollouts[NOT_TIMED:]),
        "engine_gap": max(m.get("engine_gap", 0.0) for m in rollouts),
    }


def column(runs: dict[int, dict[str, float]], name: str) -> list[float]:
    return [run[name] for run in runs.values()]


def rows_of(found: dict[str, dict[int, dict[str, float]]], start: list[float]) -> list[dict]:
    """A row for each setting; found: what each seed's run reached, by setting; start: the SFT
    models' verifier."""
    first, rows = next(iter(found.values())), [{"setting": "SFT", "verifier": spread(start)}]
    for name, runs in found.items():
        row = {"setting": name, "seeds": len(runs), "verifier": spread(column(runs, "verifier"))}
        if runs is not first and len(runs) > 1:
            gained = [runs[s]["verifier"] - first[s]["verifier"] for s in runs]
            error = statistics.stdev(gained) / math.sqrt(len(gained))
            row["minus the first"] = f"{statistics.mean(gained):+.3f} ± {2 * error:.3f}"
        row["seconds a rollout"] = spread(column(runs, "seconds"))
        row["engine_gap at most"] = f"{max(column(runs, 'engine_gap')):.2g}"
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", default="output/engines")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--max_steps", type=int, default=0, help="rollouts; 0: the recipe's")
    arguments = parser.parse_args()
    output = Path(arguments.output_dir).resolve()
    if not os.environ.get("VLLM_PYTHON") and arguments.settings != ["native"]:
        raise SystemExit("VLLM_PYTHON names no environment of vLLM's: see docs/vllm.md")
    more = ["--max_steps", str(arguments.max_steps)] if arguments.max_steps else []
    bases = {seed: output / f"seed{seed}" for seed in arguments.seeds}
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in arguments.settings}
    for seed, base in bases.items():
        learning.build_base(base, seed)
        models = base / "step1_sft", base / "step2_reward"
        for name in arguments.settings:
            learning.ppo(base, *models, base / name, seed, [*SETTINGS[name], *more])
            found[name][seed] = measured(base, base / name, seed)
            print(f"seed {seed}, {name}: {found[name][seed]}", flush=True)
    start = [learning.judged(b, b / "step1_sft", seed)["."] for seed, b in bases.items()]
    text = figures.show(rows_of(found, start))
    (output / "engines.json").write_text(json.dumps(found), encoding="utf-8")
    (output / "engines.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
