"""Which rows form which batch, and rows → padded tensors.

The order is a function of (seed, epoch) alone: the same rows make up step 17's global batch on 1
rank or 8, today or after a resume, and no loader state needs saving.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from utils.data import chat_template
from utils.distributed import process_group


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(n, generator=generator).numpy()


def rows_of_step(step: int, batch_size: int, n: int, seed: int) -> list[int]:
    """Row numbers of global batch `step` (from 0): epochs follow each other without a gap, each
    row once an epoch, reshuffled each time."""
    wanted = range(step * batch_size, (step + 1) * batch_size)
    return [int(_permutation(n, seed, i // n)[i % n]) for i in wanted]


def steps_of(epochs: float, batch_size: int, n: int) -> int:
    """Optimizer steps in which `epochs` passes over n rows are all seen, at least 1. The last one
    is filled with rows of the next pass."""
    # 0.1 × 640 / 64 is above 1 by rounding alone.
    return max(1, math.ceil(epochs * n / batch_size - 1e-6))


def deal(
    indices: Sequence[int],
    lengths: Sequence[int] | Mapping[int, int],
    rank: int,
    world: int,
    micro: int,
    tokens: int = 0,
    counts: Mapping[int, int] | None = None,
) -> list[list[int]]:
    """This rank's micro-batches of one global batch, rows of like length together.

    micro: rows each; or where `tokens` is not 0, so many rows that padded to the longest they are
    no more than `tokens` (a longer row goes alone). counts: sequences that row i stands for, 1
    where not given; lengths[i] is then that of the longest.

    Which rows share the optimizer step does not change, so nor does the gradient (losses are
    normalised by the tokens of the whole step); only padding shrinks. Every rank gets the same
    number of micro-batches. Where the rows do not divide among the ranks, the last micro-batch of
    some has a row less, or none.
    """
    ordered = sorted(indices, key=lambda i: (lengths[i], i))
    # Neighbours go to different ranks, so that all have like lengths at the same time.
    groups = [ordered[i : i + world] for i in range(0, len(ordered), world)]
    longest = [lengths[group[-1]] for group in groups]
    sequences = [max(counts[i] for i in g) for g in groups] if counts else [1] * len(groups)
    mine = ordered[rank::world]
    return [mine[a:b] for a, b in _spans(longest, sequences, micro, tokens)]


def share(
    indices: Sequence[int],
    lengths: Sequence[int] | Mapping[int, int],
    rows: int,
    tokens: int = 0,
    counts: Mapping[int, int] | None = None,
) -> list[list[int]]:
    """This process's micro-batches of one global batch. rows: --micro_batch_size. tokens:
    --micro_batch_tokens. See deal."""
    ranks = process_group.rank(), process_group.world_size()
    return deal(indices, lengths, *ranks, rows, tokens, counts)


def dealt(lengths: Sequence[int]) -> list[int]:
    """This rank's rows of those that every rank holds: sorted by length and dealt like cards, as
    many to every rank. Where they do not divide, the first come again."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    rank, world = process_group.rank(), process_group.world_size()
    everywhere = -(-len(order) // world) * world
    return list(itertools.islice(itertools.cycle(order), everywhere))[rank::world]


def in_step(lengths: Sequence[int], micro: int, tokens: int = 0) -> list[list[int]]:
    """Rows that every rank has as many of → micro-batches as `deal` makes them, as many on every
    rank. lengths: of this rank's rows. A collective."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    everywhere = process_group.gather_objects([lengths[i] for i in order])
    longest = [max(group) for group in zip(*everywhere, strict=True)]
    return [order[a:b] for a, b in _spans(longest, [1] * len(order), micro, tokens)]


def _spans(lengths: Sequence[int], counts: Sequence[int], micro: int, tokens: int):
    """(start, end) of each micro-batch of rows whose lengths ascend."""
    if not tokens:
        return [(i, min(i + micro, len(lengths))) for i in range(0, len(lengths), micro)]
    starts, sequences = [], 0
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        sequences += count
        if i == 0 or sequences * length > tokens:
            starts.append(i)
            sequences = count
    return list(zip(starts, [*starts[1:], len(lengths)], strict=True))


def pad(rows: Sequence[Sequence], value, side: str = "right", to: int = 0) -> torch.Tensor:
    """Lists → (B, longest or `to`) tensor, filled with `value` on `side`."""
    length = max(to, max(len(r) for r in rows))
    fill = [[value] * (length - len(r)) for r in rows]
    if side == "left":
        return torch.tensor([[*f, *r] for f, r in zip(fill, rows, strict=True)])
    return torch.tensor([[*r, *f] for f, r in zip(fill, rows, strict=True)])


def supervised_batch(examples: Sequence[chat_template.Encoded], pad_id: int):
    """→ input_ids (B,T) int64, mask (B,T) bool, supervised (B,T) bool, right-padded."""
    ids = pad([e.ids for e in examples], pad_id)
    mask = pad([[True] * len(e.ids) for e in examples], False)
    return ids, mask, pad([e.supervised for e in examples], False)


def prompt_batch(encoded: Sequence[Sequence[int]], pad_id: int):
    """→ prompt_ids (B,P) int64 and prompt_mask (B,P) bool, left-padded."""
    ids = pad(encoded, pad_id, side="left")
    return ids, pad([[True] * len(e) for e in encoded], False, side="left")
