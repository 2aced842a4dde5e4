"""Answers whose log-probabilities are compared: comparisons as tokens, each row with the place
where its answer begins."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from utils.data import fitting
from utils.data.comparisons import COMPARISONS, Comparison
from utils.data.loading import DataSettings
from utils.data.rows import BadRow
from utils.data.splits import train_and_held_out
from utils.data.tables import TOKENS, View, place

PAIRS = ("all", "best_worst")


@dataclass(frozen=True)
class Answers:
    """K answers to one prompt, each as tokens behind that prompt.

    begins: where each row's answer begins. labels: how good it is, higher is better. characters:
    the length of its text. prompt: a number that is equal for rows of the same prompt.
    """

    answers: Sequence[list[int]]
    begins: Sequence[int]
    labels: Sequence[float]
    characters: Sequence[int]
    prompt: float = 0.0


@dataclass(frozen=True)
class Encode:
    """Comparison → (Answers or None, Counts of answers); see fitting.encode_answers.

    An answer that is too long loses its tail but keeps its stop token. One that was already cut
    when it was sampled has none: its probability there would teach to stop in mid-sentence.
    pairs: "best_worst" keeps the first of the best answers and the first of the worst.
    """

    tokenizer: object
    max_length: int
    long_prompts: str
    pairs: str = "all"

    def __call__(self, row: Comparison) -> tuple[Answers | None, fitting.Counts]:
        kept = range(len(row.responses))
        if self.pairs == "best_worst" and len(set(row.scores)) > 1:
            kept = [row.scores.index(max(row.scores)), row.scores.index(min(row.scores))]
        texts = [row.responses[i] for i in kept]
        turns = [{"role": "assistant", "content": text} for text in texts]
        limits = self.max_length, self.long_prompts, "cut"
        rows, counts = fitting.encode_answers(self.tokenizer, row.prompt, turns, *limits)
        if rows is None:
            return None, counts
        answers = [
            each.ids if row.finished[i] else each.ids[:-1]
            for i, each in zip(kept, rows, strict=True)
        ]
        begins = [each.last_answer for each in rows]
        if any(begin >= len(ids) for begin, ids in zip(begins, answers, strict=True)):
            raise BadRow("an answer that was cut when it was sampled has no token")
        labels = [row.scores[i] for i in kept]
        return Answers(answers, begins, labels, list(map(len, texts)), place(row, "")), counts


def load(
    names: list[str],
    tokenizer,
    settings: DataSettings,
    max_length: int,
    pairs: str,
    say: Callable[[str], None],
) -> tuple[View, View]:
    """(training rows, held-out rows) as Answers. Comparisons whose answers are all equally good are
    left out. Ends the run where either is empty."""
    bad = settings.bad_rows()
    encode = Encode(tokenizer, max_length, settings.long_prompts, pairs)
    columns = {"answers": pa.list_(TOKENS), "begins": pa.list_(pa.int64())}
    columns |= {name: COMPARISONS.columns[name] for name in ("labels", "characters", "prompt")}
    kind = dataclasses.replace(COMPARISONS, columns=columns, build=lambda c, _: Answers(**c))
    views = train_and_held_out(kind, names, encode, settings, 2, bad)
    usable = [view.usable() for view in views]
    train, held = (view.having("labels", lambda v: len(set(v)) > 1) for view in usable)
    ties = sum(map(len, usable)) - len(train) - len(held)
    say(
        f"{len(train)} comparisons to train on, {len(held)} held out; {ties} left out, whose "
        "answers are all equally good"
    )
    bad.finish("preference_data")
    if not train or not held:
        raise SystemExit(
            "no comparison to train or evaluate on; give more --preference_data, or raise "
            f"--max_length (now {max_length})"
        )
    for view, part in zip(views, ("answers to train on", "held-out answers"), strict=True):
        say(view.counts().line(part))
    return train, held
