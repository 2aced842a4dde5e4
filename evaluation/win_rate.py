"""Checkpoints against each other on the same prompts: how often which one's answer is better.

python evaluation/win_rate.py --checkpoints output/step1_sft output/step3_ppo/actor \\
    --prompts held_out.jsonl --judge verifier

All pairs of checkpoints play; whoever is named later is "second". Two are called different only
where the 95 % interval of the win rate, by prompt, does not hold one half.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

import numpy as np

from evaluation import answers as answer_files
from evaluation import estimates, judges, pages, prompt_eval, questions
from evaluation.judges import Game
from utils import whole_files
from utils.confidence import interval_by_prompt
from utils.data import toy_tasks
from utils.distributed import program
from utils.report import table
from utils.rewards.functions import FunctionError
from utils.settings import command_line
from utils.settings.fields import free, setting
from utils.terminal import visible

ENDPOINT = "judge=endpoint"


@dataclass
class WinRateConfig(prompt_eval.PromptEvalConfig):
    """Answers come about as in prompt_eval.py."""

    show_answers: bool = setting(False, "print each answer as it comes")
    answers: str = setting("", "answers.jsonl of prompt_eval.py; empty: checkpoints answer now")
    judge: str = setting(
        "verifier",
        "who says which answer is better: the embedded task's program, --reward_function, "
        "--reward_model, people (a file of rankings), or a language model behind an endpoint",
        choices=("verifier", "reward_function", "reward_model", "people", "endpoint"),
    )
    reward_model: str = setting(
        "", "folder of the reward model that judges", only_with="judge=reward_model"
    )
    tie_margin: float = setting(0.0, "scores no further apart are a tie")
    reward_function: list[str] = setting(
        [],
        "package.module:name or FILE.py:name of callables (prompts, responses, rows) → scores",
        only_with="judge=reward_function",
    )
    reward_function_timeout: float = free(
        60.0, "seconds each may take for all answers; 0: any", only_with="judge=reward_function"
    )
    rankings: list[str] = setting(
        [],
        "people's choices, as step 2 reads them: rows of prompt, responses, and ranks or scores",
        only_with="judge=people",
    )
    judge_url: str = setting(
        "", "where /chat/completions is, as http://localhost:8000/v1", only_with=ENDPOINT
    )
    judge_model: str = setting(
        "", "name of the model that the endpoint shall use", only_with=ENDPOINT
    )
    judge_timeout: float = setting(
        120.0, "seconds a verdict, with all tries; 0: any", only_with=ENDPOINT
    )
    judge_parallel: int = setting(8, "verdicts asked for at once", at_least=1, only_with=ENDPOINT)
    judge_options: str = setting(
        "",
        "JSON of what else a request says; null leaves a field out: "
        '{"max_tokens": null, "max_completion_tokens": 2000}',
        check=judges.json_object,
        only_with=ENDPOINT,
    )
    judge_prices: list[float] = setting(
        [],
        "price of a million tokens read and of a million written, for the cost",
        only_with=ENDPOINT,
    )

    def contradictions(self, world_size: int) -> Iterator[str]:
        yield from super().contradictions(world_size)
        if len(self.checkpoints) == 1:
            yield "checkpoints names one, and two are needed; set --checkpoints"
        needed = {
            "endpoint": ["judge_url", "judge_model", "output_dir"],
            "people": ["rankings"],
            "reward_model": ["reward_model"],
            "reward_function": ["reward_function"],
        }
        for name in needed.get(self.judge, []):
            if not getattr(self, name):
                yield f"judge={self.judge} needs --{name}, which is empty"
        if self.tie_margin and self.judge in ("people", "endpoint"):
            yield (
                f"tie_margin={self.tie_margin} is of scores, and judge={self.judge} gives none; "
                "leave it out, or choose another --judge"
            )
        if len(self.judge_prices) not in (0, 2):
            yield f"judge_prices={self.judge_prices}: give --judge_prices two numbers"
        if self.answers and not Path(self.answers).is_file():
            yield f"answers: {self.answers!r} does not exist; set --answers to a file"
        for flag in self.formats() if self.answers else ():
            yield f"{flag} is written where checkpoints answer now; leave out it or --answers"


def games_of(results: answer_files.Results) -> list[Game]:
    """All pairs of checkpoints, prompt by prompt and turn by turn."""
    return [
        Game(i, a, b)
        for first, second in itertools.combinations(results, 2)
        for i, groups in enumerate(zip(results[first], results[second], strict=True))
        for a, b in zip(*groups, strict=True)
    ]


def share(values, prompts) -> list[float]:
    """[mean, low, high] of numbers from 0 to 1, 95 % interval by prompt."""
    values = np.asarray(values, float)
    return [float(values.mean()), *interval_by_prompt(values, prompts)]


def mean(values, prompts) -> list[float]:
    """[mean, low, high] of any numbers, 95 % interval by prompt."""
    values = np.asarray(values, float)
    found = estimates.bootstrap(lambda weights: weights @ values / weights.sum(1), prompts)
    return [float(x) for x in found]


def pair_of(names: tuple[str, str], played: list[tuple[Game, float]]) -> dict:
    """What two checkpoints' games say."""
    points = np.array([p for _, p in played])
    prompts = [g.prompt for g, _ in played]
    longer = [len(g.second.answer) - len(g.first.answer) for g, _ in played]
    rate = share(points, prompts)
    even = rate[1] <= 0.5 <= rate[2]
    found = {"first": names[0], "second": names[1], "games": len(played)}
    found["prompts"] = len(set(prompts))
    for name, value in (("win", 1.0), ("tie", 0.5), ("loss", 0.0)):
        found[name] = share(points == value, prompts)
    found["win_rate"] = rate
    if found["prompts"] > 1:
        controlled = estimates.length_controlled_win_rate(points, longer, prompts)
        found["length_controlled"] = [float(x) for x in controlled]
    found["longer_by"] = float(np.mean(longer))
    found["better"] = None if even else names[rate[0] > 0.5]
    return found


def summarised(config, results, games: list[Game], points: list[float | None], told: dict) -> dict:
    """The contents of win_rate.json."""
    played = [(g, p) for g, p in zip(games, points, strict=True) if p is not None]
    if not played:
        raise SystemExit(f"judge={config.judge} has judged none of {len(games)} pairs of answers")
    names = list(results)
    how = {"answers": config.answers} if config.answers else config.shown()
    summary = {"judge": config.judge, "settings": how | {"prompts": config.prompts}}
    summary |= {"games": len(played), "not_judged": len(games) - len(played), **told}
    summary["checkpoints"] = {name: {} for name in names}
    for name, groups in results.items():
        of_each = [(i, a.score) for i, g in enumerate(groups) for a in g if a.score is not None]
        if of_each:
            numbers, scores = zip(*of_each, strict=True)
            if config.judge == "verifier":  # a share, as interval_by_prompt takes it
                summary["checkpoints"][name]["score"] = share(scores, numbers)
            elif len(set(numbers)) > 1:
                summary["checkpoints"][name]["score"] = mean(scores, numbers)
    if len({g.prompt for g, _ in played}) > 1:
        first, second = (
            [names.index(a.checkpoint) for a in side]
            for side in zip(*((g.first, g.second) for g, _ in played), strict=True)
        )
        outcomes = [p for _, p in played], [g.prompt for g, _ in played]
        ratings = estimates.bradley_terry(second, first, *outcomes, len(names))
        for name, *rating in zip(names, *(x.tolist() for x in ratings), strict=True):
            summary["checkpoints"][name]["elo"] = rating
    summary["pairs"] = []
    for pair in itertools.combinations(names, 2):
        of_pair = [x for x in played if (x[0].first.checkpoint, x[0].second.checkpoint) == pair]
        if of_pair:
            summary["pairs"].append(pair_of(pair, of_pair))
    return summary


def interval(values: list[float] | None, digits: int = 3) -> str:
    if values is None:
        return "-"
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*values, d=digits)


def as_text(summary: dict) -> str:
    """The tables of a summary."""
    columns = ("win", "tie", "loss", "win_rate", "length_controlled")
    lines = [
        (
            *(visible(pair[side]) for side in ("second", "first")),
            *(interval(pair.get(name)) for name in columns),
            f"better: {visible(pair['better'])}" if pair["better"] else "not told apart",
        )
        for pair in summary["pairs"]
    ]
    header = ("second", "first", "win", "tie", "loss", "win rate", "length-controlled", "verdict")
    parts = [table(lines, header)]
    each = [
        (visible(name), interval(x.get("elo"), 0), interval(x.get("score")))
        for name, x in summary["checkpoints"].items()
    ]
    parts.append(table(each, ("checkpoint", "Elo", "mean score")))
    left_out = summary["not_judged"]
    parts.append(
        f"{summary['games']} pairs of answers judged by {summary['judge']}, {left_out} left out "
        "without a verdict. The second's wins over the first's answers; (…): 95 % interval, by "
        "prompt.\nElo: the first checkpoint at 1000, intervals of the difference to it."
    )
    if summary["judge"] == "endpoint":
        agree, cost = summary["orders_agree"], summary.get("cost")
        parts.append(
            f"judge: {summary['prompt_tokens']} tokens read, {summary['completion_tokens']} "
            f"written{'' if cost is None else f', cost {cost:.4f}'}; {summary['asked_now']} "
            f"replies now, the others of earlier runs; both orders agree on "
            f"{'none' if agree is None else f'{agree:.1%}'}"
        )
    return "\n\n".join([*parts, *map(visible, summary.get("refused", []))])


def plot(summary: dict, path: Path) -> None:
    """Win rates of all pairs, and ratings, with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pairs, names = summary["pairs"], list(summary["checkpoints"])
    shape = dict(figsize=(11, 1.5 + 0.5 * max(len(pairs), len(names))), constrained_layout=True)
    figure, (left, right) = pyplot.subplots(1, 2, **shape)

    def draw(axis, rows, labels, middle, **how):
        for row, values in enumerate(rows):
            if values is not None:
                value, low, high = values
                error = [[max(0, value - low)], [max(0, high - value)]]
                axis.errorbar(value, row + how["shift"], xerr=error, fmt=how["mark"], capsize=3)
        shown = [visible(label).replace("$", r"\$") for label in labels]
        axis.set_yticks(range(len(labels)), shown, fontsize="x-small")
        axis.axvline(middle, color="grey", linewidth=0.8)
        axis.grid(axis="x", alpha=0.3)

    labels = [f"{pair['second']}\nover {pair['first']}" for pair in pairs]
    draw(left, [p["win_rate"] for p in pairs], labels, 0.5, shift=-0.08, mark="C0o")
    controlled = [p.get("length_controlled") for p in pairs]
    draw(left, controlled, labels, 0.5, shift=0.08, mark="C1s")
    left.set(title="win rate (square: at equal length)", xlim=(0, 1))
    elo = [x.get("elo") for x in summary["checkpoints"].values()]
    draw(right, elo, names, estimates.FIRST_ELO, shift=0, mark="C0o")
    right.set(title="Elo")
    for axis in (left, right):
        axis.invert_yaxis()  # the first on top, as in the table
    with whole_files.placing(path) as beside:
        figure.savefig(beside, dpi=110, format="png")
    pyplot.close(figure)


def write(folder: Path, summary: dict, asked, games, points) -> None:
    """win_rate.json, the plot, and every game."""
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    whole_files.write_text(folder / "win_rate.json", text + "\n")
    with whole_files.writing(folder / "games.jsonl") as file:
        for game, points_of_it in zip(games, points, strict=True):
            record = {"where": asked[game.prompt].where, "turn": game.first.turn}
            for side, answer in (("first", game.first), ("second", game.second)):
                record |= {side: answer.checkpoint, f"{side}_answer": answer.answer}
            record["points_of_second"] = points_of_it
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    plot(summary, folder / "win_rate.png")
    print(f"written: {folder}/win_rate.json, win_rate.png, games.jsonl", flush=True)


def load(config) -> tuple[list[questions.Question], answer_files.Results]:
    asked = questions.load(config.prompts, config.max_prompts)
    other = [q.where for q in asked if not toy_tasks.is_task(q.row)]
    if config.judge == "verifier" and other:
        raise SystemExit(
            f"judge=verifier: {other[0]} is no task of utils/data/toy_tasks.py ({len(other)} in "
            "all), which alone it judges; choose another --judge"
        )
    if config.answers:
        return asked, answer_files.read(config.answers, asked, config.checkpoints)
    prompt_eval.refuse_prompts(config, asked)
    results, seconds = {}, {}
    for path in config.checkpoints:
        results[path], seconds[path] = prompt_eval.answer_all(config, path, asked)
    # The judge comes later: no answer has a score yet.
    unscored = dataclasses.replace(config, reward_model="")
    prompt_eval.write(unscored, asked, results, pages.summary_table(results, seconds))
    return asked, results


def main() -> None:
    config = command_line.parse(WinRateConfig, __doc__)
    program.quiet_libraries()
    asked, results = load(config)
    games = games_of(results)
    try:
        points, told = judges.JUDGES[config.judge](config, asked, games)
    except FunctionError as error:
        raise SystemExit(str(error)) from None
    summary = summarised(config, results, games, points, told)
    if config.output_dir:
        write(Path(config.output_dir), summary, asked, games, points)
    print(as_text(summary), flush=True)


if __name__ == "__main__":
    program.run(main)
