"""What ranks sampled answers, by the names of --labeller.

A labeller is a function (config, prompts, answers, reward) → how good each answer is, on every
rank; None where people shall say. answers: each prompt's K. reward: what --reward_model or
--reward_function names, as `Scorer` or `WeightedSum`; else None.
"""

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
    """The weighted sum of --reward_function's scores, asked for --micro_batch_size prompts at a
    time on rank 0. Ends the run with the row that is to blame."""
    labels: list[list[float]] = []
    asked, size = list(zip(prompts, answers, strict=True)), config.micro_batch_size
    for some in (asked[i : i + size] for i in range(0, len(asked), size)):
        found: list[float] | str = []
        if process_group.is_main():
            rows = [(p.messages, a.text, p.row, a.finished) for p, group in some for a in group]
            try:
                scores = reward.scores(Answers(*map(list, zip(*rows, strict=True))))
                found = reward.total(scores).tolist()
            except FunctionError as error:
                found = str(error)
        # After each call: all of them may take longer than --timeout_minutes lets a rank wait.
        found = process_group.gather_objects(found)[0]
        if isinstance(found, str):
            raise SystemExit(found)
        scores_in_turn = iter(found)
        labels += [[next(scores_in_turn) for _ in group] for _, group in some]
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
    "none": lambda *_: None,
}
