"""What ranks sampled answers, by the names of --labeller.

A labeller is a function (config, prompts, answers, reward) → how good each answer is, on every
rank; None where people shall say. answers: each prompt's K. reward: what --reward_model,
--reward_function or --judge_url names, as `Scorer`, `WeightedSum` or `Judge`; else None.
"""

import itertools
import random

import numpy as np

from step2_reward.kept_answers import Sampled
from utils.data import toy_tasks
from utils.distributed import process_group
from utils.models import scorer
from utils.rewards.functions import FunctionError
from utils.rewards.sums import Answers


def by_verifier(config, prompts, answers: list[list[Sampled]], reward) -> list[list[float]]:
    """The embedded task's program, with as many errors as --agreement says."""
    scores = [
        [toy_tasks.verify(p.row, a.text) for a in group]
        for p, group in zip(prompts, answers, strict=True)
    ]
    labels = agreeing_scores(scores, config.agreement, config.seed)
    share = share_agreeing(scores, labels)
    mean = sum(map(sum, scores)) / sum(map(len, scores))
    process_group.say(
        f"verifier: mean score {mean:.3f}; labels agree with it on {share:.1%} of the pairs that "
        "differ"
    )
    return labels


def by_reward_model(config, prompts, answers: list[list[Sampled]], reward) -> list[list[float]]:
    """Scores as PPO would give them."""
    groups = [
        [reward.reader.encode(prompt.messages, a.text, a.finished) for a in group]
        for prompt, group in zip(prompts, answers, strict=True)
    ]
    prompts_at_once = max(1, config.micro_batch_size // config.answers_per_prompt)
    model = reward.model.to(reward.device)
    return scorer.score_groups(model, groups, reward.device, prompts_at_once)


def by_reward_function(config, prompts, answers: list[list[Sampled]], reward) -> list[list[float]]:
    """The weighted sum of --reward_function's scores."""

    def scores(prompts, answers) -> list[list[float]]:
        asked = zip(prompts, answers, strict=True)
        rows = [(p.messages, a.text, p.row, a.finished) for p, group in asked for a in group]
        found = reward.scores(Answers(*map(list, zip(*rows, strict=True))))
        in_turn = iter(reward.total(found).tolist())
        return [[next(in_turn) for _ in group] for group in answers]

    return _asked_on_rank_0(config, prompts, answers, scores)


def by_judge(config, prompts, answers: list[list[Sampled]], reward) -> list[list[float]]:
    """The share of a prompt's other answers that each is preferred to by a language model, which is
    asked about every pair in both orders; where these differ, or nothing can be read, it is half a
    win for both."""
    unread = [0, 0]

    def shares(prompts, answers) -> list[list[float]]:
        pairs, wins = [], [[0.0] * len(group) for group in answers]
        for n, (prompt, group) in enumerate(zip(prompts, answers, strict=True)):
            said = [(*prompt.messages, {"role": "assistant", "content": a.text}) for a in group]
            pairs += [(n, i, j, said) for i, j in itertools.combinations(range(len(said)), 2)]
        verdicts = reward.verdicts(
            [(said[i], said[j]) for _, i, j, said in pairs], lambda text: None
        )
        for (n, i, j, _), verdict in zip(pairs, verdicts, strict=True):
            points = 0.5 if verdict.points is None else verdict.points
            wins[n][i] += points
            wins[n][j] += 1 - points
        unread[0] += sum(verdict.points is None for verdict in verdicts)
        unread[1] += len(verdicts)
        return [[w / (len(group) - 1) for w in group] for group in wins]

    labels = _asked_on_rank_0(config, prompts, answers, shares)
    process_group.say(
        f"judge: {unread[1]} pairs in both orders, {unread[0]} without a verdict "
        f"({len(reward.refused)} questions refused); "
        f"{reward.prompt_tokens} tokens read, {reward.completion_tokens} written"
    )
    return labels


def _asked_on_rank_0(config, prompts, answers: list[list[Sampled]], scores) -> list[list[float]]:
    """scores(prompts, answers), asked for --micro_batch_size prompts at a time on rank 0. Ends the
    run with the row or server that is to blame."""
    labels: list[list[float]] = []
    for start in range(0, len(prompts), config.micro_batch_size):
        some, found = slice(start, start + config.micro_batch_size), None
        if process_group.is_main():
            try:
                found = scores(prompts[some], answers[some])
            except FunctionError as error:
                found = str(error)
        # After each call: all of them may take longer than --timeout_minutes lets a rank wait.
        found = process_group.gather_objects(found)[0]
        if isinstance(found, str):
            raise SystemExit(found)
        labels += found
    return labels


def agreeing_scores(scores: list[list[float]], agreement: float, seed: int) -> list[list[float]]:
    """Scores with noise, so that a share `agreement` of the pairs that differ keep their order.

    Errors are of answers rather than of pairs: the ranking of one prompt stays free of cycles, as a
    person's is. The noise's size is found by bisection on these very answers.
    """
    if agreement >= 1.0:
        return scores
    draw, truth = random.Random(seed), np.array(scores)
    noise = np.array([[draw.gauss(0.0, 1.0) for _ in group] for group in scores])
    low, high = 0.0, 1e4 * (np.ptp(truth) + 1e-9)
    for _ in range(60):
        middle = (low + high) / 2
        agrees = share_agreeing(truth, truth + middle * noise) > agreement
        low, high = (middle, high) if agrees else (low, middle)
    return (truth + high * noise).tolist()


def share_agreeing(truth, other) -> float:
    """(P,K) scores each → share of the pairs that differ in `truth` which `other` orders alike."""
    truth, other = np.array(truth), np.array(other)
    i, j = np.triu_indices(truth.shape[1], 1)
    differ = truth[:, i] != truth[:, j]
    alike = (truth[:, i] > truth[:, j]) == (other[:, i] > other[:, j])
    return float(alike[differ].mean()) if differ.any() else 0.0


LABELLERS = {
    "verifier": by_verifier,
    "reward_model": by_reward_model,
    "reward_function": by_reward_function,
    "judge": by_judge,
    "none": lambda *_: None,
}
