"""Training rows and held-out rows of a list of data sets, the same way in every step."""

import dataclasses
import functools
import hashlib
import math
import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from utils.data.rows import BadRows, DataError, has_split
from utils.settings.run_config import columns_of, shares_of

T = TypeVar("T")


@dataclass(frozen=True)
class DataSettings:
    """How the data sets of a step are read and shared out: the settings of these names."""

    output_dir: str
    data_schema: str = "auto"
    columns: Sequence[str] = ()
    data_weights: Sequence[float] = ()
    data_split: str = ""
    eval_fraction: float = 0.05
    max_eval_rows: int = 512
    long_prompts: str = "cut"
    data_cache: str = ""
    max_bad_rows: float = 0.0
    seed: int = 42

    def names_of_columns(self) -> dict[str, str]:
        """{our name: its name in the data} of --columns."""
        return columns_of(self.columns)

    def bad_rows(self) -> BadRows:
        return BadRows(self.max_bad_rows, f"{self.output_dir}/bad_rows.jsonl")


def train_and_held_out(
    names: list[str], load: Callable, eval_splits, settings: DataSettings, step: int, bad
):
    """(training items, held-out items) of data sets `names`.

    load(names, split_role) → items, a list or a row_tables.View; what it refuses goes to `bad`
    (rows.BadRows). A data set with a test split (one of `eval_splits`) gives its own held-out
    items; of others `eval_fraction` of the rows are held out. Then `--data_split` gives step
    `step` its share of the training items and `--data_weights` says how often they come. At most
    `max_eval_rows` are held out, a seeded choice.
    """
    train, held = [], []
    weights = settings.data_weights or [1.0] * len(names)
    if len(weights) != len(names):
        raise DataError(
            f"data_weights={weights} has {len(weights)} numbers for {len(names)} data sets; "
            "give --data_weights one number a set"
        )
    for name, weight in zip(names, weights, strict=True):
        items = load([name], "train")
        if has_split(name, eval_splits):
            held.append(load([name], "eval"))
        else:
            if len(bad) and len(items) < 2:
                bad.finish(name)  # too few rows are left because of these
            items, kept_out = hold_out(items, settings.eval_fraction, settings.seed)
            held.append(kept_out)
        items = split_for_step(items, settings.data_split, step)
        train.append(apply_weight(items, weight, settings.seed))
    held = functools.reduce(operator.add, held)
    order = list(range(len(held)))
    random.Random(settings.seed).shuffle(order)
    return functools.reduce(operator.add, train), _take(held, order[: settings.max_eval_rows])


def unweighted(settings: DataSettings) -> DataSettings:
    """`settings` without data weights and shares, for a data set that is only measured on."""
    return dataclasses.replace(settings, data_weights=[], data_split="")


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
    return _take(
        items, np.concatenate([np.tile(np.arange(len(items)), whole), np.array(chosen, int)])
    )


def _take(items: Sequence[T], positions: Sequence[int]) -> Sequence[T]:
    """The items at these positions, in that order."""
    if hasattr(items, "take"):  # a row_tables.View, which holds numbers of rows
        return items.take(positions)
    return [items[int(position)] for position in positions]


def prompt_of(item) -> str:
    """What the answer of a Conversation, Prompt or Comparison answers, as one text."""
    turns = getattr(item, "prompt", None) or item.messages
    if turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return "\x1e".join(f"{turn['role']}\x1f{turn['content']}" for turn in turns)


def place(item, salt: str) -> float:
    """Where the item's prompt falls in [0, 1): the same in every step, file, order and run."""
    digest = hashlib.sha256(f"{salt}\0{prompt_of(item)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _places(items: Sequence, salt: str) -> np.ndarray:
    if hasattr(items, "places"):
        return items.places(salt)
    return np.array([place(item, salt) for item in items])


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
        return items
    low, high = (sum(shares[:end]) / sum(shares) for end in (step - 1, step))
    places = _places(items, "data_split")
    part = _take(items, np.flatnonzero((low <= places) & (places < high)))
    if not len(part):
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
    places = _places(items, f"hold_out {seed}")
    if len(different := np.unique(places)) < 2:
        raise DataError(
            f"cannot hold out evaluation rows from {len(items)} row(s) with"
            f" {len(different)} different prompt(s); name evaluation data, or give 2 or more"
        )
    # At least the first prompt is held out, and the last one is not.
    held = (places <= max(fraction, different[0])) & (places < different[-1])
    return _take(items, np.flatnonzero(~held)), _take(items, np.flatnonzero(held))
