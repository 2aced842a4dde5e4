"""One rollout: generate → score → gather.

Rows are dealt to the ranks for the forward passes and gathered again, so every rank holds the
whole rollout (a few bytes a token) and PPO's arithmetic, its minibatches and its metrics are the
same on any number of ranks.
"""

import dataclasses
import functools
import itertools
import time
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from step3_ppo.environments.play import play
from step3_ppo.episodes import Episode, Tokens, lay_out, numbers_of, rows_of
from utils.data import batches
from utils.data.prompts import Prompt
from utils.distributed import host_memory, process_group
from utils.distributed.process_group import StopRun
from utils.generation.engine import Request, Sampling, steps_of, synced
from utils.generation.sampling import uniform_noise
from utils.generation.weights import in_eval_mode
from utils.models import language_model
from utils.rewards.functions import FunctionError
from utils.rewards.sums import Answers


@dataclass
class Rollout(Tokens):
    """Episodes with what each model computed of them. (B,R) tensors are 0 off the action_mask: off
    the tokens that the policy chose. (response_mask is what the models attend to, which may hold
    an environment's text too.)"""

    logprobs: torch.Tensor  # (B,R) fp32, of the policy that sampled
    # (B,R) fp32, as the engine that sampled computed them, where config.compares_engine(); else the
    # same.
    engine_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor  # (B,R) fp32
    entropies: torch.Tensor  # (B,R) fp32, nats
    values: torch.Tensor  # (B,R) fp32
    scores: torch.Tensor  # (B,) fp32, of reward model and reward function, as they came
    function_scores: torch.Tensor  # (B,) fp32, the reward function's part of them
    judge_scores: torch.Tensor  # (B,) fp32, the judge's, of held-out answers only
    finished: torch.Tensor  # (B,) bool: ended by itself, not cut at a limit
    group: torch.Tensor  # (B,) int64: number of the row's prompt in the rollout
    policy_step: torch.Tensor  # (B,) int64: optimizer steps of the actor that the engine sampled by

    def not_finite(self) -> list[str]:
        """Names and counts of what is not a finite number."""
        counts = []
        for name, x in vars(self).items():
            bad = ~x.isfinite() if isinstance(x, torch.Tensor) else torch.zeros(1)
            if bad.any():
                counts.append(f"{int(bad.sum())} of {bad.numel()} {name}")
        return counts


@torch.no_grad()
def collect(
    models,
    prompts: list[Prompt],
    config,
    device,
    noise_step: int,
    judge: bool = False,
    copies: int = 1,
    greedy: bool = False,
):
    """Sample and score one response for each of `prompts` (all ranks' rows), of which each
    `copies` neighbours are one prompt: from here on their `group` says so.

    noise_step numbers the call: the same number gives the same samples. greedy: the likeliest
    tokens, without noise. Returns (Rollout of all rows on every rank, {"seconds_generate",
    "seconds_score"} and the mean score of each of several reward functions).
    """
    started = time.time()
    order, mine, noise = dealt(prompts, config, noise_step)
    own, group = [prompts[i] for i in mine], torch.tensor(mine) // copies

    episodes = generate(models, own, None if greedy else noise, config)
    generated = time.time()
    rollout = gather(score(models, own, episodes, config, device, judge, group), order)
    # What was sampled ahead is as far from the policy of now as an update has moved it.
    fresh = bool((rollout.policy_step == steps_of(models.actor)).all())
    if config.rollout_engine == "vllm" and config.engine_gap_limit and fresh and not greedy:
        check_gap(rollout, config.engine_gap_limit)
    means = {}
    if models.reward_function is not None:
        means = add_function_scores(rollout, models, prompts, config)
    seconds = {"seconds_generate": generated - started, "seconds_score": time.time() - generated}
    if config.rollout_ahead:
        means["staleness"] = (steps_of(models.actor) - rollout.policy_step).float().mean().item()
    return rollout, seconds | means


def dealt(prompts: list[Prompt], config, noise_step: int):
    """(all rows in the order in which they are dealt, this rank's rows, the noise that these are
    drawn by: (B, max_response_length))."""
    noise = uniform_noise(len(prompts), config.max_response_length, config.seed, noise_step)
    # Sorted by length and dealt like cards, so that ranks and batches hold like lengths. The first
    # rows come again where the rows do not divide by the ranks: with ZeRO-3 every rank has to make
    # as many forward passes. `gather` leaves them out.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))
    rank, world = process_group.rank(), process_group.world_size()
    per_rank = -(-len(order) // world)
    mine = list(itertools.islice(itertools.cycle(order), per_rank * world))[rank::world]
    return order, mine, noise[mine]


def begin(models, prompts: list[Prompt], config, noise_step: int) -> None:
    """Let the engine sample what `collect` of the same prompts and noise will ask for, by the
    weights that it has now, while this process does something else."""
    _, mine, noise = dealt(prompts, config, noise_step)
    ids = [prompts[i].ids for i in mine]
    request = Request(*batches.prompt_batch(ids, models.tokenizer.pad_token_id), noise)
    models.rollout_engine.begin(request, sampling_of(models, config))


def generate(models, prompts: list[Prompt], noise: torch.Tensor | None, config) -> list[Episode]:
    """The policy's answers to this rank's prompts, drawn by noise (B, max_response_length), or
    greedy; where there is an environment, with its replies."""
    with synced(models.rollout_engine, models.actor) as engine:
        return play(engine, prompts, noise, sampling_of(models, config), models.environment)


def sampling_of(models, config) -> Sampling:
    return Sampling(
        config.max_response_length,
        models.tokenizer.eos_token_id,
        models.tokenizer.pad_token_id,
        config.temperature,
        logprobs=config.logprobs_from == "decode" or config.compares_engine(),
        nucleus=models.nucleus,
    )


def score(models, prompts, episodes: list[Episode], config, device, judge: bool, group) -> Rollout:
    """This rank's episodes with log-probabilities, values and scores, on the CPU."""
    tokens = lay_out(episodes, models.tokenizer.pad_token_id)
    if config.logprobs_from == "decode":
        logprobs, entropies = (numbers_of(episodes, x) for x in ("logprobs", "entropies"))
    else:
        logprobs, entropies = actor_logprobs(models, tokens, config, device)
    own = not config.compares_engine()
    engine_logprobs = logprobs if own else numbers_of(episodes, "logprobs")
    of_each = functools.partial(in_micro_batches, tokens, config, device)
    ref_logprobs, _ = of_each(logprobs_of, models.reference, config.temperature)
    values, zeros = torch.zeros_like(logprobs), torch.zeros(len(episodes))
    if models.critic is not None:
        (values,) = of_each(values_of, models.critic)
    finished = torch.tensor([e.finished for e in episodes])
    texts = texts_of(models.tokenizer, tokens)
    limits = config.micro_batch_size, config.micro_batch_tokens
    asked = (conversations(prompts, tokens), texts, finished, *tokens.joined(), *limits)
    rollout = Rollout(
        **vars(tokens),
        logprobs=logprobs,
        engine_logprobs=engine_logprobs,
        ref_logprobs=ref_logprobs,
        entropies=entropies,
        values=values,
        scores=models.reward.scores(*asked) if models.reward is not None else zeros,
        function_scores=zeros,
        judge_scores=models.judge.scores(*asked) if judge and models.judge is not None else zeros,
        finished=finished,
        group=group,
        policy_step=torch.full((len(episodes),), models.rollout_engine.policy_step),
    )
    if models.frozen_offload is not None:
        models.frozen_offload.park()
    return rollout


def gather(part: Rollout, order: list[int]) -> Rollout:
    """All ranks' rows as one Rollout, in the order of the prompts. Of n ranks, row i of rank r
    belongs to prompt order[i·n + r]; rows that `collect` dealt twice are left out."""
    rank, world = process_group.rank(), process_group.world_size()
    own = len(range(rank, len(order), world))
    part = Rollout(**{name: x[:own] for name, x in vars(part).items()})
    parts = [p for p in process_group.gather_objects(part) if len(p.scores)]
    back = torch.tensor([i for r in range(world) for i in order[r::world]]).argsort()
    whole = vars(stacked(parts))
    return Rollout(**{name: rows_of(x, back.tolist()) for name, x in whole.items()})


def stacked(parts: list[Rollout]) -> Rollout:
    """The rows of all parts below each other, padded to the longest of them."""
    prompt = max(p.prompt_ids.shape[1] for p in parts)
    response = max(p.response_ids.shape[1] for p in parts)
    fields = {}
    for f in dataclasses.fields(Rollout):
        values = [getattr(p, f.name) for p in parts]
        if f.name.startswith("prompt_"):
            values = [pad(t, (prompt - t.shape[1], 0)) for t in values]
        elif isinstance(values[0], torch.Tensor) and values[0].dim() == 2:
            values = [pad(t, (0, response - t.shape[1])) for t in values]
        is_tensor = isinstance(values[0], torch.Tensor)
        fields[f.name] = torch.cat(values) if is_tensor else list(itertools.chain(*values))
    return Rollout(**fields)


def check_gap(rollout: Rollout, limit: float) -> None:
    """StopRun where the engine that sampled is further from the trainer's policy than `limit` nats
    a token, mean over the rollout."""
    gap = (rollout.logprobs - rollout.engine_logprobs)[rollout.action_mask].abs().mean().item()
    if not gap <= limit:
        raise StopRun(
            f"engine_gap {gap:.3g} nats a token is above --engine_gap_limit {limit:g}: what vLLM "
            "samples from is not the policy that is trained. Its dtype, its kernels for this model "
            "or what it made of the weights that it was sent differ; see docs/vllm.md. Nothing was "
            "learned from this rollout"
        )


def texts_of(tokenizer, tokens: Tokens) -> list[str]:
    """The policy's last turn of each row, which is all that follows the prompt where there is no
    environment, as text without special tokens."""
    ids = tokens.response_ids.where(tokens.last_turn(), tokenizer.pad_token_id)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def conversations(prompts: list[Prompt], tokens: Tokens) -> list[Prompt]:
    """The prompts with what was said behind them before the policy's last turn: what a reward model
    reads as text before that."""
    said = zip(prompts, tokens.earlier, strict=True)
    return [replace(p, messages=(*p.messages, *turns)) if turns else p for p, turns in said]


def answers_of(tokenizer, rollout: Rollout, prompts: list[Prompt]) -> Answers:
    """The rollout's answers as reward functions see them: each the policy's last turn. Where turns
    precede it, `episode` in the row holds all behind the prompt."""
    texts, finished = texts_of(tokenizer, rollout), rollout.finished.tolist()
    messages = [p.messages for p in conversations(prompts, rollout)]
    rows = [
        {**p.row, "episode": [*turns, {"role": "assistant", "content": text}]} if turns else p.row
        for p, turns, text in zip(prompts, rollout.earlier, texts, strict=True)
    ]
    return Answers(messages, texts, rows, finished)


def add_function_scores(rollout: Rollout, models, prompts: list[Prompt], config) -> dict:
    """Call each --reward_function once, on rank 0, with every row; all ranks get the scores or
    stop. Returns the mean of each, where there are several."""
    answer = None
    if process_group.is_main():
        try:
            answer = models.reward_function.scores(answers_of(models.tokenizer, rollout, prompts))
        except FunctionError as error:
            answer = str(error)
    answer = process_group.gather_objects(answer)[0]
    if isinstance(answer, str):
        raise StopRun(answer)
    rollout.function_scores = config.reward_function_coef * models.reward_function.total(answer)
    rollout.scores = rollout.scores + rollout.function_scores
    return models.reward_function.means(answer)


def actor_logprobs(models, tokens: Tokens, config, device) -> list[torch.Tensor]:
    """(B,R) log-probabilities and entropies by a forward pass of the trained actor."""
    asked = logprobs_of, models.actor, config.temperature, models.nucleus
    with in_eval_mode(models.actor):
        return in_micro_batches(tokens, config, device, *asked)


def in_micro_batches(tokens: Tokens, config, device, compute, *args) -> list[torch.Tensor]:
    """Tensors (B,R) for all rows, 0 off the action_mask, from compute(ids (b,p+r), mask (b,p+r),
    actions (b,r), *args), which gives tensors (b,r) and is called once for each micro-batch of b
    rows with no more padding than these need.

    Every rank must call it. Results go to the CPU all together at the end: to fetch them one by one
    would make each micro-batch wait for the one before.
    """
    limits = config.micro_batch_size, config.micro_batch_tokens
    micro = batches.in_step(tokens.lengths(), *limits)
    parts, answers = [tokens.select(rows) for rows in micro], []
    for part in parts:
        ids, mask = part.joined()
        answers.append(compute(host_memory.send(ids, device), mask, part.action_mask, *args))
    wholes = []
    for pieces in zip(*answers, strict=True):
        flat = torch.cat([piece.flatten() for piece in pieces]).cpu()
        whole = flat.new_zeros(tokens.action_mask.shape)
        sizes = [piece.numel() for piece in pieces]
        for rows, part, piece in zip(micro, parts, flat.split(sizes), strict=True):
            actions = part.action_mask
            whole[rows, : actions.shape[1]] = piece.view(actions.shape) * actions
        wholes.append(whole)
    return wholes


def logprobs_of(input_ids, mask, actions, model, temperature: float, nucleus=None):
    """(B,P+R) ids and mask, (B,R) actions → (B,R) log-probabilities and entropies."""
    settings = dict(temperature=temperature, with_entropies=True, actions=actions)
    settings["nucleus"] = nucleus
    return language_model.response_logprobs(model, input_ids, mask, actions.shape[1], **settings)


def values_of(input_ids, mask, actions, critic) -> tuple[torch.Tensor]:
    """(B,P+R) → (B,R): V before response token t is drawn, read at the token before it."""
    return (critic(input_ids, mask)[:, -actions.shape[1] - 1 : -1],)
