"""Training rows and held-out rows of a list of data sets, the same way in every step."""

import dataclasses
import hashlib
import math
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from utils.config import shares_of
from utils.data.rows import DataError, has_split

T = TypeVar("T")


def train_and_held_out(names: list[str], load: Callable, eval_splits, config, step: int, bad):
    """(training items, held-out items) of data sets `names`.

    load(names, split_role) → items; what it refuses goes to `bad` (rows.BadRows). A data set with
    a test split (one of `eval_splits`) gives its own held-out items; of others
    `config.eval_fraction` of the rows are held out. Then `--data_split` gives step `step` its share
    of the training items and `--data_weights` says how often they come. At most
    `config.max_eval_rows` are held out, a seeded choice.
    """
    train, held = [], []
    weights = config.data_weights or [1.0] * len(names)
    if len(weights) != len(names):
        raise DataError(
            f"data_weights={weights} has {len(weights)} numbers for {len(names)} data sets; "
            "give --data_weights one number a set"
        )
    for name, weight in zip(names, weights, strict=True):
        items = load([name], "train")
        if has_split(name, eval_splits):
            held += load([name], "eval")
        else:
            if len(bad) and len(items) < 2:
                bad.finish(name)  # too few rows are left because of these
            items, kept_out = hold_out(items, config.eval_fraction, config.seed)
            held += kept_out
        items = split_for_step(items, config.data_split, step)
        train += apply_weight(items, weight, config.seed)
    random.Random(config.seed).shuffle(held)
    return train, held[: config.max_eval_rows]


def unweighted(config):
    """`config` without data weights and shares, for a data set that is only measured on."""
    return dataclasses.replace(config, data_weights=[], data_split="")


def apply_weight(items: Sequence[T], weight: float, seed: int) -> list[T]:
    """The items as often as one epoch shows them: 2 twice, 0.5 a seeded half, 1.5 once and a half.

    At least one item comes back. Raises DataError for a weight that is not positive and finite.
    """
    if not (math.isfinite(weight) and weight > 0):
        raise DataError(f"weight {weight}: must be a positive number; set --data_weights")
    whole = int(weight)
    extra = round((weight - whole) * len(items))
    if not whole and not extra:
        extra = min(1, len(items))
    chosen = sorted(random.Random(seed).sample(range(len(items)), extra))
    return list(items) * whole + [items[index] for index in chosen]


def prompt_of(item) -> str:
    """What the answer of a Conversation, Prompt or Comparison answers, as one text."""
    turns = getattr(item, "prompt", None) or item.messages
    if turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return "\x1e".join(f"{turn['role']}\x1f{turn['content']}" for turn in turns)


def _place(item, salt: str) -> float:
    """Where the item's prompt falls in [0, 1): the same in every step, file, order and run."""
    digest = hashlib.sha256(f"{salt}\0{prompt_of(item)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_for_step(items: Sequence[T], data_split: str, step: int) -> list[T]:
    """The part of the items that step 1, 2 or 3 may see, as DeepSpeed-Chat's --data_split.

    data_split: three shares such as "2,4,4"; "" gives every step everything. The prompt's text
    decides, so no prompt comes to two steps, though files, schemas or skipped rows differ. Raises
    DataError for other shares and for a step left without an item.
    """
    if step not in (1, 2, 3):
        raise DataError(f"step={step}: must be 1, 2 or 3")
    try:
        shares = shares_of(data_split)
    except ValueError as error:
        raise DataError(str(error)) from None
    if not shares:
        return list(items)
    low, high = (sum(shares[:end]) / sum(shares) for end in (step - 1, step))
    part = [item for item in items if low <= _place(item, "data_split") < high]
    if not part:
        raise DataError(
            f"data_split={data_split!r} leaves step {step} none of {len(items)} row(s);"
            f" set --data_split so that number {step} has a larger share"
        )
    return part


def hold_out(items: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """(training, held out), neither empty, both in the order they came.

    The prompt's text and the seed decide: all rows of a prompt go the same way, and a prompt that
    one step or file holds out is held out by every other. Raises DataError for fewer than two
    different prompts or a fraction outside 0 to 1.
    """
    if not 0 < fraction < 1:
        raise DataError(f"eval_fraction={fraction}: set --eval_fraction between 0 and 1")
    places = [_place(item, f"hold_out {seed}") for item in items]
    if len(set(places)) < 2:
        raise DataError(
            f"cannot hold out evaluation rows from {len(items)} row(s) with"
            f" {len(set(places))} different prompt(s); name evaluation data, or give 2 or more"
        )
    # At least the first prompt is held out, and the last one is not.
    limit = min(max(fraction, min(places)), max(places))
    held = [place <= limit and place < max(places) for place in places]
    return (
        [item for item, out in zip(items, held, strict=True) if not out],
        [item for item, out in zip(items, held, strict=True) if out],
    )
