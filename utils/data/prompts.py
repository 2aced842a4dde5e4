"""Step 3's data: prompts as tokens, with the turns and the data row that reward functions read."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from utils.data import batches, instructions, row_cache, row_tables, splits
from utils.data.splits import DataSettings


class Reader(Protocol):
    """A reward model's way to read conversations (models/scorer.py)."""

    def refusal(self, messages: Sequence[dict]) -> str | None:
        """Why it can score no answer to these messages, or None."""


@dataclass(frozen=True)
class Prompt:
    """ids: the prompt's tokens. messages, row: its turns and its data row."""

    ids: list[int]
    messages: tuple[dict, ...]
    row: dict


def _prompt(columns: dict, item: Callable) -> Prompt:
    read = item()
    return Prompt(columns["ids"], read.messages, read.row)


PROMPTS = row_tables.Layout(instructions.Prompt, {"ids": row_tables.TOKENS}, _prompt)


def readable(prompts: Sequence, readers: Iterable[Reader], bad) -> list:
    """The items (with messages and where) an answer to which every one of `readers` can read.

    The others go to `bad` (BadRows), so that no run ends in the middle because one cannot be
    scored.
    """
    readers, kept = list(readers), []
    for prompt in prompts:
        refusals = [why for r in readers if (why := r.refusal(prompt.messages))]
        if refusals:
            bad.add(prompt.where, "; ".join(refusals), list(prompt.messages))
        else:
            kept.append(prompt)
    return kept


def encode(
    tokenizer, prompts, max_prompt_length: int, long_prompts: str, readers: Iterable[Reader], bad
) -> tuple[list[Prompt], batches.Counts]:
    """(instructions.Prompts that all `readers` can read, as Prompt, Counts); see
    batches.encode_prompts."""
    prompts = readable(prompts, readers, bad)
    kept, ids, counts = batches.encode_prompts(
        tokenizer, prompts, max_prompt_length, long_prompts, bad
    )
    return [Prompt(i, p.messages, p.row) for p, i in zip(kept, ids, strict=True)], counts


def load(
    names: list[str],
    tokenizer,
    settings: DataSettings,
    max_prompt_length: int,
    readers: Sequence[Reader],
    say: Callable[[str], None],
) -> tuple[row_tables.View, row_tables.View]:
    """(training prompts, held-out prompts) as Prompt, those that all `readers` can read."""
    bad = settings.bad_rows()
    load_rows = row_cache.Reader(
        functools.partial(
            instructions.load_prompts,
            schema=settings.data_schema,
            columns=settings.names_of_columns(),
        ),
        functools.partial(
            encode,
            tokenizer,
            max_prompt_length=max_prompt_length,
            long_prompts=settings.long_prompts,
            readers=readers,
        ),
        PROMPTS,
        settings,
        bad,
    )
    train, held = splits.train_and_held_out(
        names, load_rows, instructions.PROMPT_SPLITS["eval"], settings, step=3, bad=bad
    )
    bad.finish("prompt_data")
    say(train.counts().line("prompts"))
    say(held.counts().line("held-out prompts"))
    train, held = train.usable(), held.usable()
    if not train or not held:
        raise SystemExit(
            f"no prompt left to train or evaluate on; max_prompt_length={max_prompt_length},"
            f" long_prompts={settings.long_prompts}: raise --max_prompt_length, or give more rows"
        )
    return train, held
