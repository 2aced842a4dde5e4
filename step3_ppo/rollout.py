"""One batch of experience: generate → mask → score.

Rows are dealt to the ranks for the forward passes and gathered again, so every rank holds the
whole rollout (a few bytes a token) and PPO's arithmetic, its minibatches and its metrics are the
same on any number of ranks.
"""

import dataclasses
import functools
import itertools
import time
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from step3_ppo import algorithm, measures
from step3_ppo.rewards import functions as scoring
from utils.data import batches
from utils.data.prompts import Prompt
from utils.distributed import host_memory, process_group
from utils.distributed.process_group import StopRun
from utils.generation import sampling as generation
from utils.generation.engine import Request, Sampling, synced
from utils.generation.weights import in_eval_mode
from utils.models import language_model


@dataclass
class Rollout:
    """B sequences, prompts left-padded to P, responses right-padded to R. All on the CPU."""

    prompt_ids: torch.Tensor  # (B,P) int64
    prompt_mask: torch.Tensor  # (B,P) bool
    response_ids: torch.Tensor  # (B,R) int64
    response_mask: torch.Tensor  # (B,R) bool, through the stop token
    logprobs: torch.Tensor  # (B,R) fp32, of the policy that sampled
    ref_logprobs: torch.Tensor  # (B,R) fp32
    entropies: torch.Tensor  # (B,R) fp32, nats
    values: torch.Tensor  # (B,R) fp32
    scores: torch.Tensor  # (B,) fp32, of reward model and reward function, as they came
    function_scores: torch.Tensor  # (B,) fp32, the reward function's part of them
    judge_scores: torch.Tensor  # (B,) fp32, the judge's, of held-out answers only
    finished: torch.Tensor  # (B,) bool: ended with the stop token, not at the limit

    def select(self, rows) -> "Rollout":
        """Some rows, with padding that none of them needs cut off."""
        part = {f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)}
        left = int(part["prompt_mask"].long().argmax(1).min())
        right = int(part["response_mask"].sum(1).max())
        for name in part:
            if name.startswith("prompt_"):
                part[name] = part[name][:, left:]
            elif part[name].dim() == 2:
                part[name] = part[name][:, :right]
        return Rollout(**part)

    def not_finite(self) -> list[str]:
        """Names and counts of what is not a finite number."""
        found = []
        for f in dataclasses.fields(self):
            bad = ~getattr(self, f.name).isfinite()
            if bad.any():
                found.append(f"{int(bad.sum())} of {bad.numel()} {f.name}")
        return found

    def lengths(self) -> list[int]:
        return (self.prompt_mask.sum(1) + self.response_mask.sum(1)).tolist()


def _gather(parts: list[Rollout], order: list[int]) -> Rollout:
    """Parts of all ranks → one Rollout; row k of the parts laid end to end becomes row order[k]."""
    parts = [p for p in parts if len(p.scores)]
    prompt = max(p.prompt_ids.shape[1] for p in parts)
    response = max(p.response_ids.shape[1] for p in parts)
    back = torch.tensor(order).argsort()
    fields = {}
    for f in dataclasses.fields(Rollout):
        tensors = [getattr(p, f.name) for p in parts]
        if f.name.startswith("prompt_"):
            tensors = [pad(t, (prompt - t.shape[1], 0)) for t in tensors]
        elif tensors[0].dim() == 2:
            tensors = [pad(t, (0, response - t.shape[1])) for t in tensors]
        fields[f.name] = torch.cat(tensors)[back]
    return Rollout(**fields)


@torch.no_grad()
def collect(models, prompts: list[Prompt], config, device, noise_step: int, judge=False):
    """Sample and score one response for each of `prompts` (all ranks' rows).

    noise_step numbers the call: the same number gives the same samples. Returns (Rollout of all
    rows on every rank, {"seconds_generate", "seconds_score"}).
    """
    rank, world = process_group.rank(), process_group.world_size()
    pad_id, stop_id = models.tokenizer.pad_token_id, models.tokenizer.eos_token_id
    length = config.max_response_length
    noise = generation.uniform_noise(len(prompts), length, config.seed, noise_step)
    # Like lengths together, and the same number of rows and so of forward passes on every rank.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))
    per_rank = -(-len(order) // world)
    filled = list(itertools.islice(itertools.cycle(order), per_rank * world))
    mine = filled[rank::world]
    prompt_ids, prompt_mask = batches.prompt_batch([prompts[i].ids for i in mine], pad_id)

    started = time.time()
    with_logprobs = models.old_logprobs.source != "forward"
    sampling = Sampling(length, stop_id, pad_id, config.temperature, with_logprobs)
    with synced(models.rollout_engine, models.actor) as engine:
        samples = engine.generate(Request(prompt_ids, prompt_mask, noise[mine]), sampling)
    responses, response_mask = samples.response_ids, samples.response_mask
    generated = time.time()
    # From here on all is on the CPU, but for the ids that a model reads and what it answers.
    input_ids = torch.cat([prompt_ids, responses], 1)
    mask = torch.cat([prompt_mask, response_mask], 1)
    limits = config.micro_batch_size, config.micro_batch_tokens
    micro = batches.in_step(mask.sum(1).tolist(), *limits)
    score = functools.partial(
        in_micro_batches, micro, device, prompt_ids, prompt_mask, responses, response_mask
    )
    decoded = samples.logprobs, samples.entropies
    if models.old_logprobs.source != "decode":
        with in_eval_mode(models.actor):
            scored = score(response_logprobs, models.actor, config.temperature)
    if models.old_logprobs.source is None:
        models.old_logprobs.compare(decoded, scored)
    logprobs, entropies = decoded if models.old_logprobs.source == "decode" else scored
    ref_logprobs, _ = score(response_logprobs, models.reference, config.temperature)
    values, none = torch.zeros_like(logprobs), torch.zeros(len(mine))
    if models.critic is not None:
        (values,) = score(response_values, models.critic)
    finished = torch.tensor([reason == "stop" for reason in samples.finish_reasons])
    texts = texts_of(models.tokenizer, responses, response_mask)
    asked = ([prompts[i] for i in mine], texts, finished, input_ids, mask, *limits)
    part = Rollout(
        prompt_ids,
        prompt_mask,
        responses,
        response_mask,
        logprobs,
        ref_logprobs,
        entropies,
        values,
        scores=models.reward.scores(*asked) if models.reward is not None else none,
        function_scores=none,
        judge_scores=models.judge.scores(*asked) if judge and models.judge is not None else none,
        finished=finished,
    )
    if models.frozen_offload is not None:
        models.frozen_offload.park()
    own = len(range(rank, len(order), world))  # without the filling
    part = Rollout(**{f.name: getattr(part, f.name)[:own] for f in dataclasses.fields(part)})
    dealt = [i for r in range(world) for i in order[r::world]]
    rollout = _gather(process_group.gather_objects(part), dealt)
    if models.reward_function is not None:
        add_function_scores(rollout, models, prompts, config)
    seconds = {"seconds_generate": generated - started, "seconds_score": time.time() - generated}
    return rollout, seconds


def texts_of(tokenizer, responses: torch.Tensor, mask: torch.Tensor) -> list[str]:
    """(B,R) responses and their mask → what they say."""
    return tokenizer.batch_decode(
        responses.where(mask, tokenizer.pad_token_id), skip_special_tokens=True
    )


def add_function_scores(rollout: Rollout, models, prompts: list[Prompt], config) -> None:
    """Call --reward_function once, on rank 0, with every row; all ranks get its scores or stop."""
    answer = None
    if process_group.is_main():
        texts = texts_of(models.tokenizer, rollout.response_ids, rollout.response_mask)
        try:
            answer = scoring.call(
                models.reward_function,
                config.reward_function,
                [p.messages[-1]["content"] for p in prompts],
                texts,
                [p.row for p in prompts],
                config.reward_function_timeout,
            )
        except scoring.RewardFunctionError as error:
            answer = str(error)
    answer = process_group.gather_objects(answer)[0]
    if isinstance(answer, str):
        raise StopRun(answer)
    rollout.function_scores = config.reward_function_coef * torch.tensor(answer, dtype=torch.float)
    rollout.scores = rollout.scores + rollout.function_scores


def in_micro_batches(
    micro, device, prompt_ids, prompt_mask, response_ids, response_mask, compute, *args
) -> list[torch.Tensor]:
    """compute(ids (b,p+r), mask, r, *args) → tensors (b,r), for each list of b rows in `micro`
    without the padding that none of them needs → the same (B,R) for all rows, 0 off the mask.

    All is on the CPU, but for the ids that compute gets and what it answers: no micro-batch waits
    for the one before it.
    """
    answers, widths = [], []
    for rows in micro:
        masks = prompt_mask[rows], response_mask[rows]
        left, right = int(masks[0].long().argmax(1).min()), int(masks[1].sum(1).max())
        ids = torch.cat([prompt_ids[rows][:, left:], response_ids[rows][:, :right]], 1)
        mask = torch.cat([masks[0][:, left:], masks[1][:, :right]], 1)
        answers.append(compute(host_memory.send(ids, device), mask, right, *args))
        widths.append(right)
    wholes = []
    for parts in zip(*answers, strict=True):
        flat = torch.cat([part.flatten() for part in parts]).cpu()
        whole = flat.new_zeros(response_mask.shape)
        pieces = flat.split([part.numel() for part in parts])
        for rows, right, piece in zip(micro, widths, pieces, strict=True):
            whole[rows, :right] = piece.view(-1, right) * response_mask[rows, :right]
        wholes.append(whole)
    return wholes


def response_logprobs(input_ids, mask, length: int, model, temperature: float):
    """(B,P+R) → (B,R) log-probabilities and entropies."""
    settings = dict(temperature=temperature, with_entropies=True)
    return language_model.response_logprobs(model, input_ids, mask, length, **settings)


def response_values(input_ids, mask, length: int, critic) -> tuple[torch.Tensor]:
    """(B,P+R) → (B,R): V before response token t is drawn, read at the token before it."""
    return (critic(input_ids, mask)[:, -length - 1 : -1],)


@dataclass
class Experience:
    """A rollout with what the updates need. A = R where an action is a token, A = 1 where it is
    the whole answer. (B,A) fp32 each, 0 off the mask."""

    rollout: Rollout
    mask: torch.Tensor  # (B,A) bool
    logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    scores: torch.Tensor | None = None  # (B,) fp32 as rewards count them; none in a micro-batch
    rewards: torch.Tensor | None = None  # (B,A), of the whole rollout only too


def make_experience(rollout: Rollout, config, state) -> tuple[Experience, dict[str, float]]:
    """Scores → rewards → advantages; and the rollout's metrics."""
    mask, logprobs, values = rollout.response_mask, rollout.logprobs, rollout.values
    scores, clipped = state.shaped(rollout, config)
    rewards, kl = algorithm.token_rewards(
        scores, logprobs, rollout.ref_logprobs, mask, state.kl_coef, config.kl_estimator
    )
    if config.action_level == "sequence":
        rewards, logprobs = (algorithm.one_action(x, mask) for x in (rewards, logprobs))
        mask, values = mask[:, :1], values[:, :1]
    if config.whiten_rewards:
        rewards = algorithm.whiten(rewards, mask, shift_mean=False)
    # Without a critic values are 0, and with λ = 1 the advantage is the return itself.
    lam = 1.0 if config.algorithm == "reinforce" else config.lam
    advantages, returns = algorithm.gae(rewards, values, mask, config.gamma, lam)
    experience = Experience(rollout, mask, logprobs, values, advantages, returns, scores, rewards)
    metrics = measures.measure_rollout(rollout, config.kl_estimator) | clipped
    metrics |= measures.measure_experience(experience, config, state)
    if config.whiten_advantages:
        experience.advantages = algorithm.whiten(advantages, mask)
    return experience, metrics
