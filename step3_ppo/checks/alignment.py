"""The self-check's questions about rows: whose score is whose, and which token an advantage weighs.

A batch that is out of step by one row trains on noise, and no mean over it shows that.
"""

import itertools

import numpy as np
import torch

from step3_ppo import rollout as rollouts
from step3_ppo.checks.models import Fault, apart, must_agree, worst
from step3_ppo.rewards import functions as scoring
from utils.distributed import process_group

ROWS_ALONE = 8  # a rank scores so many again
SLOW = 30.0  # seconds; a --reward_function that may take longer is not asked a second time
ARITHMETIC = 5e-5  # PPO's own is in fp32, whatever the models compute in


def scores_of_the_probe(check) -> str:
    """Each answer's score is its own, before anything is trained."""
    return _scores_belong(check, check.probe, check.asked, check.probe_seconds)


def scores_of_the_rollout(check) -> str:
    """The same of the first rollout's answers, as PPO was given them."""
    return _scores_belong(check, check.rollout, check.sampled, check.metrics)


def _scores_belong(check, rollout, prompts, seconds: dict[str, float]) -> str:
    found = []
    if check.models.reward is not None:
        found.append(_model_scores(check, rollout, prompts))
    if check.models.reward_function is not None:
        found.append(_function_scores(check, rollout, prompts, seconds["seconds_score"]))
    return "; ".join(found)


@torch.no_grad()
def _model_scores(check, rollout, prompts) -> str:
    """A few rows, one at a time and without padding, must score as they did among the others."""
    rank, world = process_group.rank(), process_group.world_size()
    own = range(rank, len(prompts) // world * world, world)  # as many on every rank
    rows = list(own)[:: -(-len(own) // ROWS_ALONE)]
    alone = []
    for row in rows:
        one = rollout.select([row])
        ids = torch.cat([one.prompt_ids, one.response_ids], 1)
        mask = torch.cat([one.prompt_mask, one.response_mask], 1)
        texts = rollouts.texts_of(check.models.tokenizer, one.response_ids, one.response_mask)
        asked = [prompts[row]], texts, one.finished, ids, mask, 1
        alone.append(check.models.reward.scores(*asked) + one.function_scores)
    what = f"scores of {len(rows)} answers, each alone and among {len(prompts)}"
    cause = (
        "answers have each other's scores, or what stands beside them counts; see rollout.collect "
        "and Scorer.scores"
    )
    text = must_agree(check, torch.cat(alone), rollout.scores[rows], what, cause)
    return text + _if_rolled(check, rollout.scores)


def _function_scores(check, rollout, prompts, seconds: float) -> str:
    """--reward_function must give the rows, in another order, the scores that they had."""
    if not process_group.is_main():
        return ""  # rank 0 alone calls it, and its verdict is everybody's
    config, name = check.config, f"--reward_function {check.config.reward_function}"
    if seconds > SLOW:
        return f"not checked: scoring took {seconds:.0f} s, so {name} was not asked again"
    texts = rollouts.texts_of(check.models.tokenizer, rollout.response_ids, rollout.response_mask)

    def ask(order: list[int]) -> torch.Tensor:
        chosen = [prompts[i] for i in order]
        asked = [p.messages[-1]["content"] for p in chosen], [texts[i] for i in order]
        call = check.models.reward_function, config.reward_function, *asked
        try:
            found = scoring.call(*call, [p.row for p in chosen], config.reward_function_timeout)
        except scoring.RewardFunctionError as error:
            raise Fault(f"asked again about the same rows: {error}") from None
        back = torch.tensor(order).argsort()
        return config.reward_function_coef * torch.tensor(found, dtype=torch.float)[back]

    before, in_order = rollout.function_scores, list(range(len(prompts)))
    # Prompt by prompt: a function may compare the answers to one prompt, which stand together.
    groups = [list(g) for _, g in itertools.groupby(in_order, lambda i: prompts[i].messages)]
    groups = groups if len(groups) > 1 else [[i] for i in in_order]
    drawn = np.random.default_rng(0).permutation(len(groups))
    shuffled = [i for group in drawn for i in groups[group]]
    most = apart(before, ask(shuffled))[1]
    if most > 10 * check.tolerance:
        if apart(before, ask(in_order))[1] > 10 * check.tolerance:
            return f"not checked: {name} gives the same rows other scores when asked again"
        raise Fault(
            f"scores of {name} change by up to {most:.2g} with the order of the rows: they are "
            "another row's, or depend on other prompts' (--self_check warn if they shall)"
        )
    said = f"those of {name} follow their {len(prompts)} rows, shuffled, within {most:.1e}"
    return said + _if_rolled(check, before)


def _if_rolled(check, scores: torch.Tensor) -> str:
    """What the check would see of scores that are each the row's before."""
    gap = apart(scores, scores.roll(1))[0]
    return f" (rolled by one row: {gap:.2g})" if gap > check.tolerance else " (all are alike)"


class Followed:
    """Looks on as the loss of the run's first optimizer step goes back: what each micro-batch is
    of, and the gradient that the loss gives each token's log-probability."""

    def __init__(self):
        self.seen: list[dict] = []

    def __call__(self, ids, mask, length: int, logprobs, loss) -> None:
        """ids, mask (b,P+R); length: R; logprobs (b,R), what `loss` is reckoned from."""
        found = {"ids": ids.cpu(), "mask": mask.cpu(), "length": length}
        found["logprobs"] = logprobs.detach().cpu()
        self.seen.append(found)
        # An engine multiplies the loss: ranks / tokens, in fp16 a power of two as well.
        loss.register_hook(lambda gradient: found.update(factor=float(gradient)))
        logprobs.register_hook(lambda gradient: found.update(gradient=gradient.cpu()))

    def rows(self):
        """Of each row: its (prompt, response) ids, then (R,) each: mask, log-probabilities, and
        −∂loss/∂log-probability."""
        for part in self.seen:
            at = part["ids"].shape[1] - part["length"]
            ids, mask = part["ids"], part["mask"]
            contents = _contents(ids[:, :at], mask[:, :at]), _contents(ids[:, at:], mask[:, at:])
            weights = -part["gradient"].double() / part["factor"]
            tensors = mask[:, at:], part["logprobs"].double(), weights
            columns = zip(*contents, *(x.numpy() for x in tensors), strict=True)
            for prompt, response, *found in columns:
                yield (prompt, response), *found


def advantages_reach_their_tokens(check) -> str:
    """From the answers' scores to the loss: the weight that each token's log-probability has in it
    is the advantage that the definitions give this token of this answer."""
    config, rollout = check.config, check.experience.rollout
    _scores_keep_their_order(check.experience)
    expected, scale = advantages_by_definition(check.experience, config, check.metrics["kl_coef"])
    old = rollout.logprobs.double().numpy()
    places: dict[tuple, list[int]] = {}
    sides = (rollout.prompt_ids, rollout.prompt_mask), (rollout.response_ids, rollout.response_mask)
    for row, content in enumerate(zip(*(_contents(*side) for side in sides), strict=True)):
        places.setdefault(content, []).append(row)
    narrow = min(config.clip_ratio, config.clip_ratio_high or config.clip_ratio) / 2
    gaps, tokens = [0.0], 0
    for content, kept, new, weight in check.followed.rows():
        tried, size = [], len(kept)
        for row in places.get(content, []):  # several, where an answer was drawn twice
            ratio = _ratio(new - old[row, :size], kept, config)
            gap = np.abs(weight - expected[row, :size] * ratio)
            gap = np.nan_to_num(gap / (scale + np.abs(expected[row, :size])), nan=np.inf)
            tried.append(gap[np.abs(ratio - 1) < narrow])  # beyond it clips may cut it off
        if not tried:  # in no row of the rollout; told below, where all ranks have joined
            tried.append(np.full(1, np.inf))
        gaps += min(tried, key=lambda gap: gap.max(initial=0.0)).tolist()
        tokens += int(kept.sum())
    mean, most = worst(float(np.mean(gaps)), float(np.max(gaps)))
    if mean > ARITHMETIC or most > 10 * ARITHMETIC:
        raise Fault(
            f"in the loss of the first minibatch tokens weigh up to {most:.2g} (mean {mean:.2g}, "
            "relative) more or less than the advantages that scores, KL and values make: rows or "
            "tokens are out of step; see rollout.make_experience and update.step_actor"
        )
    return f"{tokens} tokens of the first minibatch weigh in the loss what they should"


def _scores_keep_their_order(experience) -> None:
    """Normalised, clipped or charged for being cut, a better score never becomes the worse one."""
    raw, counted = experience.rollout.scores, experience.scores
    for group in (experience.rollout.finished, ~experience.rollout.finished):
        rows = group.nonzero().flatten()
        rows = rows[raw[rows].argsort()]
        for low, high in zip(rows[:-1].tolist(), rows[1:].tolist(), strict=True):
            if counted[low] > counted[high] and raw[low] < raw[high]:
                raise Fault(
                    f"scores {raw[low]:.4g} and {raw[high]:.4g} of rows {low} and {high} count as "
                    f"{counted[low]:.4g} and {counted[high]:.4g}: rewards are another row's; see "
                    "rollout.make_experience"
                )


def _contents(ids: torch.Tensor, mask: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row[kept].tolist()) for row, kept in zip(ids, mask, strict=True)]


def _ratio(log_ratio: np.ndarray, kept: np.ndarray, config) -> np.ndarray:
    """(R,) what the policy loss multiplies an advantage by: PPO's ratio, 1 in losses without."""
    if config.algorithm != "ppo":
        return np.ones_like(log_ratio)
    log_ratio = np.where(kept, log_ratio, 0.0)
    if config.action_level == "sequence":
        log_ratio = np.full_like(log_ratio, log_ratio.sum())
    return np.exp(log_ratio.clip(-80, 80))


def advantages_by_definition(experience, config, kl_coef: float) -> tuple[np.ndarray, float]:
    """(B,R) fp64 advantages of response tokens, 0 off the mask, and the size of the numbers that
    they are differences of, which they are rounded by. Not by algorithm.py: to check it."""
    rollout = experience.rollout
    fields = rollout.response_mask, rollout.logprobs, rollout.ref_logprobs, rollout.values
    tokens, logprobs, references, values = (x.double().numpy() for x in fields)
    k1 = (logprobs - references) * tokens
    kl = {"k1": k1, "k2": k1**2 / 2, "k3": np.exp(-k1) - 1 + k1}[config.kl_estimator]
    rewards, mask = -kl_coef * kl, tokens
    last = tokens.sum(1).astype(int) - 1
    rewards[np.arange(len(rewards)), last] += experience.scores.double().numpy()
    if config.action_level == "sequence":
        rewards, values, mask = rewards.sum(1, keepdims=True), values[:, :1], tokens[:, :1]
    values, size = values * mask, 0.0
    if config.whiten_rewards:  # their mean stays
        mean, spread = rewards[mask > 0].mean(), np.sqrt(rewards[mask > 0].var() + 1e-8)
        size = np.abs(rewards).max() / spread
        rewards = ((rewards - mean) / spread + mean) * mask
    after = np.pad(values, ((0, 0), (0, 1)))[:, 1:]
    errors = (rewards + config.gamma * after - values) * mask
    decay = config.gamma * (1.0 if config.algorithm == "reinforce" else config.lam)
    advantages, following = np.zeros_like(errors), 0.0
    for t in reversed(range(errors.shape[1])):
        advantages[:, t] = following = errors[:, t] + decay * following
    advantages, deviation = advantages * mask, 1.0
    if config.whiten_advantages:
        counted = advantages[mask > 0]
        deviation = np.sqrt(counted.var() + 1e-8)
        advantages = (advantages - counted.mean()) / deviation
    size = max(size, np.abs(rewards).max(), np.abs(values).max())
    return advantages * tokens, 1 + size / deviation
