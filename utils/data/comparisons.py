"""Step 2's data: comparisons as tokens, and which rank scores which of them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from utils.data import batches, demonstrations, fitting, schemas
from utils.data.loading import DataSettings, Kind, load_items
from utils.data.readers import Reading
from utils.data.rows import BadRow, Row
from utils.data.schemas import Schema
from utils.data.splits import train_and_held_out
from utils.data.tables import TOKENS, View, place

SPLITS = {"train": ("train_prefs", "train"), "eval": ("test_prefs", "validation", "test")}


@dataclass(frozen=True)
class Comparison:
    """K >= 2 answers to one prompt with K finite scores, higher is better; or one that is judged by
    itself, good (1) or bad (0).

    All scores may be equal, as in real rankings: such a row is sound, but teaches nothing.
    finished: whether each answer ended by itself and was not cut at the length limit it was sampled
    with; where not given, all did.
    """

    prompt: tuple[dict, ...]
    responses: tuple[str, ...]
    scores: tuple[float, ...]
    where: str
    finished: tuple[bool, ...] = ()

    def __post_init__(self):
        if not self.finished:
            object.__setattr__(self, "finished", (True,) * len(self.responses))


@dataclass(frozen=True)
class Ranked:
    """The K answers to one prompt, each as tokens behind that prompt.

    labels: how good each answer is, higher is better. characters: the length of each answer's text.
    prompt: a number that is equal for comparisons of the same prompt.
    """

    answers: Sequence[list[int]]
    labels: Sequence[float]
    characters: Sequence[int]
    prompt: float = 0.0


def _convert(schema: Schema, row: Row, reading: Reading) -> list[Comparison]:
    made = []
    for part, each in schemas.parts(schema, row, reading):
        prompt = schemas.prompt_of(part, each, reading)
        responses, scores = (part.ranked or part.judged)(each.data, reading)
        seen: dict[str, float] = {}
        for number, (text, score) in enumerate(zip(responses, scores, strict=True), 1):
            if seen.setdefault(text, score) != score:
                raise BadRow(
                    f"response {number} is there before with score {seen[text]}, not {score}"
                )
        marks = each.data.get("finished") if "responses" in each.data else None
        finished = _finished(marks, len(responses))
        made.append(Comparison(prompt, tuple(responses), tuple(scores), each.where, finished))
    return made


def _finished(value: Any, count: int) -> tuple[bool, ...]:
    """The column that step2_reward/collect.py writes beside the answers. Raises BadRow."""
    if value is None:
        return ()
    if not isinstance(value, list) or [type(x) for x in value] != [bool] * count:
        raise BadRow(f"finished is {value!r}, not a list of {count} true or false, one a response")
    return tuple(value)


COMPARISONS = Kind(
    "comparison",
    Comparison,
    SPLITS,
    _convert,
    {
        "answers": pa.list_(TOKENS),
        "labels": pa.list_(pa.float64()),
        "characters": pa.list_(pa.int64()),
        "prompt": pa.float64(),
    },
    lambda columns, _: Ranked(**columns),
)
JUDGED = dataclasses.replace(COMPARISONS, use="judged")  # and single answers, for KTO
load_comparisons = functools.partial(load_items, COMPARISONS)


@dataclass(frozen=True)
class Encode:
    """Comparison → (Ranked or None, Counts of answers); see fitting.encode_answers.

    An answer that is too long loses its tail but keeps its stop token, where its score is read. One
    that was already cut when it was sampled has none, as when PPO scores it.
    """

    tokenizer: object
    max_length: int
    long_prompts: str

    def __call__(self, row: Comparison) -> tuple[Ranked | None, fitting.Counts]:
        turns = [{"role": "assistant", "content": text} for text in row.responses]
        limits = self.max_length, self.long_prompts, "cut"
        rows, counts = fitting.encode_answers(self.tokenizer, row.prompt, turns, *limits)
        if rows is None:
            return None, counts
        ended = zip(rows, row.finished, strict=True)
        answers = [each.ids if done else each.ids[:-1] for each, done in ended]
        characters = [len(text) for text in row.responses]
        return Ranked(answers, list(row.scores), characters, place(row, "")), counts


def load(
    names: list[str],
    sft_data: list[str],
    tokenizer,
    settings: DataSettings,
    max_length: int,
    say: Callable[[str], None],
) -> tuple[View, View, list[Ranked]]:
    """(training comparisons, held-out comparisons, held-out demonstrations) as Ranked.

    The demonstrations are those of `sft_data`, or without it the best answers of the held-out
    comparisons. Comparisons whose answers are all equally good are left out.
    """
    bad = settings.bad_rows()
    encode = Encode(tokenizer, max_length, settings.long_prompts)
    views = train_and_held_out(COMPARISONS, names, encode, settings, 2, bad)
    shown = []
    if sft_data:
        shown = demonstrations.held_out_answers(sft_data, tokenizer, settings, max_length, bad)
    usable = [view.usable() for view in views]
    train, held = (view.having("labels", lambda v: len(set(v)) > 1) for view in usable)
    ties = sum(map(len, usable)) - len(train) - len(held)
    say(
        f"{len(train)} comparisons to train on, {len(held)} held out; {ties} left out, whose "
        "answers are all equally good"
    )
    bad.finish("preference_data")
    if not train or not held:
        raise SystemExit("no comparison to train or evaluate on; give more --preference_data")
    labels = "answers to train on", "held-out answers"
    for part, view, label in zip((train, held), views, labels, strict=True):
        dropped = fitting.Counts(dropped=view.counts().dropped)
        say((part.counts() + dropped).line(label))
    if not shown:
        shown = [r.answers[r.labels.index(max(r.labels))] for r in held]
    return train, held, [Ranked([ids], [0.0], [0]) for ids in shown]


def ranked_pairs(labels: Sequence[Sequence[float]]) -> tuple[list[int], list[int], list[float]]:
    """Indices of (winner, loser) over all prompts' answers laid end to end, and pair weights.

    labels[p][k]: how good answer k of prompt p is. Ties make no pair. The pairs of one prompt
    weigh 1 together (1/C(K,2) each without ties): were they separate examples, each answer would
    be trained on K−1 times an epoch and overfit.
    """
    winners, losers, weights = [], [], []
    start = 0
    for group in labels:
        pairs = [(i, j) for i, a in enumerate(group) for j, b in enumerate(group) if a > b]
        winners += [start + i for i, _ in pairs]
        losers += [start + j for _, j in pairs]
        weights += [1.0 / max(len(pairs), 1)] * len(pairs)
        start += len(group)
    return winners, losers, weights


def deal(
    chosen: Sequence[int],
    ranked: Sequence[Ranked] | Mapping[int, Ranked],
    rows: int,
    tokens: int,
) -> list[list[int]]:
    """This rank's micro-batches of comparisons `chosen`; rows, tokens: as in batches.share."""
    lengths = {i: max(map(len, ranked[i].answers)) for i in chosen}
    counts = {i: len(ranked[i].answers) for i in chosen}
    return batches.share(chosen, lengths, rows, tokens, counts)
