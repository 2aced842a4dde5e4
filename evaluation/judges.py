"""Who says which of two answers is better: a program, a reward function or model, people, or a
language model behind an endpoint."""

import collections
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation import prompt_eval
from evaluation.answers import Answer
from utils.data import comparisons, rows, toy_tasks
from utils.rewards import sums
from utils.rewards.judge import Judge


def json_object(text: str) -> dict:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


@dataclass(frozen=True)
class Game:
    """Answers of two checkpoints to one prompt, in one turn."""

    prompt: int
    first: Answer
    second: Answer


# Judges: (config, questions, games) → (points of the second answer of each game, 1, 0.5 or 0, None
# where there is no verdict; what else is to be told).


def by_score(games: list[Game], margin: float) -> list[float | None]:
    points = []
    for game in games:
        a, b = game.first.score, game.second.score
        if a is None or b is None:
            points.append(None)
        else:
            points.append(0.5 if abs(b - a) <= margin else float(b > a))
    return points


def all_answers(games: list[Game]) -> list[tuple[int, Answer]]:
    """(number of its prompt, answer), each once."""
    every = [(g.prompt, a) for g in games for a in (g.first, g.second)]
    return list({id(a): (i, a) for i, a in every}.values())


def by_verifier(config, asked, games):
    for i, answer in all_answers(games):
        answer.score = float(toy_tasks.verify(asked[i].row, answer.answer))
    return by_score(games, config.tie_margin), {}


def by_reward_function(config, asked, games):
    answers = all_answers(games)
    reward = sums.load(config.reward_function, [], config.reward_function_timeout)
    columns = [(a.conversation[:-1], a.answer, asked[i].row, a.finished) for i, a in answers]
    scores = reward.total(reward.scores(sums.Answers(*map(list, zip(*columns, strict=True)))))
    for (_, answer), score in zip(answers, scores.tolist(), strict=True):
        answer.score = score
    return by_score(games, config.tie_margin), {}


def by_reward_model(config, asked, games):
    refused = prompt_eval.score_all(config, [a for _, a in all_answers(games)])
    return by_score(games, config.tie_margin), {"refused": refused}


def said(turns) -> tuple:
    return tuple((turn["role"], turn["content"].strip()) for turn in turns)


def by_people(config, asked, games):
    """The majority of those who ranked both answers."""
    bad = rows.BadRows()
    read = comparisons.load_comparisons(config.rankings, bad=bad)
    if len(bad):
        raise rows.DataError(bad.problems, title="rankings that cannot be used:")
    ranked = collections.defaultdict(list)
    for row in read:
        texts = map(str.strip, row.responses)
        ranked[said(row.prompt)].append(dict(zip(texts, row.scores, strict=True)))
    points: list[float | None] = []
    for game in games:
        a, b = (answer.answer.strip() for answer in (game.first, game.second))
        alike = said(game.first.conversation[:-1]) == said(game.second.conversation[:-1])
        votes = [
            np.sign(scores[b] - scores[a])
            for scores in (ranked[said(game.first.conversation[:-1])] if alike else ())
            if a in scores and b in scores
        ]
        points.append((1 + float(np.sign(sum(votes)))) / 2 if votes else None)
    return points, {"rankings": len(read)}


def by_endpoint(config, asked, games):
    judge = Judge(
        config.judge_url,
        config.judge_model,
        config.judge_timeout,
        config.judge_parallel,
        json_object(config.judge_options) if config.judge_options else {},
        Path(config.output_dir) / "judgements.jsonl",
    )
    pairs = [(g.second.conversation, g.first.conversation) for g in games]
    verdicts = judge.verdicts(pairs, lambda text: print(text, flush=True))
    known = [v.agree for v in verdicts if v.agree is not None]
    told = {
        "asked_now": judge.asked,
        "prompt_tokens": judge.prompt_tokens,
        "completion_tokens": judge.completion_tokens,
        "orders_agree": sum(known) / len(known) if known else None,
        "refused": [f"{len(judge.refused)} questions: {r}" for r in judge.refused[:1]],
    }
    if config.judge_prices:
        tokens = judge.prompt_tokens, judge.completion_tokens
        each = zip(tokens, config.judge_prices, strict=True)
        told["cost"] = sum(n * price / 1e6 for n, price in each)
    return [v.points for v in verdicts], told


JUDGES = {
    "verifier": by_verifier,
    "reward_function": by_reward_function,
    "reward_model": by_reward_model,
    "people": by_people,
    "endpoint": by_endpoint,
}
