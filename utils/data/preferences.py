"""Answers whose log-probabilities are compared: comparisons, or answers judged one by one, as
tokens, each row with the place where its answer begins."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from utils.data import fitting
from utils.data.comparisons import COMPARISONS, JUDGED, Comparison
from utils.data.loading import DataSettings
from utils.data.rows import BadRow
from utils.data.splits import train_and_held_out
from utils.data.tables import TOKENS, View, place

PAIRS = ("all", "best_worst", "best_random")


@dataclass(frozen=True)
class Answers:
    """K answers to one prompt, each as tokens behind that prompt.

    begins: where each row's answer begins. labels: how good it is, higher is better; of a single
    answer, which is judged by itself, 1 for a good one and 0 for a bad one. characters:
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
    pairs: which answers are kept, see `_kept`.
    """

    tokenizer: object
    max_length: int
    long_prompts: str
    pairs: str = "all"

    def __call__(self, row: Comparison) -> tuple[Answers | None, fitting.Counts]:
        kept = _kept(row, self.pairs)
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


def _kept(row: Comparison, pairs: str) -> Sequence[int]:
    """Of answers that differ in score: all, or the first of the best against the first of the worst
    ("best_worst") or against one of those below it, drawn by the row itself ("best_random")."""
    scores, best = row.scores, max(row.scores)
    if pairs == "all" or len(set(scores)) == 1:
        return range(len(scores))
    if pairs == "best_worst":
        return [scores.index(best), scores.index(min(scores))]
    below = [i for i, score in enumerate(scores) if score < best]
    drawn = place(row, f"best_random {row.responses}")
    return [scores.index(best), below[int(drawn * len(below))]]


def load(
    names: list[str],
    tokenizer,
    settings: DataSettings,
    max_length: int,
    pairs: str,
    single: bool,
    say: Callable[[str], None],
    margin: float = 0.0,
) -> tuple[View, View]:
    """(training rows, held-out rows) as Answers. Comparisons whose best and worst kept answer are
    no more than `margin` apart in score are left out. single: rows of one answer that is judged by
    itself will do. Ends the run where either is empty."""
    bad = settings.bad_rows()
    encode = Encode(tokenizer, max_length, settings.long_prompts, pairs)
    columns = {"answers": pa.list_(TOKENS), "begins": pa.list_(pa.int64())}
    columns |= {name: COMPARISONS.columns[name] for name in ("labels", "characters", "prompt")}
    kind = JUDGED if single else COMPARISONS
    kind = dataclasses.replace(kind, columns=columns, build=lambda c, _: Answers(**c))
    views = train_and_held_out(kind, names, encode, settings, 2, bad)
    usable = [view.usable() for view in views]
    train, held = (view.having("labels", lambda v: _teaches(v, margin)) for view in usable)
    ties = sum(map(len, usable)) - len(train) - len(held)
    say(
        f"{len(train)} rows to train on, {len(held)} held out; {ties} left out, whose answers are "
        + (f"no more than {margin:g} apart" if margin else "all equally good")
    )
    bad.finish("preference_data")
    if not train or not held:
        raise SystemExit(
            "no row to train or evaluate on; give more --preference_data, raise --max_length "
            f"(now {max_length}), or lower --pair_margin (now {margin:g})"
        )
    for view, part in zip(views, ("answers to train on", "held-out answers"), strict=True):
        say(view.counts().line(part))
    return train, held


def _teaches(labels: Sequence[float], margin: float = 0.0) -> bool:
    return len(labels) == 1 or max(labels) - min(labels) > margin


class Mismatched(Sequence):
    """Rows of Answers: to each prompt of `rows` an answer to another one, the next before it in
    `rows`, of whose answers they take turns. Ends the run where all rows have one prompt.

    KTO takes how much likelier the policy finds such answers than the reference for the KL between
    them. Which row has which is fixed, so that the reference's numbers can be computed once.
    """

    def __init__(self, rows: View, max_length: int):
        self.rows, self.max_length = rows, max_length
        prompts = rows.numbers("prompt")
        if len(set(prompts.tolist())) < 2:
            raise SystemExit(
                f"loss=kto estimates a KL by answers to other prompts, and all of {len(rows)} rows "
                "have one prompt; give more --preference_data, or raise --eval_fraction"
            )
        self.other = np.arange(len(rows)) - 1
        while (same := prompts[self.other] == prompts).any():
            self.other -= same

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Answers:
        row, other = self.rows[i], self.rows[int(self.other[i]) % len(self)]
        k = i % len(other.answers)
        ids = row.answers[0][: row.begins[0]] + other.answers[k][other.begins[k] :]
        return Answers([ids[: self.max_length]], [row.begins[0]], [0.0], [0])

    def fingerprint(self) -> str:
        return f"mismatched within {self.max_length} tokens, {self.rows.fingerprint()}"
