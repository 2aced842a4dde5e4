"""The curves of runs as SVG, in colours that the page chooses for light and dark."""

import io
import math
from dataclasses import dataclass

from evaluation.run_folder import Step

POINTS = 400  # a longer curve is drawn as means over neighbours
# Drawn in these and then given to the page's style sheet.
INK = "#010203"
COLOURS = {f"#0000{n:02x}": f"var(--series-{n})" for n in range(1, 7)} | {INK: "currentColor"}


@dataclass(frozen=True)
class Figure:
    """names: metrics, of which those are drawn that were recorded. over_kl: over √KL, the first on
    the left axis and the others, whose best checkpoint is marked, on the right."""

    title: str
    unit: str
    names: tuple[str, ...]
    over_kl: bool = False


FIGURES = {
    "sft": (
        Figure("loss", "nats a token", ("loss", "eval/loss")),
        Figure("gradient norm", "", ("grad_norm",)),
    ),
    "reward": (
        Figure("ranking loss", "nats a comparison", ("loss",)),
        Figure(
            "held-out accuracy",
            "share of pairs",
            ("eval/accuracy", "eval/accuracy_low", "eval/accuracy_high")
            + ("eval/accuracy_longer_answer",),
        ),
    ),
    "ppo": (
        Figure("score", "score", ("score", "eval/score")),
        Figure(
            "parts of the score",
            "score",
            ("score_model", "score_function", "eval/score_model", "eval/score_function"),
        ),
        Figure("a judge that training did not see", "", ("eval/verifier", "eval/judge")),
        Figure("proxy and gold", "", ("eval/score", "eval/verifier", "eval/judge"), over_kl=True),
        Figure("KL to the reference", "nats an answer", ("kl_k1", "kl_k3", "eval/kl_k1")),
        Figure("answers that end by themselves", "share", ("eos_share", "eval/eos_share")),
        Figure("length of answers", "tokens", ("response_length", "eval/response_length")),
        Figure("entropy", "nats a token", ("entropy", "eval/entropy")),
        Figure("variance explained by the critic", "", ("explained_variance",)),
        Figure("updates clipped", "share", ("clip_fraction",)),
        Figure("time of a rollout", "s", ("seconds_generate", "seconds_score", "seconds_train")),
    ),
    "preference": (
        Figure("proxy and gold", "", ("eval/margin", "eval/verifier", "eval/judge"), over_kl=True),
        Figure("answers that end by themselves", "share", ("eval/eos_share",)),
        Figure("loss", "", ("loss", "eval/loss")),
        Figure("accuracy", "share of pairs", ("accuracy", "eval/accuracy")),
        Figure("implied rewards", "", ("chosen_reward", "rejected_reward")),
        Figure("log-probabilities", "nats an answer", ("chosen_logprob", "rejected_logprob")),
    ),
}


def thinned(points: list[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of as many neighbours."""
    size = -(-len(points) // most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(sum(x) / len(group) for x in zip(*group, strict=True)) for group in groups]


def over_kl(step: Step, name: str) -> list[tuple[float, float]]:
    """(√KL, the metric) of each evaluation, in the order of training; KL by its unbiased estimate
    that is never below 0, or where that is not there by the other one."""
    rows = [(m.get("eval/kl_k3", m.get("eval/kl_k1")), m.get(name)) for m in step.metrics]
    return [(math.sqrt(max(kl, 0.0)), x) for kl, x in rows if kl is not None and x is not None]


def curves(figure: Figure, steps: list[tuple[str, Step]]) -> list[tuple[str, str, list]]:
    """(metric, whose, points) of all that was recorded. steps: (name, step)."""
    found = []
    for name in figure.names:
        for whose, step in steps:
            points = over_kl(step, name) if figure.over_kl else step.values(name)
            found += [(name, whose, points)] if len(points) > 1 else []
    return found


def draw(figure: Figure, steps: list[tuple[str, Step]]) -> str:
    """The SVG of the curves of some steps of one kind; empty where nothing was recorded."""
    drawn = curves(figure, steps)
    metrics = list(dict.fromkeys(name for name, *_ in drawn))
    if not drawn or (figure.over_kl and len(metrics) < 2):
        return ""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # A name of a run may hold "$", which is no formula.
    settings = {"svg.fonttype": "none", "svg.hashsalt": figure.title, "text.parse_math": False}
    settings |= {"font.size": 9}
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings |= dict.fromkeys(names, INK) | {"grid.color": INK}
    colours, text = list(COLOURS)[:6], io.StringIO()
    with pyplot.rc_context(settings):
        canvas, left = pyplot.subplots(figsize=(4.6, 2.7), layout="constrained")
        # Two measures in units of their own have an axis each.
        right = left.twinx() if figure.over_kl else left
        for k, (name, whose, points) in enumerate(drawn):
            held_out, several = name.startswith("eval/"), len(steps) > 1
            first = name == metrics[0]
            style = {"marker": "o", "markersize": 3} if held_out else {"linewidth": 1}
            line = ("-", "--", ":", "-.")[metrics.index(name) % 4 if several else 0]
            label = f"{whose}: {name}" if several else name
            colour = colours[[w for w, _ in steps].index(whose) % 6 if several else k % 6]
            axis = left if first else right
            axis.plot(*zip(*thinned(points), strict=True), line, color=colour, label=label, **style)
            if figure.over_kl and not first:
                best = max(points, key=lambda point: point[1])
                axis.plot(*best, "*", markersize=11, color=colour)
                axis.annotate("keep", best, xytext=(0, 7), textcoords="offset points", fontsize=8)
        left.set(xlabel="√KL" if figure.over_kl else "step", ylabel=figure.unit)
        if not figure.over_kl:
            left.xaxis.get_major_locator().set_params(integer=True)
        if figure.over_kl:
            left.set(ylabel=metrics[0])
            right.set(ylabel=", ".join(metrics[1:]))
            canvas.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=7)
        elif len(drawn) > 1:
            left.legend(frameon=False, fontsize=7)
        left.grid(alpha=0.15)
        for side in ("top", *([] if figure.over_kl else ["right"])):
            left.spines[side].set_visible(False)
            right.spines[side].set_visible(False)
        canvas.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(canvas)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]  # without what only a file of its own needs
    for drawn_in, shown_in in COLOURS.items():
        svg = svg.replace(drawn_in, shown_in)
    return svg


def all_of(kind: str, steps: list[tuple[str, Step]]) -> list[tuple[str, str]]:
    """(title, SVG) of the figures of a kind of step."""
    made = [(figure.title, draw(figure, steps)) for figure in FIGURES[kind]]
    return [(title, svg) for title, svg in made if svg]
