"""The closing table of a run, summary.json and curves.png.

    python -m evaluation.summary --output_dir OUTPUT [--verifier_data held_out.jsonl]

Reads each step's result.json and metrics.jsonl; with the embedded task it also samples from the
SFT policy, the PPO policy and its average on held-out prompts and lets the verifier judge.
"""

import argparse
import json
from pathlib import Path

from utils import whole_files

STEPS = {"sft": "step1_sft", "reward": "step2_reward", "ppo": "step3_ppo"}
POLICIES = {"sft": "step1_sft", "ppo": "step3_ppo/actor", "ppo_ema": "step3_ppo/actor_ema"}


def read_result(folder: Path) -> dict:
    path = folder / "result.json"
    if not path.exists():
        raise SystemExit(f"{path} is missing: the step that writes it did not finish")
    return json.loads(path.read_text(encoding="utf-8"))


def read_metrics(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def verify_policy(folder: Path, rows: list[dict], seed: int) -> float:
    """Mean verifier score of answers sampled at temperature 1 by the model in `folder`."""
    return sum(verdicts(folder, rows, seed)) / len(rows)


def verdicts(folder: Path, rows: list[dict], seed: int, max_new_tokens: int = 32) -> list[float]:
    """The same of each row's answer."""
    from transformers import AutoModelForCausalLM

    from utils.data import batches, chat_template, toy_tasks
    from utils.generation import sampling as generation

    tokenizer = chat_template.load_tokenizer(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    encoded = [
        chat_template.encode_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}])
        for row in rows
    ]
    ids, mask = batches.prompt_batch(encoded, tokenizer.pad_token_id)
    responses = generation.generate(
        model,
        ids,
        mask,
        max_new_tokens=max_new_tokens,
        stop_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        noise=generation.uniform_noise(len(rows), max_new_tokens, seed, 2**31 + 1),
    )
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return [float(toy_tasks.verify(r, t)) for r, t in zip(rows, texts, strict=True)]


def verified(output: Path, rows: list[dict], seed: int) -> dict[str, float]:
    """Of each policy the mean verdict, its standard error (…_se), and that of its differences to
    the SFT policy's, prompt by prompt (…_se_change)."""
    from utils.report import standard_error

    found = {"prompts": len(rows)}
    folders = {name: output / folder for name, folder in POLICIES.items()}
    each = {name: verdicts(f, rows, seed) for name, f in folders.items() if f.exists()}
    for name, values in each.items():
        found |= {name: sum(values) / len(values), f"{name}_se": standard_error(values)}
        gained = [b - a for a, b in zip(each["sft"], values, strict=True)]
        found[f"{name}_se_change"] = standard_error(gained)
    return found


def summarise(output: Path, verifier_data: str, seed: int, seconds: float) -> dict:
    """The contents of summary.json."""
    sft, reward, ppo = (read_result(output / folder) for folder in STEPS.values())
    summary = {
        "sft": {k: sft[k] for k in ("eval_loss_before", "eval_loss_after")},
        "reward": {
            k: reward[k]
            for k in (
                "accuracy",
                "accuracy_low",
                "accuracy_high",
                "accuracy_before",
                "accuracy_longer_answer",
                "pairs",
            )
        },
        "ppo": {
            "score_before": ppo["score_before"],
            "score_after": ppo["score_after"],
            "held_out_prompts": ppo["held_out_prompts"],
            "score_se_before": ppo["score_se_before"],
            "score_se_after": ppo["score_se_after"],
            "score_se_change": ppo["score_se_change"],
            "kl_before": ppo["kl_before"],
            "kl": ppo["kl_after"],
            "kl_k3": ppo["kl_k3_after"],
            "response_length_before": ppo["response_length_before"],
            "response_length_after": ppo["response_length_after"],
            "eos_share_after": ppo["eos_share_after"],
        },
        "seconds": {name: read_result(output / f)["seconds"] for name, f in STEPS.items()},
    }
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
    from utils.report import table

    sft, reward, ppo, seconds = (summary[k] for k in ("sft", "reward", "ppo", "seconds"))
    rows = [
        (
            "SFT held-out loss",
            f"{sft['eval_loss_before']:.3f}",
            f"{sft['eval_loss_after']:.3f}",
            "",
        ),
        (
            "reward accuracy on held-out pairs",
            f"{reward['accuracy_before']:.3f}",
            f"{reward['accuracy']:.3f} ({reward['accuracy_low']:.3f} to "
            f"{reward['accuracy_high']:.3f})",
            "",
        ),
        (
            "  of always choosing the longer answer",
            f"{reward['accuracy_longer_answer']:.3f}",
            "",
            "",
        ),
        (
            f"PPO score, {ppo['held_out_prompts']} held-out prompts",
            _measured(ppo["score_before"], ppo["score_se_before"]),
            _measured(ppo["score_after"], ppo["score_se_after"]),
            _measured(ppo["score_after"] - ppo["score_before"], ppo["score_se_change"], "+"),
        ),
        (
            "PPO KL to the reference, nats a response",
            f"{ppo['kl_before']:.3f}",
            f"{ppo['kl']:.3f}",
            "",
        ),
    ]
    v = summary.get("verifier", {"prompts": 0})
    prompts = f"verifier, {v['prompts']} held-out prompts"
    for name, what in (("ppo", prompts), ("ppo_ema", "  of the average")):
        if name in v:
            before = _measured(v["sft"], v["sft_se"]) if name == "ppo" else ""
            change = _measured(v[name] - v["sft"], v[f"{name}_se_change"], "+")
            rows.append((what, before, _measured(v[name], v[f"{name}_se"]), change))
    times = ", ".join(f"{name} {s:.0f} s" for name, s in seconds.items())
    told = (
        "(…): 95 % interval, by prompt. ±: one standard error over the prompts, for a change of "
        "the differences prompt by prompt."
    )
    return f"{table(rows, ('measure', 'before', 'after', 'change'))}\n{told}\ntime: {times}"


def plot(output: Path) -> None:
    """curves.png: loss of each training, and PPO's score, verifier and KL."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    sft, reward, ppo = (read_metrics(output / folder) for folder in STEPS.values())

    def draw(axis, metrics, name, label=None, **style):
        points = [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)

    draw(axes[0][0], sft, "loss")
    axes[0][0].set(title="step 1: SFT loss a token", xlabel="optimizer step", ylabel="nats")
    draw(axes[0][1], reward, "loss")
    axes[0][1].set(title="step 2: ranking loss", xlabel="optimizer step", ylabel="nats a pair")
    draw(axes[1][0], ppo, "score", "rollout score", alpha=0.4)
    draw(axes[1][0], ppo, "eval/score", "held-out score", marker="o")
    axes[1][0].set(title="step 3: score", xlabel="rollout", ylabel="reward model's score")
    axes[1][0].legend(loc="lower right")
    if any(m.get("eval/verifier") is not None for m in ppo):
        right = axes[1][0].twinx()
        draw(right, ppo, "eval/verifier", "held-out verifier", marker="s", color="tab:green")
        right.set(ylabel="verifier", ylim=(0, 1))
        right.legend(loc="upper left")
    for estimator in ("k1", "k2", "k3"):  # by their own names: `kl` is what --kl_estimator says
        draw(axes[1][1], ppo, f"kl_{estimator}", estimator, marker=".", alpha=0.6)
    axes[1][1].set(title="step 3: KL to the reference", xlabel="rollout", ylabel="nats a response")
    axes[1][1].legend()
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    with whole_files.placing(output / "curves.png") as beside:
        figure.savefig(beside, dpi=110, format="png")
    pyplot.close(figure)


def main() -> None:
    from utils.distributed.program import quiet_libraries

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--verifier_data", default="", help="held-out rows of the embedded task")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--seconds", type=float, default=0.0, help="time the whole run took so far")
    arguments = parser.parse_args()
    quiet_libraries()
    output = Path(arguments.output_dir)
    summary = summarise(output, arguments.verifier_data, arguments.seed, arguments.seconds)
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    whole_files.write_text(output / "summary.json", text + "\n")
    plot(output)
    print(closing_table(summary))
    print(f"written: {output}/summary.json, {output}/curves.png")


if __name__ == "__main__":
    from utils.distributed.program import run

    run(main)
