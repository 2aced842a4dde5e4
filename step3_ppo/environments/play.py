"""Episodes of several turns: the policy speaks, the environment replies, until one has ended all.

The tokens that the policy samples are kept as they are, never decoded and encoded again. At each
turn the engine reads an episode from its first token: a turn costs one more pass over what stands
there, no memory between turns, and serves every engine.
"""

import dataclasses
import itertools

import torch
from torch.nn.functional import pad

from step3_ppo.environments.environment import Environment
from step3_ppo.episodes import Episode, Segment, turn_of
from utils.data import batches
from utils.distributed import process_group
from utils.distributed.process_group import StopRun
from utils.generation.engine import Request, Sampling
from utils.rewards.functions import FunctionError


def play(
    engine, prompts, noise: torch.Tensor | None, sampling: Sampling, environment: Environment | None
) -> list[Episode]:
    """An episode for each of this rank's prompts; without an environment, of one turn.

    sampling.max_new_tokens: room behind the prompt, for the tokens of policy and environment
    together. noise (B, that): token t behind prompt i is drawn by noise[i, t], in whichever turn;
    None: greedy. A collective of all ranks, each with as many prompts.
    """
    limit = sampling.max_new_tokens
    episodes = [Episode(prompt.ids, [], False) for prompt in prompts]
    going = list(range(len(prompts)))  # in which the policy is to speak
    rows, room = going, limit
    for turn in range(1, 1 + (environment.max_turns if environment else 1)):
        used = [_length(episodes[i]) for i in rows]
        ids, mask = batches.prompt_batch([episodes[i].ids() for i in rows], sampling.pad_id)
        drawn = None if noise is None else _from(noise[rows], used, room)
        how = dataclasses.replace(sampling, max_new_tokens=room)
        samples = engine.generate(Request(ids, mask, drawn), how)
        for row, i in enumerate(going):
            segment, stopped = turn_of(samples, row, limit - used[row])
            segments = [*episodes[i].segments, segment]
            episodes[i] = dataclasses.replace(episodes[i], segments=segments, finished=stopped)
        if environment is None:
            break
        going, error = [i for i in going if episodes[i].finished], ""
        try:
            last = turn == environment.max_turns
            going = _reply(environment, episodes, going, prompts, 0 if last else limit)
        except FunctionError as failed:
            error, going = str(failed), []
        left = max((limit - _length(episodes[i]) for i in going), default=0)
        every_rank = process_group.gather_objects((error, len(going), left))
        errors, counts, rooms = zip(*every_rank, strict=True)
        if any(errors):
            raise StopRun(next(filter(None, errors)))
        if not any(counts):
            break
        # Every rank asks for as many rows and tokens, as engines may decode in step. What is drawn
        # for a row beyond its own room, or for a row that only fills up, is dropped.
        shortest = min(range(len(prompts)), key=lambda i: _length(episodes[i]))
        filled = itertools.chain(going, itertools.cycle(going or [shortest]))
        rows, room = list(itertools.islice(filled, max(counts))), max(rooms)
    return episodes


def _length(episode: Episode) -> int:
    """Tokens behind the prompt."""
    return sum(len(s.ids) for s in episode.segments)


def _from(noise: torch.Tensor, used: list[int], room: int) -> torch.Tensor:
    """(b, limit) noise of whole episodes → (b, room): of the tokens behind the `used` ones; 0 past
    the limit."""
    longer = pad(noise, (0, room))
    return torch.stack([row[n : n + room] for row, n in zip(longer, used, strict=True)])


def _reply(
    environment: Environment, episodes: list[Episode], rows: list[int], prompts, limit: int
) -> list[int]:
    """Ask the environment about the episodes `rows`, whose policy has ended its turn, and add what
    it replies; → those that go on. One that has no room for the reply within `limit` tokens behind
    the prompt and a token after it is cut there: without the reply, and not finished."""
    said = []
    for i in rows:
        spoken = episodes[i].segments[-1].ids
        text = environment.tokenizer.decode(spoken, skip_special_tokens=True)
        turn = {"role": "assistant", "content": text}
        said.append([*prompts[i].messages, *episodes[i].earlier, turn])
    replies = environment.replies([list(turns) for turns in said], [prompts[i].row for i in rows])
    going = []
    for i, turns, reply in zip(rows, said, replies, strict=True):
        if reply is None:
            continue
        ids = torch.tensor(environment.ids_of(turns, reply))
        fits = _length(episodes[i]) + len(ids) < limit
        changed = {"finished": False}
        if fits:
            changed["segments"] = [*episodes[i].segments, Segment(ids, by_policy=False)]
            changed["earlier"] = (*episodes[i].earlier, turns[-1], environment.turn(reply))
            going.append(i)
        episodes[i] = dataclasses.replace(episodes[i], **changed)
    return going
