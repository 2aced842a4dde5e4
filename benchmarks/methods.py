"""All methods against PPO on the embedded task, over seeds: at equal samples and at equal seconds.

    python benchmarks/methods.py [--output_dir output/methods] [--seeds 1 2 3 4 5] [--methods ppo …]
        [--samples 12800]

Data, SFT model, first comparisons and reward model of the tiny recipe once a seed, as
benchmarks/learning.py makes them; then each method from that SFT model. The algorithms of step 3
sample --samples answers in all, in rollouts of the recipe's size, and the reward model scores them;
for online_dpo and best_of_n it ranks as many. The preference losses by themselves take the
comparisons that the reward model was trained on, and sample nothing. The best of n answers of the
untrained SFT model stand beside them. One process on one core at a time; what a folder holds is not
done again, so a killed run goes on. Writes methods.md (the table), methods.json, and methods.png
(verifier against KL, and against seconds).
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import pipeline  # noqa: E402
from benchmarks import learning  # noqa: E402
from benchmarks.learning import recipe_flags, run, spread  # noqa: E402
from evaluation.summary import ANSWER_TOKENS, read_metrics  # noqa: E402
from utils import whole_files  # noqa: E402
from utils.data import batches, chat_template, toy_tasks  # noqa: E402
from utils.distributed import program  # noqa: E402
from utils.generation import sampling  # noqa: E402
from utils.models import language_model, scalar_model, scorer  # noqa: E402
from utils.models.loading import Loading  # noqa: E402

BEST_OF = (1, 2, 4, 8, 16)
ROLLOUT = 128  # answers, as in the recipe
RANKED = 8  # answers a prompt, of those that the reward model ranks


@dataclass(frozen=True)
class Run:
    """One method on one seed. base: the seed's folder, as learning.build_base makes it."""

    base: Path
    folder: Path
    seed: int
    samples: int


# How a method is trained, and with which flags: settings beside the recipe's.


def by_rollouts(job: Run, flags: list[str]) -> None:
    steps = ["--max_steps", str(job.samples // ROLLOUT), "--eval_every", "5", *flags]
    places = job.base / "step1_sft", job.base / "step2_reward", job.folder
    learning.ppo(job.base, *places, job.seed, steps)


def ranked_by_reward_model(job: Run, keep: str) -> Path:
    """Answers of the SFT model, job.samples of them, as comparisons or as the best of each."""
    flags = ["--labeller", "reward_model", "--reward_model", job.base / "step2_reward"]
    flags += ["--keep", keep, "--answers_per_prompt", RANKED]
    out = job.folder / "answers.jsonl"
    flags += ["--num_prompts", job.samples // RANKED]
    learning.collect(job.base, job.base / "step1_sft", out, job.seed, flags)
    figures = json.loads(out.with_suffix(".result.json").read_text(encoding="utf-8"))
    if figures["prompts"] * RANKED != job.samples:
        raise SystemExit(
            f"{out}: {RANKED} answers to each of {figures['prompts']} prompts, all there are, for "
            f"--samples {job.samples}; lower it in another --output_dir"
        )
    return out


def by_comparisons(job: Run, flags: list[str], comparisons: Path | None = None) -> None:
    where = ["--model_name_or_path", job.base / "step1_sft", "--output_dir", job.folder]
    where += ["--preference_data", comparisons or job.base / "data/comparisons_1.jsonl"]
    where += ["--seed", job.seed, "--tensorboard", "false", *recipe_flags("preference"), *flags]
    run("step3_preference/main.py", *where, done=job.folder / "result.json")


def by_new_comparisons(job: Run, flags: list[str]) -> None:
    by_comparisons(job, flags, ranked_by_reward_model(job, "ranking"))


def by_best_answers(job: Run, flags: list[str]) -> None:
    best = ranked_by_reward_model(job, "best")
    where = ["--model_name_or_path", job.base / "step1_sft", "--output_dir", job.folder]
    where += ["--sft_data", best, "--seed", job.seed, "--tensorboard", "false"]
    run("step1_sft/main.py", *where, *recipe_flags("sft"), *flags, done=job.folder / "result.json")


Train = Callable[[Run, list[str]], None]
BY_STEP: dict[str, Train] = {
    "ppo": by_rollouts,
    "preference": by_comparisons,
    "sft": by_best_answers,
}
METHODS: dict[str, tuple[Train, list[str]]] = {
    **{
        name: (BY_STEP[m.step], learning.method_flags(name)) for name, m in pipeline.METHODS.items()
    },
    "online_dpo": (by_new_comparisons, learning.method_flags("dpo")),
}


# What a method reached.


@dataclass(frozen=True)
class Judged:
    """n answers to each of P prompts: the verifier's and the reward model's scores (P,n), KL to the
    SFT model (k1, nats an answer) and tokens."""

    verdicts: list[list[float]]
    scores: list[list[float]]
    kl: float
    tokens: float


@torch.no_grad()
def judged(policy: Path, base: Path, n: int, seed: int) -> Judged:
    """Of answers at temperature 1, of ANSWER_TOKENS tokens at most, to the held-out prompts."""
    text = (base / "data/held_out.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    turns = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    tokenizer = chat_template.load_tokenizer(str(policy))
    load = dict(dtype="fp32", tokenizer=tokenizer)
    model, reference = (
        language_model.load(Loading(), str(folder), **load).eval()
        for folder in (policy, base / "step1_sft")
    )
    prompts = [chat_template.encode_prompt(tokenizer, turn) for turn in turns for _ in range(n)]
    ids, mask = batches.prompt_batch(prompts, tokenizer.pad_token_id)
    answers = sampling.generate(
        model,
        ids,
        mask,
        max_new_tokens=ANSWER_TOKENS,
        stop_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        noise=sampling.uniform_noise(len(ids), ANSWER_TOKENS, seed, 2**31 + 1),
    )
    stops = answers == tokenizer.eos_token_id
    counted = stops.cumsum(1) - stops.long() == 0  # through the first stop token
    both = torch.cat([ids, answers], 1), torch.cat([mask.bool(), counted], 1)
    found = [
        torch.cat(
            [
                language_model.response_logprobs(each, *part, answers.shape[1])[0].sum(1)
                for part in zip(*(x.split(256) for x in both), strict=True)
            ]
        )
        for each in (model, reference)
    ]
    texts = tokenizer.batch_decode(
        answers.where(counted, tokenizer.pad_token_id), skip_special_tokens=True
    )
    told = list(zip(texts, stops.any(1).tolist(), strict=True))
    groups = [told[i : i + n] for i in range(0, len(told), n)]
    reader = scorer.Reader.load(str(base / "step2_reward"))
    load["tokenizer"] = reader.tokenizer
    reward = scalar_model.load(Loading(), str(base / "step2_reward"), **load)
    encoded = [
        [reader.encode(turn, *answer) for answer in group]
        for turn, group in zip(turns, groups, strict=True)
    ]
    return Judged(
        verdicts=[
            [float(toy_tasks.verify(row, text)) for text, _ in group]
            for row, group in zip(rows, groups, strict=True)
        ],
        scores=scorer.score_groups(reward, encoded, torch.device("cpu"), 16),
        kl=(found[0] - found[1]).mean().item(),
        tokens=counted.sum(1).float().mean().item(),
    )


def kept(path: Path, make: Callable[[], object]):
    """What a JSON file holds, made where there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        whole_files.write_text(path, json.dumps(make()))
    return json.loads(path.read_text(encoding="utf-8"))


def mean(table: list[list[float]]) -> float:
    return statistics.mean(x for row in table for x in row)


def measured(policy: Path, base: Path, seed: int) -> dict[str, float]:
    found = judged(policy, base, 1, seed)
    numbers = {"verifier": mean(found.verdicts), "score": mean(found.scores)}
    return numbers | {"kl": found.kl, "tokens": found.tokens}


def result_of(job: Run) -> dict:
    """Measures of a finished method, CPU seconds, bytes, and its curve."""
    policy = job.folder / "actor" if (job.folder / "actor").exists() else job.folder
    numbers = kept(job.folder / "measured.json", lambda: measured(policy, job.base, job.seed))
    costs = [json.loads(path.read_text()) for path in job.folder.glob("*_cost.json")]
    numbers["seconds"] = sum(cost["seconds"] for cost in costs)
    numbers["memory"] = max(cost["memory"] for cost in costs)
    return numbers | {"curve": curve(job.folder, numbers)}


def curve(folder: Path, end: dict[str, float]) -> list[dict[str, float]]:
    """Seconds, KL and verifier of the evaluations while step 3 trained, of its own few held-out
    prompts, and at the end, of all. Seconds are the rollouts' share of the CPU seconds of all."""
    points, past = [], 0.0
    rows = read_metrics(folder) if (folder / "actor").exists() else []
    total = sum(row.get("seconds", 0.0) for row in rows)
    for row in rows:
        past += row.get("seconds", 0.0)
        if row.get("eval/verifier") is not None:
            seconds = end["seconds"] * past / total
            points.append({"seconds": seconds, "kl": row["eval/kl"]})
            points[-1]["verifier"] = row["eval/verifier"]
    return [*points[:-1], {key: end[key] for key in ("seconds", "kl", "verifier")}]


def at_seconds(points: list[dict[str, float]], seconds: float, start: float) -> float:
    """The verifier that a curve has reached by then; start: of the model that it begins with."""
    reached = [point["verifier"] for point in points if point["seconds"] <= seconds]
    return reached[-1] if reached else start


# Best of n.


def of_the_best(scores: list[float], values: list[float], n: int) -> float:
    """The expected value of the highest-scored of n answers, drawn without replacement from those
    given: of N sorted by score the i-th (from 0) is it with probability C(i, n−1) / C(N, n). Where
    scores tie, the later one stands for the higher."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    chances = [math.comb(i, n - 1) / math.comb(len(order), n) for i in range(len(order))]
    return sum(chance * values[i] for chance, i in zip(chances, order, strict=True))


def kl_of_best(n: int) -> float:
    """log n − (n−1)/n nats: of best of n to what it draws from, at most (Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n


def best_of_n(base: Path, seed: int) -> list[dict[str, float]]:
    """KL and verifier of the SFT model's best of n on the held-out prompts, for each n."""
    found = judged(base / "step1_sft", base, max(BEST_OF), seed)
    pairs = list(zip(found.scores, found.verdicts, strict=True))
    return [
        {"kl": kl_of_best(n), "verifier": statistics.mean(of_the_best(*pair, n) for pair in pairs)}
        for n in BEST_OF
    ]


# Over seeds.


def table(results: dict[str, dict[int, dict]], starts: dict[int, float], best) -> str:
    """Markdown. results: {method: {seed: result_of}}; best: {seed: best_of_n}."""
    first = next(iter(results))
    lines = [
        f"Means over seeds ± standard deviation; SFT {spread(starts.values())}. seconds: CPU time "
        "of the method alone; memory: MB of its process.\n",
        f"| method | seeds | verifier | least | score | KL | tokens | seconds | memory | verifier "
        f"at {first}'s seconds |",
        "| " + " | ".join(["---"] * 10) + " |",
    ]
    for name, found in results.items():
        rows = list(found.values())
        verifiers = [row["verifier"] for row in rows]
        then = [
            at_seconds(row["curve"], results[first][seed]["seconds"], starts[seed])
            for seed, row in found.items()
            if seed in results[first]
        ]
        lines.append(
            f"| {name} | {len(rows)} | {spread(verifiers)} | {min(verifiers):.3f} | "
            f"{spread(row['score'] for row in rows)} | {spread(row['kl'] for row in rows)} | "
            f"{statistics.mean(row['tokens'] for row in rows):.1f} | "
            f"{statistics.mean(row['seconds'] for row in rows):.0f} | "
            f"{max(row['memory'] for row in rows) / 1e6:.0f} | {spread(then) if then else ''} |"
        )
    for n, points in zip(BEST_OF, zip(*best.values(), strict=True), strict=True):
        verifiers = [point["verifier"] for point in points]
        lines.append(
            f"| the best of {n}, untrained | {len(points)} | {spread(verifiers)} | "
            f"{min(verifiers):.3f} | | ≤ {points[0]['kl']:.2f} | | | | |"
        )
    return "\n".join(lines)


def over_seeds(curves: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """The mean of curves, point by point: the k-th of each was taken after as many rollouts."""
    return [
        {key: statistics.mean(point[key] for point in points) for key in points[0]}
        for points in zip(*curves, strict=True)
    ]


def plot(path: Path, results: dict[str, dict[int, dict]], best) -> None:
    """Of each method the mean curve of its seeds, or a square where only its end was measured; best
    of n is what a frontier is measured by."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True)
    titles = {"kl": "KL to the SFT model, nats an answer", "seconds": "CPU seconds of the method"}
    colours = pyplot.get_cmap("tab20").colors
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for number, (name, found) in enumerate(results.items()):
            points = over_seeds([row["curve"] for row in found.values()])
            x, y = ([point[k] for point in points] for k in (key, "verifier"))
            style = dict(color=colours[number % len(colours)], linewidth=1.5, label=name)
            style["marker"] = "s" if len(points) == 1 else "o"
            style["linestyle"] = ("-", ":")[number // len(colours) % 2]
            axis.plot(x, y, markersize=4, **style)
        axis.set(xlabel=title, ylabel="verifier")
        axis.grid(alpha=0.3)
    points = over_seeds(list(best.values()))
    x, y = ([point[key] for point in points] for key in ("kl", "verifier"))
    axes[0].plot(x, y, "k-", label="the best of n")
    axes[0].legend(fontsize=7, ncols=2)
    with whole_files.placing(path) as beside:
        figure.savefig(beside, dpi=110, format="png")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", default="output/methods")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--samples", type=int, default=12_800, help="answers for each method")
    parser.add_argument("--workers", type=int, default=1, help="processes at once")
    parser.add_argument("--report_only", action="store_true", help="run nothing, tell what is")
    asked = parser.parse_args()
    program.quiet_libraries()
    output = Path(asked.output_dir).resolve()
    if asked.samples <= 0 or asked.samples % ROLLOUT:
        raise SystemExit(f"--samples {asked.samples} is no multiple of {ROLLOUT}, a rollout")
    before = kept(output / "samples.json", lambda: asked.samples)
    if before != asked.samples:
        raise SystemExit(f"{output} was begun with --samples {before}; take another --output_dir")
    bases = {seed: output / f"seed{seed}" for seed in asked.seeds}
    jobs = [
        (name, Run(base, base / name, seed, asked.samples))
        for name in asked.methods
        for seed, base in bases.items()
    ]

    def train(job: tuple[str, Run]) -> None:
        name, one = job
        method, flags = METHODS[name]
        method(one, flags)
        print(f"seed {one.seed}: {name} done", flush=True)

    if not asked.report_only:
        with ThreadPoolExecutor(asked.workers) as pool:
            list(pool.map(lambda seed: learning.build_base(bases[seed], seed), asked.seeds))
            list(pool.map(train, jobs))
    results: dict[str, dict[int, dict]] = {}
    for name, one in jobs:
        if (one.folder / "result.json").exists():
            results.setdefault(name, {})[one.seed] = result_of(one)
    if not results:
        raise SystemExit(f"{output} holds no finished method")
    starts, best = {}, {}
    for seed, base in bases.items():
        start = kept(base / "sft.json", lambda b=base, s=seed: measured(b / "step1_sft", b, s))
        starts[seed] = start["verifier"]
        best[seed] = kept(base / "best_of_n.json", lambda b=base, s=seed: best_of_n(b, s))
    plot(output / "methods.png", results, best)
    numbers = {"methods": results, "sft": starts, "best_of_n": best, "samples": asked.samples}
    whole_files.write_text(output / "methods.json", json.dumps(numbers))
    text = table(results, starts, best)
    whole_files.write_text(output / "methods.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main()
