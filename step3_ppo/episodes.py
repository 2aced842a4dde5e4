"""Episodes of turns, and how they lie in tensors.

An episode is a prompt and what follows it: segments of tokens, each by the policy or by an
environment (a tool's result, a user's next turn). A single answer is the short case, one segment.
Two masks tell the tokens after the prompt apart: response_mask is what is attended to, action_mask
what the policy chose and is credited for.
"""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from utils.data import batches
from utils.generation.engine import Samples


@dataclass(frozen=True)
class Segment:
    """ids (n,) int64, all by one author. logprobs, entropies (n,) fp32: as the policy's tokens were
    sampled; None where that is not known, and for an environment."""

    ids: torch.Tensor
    by_policy: bool = True
    logprobs: torch.Tensor | None = None
    entropies: torch.Tensor | None = None


@dataclass(frozen=True)
class Episode:
    prompt_ids: list[int]
    segments: list[Segment]
    finished: bool  # came to its own end: not cut at the limit of tokens or of turns
    # What was said before the policy's last turn, {"role", "content"} each: its earlier turns and
    # the environment's replies.
    earlier: tuple[dict, ...] = ()

    def ids(self) -> list[int]:
        return [*self.prompt_ids, *(i for s in self.segments for i in s.ids.tolist())]


@dataclass
class Tokens:
    """B episodes, prompts left-padded to P, what follows right-padded to R. All on the CPU."""

    prompt_ids: torch.Tensor  # (B,P) int64
    prompt_mask: torch.Tensor  # (B,P) bool
    response_ids: torch.Tensor  # (B,R) int64
    response_mask: torch.Tensor  # (B,R) bool: what is attended to
    action_mask: torch.Tensor  # (B,R) bool: what the policy chose
    earlier: list[tuple[dict, ...]]  # (B,), as in Episode

    def select(self, rows):
        """Some rows, with padding that none of them needs cut off."""
        part = {name: rows_of(x, rows) for name, x in vars(self).items()}
        left = int(part["prompt_mask"].any(0).nonzero().min())
        right = int(part["response_mask"].any(0).nonzero().max()) + 1
        for name, x in part.items():
            if name.startswith("prompt_"):
                part[name] = x[:, left:]
            elif isinstance(x, torch.Tensor) and x.dim() == 2:
                part[name] = x[:, :right]
        return type(self)(**part)

    def joined(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,P+R) ids, and the mask of what is attended to."""
        ids = torch.cat([self.prompt_ids, self.response_ids], 1)
        return ids, torch.cat([self.prompt_mask, self.response_mask], 1)

    def lengths(self) -> list[int]:
        return (self.prompt_mask.sum(1) + self.response_mask.sum(1)).tolist()

    def last_turn(self) -> torch.Tensor:
        """(B,R) bool: the policy's tokens that no environment's come after."""
        replies = self.response_mask & ~self.action_mask
        return self.action_mask & (replies.flip(1).cumsum(1).flip(1) == 0)


def rows_of(values, rows: list[int]):
    """Some rows of a tensor, or of a list with one entry a row."""
    return values[rows] if isinstance(values, torch.Tensor) else [values[i] for i in rows]


def turn_of(samples: Samples, row: int, room: int) -> tuple[Segment, bool]:
    """A row of samples as the policy's turn of at most `room` tokens, and whether it ended with the
    stop token within these."""
    kept = samples.response_mask[row].clone()
    stopped = samples.finish_reasons[row] == "stop" and int(kept.sum()) <= room
    kept[room:] = False
    seen = (None if x is None else x[row][kept] for x in (samples.logprobs, samples.entropies))
    return Segment(samples.response_ids[row][kept], True, *seen), stopped


def lay_out(episodes: list[Episode], pad_id: int) -> Tokens:
    ids = [torch.cat([s.ids for s in e.segments]) for e in episodes]
    actions = [
        torch.cat([torch.full((len(s.ids),), s.by_policy) for s in e.segments]) for e in episodes
    ]
    prompts = batches.prompt_batch([e.prompt_ids for e in episodes], pad_id)
    attended = [torch.ones(len(x), dtype=torch.bool) for x in ids]
    responses = pad_sequence(ids, batch_first=True, padding_value=pad_id)
    masks = (pad_sequence(x, True) for x in (attended, actions))
    return Tokens(*prompts, responses, *masks, [e.earlier for e in episodes])


def numbers_of(episodes: list[Episode], name: str) -> torch.Tensor:
    """(B,R) fp32: "logprobs" or "entropies", laid out as `lay_out` does, 0 where there is none."""

    def of(segment: Segment) -> torch.Tensor:
        numbers = getattr(segment, name)
        return torch.zeros(len(segment.ids)) if numbers is None else numbers

    rows = [torch.cat([of(segment) for segment in e.segments]) for e in episodes]
    return pad_sequence(rows, batch_first=True)
