"""Step 2's data: comparisons as token rows, and which rank scores which of them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from utils.data import (
    batches,
    chat_template,
    demonstrations,
    fitting,
    preferences,
    row_cache,
    row_tables,
    splits,
)
from utils.data.splits import DataSettings


@dataclass(frozen=True)
class Ranked:
    """The K answers to one prompt, each as tokens behind that prompt.

    labels: how good each answer is, higher is better. characters: the length of each answer's text.
    prompt: a number that is equal for comparisons of the same prompt.
    """

    answers: tuple[list[int], ...]
    labels: tuple[float, ...]
    characters: tuple[int, ...]
    prompt: float = 0.0


RANKED = row_tables.Layout(
    preferences.Comparison,
    {
        "answers": pa.list_(row_tables.TOKENS),
        "labels": pa.list_(pa.float64()),
        "characters": pa.list_(pa.int64()),
        "prompt": pa.float64(),
    },
    lambda columns, _: Ranked(
        tuple(columns["answers"]),
        tuple(columns["labels"]),
        tuple(columns["characters"]),
        columns["prompt"],
    ),
)


def encode(
    tokenizer, comparisons, max_length: int, long_prompts: str, bad
) -> tuple[list[Ranked], batches.Counts]:
    """Comparisons → (list of Ranked, Counts of answers).

    All answers of a comparison follow the same prompt tokens, cut so that the longest answer fits.
    An answer that is too long even so loses its tail but keeps its stop token, where its score is
    read. An answer that was already cut when it was sampled has no stop token. Comparisons that the
    chat template cannot render go to `bad`.
    """
    counts, encoded = batches.Counts(), []
    for row in comparisons:
        try:
            answers, fate = fitting.encode_answers(
                tokenizer, row.prompt, row.responses, max_length, long_prompts
            )
        except chat_template.TemplateError as error:
            bad.add(row.where, str(error), list(row.responses))
            continue
        counts += fate
        if answers is None:
            continue
        # PPO scores an answer that was cut when it was sampled without a stop token too.
        answers = [a if done else a[:-1] for a, done in zip(answers, row.finished, strict=True)]
        characters = tuple(len(t) for t in row.responses)
        encoded.append(Ranked(tuple(answers), row.scores, characters, splits.place(row, "")))
    return encoded, counts


def load(
    names: list[str],
    sft_data: list[str],
    tokenizer,
    settings: DataSettings,
    max_length: int,
    say: Callable[[str], None],
) -> tuple[row_tables.View, row_tables.View, list[Ranked]]:
    """(training comparisons, held-out comparisons, held-out demonstrations) as Ranked.

    The demonstrations are those of `sft_data`, or without it the best answers of the held-out
    comparisons. Comparisons whose answers are all equally good are left out.
    """
    bad = settings.bad_rows()
    load_rows = row_cache.Reader(
        functools.partial(
            preferences.load_comparisons,
            schema=settings.data_schema,
            columns=settings.names_of_columns(),
        ),
        functools.partial(
            encode, tokenizer, max_length=max_length, long_prompts=settings.long_prompts
        ),
        RANKED,
        settings,
        bad,
    )
    train, held = splits.train_and_held_out(
        names, load_rows, preferences.PREFERENCE_SPLITS["eval"], settings, step=2, bad=bad
    )
    shown = []
    if sft_data:
        shown = demonstrations.held_out(sft_data, tokenizer, settings, max_length, bad)
    dropped = [part.counts().dropped for part in (train, held)]
    train, held = train.usable(), held.usable()
    ties = len(train) + len(held)
    train, held = (part.where("labels", lambda v: len(set(v)) > 1) for part in (train, held))
    ties -= len(train) + len(held)
    say(
        f"{len(train)} comparisons to train on, {len(held)} held out; {ties} left out, whose "
        "answers are all equally good"
    )
    bad.finish("preference_data")
    if not train or not held:
        raise SystemExit("no comparison to train or evaluate on; give more --preference_data")
    parts = zip((train, held), dropped, ("answers to train on", "held-out answers"), strict=True)
    for part, lost, name in parts:
        say((part.counts() + batches.Counts(dropped=lost)).line(name))
    if not shown:
        shown = [r.answers[r.labels.index(max(r.labels))] for r in held]
    return train, held, [Ranked((ids,), (0.0,), (0,)) for ids in shown]


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
