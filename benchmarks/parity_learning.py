"""Learning curves of step 3 and of TRL's PPOTrainer on the embedded task, at equal samples.

Both start from one SFT model and one reward model and take recipes/tiny.yaml's settings of PPO; the
verifier judges both on the 512 held-out prompts with our sampler and the same noise, as
evaluation/summary.py does.

    python -m benchmarks.parity_learning ours|trl SOURCE OUTPUT SEED MAX_STEPS

is one run, in a process of its own: each side sets up its own process group and random state.

Not the same, because TRL 1.12 has no setting for it: it never clips gradients (ours at norm 1); it
steps the learning rate once a rollout (we give it the mean of our schedule over the rollout); it
draws its own samples and order of prompts. Its step past the stop token and its variance are in
parity_numbers. Ours keeps an averaged actor, which is not judged here.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SEEDS = (42, 1, 2)
SIDES = ("ours", "trl")


def recipe_flags(section: str) -> list[str]:
    """Flags of a section of the tiny recipe."""
    given = yaml.safe_load((ROOT / "recipes/tiny.yaml").read_text())[section]
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def call(*command) -> None:
    """A program of this repository; what it prints is shown only where it fails."""
    words = [sys.executable, *map(str, command)]
    # A process group that this process has joined is not the child's, nor accelerate's in it.
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    rest = {k: v for k, v in os.environ.items() if k not in own}
    done = subprocess.run(words, cwd=ROOT, env=rest, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def make_source(folder: Path, seed: int) -> None:
    """data/, step1_sft/ and step2_reward/ with the recipe's settings, as run_all.sh makes them."""
    data, common = folder / "data", ["--seed", seed]
    call("-m", "utils.data.toy_tasks", "--output_dir", data, *common)
    base = ["-m", "utils.models.from_scratch", "--output_dir", folder / "base_model"]
    call(*base, "--data", data / "sft.jsonl", *common, *recipe_flags("scratch"))
    common.append("--overwrite")
    sft = ["step1_sft/main.py", "--model_name_or_path", folder / "base_model"]
    sft += ["--sft_data", data / "sft.jsonl", "--output_dir", folder / "step1_sft"]
    call(*sft, *recipe_flags("sft"), *common)
    collect = ["step2_reward/collect.py", "--policy", folder / "step1_sft"]
    collect += ["--prompt_data", data / "prompts.jsonl"]
    collect += ["--output_file", data / "comparisons_1.jsonl"]
    call(*collect, *recipe_flags("collect"), *common)
    reward = ["step2_reward/main.py", "--model_name_or_path", folder / "step1_sft"]
    reward += ["--preference_data", data / "comparisons_1.jsonl", "--sft_data", data / "sft.jsonl"]
    call(*reward, "--output_dir", folder / "step2_reward", *recipe_flags("reward"), *common)


def ppo_flags(source: Path, output: Path, seed: int, max_steps: int) -> list[str]:
    """The command line of step 3, from which TRL's settings are derived too. max_steps 0: the
    recipe's."""
    shorter = ["--max_steps", max_steps, "--eval_every", max(1, max_steps // 5)]
    return [
        *["--model_name_or_path", str(source / "step1_sft")],
        *["--reward_model", str(source / "step2_reward")],
        *["--prompt_data", str(source / "data/prompts.jsonl"), "--output_dir", str(output)],
        "--overwrite",
        *recipe_flags("ppo"),
        *["--seed", str(seed), "--tensorboard", "false"],
        *(map(str, shorter) if max_steps else []),
    ]


class Judge:
    """Called with a policy at points of a run; writes curve.json: [{rollouts, verifier, …}].

    seconds: of rollouts and updates since the first call. `idle` is what does not count.
    """

    def __init__(self, config, source: Path, tokenizer):
        self.config, self.tokenizer, self.points = config, tokenizer, []
        self.started, self.idle = None, 0.0
        lines = (source / "data/held_out.jsonl").read_text(encoding="utf-8").splitlines()
        self.rows = [json.loads(line) for line in lines]

    def __call__(self, policy, rollouts: int, **metrics) -> None:
        from evaluation.summary import verdicts

        tick = time.time()
        self.started = self.started or tick
        seconds = tick - self.started - self.idle
        folder = Path(self.config.output_dir, "policy")
        policy.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        verdict = statistics.mean(verdicts(folder, self.rows, self.config.seed))
        point = {"rollouts": rollouts, "samples": rollouts * self.config.rollout_size()}
        self.points.append(point | {"verifier": verdict, "seconds": seconds, **metrics})
        self.write()
        self.idle += time.time() - tick

    def write(self) -> None:
        text = json.dumps(self.points, indent=1)
        Path(self.config.output_dir, "curve.json").write_text(text + "\n", encoding="utf-8")


def run_ours(config, flags: list[str], judge: Judge) -> None:
    """step3_ppo/main.py itself. Its evaluations, before, every few rollouts and after the last, are
    where the judge looks in."""
    from step3_ppo import main as step3

    evaluate, calls = step3.evaluate, 0

    def judged(models, *rest):
        nonlocal calls
        judge(models.actor.module, min(calls * config.eval_every, config.max_steps))
        calls += 1
        tick = time.time()
        result = evaluate(models, *rest)
        judge.idle += time.time() - tick
        return result

    step3.evaluate, sys.argv = judged, ["step3_ppo/main.py", *flags]
    step3.main()
    lines = Path(config.output_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = {m["step"]: m for m in map(json.loads, lines)}
    for point in judge.points[1:]:
        point |= {name: metrics[point["rollouts"]][name] for name in ("kl", "score")}
    judge.write()


def run_trl(config, judge: Judge) -> None:
    """PPOTrainer on the prompts that step 3 would train on."""
    from transformers import TrainerCallback

    from benchmarks import trl_runner
    from step3_ppo.models import readers
    from utils.data import prompts as prompt_data
    from utils.data.loading import DataSettings
    from utils.models.scorer import reads_text

    prompts, _ = prompt_data.load(
        config.prompt_data,
        judge.tokenizer,
        config.pick(DataSettings),
        config.max_prompt_length,
        [r for r in readers(config).values() if reads_text(r, judge.tokenizer)],
        print,
    )

    class LookIn(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % config.eval_every == 0 or state.global_step == config.max_steps:
                last = state.log_history[-1]
                kl, score = last["objective/kl"], last["objective/scores"]
                judge(trainer.policy_model, state.global_step, kl=kl, score=score)

    output = str(Path(config.output_dir) / "trainer")
    ids = [prompt.ids for prompt in prompts]
    trainer = trl_runner.build_trainer(config, ids, judge.tokenizer, output, [LookIn()])
    judge(trainer.policy_model, 0)
    trainer.train()


def one_run(side: str, source: Path, output: Path, seed: int, max_steps: int) -> None:
    from step3_ppo.config import PPOConfig
    from utils.data import chat_template
    from utils.distributed.program import quiet_libraries
    from utils.settings import command_line

    quiet_libraries()
    flags = ppo_flags(source, output, seed, max_steps)
    config = command_line.build(PPOConfig, flags, world_size=1)
    tokenizer = chat_template.load_tokenizer(config.model_name_or_path)
    judge = Judge(config, source, tokenizer)
    if side == "ours":
        run_ours(config, flags, judge)
    else:
        run_trl(config, judge)


def run(output: Path, sources: list[str], seeds: list[int] | None, max_steps: int) -> list[dict]:
    """Both sides on every seed: [{"seed", "ours": points, "trl": points}]."""
    if seeds is None:
        seeds = [] if sources else SEEDS
    folders = {}
    for source in map(Path, sources):
        settings = yaml.safe_load((source / "step1_sft/config.yaml").read_text(encoding="utf-8"))
        folders[settings["seed"]] = source.resolve()
    for seed in seeds:
        folders[seed] = output / f"seed{seed}/source"
        print(f"seed {seed}: SFT and reward model", flush=True)
        make_source(folders[seed], seed)
    curves = []
    for seed, source in folders.items():
        curve = {"seed": seed}
        for side in SIDES:
            folder = output / f"seed{seed}/{side}"
            call("-m", "benchmarks.parity_learning", side, source, folder, seed, max_steps)
            curve[side] = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
            ends = [f"{curve[side][i]['verifier']:.3f}" for i in (0, -1)]
            print(f"seed {seed}, {side}: verifier {' → '.join(ends)}", flush=True)
        curves.append(curve)
    return curves


def mean_curve(curves: list[dict], side: str) -> list[float]:
    columns = zip(*[[p["verifier"] for p in c[side]] for c in curves], strict=True)
    return [sum(column) / len(column) for column in columns]


def _ends(points: list[dict]) -> tuple[str, ...]:
    """Means of what is told of a run's last point only."""
    mean = {k: sum(p[k] for p in points) / len(points) for k in ("score", "kl", "seconds")}
    return f"{mean['score']:.2f}", f"{mean['kl']:.2f}", f"{mean['seconds']:.0f}"


def closing_table(curves: list[dict]) -> str:
    """Verifier at equal samples, per seed and mean; and what is to be seen in it."""
    from utils.report import table

    samples = [f"{p['samples']}" for p in curves[0]["ours"]]
    header = ("seed", "", *samples, "score", "KL", "seconds")
    rows = []
    for curve in curves:
        for side in SIDES:
            values = [f"{p['verifier']:.3f}" for p in curve[side]]
            rows.append((curve["seed"], side, *values, *_ends([curve[side][-1]])))
    means = {side: mean_curve(curves, side) for side in SIDES}
    for side in SIDES:
        ends = _ends([c[side][-1] for c in curves])
        rows.append(("mean", side, *[f"{v:.3f}" for v in means[side]], *ends))
    ahead = [a - b for a, b in zip(means["ours"], means["trl"], strict=True)]
    rows.append(("mean", "ours − trl", *[f"{a:+.3f}" for a in ahead]))
    rows = [row + ("",) * (len(header) - len(row)) for row in rows]
    last = [c["ours"][-1]["verifier"] - c["trl"][-1]["verifier"] for c in curves]
    error = f" ± {statistics.stdev(last) / len(last) ** 0.5:.3f}" if len(last) > 1 else ""
    return (
        "verifier on 512 held-out prompts, by responses sampled (standard error of one figure "
        "0.02);\nscore, KL (nats a response) of the last rollout; seconds of rollouts and updates\n"
        + table(rows, header)
        + f"\nours − trl: {ahead[-1]:+.3f}{error} at the end ("
        + ", ".join(f"seed {c['seed']} {d:+.3f}" for c, d in zip(curves, last, strict=True))
        + f"), {statistics.mean(ahead[1:]):+.3f} on average over the points; "
        + f"ours ≥ trl at {sum(a >= 0 for a in ahead[1:])} of {len(ahead) - 1} points"
    )


def plot(curves: list[dict], path: Path) -> None:
    """Both sides' verifier over samples: each seed thin, the mean thick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5), constrained_layout=True)
    samples = [p["samples"] for p in curves[0]["ours"]]
    for side, color in zip(SIDES, ("tab:blue", "tab:orange"), strict=True):
        for curve in curves:
            axis.plot(samples, [p["verifier"] for p in curve[side]], color=color, alpha=0.3)
        mean = mean_curve(curves, side)
        axis.plot(samples, mean, color=color, marker="o", label=f"{side}, mean of {len(curves)}")
    axis.set(xlabel="responses sampled", ylabel="verifier, held-out prompts", ylim=(0, 1))
    axis.set_title("PPO on the embedded task, same SFT and reward model")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    side, source, output, seed, max_steps = sys.argv[1:]
    one_run(side, Path(source), Path(output), int(seed), int(max_steps))
