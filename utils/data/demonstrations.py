"""Step 1's data: demonstrations as tokens, of which the assistant's are supervised."""

import functools
from collections.abc import Callable

from utils.data import batches, instructions, row_cache, row_tables, splits
from utils.data.splits import DataSettings


def load(
    names: list[str],
    tokenizer,
    settings: DataSettings,
    max_length: int,
    long_answers: str,
    say: Callable[[str], None],
) -> tuple[row_tables.View, row_tables.View]:
    """(training examples, held-out examples) as chat_template.Encoded."""
    bad = settings.bad_rows()
    load_rows = row_cache.Reader(
        functools.partial(
            instructions.load_conversations,
            schema=settings.data_schema,
            columns=settings.names_of_columns(),
        ),
        functools.partial(
            batches.encode_conversations,
            tokenizer,
            max_length=max_length,
            long_prompts=settings.long_prompts,
            long_answers=long_answers,
        ),
        row_tables.SUPERVISED,
        settings,
        bad,
    )
    train, held = splits.train_and_held_out(
        names, load_rows, instructions.SFT_SPLITS["eval"], settings, step=1, bad=bad
    )
    bad.finish("sft_data")
    say(train.counts().line("training data"))
    say(held.counts().line("held-out data"))
    train, held = train.usable(), held.usable()
    if not train or not held:
        raise SystemExit(
            f"nothing left to train or evaluate on; max_length={max_length}: "
            "raise --max_length or give more rows"
        )
    return train, held


def held_out(
    names: list[str], tokenizer, settings: DataSettings, max_length: int, bad
) -> list[list[int]]:
    """Token rows of the held-out demonstrations, for step 2's bias."""
    _, held = splits.train_and_held_out(
        names,
        row_cache.Reader(
            functools.partial(instructions.load_conversations, columns=settings.names_of_columns()),
            functools.partial(row_tables.as_read),
            row_tables.CONVERSATIONS,
            settings,
            bad,
        ),
        instructions.SFT_SPLITS["eval"],
        splits.unweighted(settings),
        step=1,
        bad=bad,
    )
    encoded, _ = batches.encode_conversations(
        tokenizer, held, max_length, settings.long_prompts, "cut", bad
    )
    return [e.ids for e in encoded]
