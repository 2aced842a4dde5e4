"""Checks of rows: whose score is whose, and which token an advantage weighs.

A batch that is out of step by one row trains on noise, and no mean over it shows that.
"""

import itertools

import numpy as np
import torch

from step3_ppo import rollout as rollouts
from step3_ppo.checks.probe import AFTER, BEFORE, Fault, FirstSteps, Probe, apart, check, worst
from utils.distributed import process_group
from utils.rewards.functions import FunctionError

ROWS_ALONE = 8  # a rank scores so many again
SLOW = 30.0  # seconds; a --reward_function that may take longer is not asked a second time
ARITHMETIC = 5e-5  # PPO's own is in fp32, whatever the models compute in


@check(BEFORE, "scores belong to their answers")
def scores_belong(probe: Probe) -> str:
    """Each answer's score is its own."""
    said = []
    if probe.models.reward is not None:
        said.append(_model_scores(probe))
    # Only rank 0 calls the function; its verdict counts for all ranks.
    if probe.models.reward_function is not None and process_group.is_main():
        said.append(_function_scores(probe))
    return "; ".join(said)


@check(AFTER, "scores of the rollout")
def scores_of_the_rollout(steps: FirstSteps) -> str:
    """The same of the first rollout's answers, as PPO was given them."""
    return scores_belong(steps.as_probe())


@torch.no_grad()
def _model_scores(probe: Probe) -> str:
    """A few rows, one at a time and without padding, must score as they did among the others."""
    rank, world, total = process_group.rank(), process_group.world_size(), len(probe.asked)
    own = range(rank, total // world * world, world)  # as many on every rank
    rows, alone, models = list(own)[:: -(-len(own) // ROWS_ALONE)], [], probe.models
    for row in rows:
        one = probe.rollout.select([row])
        texts = rollouts.texts_of(models.tokenizer, one)
        asked = rollouts.conversations([probe.asked[row]], one)
        score = models.reward.scores(asked, texts, one.finished, *one.joined(), 1)
        alone.append(score + one.function_scores)
    said = probe.must_agree(
        torch.cat(alone),
        probe.rollout.scores[rows],
        f"scores of {len(rows)} answers, each alone and among {total}",
        "answers have each other's scores, or what stands beside them counts; see rollout.collect "
        "and Scorer.scores",
    )
    return said + _if_rolled(probe, probe.rollout.scores)


def _function_scores(probe: Probe) -> str:
    """--reward_function must give the rows, in another order, the scores that they had."""
    config, rollout, asked = probe.config, probe.rollout, probe.asked
    name = f"--reward_function {' '.join(config.reward_sources())}"
    if probe.seconds_score > SLOW:
        long = f"{probe.seconds_score:.0f} s"
        return f"not checked: scoring took {long}, so {name} was not asked again"
    function = probe.models.reward_function

    def gap(order: list[int]) -> float:
        """Between the scores that the rows had and those that they get in this order."""
        chosen, rows = rollout.select(order), [asked[i] for i in order]
        try:
            scores = function.scores(rollouts.answers_of(probe.models.tokenizer, chosen, rows))
        except FunctionError as error:
            raise Fault(f"asked again about the same rows: {error}") from None
        total = config.reward_function_coef * function.total(scores)
        return apart(rollout.function_scores[order], total)[1]

    in_order, allowed = list(range(len(asked))), 10 * probe.tolerance
    # Prompt by prompt: a function may compare the answers to one prompt, which stand together.
    groups = [list(g) for _, g in itertools.groupby(in_order, lambda i: asked[i].messages)]
    groups = groups if len(groups) > 1 else [[i] for i in in_order]
    drawn = np.random.default_rng(0).permutation(len(groups))
    most = gap([i for group in drawn for i in groups[group]])
    if most > allowed and gap(in_order) > allowed:
        return f"not checked: {name} gives the same rows other scores when asked again"
    if most > allowed:
        raise Fault(
            f"scores of {name} change by up to {most:.2g} with the order of the rows: they are "
            "another row's, or depend on other prompts' (--self_check warn if they shall)"
        )
    said = f"those of {name} follow their {len(asked)} rows, shuffled, within {most:.1e}"
    return said + _if_rolled(probe, rollout.function_scores)


def _if_rolled(probe: Probe, scores: torch.Tensor) -> str:
    """What the check would see of scores that are each the row's before."""
    gap = apart(scores, scores.roll(1))[0]
    return f" (rolled by one row: {gap:.2g})" if gap > probe.tolerance else " (all are alike)"


class LossTrace:
    """Called with each micro-batch of the run's first optimizer step of the actor: keeps the
    gradient that the loss gives each token's log-probability."""

    def __init__(self):
        self.micro_batches: list[dict] = []

    def __call__(self, ids, mask, actions, logprobs, loss) -> None:
        """ids, mask (b,P+R); actions, logprobs (b,R), from which `loss` is computed."""
        kept = {"ids": ids.cpu(), "mask": mask.cpu(), "actions": actions.cpu()}
        kept["logprobs"] = logprobs.detach().cpu()
        self.micro_batches.append(kept)
        # An engine multiplies the loss: ranks / tokens, in fp16 a power of two as well.
        loss.register_hook(lambda gradient: kept.update(factor=float(gradient)))
        logprobs.register_hook(lambda gradient: kept.update(gradient=gradient.cpu()))

    def rows(self):
        """Of each row: its (prompt, response) ids, then (R,) each: which are actions,
        log-probabilities, and −∂loss/∂log-probability."""
        for part in self.micro_batches:
            start = part["ids"].shape[1] - part["actions"].shape[1]
            ids, mask = part["ids"], part["mask"]
            weights = -part["gradient"].double() / part["factor"]
            tensors = part["actions"], part["logprobs"].double(), weights
            prompts = _unpadded(ids[:, :start], mask[:, :start])
            responses = _unpadded(ids[:, start:], mask[:, start:])
            for prompt, response, *columns in zip(
                prompts, responses, *(x.numpy() for x in tensors), strict=True
            ):
                yield (prompt, response), *columns


def _unpadded(ids: torch.Tensor, mask: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row[kept].tolist()) for row, kept in zip(ids, mask, strict=True)]


@check(AFTER, "advantages reach their tokens")
def advantages_reach_their_tokens(steps: FirstSteps) -> str:
    """From the answers' scores to the loss: the weight that each token's log-probability has in it
    is the advantage that the definitions give this token of this answer."""
    config, experience = steps.probe.config, steps.experience
    if config.algorithm not in DEFINITIONS:
        return f"not checked: DEFINITIONS has no second definition of {config.algorithm}"
    _scores_keep_their_order(experience, config)
    kl_coef, rollout = steps.metrics["kl_coef"], experience.rollout
    expected, scale = advantages_by_definition(experience, config, kl_coef)
    old, ref = (x.double().numpy() for x in (rollout.logprobs, rollout.ref_logprobs))
    learned = rollout.finished.numpy() | (not config.mask_cut_answers)
    in_loss = kl_coef * (config.place_of_kl() == "loss")
    prompts = _unpadded(rollout.prompt_ids, rollout.prompt_mask)
    responses = _unpadded(rollout.response_ids, rollout.response_mask)
    places: dict[tuple, list[int]] = {}
    for row, content in enumerate(zip(prompts, responses, strict=True)):
        places.setdefault(content, []).append(row)
    narrow = min(config.clips()) / 2
    gaps, tokens, answers = [0.0], 0, 0
    for content, kept, new, weight in steps.trace.rows():
        candidates, size, share = [], len(kept), _share(kept, config)
        for row in places.get(content, []):  # several, where an answer was drawn twice
            ratio = _ratio(new - old[row, :size], kept, config)
            pull = in_loss * _pull_of_kl(new - ref[row, :size], config) * kept
            wanted = expected[row, :size] * ratio - pull * learned[row]
            gap = np.abs(weight / share - wanted) / (scale[row] + np.abs(wanted))
            gap = np.nan_to_num(gap, nan=np.inf)
            candidates.append(gap[np.abs(ratio - 1) < narrow])  # beyond it clips may cut it off
        if not candidates:  # in no row of the rollout: a fault, once all ranks have joined
            candidates.append(np.full(1, np.inf))
        gaps += min(candidates, key=lambda gap: gap.max(initial=0.0)).tolist()
        tokens += int(kept.sum()) * bool(learned[row])
        answers += config.normalisation() == "constant" or bool(learned[row])
    mean, most = worst(float(np.mean(gaps)), float(np.max(gaps)))
    if mean > ARITHMETIC or most > 10 * ARITHMETIC:
        raise Fault(
            f"in the loss of the first minibatch tokens weigh up to {most:.2g} (mean {mean:.2g}, "
            "relative) more or less than the advantages that scores, KL and values make: rows or "
            "tokens are out of step; see experience.make_experience and update.step_actor"
        )
    _loss_is_divided(steps.trace, tokens, answers, config)
    return f"{tokens} tokens of the first minibatch weigh in the loss what they should"


def _scores_keep_their_order(experience, config) -> None:
    """Normalised, clipped or charged for being cut, a better score never becomes the worse one."""
    raw, counted, slack = experience.rollout.scores, experience.scores, 0.0
    if config.overlong_penalty:  # which a long answer pays, however good
        lengths, longest = experience.rollout.response_mask.sum(1), config.max_response_length
        beyond = 1 - (longest - lengths) / config.overlong_buffer
        counted = counted + config.overlong_penalty * beyond.clamp(0, 1)
        slack = ARITHMETIC * (1 + config.overlong_penalty)
    for group in (experience.rollout.finished, ~experience.rollout.finished):
        rows = group.nonzero().flatten()
        rows = rows[raw[rows].argsort()].tolist()
        for low, high in itertools.pairwise(rows):
            if counted[low] > counted[high] + slack and raw[low] < raw[high]:
                raise Fault(
                    f"scores {raw[low]:.4g} and {raw[high]:.4g} of rows {low} and {high} count as "
                    f"{counted[low]:.4g} and {counted[high]:.4g}: rewards are another row's; see "
                    "experience.make_experience"
                )


def _loss_is_divided(trace, tokens: int, answers: int, config) -> None:
    """By what the minibatch has on all ranks; in fp16 a power of two multiplies it as well."""
    own = trace.micro_batches[0]["factor"] if trace.micro_batches else None
    all_tokens, all_answers, factors = zip(
        *process_group.gather_objects((tokens, answers, own)), strict=True
    )
    by_token = config.normalisation() == "token" and config.action_level == "token"
    expected = process_group.world_size() / max(sum(all_tokens if by_token else all_answers), 1)
    for factor in factors:
        twos = 0.0 if factor is None else float(np.log2(factor / expected))
        if not abs(twos - round(twos)) < ARITHMETIC:
            raise Fault(
                f"the loss of the first minibatch is multiplied by {factor:.4g} and not by ranks / "
                f"{'tokens' if by_token else 'answers'} = {expected:.4g}; see update.step_actor"
            )


def _share(kept: np.ndarray, config) -> float:
    """What each action of an answer counts in the sum that is the loss."""
    if config.normalisation() == "constant":
        return 1 / config.max_response_length
    alike = config.normalisation() == "token" or config.action_level == "sequence"
    return 1.0 if alike else 1 / kept.sum()


def _pull_of_kl(log_ratio: np.ndarray, config) -> np.ndarray:
    """(R,) ∂kl/∂log p of the estimate in the loss, from log p − log q."""
    return 1 - np.exp(-log_ratio) if config.estimator_of_kl() == "k3" else log_ratio


def _ratio(log_ratio: np.ndarray, kept: np.ndarray, config) -> np.ndarray:
    """(R,) what the policy loss multiplies an advantage by: PPO's ratio, 1 in losses without."""
    if config.algorithm in ("a2c", "reinforce"):
        return np.ones_like(log_ratio)
    log_ratio = np.where(kept, log_ratio, 0.0)
    if config.action_level == "sequence":
        log_ratio = np.full_like(log_ratio, log_ratio.sum())
    if config.algorithm == "gspo":
        log_ratio = np.full_like(log_ratio, log_ratio.sum() / kept.sum())
    return np.exp(log_ratio.clip(-80, 80))


def advantages_by_definition(experience, config, kl_coef: float) -> tuple[np.ndarray, np.ndarray]:
    """(B,R) fp64 advantages of actions, 0 elsewhere, and (B,) the size of the numbers that
    they are differences of, which they are rounded by. Not by advantages.py: to check it."""
    rollout = experience.rollout
    fields = rollout.action_mask, rollout.logprobs, rollout.ref_logprobs, rollout.values
    tokens, logprobs, references, values = (x.double().numpy() for x in fields)
    k1 = (logprobs - references) * tokens
    kl = {"k1": k1, "k2": k1**2 / 2, "k3": np.exp(-k1) - 1 + k1}[config.estimator_of_kl()]
    rewards, mask = -kl_coef * (config.place_of_kl() == "reward") * kl, tokens
    rows, last = np.arange(len(rewards)), tokens.shape[1] - 1 - tokens[:, ::-1].argmax(1)
    rewards[rows, last] += experience.scores.double().numpy()
    if config.action_level == "sequence":
        rewards, values = rewards.sum(1, keepdims=True), values[rows, tokens.argmax(1), None]
        mask = np.ones_like(rewards)
    values, size = values * mask, 0.0
    learned = rollout.finished.numpy()[:, None] | (not config.mask_cut_answers)
    if config.whiten_rewards:  # their mean stays
        mean, spread = rewards[mask > 0].mean(), np.sqrt(rewards[mask > 0].var() + 1e-8)
        size = np.abs(rewards).max() / spread
        rewards = ((rewards - mean) / spread + mean) * mask
    definition, whitened = DEFINITIONS[config.algorithm]
    if config.algorithm == "remax":
        baseline = experience.baseline.double().numpy()
        size = max(size, np.abs(baseline).max())
        advantages = (rewards.sum(1) - baseline)[:, None] * mask
        deviation = np.ones(len(rewards))
    elif definition in (_gae, _returns):
        advantages, deviation = definition(rewards, values, mask, config), np.ones(len(rewards))
    else:
        advantages, deviation = np.zeros(len(rewards)), np.ones(len(rewards))
        totals, lengths = rewards.sum(1), tokens.sum(1)
        groups = rollout.group.numpy()
        for one in np.unique(groups):
            own = np.flatnonzero(groups == one)
            advantages[own], deviation[own] = definition(totals[own], lengths[own])
        size = max(size, np.abs(totals).max())
        advantages = advantages[:, None] * mask
    if whitened and config.whiten_advantages:
        counted = advantages[(mask > 0) & learned]
        spread = np.sqrt(counted.var() + 1e-8)
        advantages, deviation = (advantages - counted.mean()) / spread, deviation * spread
    if config.importance_cap:
        moves = (logprobs - rollout.engine_logprobs.double().numpy()) * tokens
        moves = moves.sum(1, keepdims=True) if config.action_level == "sequence" else moves
        advantages = advantages * np.minimum(np.exp(moves), config.importance_cap)
    size = max(size, np.abs(rewards).max(), np.abs(values).max())
    return advantages * tokens * learned, 1 + size / deviation


def _gae(rewards, values, mask, config, lam=None) -> np.ndarray:
    advantages = np.zeros_like(rewards)
    decay = config.gamma * (config.lam if lam is None else lam)
    for row, acts in enumerate(mask > 0):
        value = following = 0.0  # of the action after
        for t in reversed(np.flatnonzero(acts)):
            error = rewards[row, t] + config.gamma * value - values[row, t]
            advantages[row, t] = following = error + decay * following
            value = values[row, t]
    return advantages


def _returns(*arguments) -> np.ndarray:
    return _gae(*arguments, lam=1.0)


# Of one prompt's answers: (n,) totals and lengths → (n,) advantages, and what they were divided by.


def _grpo(totals, lengths):
    deviation = totals.std(ddof=1) + 1e-4
    return (totals - totals.mean()) / deviation, deviation


def _dr_grpo(totals, lengths):
    return totals - totals.mean(), 1.0


def _rloo(totals, lengths):
    others = [np.delete(totals, i).mean() for i in range(len(totals))]
    return totals - others, 1.0


def _opo(totals, lengths):
    return totals - np.average(totals, weights=lengths), 1.0


# By --algorithm: its advantages, and whether --whiten_advantages is for it.
DEFINITIONS = {
    "ppo": (_gae, True),
    "trpo": (_gae, True),
    "nlpo": (_gae, True),
    "a2c": (_gae, True),
    "reinforce": (_returns, True),
    "grpo": (_grpo, False),
    "dr_grpo": (_dr_grpo, False),
    "rloo": (_rloo, False),
    "reinforce++": (_returns, True),
    "reinforce++_baseline": (_dr_grpo, True),
    "remax": (None, False),
    "opo": (_opo, False),
    "gspo": (_grpo, False),
    "cispo": (_grpo, False),
}
