"""The closing table of a run, summary.json and curves.png.

    python -m evaluation.summary --output_dir OUTPUT [--verifier_data held_out.jsonl]

Reads each step's result.json and metrics.jsonl; with the embedded task it also samples from the
SFT policy, the PPO policy and its average on held-out prompts and lets the verifier judge.
"""

import argparse
import json
from pathlib import Path

from utils import whole_files
from utils.data import batches, chat_template, toy_tasks
from utils.distributed import program
from utils.generation import sampling
from utils.report import standard_error, table

STEPS = {"sft": "step1_sft", "reward": "step2_reward", "ppo": "step3_ppo"}
ANSWER_TOKENS = 32
POLICIES = {"sft": "step1_sft", "ppo": "step3_ppo/actor", "ppo_ema": "step3_ppo/actor_ema"}
# What summary.json takes from each step's result.json, by its name there where that differs.
TAKEN = {
    "sft": ("eval_loss_before", "eval_loss_after"),
    "reward": (
        *("accuracy", "accuracy_low", "accuracy_high", "accuracy_before"),
        *("accuracy_longer_answer", "pairs"),
    ),
    "ppo": (
        *("score_before", "score_after", "held_out_prompts"),
        *("score_se_before", "score_se_after", "score_se_change", "kl_before"),
        *("response_length_before", "response_length_after", "eos_share_after"),
    ),
}
RENAMED = {"ppo": {"kl": "kl_after", "kl_k3": "kl_k3_after"}}


def read_result(folder: Path) -> dict:
    path = folder / "result.json"
    if not path.exists():
        raise SystemExit(f"{path} is missing: the step that writes it did not finish")
    return json.loads(path.read_text(encoding="utf-8"))


def read_metrics(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def verdicts(folder: Path, rows: list[dict], seed: int) -> list[float]:
    """The verifier's score of each row's answer, which the model in `folder` samples at temperature
    1, of at most ANSWER_TOKENS tokens."""
    from transformers import AutoModelForCausalLM

    tokenizer = chat_template.load_tokenizer(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    turns = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    encoded = [chat_template.encode_prompt(tokenizer, turn) for turn in turns]
    responses = sampling.generate(
        model,
        *batches.prompt_batch(encoded, tokenizer.pad_token_id),
        max_new_tokens=ANSWER_TOKENS,
        stop_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        noise=sampling.uniform_noise(len(rows), ANSWER_TOKENS, seed, 2**31 + 1),
    )
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return [float(toy_tasks.verify(r, t)) for r, t in zip(rows, texts, strict=True)]


def verified(output: Path, rows: list[dict], seed: int) -> dict[str, float]:
    """Of each policy the mean verdict, its standard error (…_se), and that of its differences to
    the SFT policy's, prompt by prompt (…_se_change)."""
    result = {"prompts": len(rows)}
    folders = {name: output / folder for name, folder in POLICIES.items()}
    each = {name: verdicts(f, rows, seed) for name, f in folders.items() if f.exists()}
    for name, values in each.items():
        result |= {name: sum(values) / len(values), f"{name}_se": standard_error(values)}
        gained = [b - a for a, b in zip(each["sft"], values, strict=True)]
        result[f"{name}_se_change"] = standard_error(gained)
    return result


def summarise(output: Path, verifier_data: str, seed: int, seconds: float) -> dict:
    """The contents of summary.json."""
    results = {step: read_result(output / folder) for step, folder in STEPS.items()}
    summary = {
        step: {name: results[step][name] for name in names}
        | {name: results[step][old] for name, old in RENAMED.get(step, {}).items()}
        for step, names in TAKEN.items()
    }
    summary["seconds"] = {step: result["seconds"] for step, result in results.items()}
    if seconds:
        summary["seconds"]["total"] = seconds
    if verifier_data:
        rows = [json.loads(x) for x in Path(verifier_data).read_text(encoding="utf-8").splitlines()]
        summary["verifier"] = verified(output, rows, seed)
    return summary


def _measured(value: float, error: float | None, sign: str = "") -> str:
    """A value ± its standard error, which a single prompt does not have."""
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


def closing_table(summary: dict) -> str:
    sft, reward, ppo = (summary[step] for step in STEPS)
    rows = [
        ("SFT held-out loss", sft["eval_loss_before"], sft["eval_loss_after"], ""),
        (
            "reward accuracy on held-out pairs",
            reward["accuracy_before"],
            "{accuracy:.3f} ({accuracy_low:.3f} to {accuracy_high:.3f})".format(**reward),
            "",
        ),
        ("  of always choosing the longer answer", reward["accuracy_longer_answer"], "", ""),
        (
            f"PPO score, {ppo['held_out_prompts']} held-out prompts",
            _measured(ppo["score_before"], ppo["score_se_before"]),
            _measured(ppo["score_after"], ppo["score_se_after"]),
            _measured(ppo["score_after"] - ppo["score_before"], ppo["score_se_change"], "+"),
        ),
        ("PPO KL to the reference, nats a response", ppo["kl_before"], ppo["kl"], ""),
    ]
    v = summary.get("verifier", {"prompts": 0})
    prompts = f"verifier, {v['prompts']} held-out prompts"
    for name, what in (("ppo", prompts), ("ppo_ema", "  of the average")):
        if name in v:
            before = _measured(v["sft"], v["sft_se"]) if name == "ppo" else ""
            change = _measured(v[name] - v["sft"], v[f"{name}_se_change"], "+")
            rows.append((what, before, _measured(v[name], v[f"{name}_se"]), change))
    rows = [tuple(f"{x:.3f}" if isinstance(x, float) else x for x in row) for row in rows]
    times = ", ".join(f"{name} {s:.0f} s" for name, s in summary["seconds"].items())
    legend = (
        "(…): 95 % interval, by prompt. ±: one standard error over the prompts, for a change of "
        "the differences prompt by prompt."
    )
    return f"{table(rows, ('measure', 'before', 'after', 'change'))}\n{legend}\ntime: {times}"


def plot(output: Path) -> None:
    """curves.png: loss of each training, and PPO's score, verifier and KL."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    loss, ranking, score, kl = axes.flat
    sft, reward, ppo = (read_metrics(output / folder) for folder in STEPS.values())

    def draw(axis, metrics, name, label=None, **style):
        points = [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)

    draw(loss, sft, "loss")
    loss.set(title="step 1: SFT loss a token", xlabel="optimizer step", ylabel="nats")
    draw(ranking, reward, "loss")
    ranking.set(title="step 2: ranking loss", xlabel="optimizer step", ylabel="nats a pair")
    draw(score, ppo, "score", "rollout score", alpha=0.4)
    draw(score, ppo, "eval/score", "held-out score", marker="o")
    score.set(title="step 3: score", xlabel="rollout", ylabel="reward model's score")
    score.legend(loc="lower right")
    if any(m.get("eval/verifier") is not None for m in ppo):
        right = score.twinx()
        draw(right, ppo, "eval/verifier", "held-out verifier", marker="s", color="tab:green")
        right.set(ylabel="verifier", ylim=(0, 1))
        right.legend(loc="upper left")
    for estimator in ("k1", "k2", "k3"):  # by their own names: `kl` is what --kl_estimator says
        draw(kl, ppo, f"kl_{estimator}", estimator, marker=".", alpha=0.6)
    kl.set(title="step 3: KL to the reference", xlabel="rollout", ylabel="nats a response")
    kl.legend()
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    with whole_files.placing(output / "curves.png") as beside:
        figure.savefig(beside, dpi=110, format="png")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--verifier_data", default="", help="held-out rows of the embedded task")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--seconds", type=float, default=0.0, help="time the whole run took so far")
    asked = parser.parse_args()
    program.quiet_libraries()
    output = asked.output_dir
    summary = summarise(output, asked.verifier_data, asked.seed, asked.seconds)
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    whole_files.write_text(output / "summary.json", text + "\n")
    plot(output)
    print(closing_table(summary))
    print(f"written: {output}/summary.json, {output}/curves.png")


if __name__ == "__main__":
    program.run(main)
