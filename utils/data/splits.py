"""Training rows and held-out rows of a step's data sets, the same way in every step."""

import functools
import math
import operator
import random
from collections.abc import Callable

import numpy as np

from utils.data.cache import load_view
from utils.data.loading import DataSettings, Kind
from utils.data.rows import BadRows, DataError
from utils.data.sources import has_split
from utils.data.tables import View
from utils.settings.run_config import shares_of


def load_step(
    kind: Kind,
    names: list[str],
    encode: Callable,
    settings: DataSettings,
    step: int,
    flag: str,
    limit: str,
    parts: tuple[str, str],
    say: Callable[[str], None],
) -> tuple[View, View]:
    """(training rows, held-out rows) that could be encoded. Ends the run where either is empty.

    flag, limit: the settings that name the data and limit its length. parts: what the two are
    called when they are counted.
    """
    bad = settings.bad_rows()
    views = train_and_held_out(kind, names, encode, settings, step, bad)
    bad.finish(flag)
    for view, part in zip(views, parts, strict=True):
        say(view.counts().line(part))
    train, held = (view.usable() for view in views)
    if not train or not held:
        raise SystemExit(
            f"{flag}: nothing left to train or evaluate on; {limit}={getattr(encode, limit)}, "
            f"long_prompts={settings.long_prompts}: raise --{limit}, or give more rows"
        )
    return train, held


def train_and_held_out(
    kind: Kind,
    names: list[str],
    encode: Callable | None,
    settings: DataSettings,
    step: int,
    bad: BadRows,
) -> tuple[View, View]:
    """(training rows, held-out rows) of data sets; see cache.load_view for the arguments.

    A data set with a split to evaluate on gives its own held-out rows; of others `eval_fraction` is
    held out. Then `data_split` gives `step` its share of the training rows and `data_weights` says
    how often they come. At most `max_eval_rows` are held out, a seeded choice.
    """
    train, held = [], []
    weights = settings.data_weights or [1.0] * len(names)
    if len(weights) != len(names):
        raise DataError(
            f"data_weights={weights} has {len(weights)} numbers for {len(names)} data sets; "
            "give --data_weights one number a set"
        )
    for name, weight in zip(names, weights, strict=True):
        rows = load_view(kind, [name], "train", encode, settings, bad)
        if has_split(name, kind.splits["eval"]):
            held.append(load_view(kind, [name], "eval", encode, settings, bad))
        else:
            if len(bad) and len(rows) < 2:
                bad.finish(name)  # too few rows are left because of these
            out = held_out(rows.places(f"hold_out {settings.seed}"), settings.eval_fraction)
            held.append(rows.take(out))
            rows = rows.take(~out)
        if shares := shares_of(settings.data_split):
            rows = rows.take(in_share(rows.places("data_split"), shares, step))
        train.append(rows.take(repeated(len(rows), weight, settings.seed)))
    held = functools.reduce(operator.add, held)
    order = list(range(len(held)))
    random.Random(settings.seed).shuffle(order)
    return functools.reduce(operator.add, train), held.take(order[: settings.max_eval_rows])


def held_out(places: np.ndarray, fraction: float) -> np.ndarray:
    """(N,) flags of the rows to hold out, at least one prompt's and never all.

    places: where each row's prompt falls in [0, 1), so that all rows of a prompt go the same way,
    and a prompt that one step or file holds out is held out by every other.
    """
    if len(different := np.unique(places)) < 2:
        raise DataError(
            f"cannot hold out evaluation rows from {len(places)} row(s) with"
            f" {len(different)} different prompt(s); name evaluation data, or give 2 or more"
        )
    return (places <= max(fraction, different[0])) & (places < different[-1])


def in_share(places: np.ndarray, shares: list[float], step: int) -> np.ndarray:
    """(N,) flags of the rows that step 1, 2 or 3 may see, as DeepSpeed-Chat's --data_split.

    The prompt's place decides, so no prompt comes to two steps though files or schemas differ.
    """
    low, high = (sum(shares[:end]) / sum(shares) for end in (step - 1, step))
    flags = (low <= places) & (places < high)
    if not flags.any():
        raise DataError(
            f"data_split={','.join(f'{s:g}' for s in shares)} leaves step {step} none of "
            f"{len(places)} row(s); set --data_split so that number {step} has a larger share"
        )
    return flags


def repeated(count: int, weight: float, seed: int) -> np.ndarray:
    """Row numbers of one epoch: weight 2 gives each twice, 0.5 a seeded half, 1.5 once and a half;
    at least one row."""
    if not (math.isfinite(weight) and weight > 0):
        raise DataError(f"weight {weight}: must be a positive number; set --data_weights")
    whole = int(weight)
    extra = round((weight - whole) * count)
    if not whole and not extra:
        extra = min(1, count)
    chosen = sorted(random.Random(seed).sample(range(count), extra))
    return np.concatenate([np.tile(np.arange(count), whole), np.array(chosen, int)])
