"""The numbers of a reward model's report card, and how they are shown: from comparisons and scores
alone, without a model."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation import estimates, pages
from utils import whole_files
from utils.confidence import interval_by_prompt, ranking_accuracy
from utils.data.comparisons import Comparison
from utils.report import table
from utils.terminal import visible

QUANTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class Pair:
    """Two answers to one comparison's prompt, numbers in it, the first better by its label."""

    row: int
    better: int
    worse: int


def pairs_of(rows: list[Comparison]) -> list[Pair]:
    return [
        Pair(n, i, j)
        for n, row in enumerate(rows)
        for i, a in enumerate(row.scores)
        for j, b in enumerate(row.scores)
        if a > b
    ]


# What an answer has that people, or a model, may like or dislike: of (answer, prompt).

REFUSAL = re.compile(
    r"\b(I'm sorry|I am sorry|I apologi[sz]e|I can(?:no|')t|I am unable|I'm unable|as an AI)\b"
    r"|抱歉|对不起|我不能|我无法|作为一个(?:AI|人工智能)",
    re.I,
)
POLITE = re.compile(
    r"\b(please|thank you|thanks|you're welcome|happy to|glad to|I hope)\b|请|谢谢|您|希望", re.I
)
LIST = re.compile(r"^\s*(?:[-*•]|\d+[.)、])\s*\S", re.M)
MARKUP = re.compile(r"^#{1,6} |\*\*\S|^```", re.M)
CHINESE = re.compile(r"[\u3400-\u9fff]")


def share_chinese(text: str) -> float:
    letters = [c for c in text if c.isalpha()]
    return sum(bool(CHINESE.match(c)) for c in letters) / max(len(letters), 1)


FEATURES = {
    "length, each doubling": lambda a, p: math.log2(1 + len(a)),
    "a list": lambda a, p: float(len(LIST.findall(a)) > 1),
    "headings, bold or code": lambda a, p: float(bool(MARKUP.search(a))),
    "a refusal or apology": lambda a, p: float(bool(REFUSAL.search(a))),
    "politeness": lambda a, p: float(bool(POLITE.search(a))),
    "another language than the prompt's": lambda a, p: abs(share_chinese(a) - share_chinese(p)),
}


def paid_for(rows, pairs, scores, prompts) -> dict[str, dict]:
    """Of each feature how much it makes an answer win, in nats of the odds, all others alike: by
    the labels and by the model's scores, with intervals by prompt. A feature that no pair differs
    in is left out.

    Logistic regression of who wins on the difference of features; both are of the same pairs, so
    that what the model likes more than the labels do is what it pays for.
    """
    said = [row.prompt[-1]["content"] for row in rows]
    values = [
        [[f(text, p) for f in FEATURES.values()] for text in row.responses]
        for row, p in zip(rows, said, strict=True)
    ]
    x = np.array([np.subtract(values[p.row][p.better], values[p.row][p.worse]) for p in pairs])
    seen = np.abs(x).max(0) > 0
    if not seen.any():
        return {}
    margins = margins_of(pairs, scores)
    chosen = (margins > 0) + 0.5 * (margins == 0)
    both = [np.ones(len(pairs)), chosen]
    fits = [
        estimates.bootstrap(lambda w, y=y: estimates.logistic(x[:, seen], y, w), prompts)
        for y in both
    ]
    names = [name for name, there in zip(FEATURES, seen, strict=True) if there]
    return {
        name: {
            who: [float(part[k]) for part in fit]
            for who, fit in zip(("labels", "model"), fits, strict=True)
        }
        for k, name in enumerate(names)
    }


def margins_of(pairs: list[Pair], scores) -> np.ndarray:
    """Score of the better answer less that of the worse one, of each pair."""
    return np.array([scores[p.row][p.better] - scores[p.row][p.worse] for p in pairs])


def accuracy(margins: np.ndarray, prompts: np.ndarray) -> dict:
    """Of some pairs: [share right, low, high], and how many they are."""
    right = (margins > 0) + 0.5 * (margins == 0)
    return {"accuracy": [float(right.mean()), *interval_by_prompt(right, prompts)]} | {
        "pairs": len(right)
    }


def by_quantile(values: np.ndarray, margins, prompts, parts: int = 4) -> dict[str, dict]:
    """Accuracy of pairs with like `values`, in parts of about as many pairs."""
    values = np.array([float(f"{v:.4g}") for v in values])  # as shown: 0.1 + 0.2 is 0.3
    edges = np.unique(np.quantile(values, np.linspace(0, 1, parts + 1)))
    if len(edges) < 2:
        return {}
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    found = {}
    for k in np.unique(place):
        inside = place == k
        low, high = values[inside].min(), values[inside].max()
        found[f"{low:.4g} to {high:.4g}"] = accuracy(margins[inside], prompts[inside])
    return found


def spread(scores: list[float]) -> dict:
    """Mean, quantiles and number."""
    found = {f"p{q}": float(np.percentile(scores, q)) for q in QUANTILES}
    return {"mean": float(np.mean(scores)), "answers": len(scores)} | found


def agreement(margins, others, prompts) -> dict:
    """How a second reward model's margins go with the first's."""
    alike = (np.sign(margins) == np.sign(others)).astype(float)
    found = {"pairs_alike": [float(alike.mean()), *interval_by_prompt(alike, prompts)]}
    varied = np.ptp(margins) > 0 and np.ptp(others) > 0
    found["correlation"] = float(np.corrcoef(margins, others)[0, 1]) if varied else None
    return found | {"second": accuracy(others, prompts)}


def report_of(rows, ranked, scores, categories, second=None, policies=None, worst=10) -> dict:
    """The contents of reward_report.json.

    rows: Comparisons; ranked: the same as tokens; scores: the model's, of each row's answers.
    categories: of each row, or None. second: another model's scores. policies: {name: scores}.
    """
    labels = [r.labels for r in ranked]
    overall = ranking_accuracy(
        labels, scores, [r.characters for r in ranked], [r.prompt for r in ranked]
    )
    pairs = pairs_of(rows)
    prompts = np.array([str(ranked[p.row].prompt) for p in pairs])
    margins = margins_of(pairs, scores)
    gaps = np.array([rows[p.row].scores[p.better] - rows[p.row].scores[p.worse] for p in pairs])
    longer = np.array(
        [len(rows[p.row].responses[p.better]) - len(rows[p.row].responses[p.worse]) for p in pairs]
    )
    found = {"overall": overall, "prompts": len(set(prompts))}
    found["by difference of the labels"] = by_quantile(gaps, margins, prompts)
    found["by characters that the better answer is longer"] = by_quantile(longer, margins, prompts)
    named_rows = np.array([categories[p.row] for p in pairs], dtype=object)
    found["by category"] = {
        str(name): accuracy(margins[named_rows == name], prompts[named_rows == name])
        for name in sorted(set(categories) - {None}, key=str)
        if (named_rows == name).any()
    }
    found["calibration"] = estimates.calibration(margins)
    found["pays for"] = paid_for(rows, pairs, scores, prompts) if found["prompts"] > 1 else {}
    ends = [
        (max(range(len(g)), key=g.__getitem__), min(range(len(g)), key=g.__getitem__))
        for g in labels
    ]
    found["scores"] = {
        "chosen": spread([s[best] for s, (best, _) in zip(scores, ends, strict=True)]),
        "rejected": spread([s[least] for s, (_, least) in zip(scores, ends, strict=True)]),
    } | {name: spread(each) for name, each in (policies or {}).items()}
    if second is not None:
        found["agreement"] = agreement(margins, margins_of(pairs, second), prompts)
    found["most wrong"] = [
        {
            "where": rows[p.row].where,
            "prompt": list(rows[p.row].prompt),
            "better": rows[p.row].responses[p.better],
            "worse": rows[p.row].responses[p.worse],
            "margin": float(margins[k]),
            "labels": [float(rows[p.row].scores[p.better]), float(rows[p.row].scores[p.worse])],
        }
        for k, p in sorted(enumerate(pairs), key=lambda pair: margins[pair[0]])[:worst]
        if margins[k] < 0
    ]
    return found


# Pages.


def interval(values) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*values)


def tables_of(report: dict) -> str:
    x = report["overall"]
    parts = [
        f"accuracy {interval([x['accuracy'], x['accuracy_low'], x['accuracy_high']])} on "
        f"{x['pairs']} pairs of {report['prompts']} prompts; always the longer answer: "
        f"{x['accuracy_longer_answer']:.3f}; mean margin {x['margin']:.3f}\n(…): 95 % interval, by "
        "prompt"
    ]
    for name in [n for n in report if n.startswith("by ")]:
        if report[name]:
            lines = [
                (visible(part), interval(y["accuracy"]), y["pairs"])
                for part, y in report[name].items()
            ]
            parts.append(table(lines, (name, "accuracy", "pairs")))
    bins = report["calibration"]["bins"]
    lines = [(f"{b['claim']:.3f}", f"{b['right']:.3f}", b["pairs"]) for b in bins]
    parts.append(
        table(lines, ("sure of its choice", "right", "pairs"))
        + f"\nexpected calibration error {report['calibration']['expected_error']:.3f}"
    )
    lines = [
        (n, interval(y["labels"]), interval(y["model"])) for n, y in report["pays for"].items()
    ]
    if lines:
        parts.append(
            table(lines, ("pays for", "the labels", "the model"))
            + "\nnats by which the odds to win rise, all else alike"
        )
    lines = [
        (
            visible(name),
            y["answers"],
            *(f"{y[k]:.3f}" for k in ("mean", *(f"p{q}" for q in QUANTILES))),
        )
        for name, y in report["scores"].items()
    ]
    header = ("scores of", "answers", "mean", *(f"{q} %" for q in QUANTILES))
    parts.append(table(lines, header))
    if found := report.get("agreement"):
        correlation = found["correlation"]
        parts.append(
            f"the second reward model orders {interval(found['pairs_alike'])} of the pairs alike, "
            f"correlation of the margins "
            f"{'none' if correlation is None else f'{correlation:.3f}'}; it is right on "
            f"{interval(found['second']['accuracy'])}"
        )
    return "\n\n".join(parts)


def as_markdown(report: dict, title: str) -> str:
    parts = ["# Report card of a reward model", pages.fence(title), pages.fence(tables_of(report))]
    parts.append(f"## The {len(report['most wrong'])} most wrong pairs")
    for n, pair in enumerate(report["most wrong"], 1):
        parts.append("### " + pages.code_span(f"{n}: {pair['where']}, margin {pair['margin']:.3f}"))
        for turn in pair["prompt"]:
            parts += [pages.code_span(turn["role"]), pages.fence(turn["content"])]
        for side, label in zip(("better", "worse"), pair["labels"], strict=True):
            parts += [f"{side} by the labels ({label:g})", pages.fence(pair[side])]
    return "\n\n".join(parts) + "\n"


def plot(report: dict, path: Path) -> None:
    """Calibration, what is paid for, scores."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(15, 4.5), constrained_layout=True
    )
    bins = report["calibration"]["bins"]
    left.plot([0.5, 1], [0.5, 1], color="grey", linewidth=0.8)
    left.plot([b["claim"] for b in bins], [b["right"] for b in bins], marker="o")
    error = report["calibration"]["expected_error"]
    left.set(title=f"calibration, error {error:.3f}", xlabel="sure of its choice", ylabel="right")
    effects = report["pays for"]
    for shift, who in ((-0.1, "labels"), (0.1, "model")):
        for row, each in enumerate(effects.values()):
            value, low, high = each[who]
            bar = [[max(0, value - low)], [max(0, high - value)]]
            colour, label = f"C{int(who == 'model')}", None if row else who
            middle.errorbar(
                value, row + shift, xerr=bar, fmt="o", capsize=3, color=colour, label=label
            )
    middle.set_yticks(range(len(effects)), list(effects), fontsize="small")
    middle.invert_yaxis()
    middle.axvline(0, color="grey", linewidth=0.8)
    middle.set(title="pays for", xlabel="nats of the odds to win")
    if effects:
        middle.legend(fontsize="small")
    ends = dict(zip(("whislo", "q1", "med", "q3", "whishi"), QUANTILES, strict=True))
    boxes = [
        {"label": visible(name).replace("$", r"\$")} | {end: x[f"p{q}"] for end, q in ends.items()}
        for name, x in report["scores"].items()
    ]
    right.bxp(boxes, showfliers=False)
    right.set(title="scores: 5, 25, 50, 75, 95 %")
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    with whole_files.placing(path) as beside:
        figure.savefig(beside, dpi=110, format="png")
    pyplot.close(figure)
