"""The closing table of a run, summary.json, curves.png and the run's page, report.html.

    python -m evaluation.summary --output_dir OUTPUT [--verifier_data held_out.jsonl]

Reads each step's result.json and metrics.jsonl. Of PPO alone it shows before and after; with the
embedded task it also samples from the SFT policy, the PPO policy and its average on held-out
prompts and lets the verifier judge. With --methods it shows the table of methods.json instead; with
no --reward, what step 3 measured before and after it trained each of them.
"""

import argparse
import json
from pathlib import Path

from evaluation import methods, run_folder
from evaluation.methods import measured
from utils import whole_files
from utils.data import batches, chat_template, toy_tasks
from utils.distributed import program
from utils.generation import sampling
from utils.models import adapters, value_heads
from utils.pretrained import base_of
from utils.report import standard_error, table

STEPS = {"sft": "step1_sft", "reward": "step2_reward", "ppo": "step3_ppo"}
ANSWER_TOKENS = 32
FUNCTIONS = "the reward functions, of a verifier that says 1 or 0 the share of right answers"
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
    base = base_of(str(folder)) or str(folder)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapters.put_on(model, str(folder), None)
    value_heads.put_on(model, base)
    model.eval()
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


def taken(step: str, folder: Path) -> dict:
    """What summary.json has of a step."""
    result = read_result(folder)
    row = {name: result[name] for name in TAKEN[step]}
    return row | {name: result[old] for name, old in RENAMED.get(step, {}).items()}


def summarise(output: Path, verifier_data: str, seed: int, seconds: float) -> dict:
    """The contents of summary.json of SFT, reward model and PPO."""
    folders = {step: output / folder for step, folder in STEPS.items()}
    summary = {step: taken(step, folder) for step, folder in folders.items()}
    summary["seconds"] = {step: read_result(folder)["seconds"] for step, folder in folders.items()}
    if seconds:
        summary["seconds"]["total"] = seconds
    if verifier_data:
        rows = [json.loads(x) for x in Path(verifier_data).read_text(encoding="utf-8").splitlines()]
        summary["verifier"] = verified(output, rows, seed)
    return summary


def measured_by_step_3(output: Path, names: list[str]) -> dict[str, dict[str, float]]:
    """The same measures as evaluation/methods.py's, of step 3's held-out prompts and, with an
    environment, of whole episodes. "sft" is what each method began with: all begin alike."""
    results = {name: read_result(output / f"step3_{name}") for name in names}

    def row(result: dict, when: str) -> dict:
        taken = ("score", "score_se", "kl", "response_length", "eos_share")
        found = {n: result[f"{n}_{when}"] for n in taken if f"{n}_{when}" in result}
        return found | {"prompts": result["held_out_prompts"]}

    changes = {
        name: {
            "score_change": result["score_after"] - result["score_before"],
            "score_change_se": result["score_se_change"],
        }
        for name, result in results.items()
    }
    after = {name: row(result, "after") | changes[name] for name, result in results.items()}
    return {"sft": row(results[names[0]], "before"), **after}


def summarise_without_reward_model(output: Path, names: list[str], seconds: dict) -> dict:
    """The contents of summary.json where functions alone score the answers."""
    found = {"sft": taken("sft", output / STEPS["sft"])}
    return found | {"methods": measured_by_step_3(output, names), "seconds": seconds}


def summarise_methods(output: Path, reward: Path, seconds: dict[str, float]) -> dict:
    """The contents of summary.json of any methods. reward: the folder of the reward model that all
    of them share. seconds: by method, and of what they share."""
    found = json.loads((output / "methods.json").read_text(encoding="utf-8"))
    summary = {"sft": taken("sft", output / STEPS["sft"]), "reward": taken("reward", reward)}
    return summary | {"methods": found, "seconds": seconds}


def parts_of_rewards(folders: dict[str, Path]) -> dict[str, dict[str, dict[str, float]]]:
    """{method: {part of its reward: {"before", "after"}}} of those whose reward adds up several.
    folders: of step 3, by method."""
    steps = {name: run_folder.read_step(folder) for name, folder in folders.items()}
    found = {name: step.parts() for name, step in steps.items() if step}
    return {
        name: {part: dict(zip(("before", "after"), x, strict=True)) for part, x in parts.items()}
        for name, parts in found.items()
        if parts
    }


def table_of(summary: dict) -> str:
    """The closing table of what one of the functions above gave, with the parts of rewards."""
    text = closing_table_of_methods(summary) if "methods" in summary else closing_table(summary)
    rows = [
        (name, part, x["before"], x["after"], f"{x['after'] - x['before']:+.3f}")
        for name, parts in summary.get("parts", {}).items()
        for part, x in parts.items()
    ]
    if not rows:
        return text
    header = "method", "part of its score in step 3", "before", "after", "change"
    return f"{text}\n\n{in_three_digits(rows, *header)}"


def before_step_3(sft: dict, reward: dict | None) -> list[tuple]:
    loss = ("SFT held-out loss", sft["eval_loss_before"], sft["eval_loss_after"], "")
    if reward is None:
        return [loss]
    return [
        loss,
        (
            "reward accuracy on held-out pairs",
            reward["accuracy_before"],
            "{accuracy:.3f} ({accuracy_low:.3f} to {accuracy_high:.3f})".format(**reward),
            "",
        ),
        ("  of always choosing the longer answer", reward["accuracy_longer_answer"], "", ""),
    ]


def in_three_digits(rows: list[tuple], *header: str) -> str:
    cells = [tuple(f"{x:.3f}" if isinstance(x, float) else x for x in row) for row in rows]
    return table(cells, header)


def closing_table_of_methods(summary: dict) -> str:
    rows = [row[:3] for row in before_step_3(summary["sft"], summary.get("reward"))]
    scored_by = {} if "reward" in summary else {"scored_by": FUNCTIONS}
    return (
        f"{in_three_digits(rows, 'measure', 'before', 'after')}\n\n"
        f"{methods.as_table(summary['methods'], summary['seconds'], **scored_by)}\n"
        f"time: {sum(summary['seconds'].values()):.0f} s, of which all methods share "
        f"{summary['seconds'].get('shared', 0.0):.0f} s"
    )


def closing_table(summary: dict) -> str:
    sft, reward, ppo = (summary[step] for step in STEPS)
    rows = [
        *before_step_3(sft, reward),
        (
            f"PPO score, {ppo['held_out_prompts']} held-out prompts",
            measured(ppo["score_before"], ppo["score_se_before"]),
            measured(ppo["score_after"], ppo["score_se_after"]),
            measured(ppo["score_after"] - ppo["score_before"], ppo["score_se_change"], "+"),
        ),
        ("PPO KL to the reference, nats a response", ppo["kl_before"], ppo["kl"], ""),
    ]
    v = summary.get("verifier", {"prompts": 0})
    prompts = f"verifier, {v['prompts']} held-out prompts"
    for name, what in (("ppo", prompts), ("ppo_ema", "  of the average")):
        if name in v:
            before = measured(v["sft"], v["sft_se"]) if name == "ppo" else ""
            change = measured(v[name] - v["sft"], v[f"{name}_se_change"], "+")
            rows.append((what, before, measured(v[name], v[f"{name}_se"]), change))
    times = ", ".join(f"{name} {s:.0f} s" for name, s in summary["seconds"].items())
    legend = (
        "(…): 95 % interval, by prompt. ±: one standard error over the prompts, for a change of "
        "the differences prompt by prompt."
    )
    shown = in_three_digits(rows, "measure", "before", "after", "change")
    return f"{shown}\n{legend}\ntime: {times}"


def plot(output: Path, reward: Path | None, policies: dict[str, Path]) -> None:
    """curves.png: loss of SFT and reward model; scores, verifier and KL of each method that learns
    from rollouts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    loss, ranking, score, kl = axes.flat
    right = None

    def draw(axis, metrics, name, label=None, **style):
        points = [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)

    draw(loss, read_metrics(output / STEPS["sft"]), "loss")
    loss.set(title="step 1: SFT loss a token", xlabel="optimizer step", ylabel="nats")
    ranking.set_visible(reward is not None)
    if reward is not None:
        draw(ranking, read_metrics(reward), "loss")
    ranking.set(title="step 2: ranking loss", xlabel="optimizer step", ylabel="nats a pair")
    score.set(title="step 3: score", xlabel="rollout", ylabel="reward model's score")
    kl.set(title="step 3: KL to the reference", xlabel="rollout", ylabel="nats a response")
    alone = len(policies) == 1
    for name, folder in policies.items():
        metrics, which = read_metrics(folder), "" if alone else f" {name}"
        if alone:
            draw(score, metrics, "score", "rollout score", alpha=0.4)
        draw(score, metrics, "eval/score", f"held-out score{which}", marker="o")
        if any(m.get("eval/verifier") is not None for m in metrics):
            right = right or score.twinx()
            draw(right, metrics, "eval/verifier", f"held-out verifier{which}", marker="s", ls=":")
            right.set(ylabel="verifier", ylim=(0, 1))
        # By their own names: `kl` is what --kl_estimator says.
        for estimator in ("k1", "k2", "k3") if alone else ("k1",):
            draw(kl, metrics, f"kl_{estimator}", f"{estimator}{which}", marker=".", alpha=0.6)
    for axis in filter(None, (score, right, kl)):
        if axis.lines:
            axis.legend(loc="upper left" if axis is right else "lower right", fontsize="small")
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
    parser.add_argument("--methods", nargs="*", default=["ppo"], help="those of the run")
    parser.add_argument("--reward", type=Path, help="the reward model that several methods share")
    parser.add_argument("--seconds", nargs="*", default=[], help="NAME=SECONDS, what each took")
    asked = parser.parse_args()
    program.quiet_libraries()
    output = asked.output_dir
    pairs = [pair.partition("=") for pair in asked.seconds]
    seconds = {name: float(value) for name, _, value in pairs}
    reward = asked.reward
    if reward is None:
        summary = summarise_without_reward_model(output, asked.methods, seconds)
    elif asked.methods == ["ppo"]:
        # The folder may hold other methods, whose seconds are not this run's.
        reward, total = output / STEPS["reward"], sum(seconds.get(n, 0) for n in ("shared", "ppo"))
        summary = summarise(output, asked.verifier_data, asked.seed, total)
    else:
        summary = summarise_methods(output, reward, seconds)
    folders = {name: output / f"step3_{name}" for name in asked.methods}
    if parts := parts_of_rewards(folders):
        summary["parts"] = parts
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    whole_files.write_text(output / "summary.json", text + "\n")
    plot(output, reward, {name: f for name, f in folders.items() if (f / "actor").exists()})
    from evaluation import html_report  # which shows the tables of this module

    html_report.write([output], output / "report.html")
    print(table_of(summary))
    print(
        "written:",
        ", ".join(f"{output}/{x}" for x in ("summary.json", "curves.png", "report.html")),
    )


if __name__ == "__main__":
    program.run(main)
