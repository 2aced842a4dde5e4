"""The row schemas: one table, and how a row finds its entry."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from utils.data import message_trees, rankings
from utils.data import prompt_answers as one
from utils.data.reading import Reading, Schema
from utils.data.rows import BadRow, BadRows, DataError, Row
from utils.data.turns import in_order

_PROMPT, _ANSWER = one.PROMPTS, one.ANSWERS
_overall = rankings.objects_in("completions", "response", "overall_score", "fine-grained_score")
_nectar = rankings.objects_in("answers", "answer", "rank")

# In the order in which they are tried on a row's columns: UltraFeedback has messages, chosen and
# prompt side by side, and a later entry must not take what an earlier one says more about.
# name: columns that must be there (of names in one bracket, one), prompt, answer, ranked answers.
SCHEMAS = {
    "messages": Schema((("messages",),), *one.chat_in("messages")),
    # ShareGPT, Belle's multi-turn
    "conversations": Schema(
        (("conversations", "conversation"),), *one.chat_in("conversations", "conversation")
    ),
    # OpenAssistant: a tree a row, or a message a row
    "tree": Schema((("message_tree_id",), ("prompt",)), unfold=message_trees.unfold),
    "tree_messages": Schema(
        tuple((column,) for column in message_trees.FLAT), gather=message_trees.gather
    ),
    # UltraFeedback as it was annotated, Nectar, Stanford's human preferences
    "ultrafeedback": Schema(
        (("instruction",), ("completions",)),
        one.prompt_in("instruction"),
        rankings.best_of(_overall),
        _overall,
    ),
    "nectar": Schema((("prompt",), ("answers",)), one.asked, rankings.best_of(_nectar), _nectar),
    "shp": Schema(
        (("history",), ("human_ref_A",), ("human_ref_B",), ("labels",)),
        rankings.shp_prompt,
        rankings.best_of(rankings.shp),
        rankings.shp,
    ),
    # Alpaca, Belle; Dolly
    "alpaca": Schema(
        (("instruction",), ("output", "response")),
        one.instructed,
        one.answer_in(("instruction",), "output", "response"),
    ),
    # UltraFeedback binarized, Anthropic's HH, rm-static
    "preference": Schema(
        (("chosen",), ("rejected",)),
        rankings.pair_prompt,
        rankings.chosen_answer,
        rankings.pair,
        optional=_PROMPT,
    ),
    "kwise": Schema(
        (("prompt",), ("responses",), ("scores", "ranks")),
        one.asked,
        rankings.best_of(rankings.listed),
        rankings.listed,
    ),
    # TRL's, texts or lists of turns; KTO; GSM8K
    "prompt_completion": Schema(
        (_PROMPT, _ANSWER), one.completed, one.answer_in(_PROMPT, *_ANSWER)
    ),
    "prompt": Schema((_PROMPT,), one.asked),
    # MT-Bench's question.jsonl, and FastChat's older one
    "turns": Schema((("turns",),), one.first_turn),
    "text": Schema((("question_id",), ("text",)), one.prompt_in("text")),
    # Guanaco: whole conversations in `text`, which otherwise is plain text (--ptx_data)
    "text_transcript": Schema(
        (("text",),), one.transcript_prompt, one.transcript_answer, only=one.is_text_transcript
    ),
    "instruction": Schema((("instruction",),), one.instructed),
    # all of it is learned (--ptx_data); no loader here reads it
    "plain_text": Schema((("text",),)),
}
TEXTS = ("transcript", "plain")
SYSTEM = ("system", "system_prompt")
# Columns that count beside those of a schema.
_BESIDE = {*SYSTEM, "input", "context", "history", "label", "tools"}.union(*rankings.PAIR_SCORES)


def known_for(use: str) -> dict[str, Schema]:
    """The schemas whose rows can be read for a `Reading.use`."""
    return {name: schema for name, schema in SCHEMAS.items() if schema.serves(use)}


def reading_of(use: str, schema: str, columns: Mapping[str, str] | None) -> Reading:
    """How rows are to be read by --data_schema and --columns. Raises DataError for what cannot be.

    schema: "auto", a name of SCHEMAS, "transcript" or "plain" (how texts are taken, by the columns'
    schema), or both as NAME:transcript, NAME:plain. columns: {ours: theirs}.
    """
    name, colon, texts = schema.partition(":")
    if schema in TEXTS:
        name, texts = "auto", schema
    known, columns = known_for(use), columns or {}
    if name not in ("auto", *known) or (colon or texts) and texts not in TEXTS:
        raise DataError(
            f"schema={schema!r}: set --data_schema to auto, {', '.join(known)}, or say how texts "
            "are to be taken: transcript, plain, NAME:transcript, NAME:plain"
        )
    ours = _BESIDE.union(*(each.reads for each in SCHEMAS.values()))
    if unknown := sorted(columns.keys() - ours):
        raise DataError(
            f"--columns {unknown[0]}={columns[unknown[0]]}: no schema has a column {unknown[0]}; "
            f"known are {', '.join(sorted(ours))}"
        )
    return Reading(use, name, columns, texts or "auto")


def opened(rows: Iterable[Row], reading: Reading, bad: BadRows) -> tuple[str, Iterable[Row]]:
    """(schema of a data set, its rows under our column names, as they are read).

    The schema is that of the first row whose columns are known. A set that has none of the names of
    --columns is read by its own; one that has some of them is refused. Raises DataError for that,
    and where no row's columns are known.
    """
    rows = iter(rows)
    seen = list(itertools.islice(rows, 1))
    if not seen:
        return reading.schema, seen
    columns, first = reading.columns, seen[0]
    lacks = [theirs for theirs in columns.values() if theirs not in first.data]
    if len(lacks) == len(columns):
        columns = {}
    elif lacks:
        raise DataError(
            f"{first.where}: has no column {', '.join(lacks)}, which --columns names; it has "
            f"{', '.join(map(repr, first.data))}"
        )
    name = reading.schema
    if name == "auto":
        known, wanted = known_for(reading.use), columns.keys() - _BESIDE
        known = {one: schema for one, schema in known.items() if wanted <= schema.reads}
        while not (fits := _fitting(renamed(seen[-1], columns), known)):
            if (row := next(rows, None)) is None:
                raise DataError(
                    f"{first.where}: the columns {', '.join(map(repr, first.data)) or '(none)'} "
                    f"fit no schema known here ({', '.join(known_for(reading.use))}); name them "
                    "with --columns prompt=THEIRS,answer=THEIRS, rename them, or set --data_schema"
                )
            seen.append(row)
        name = fits
    rows = (renamed(row, columns) for row in itertools.chain(seen, rows))
    if SCHEMAS[name].gather:
        rows, name = SCHEMAS[name].gather(rows, bad, reading.notes)
    return name, rows


def has_answer(data: dict) -> bool:
    """Whether a demonstration could be read from a row."""
    return any(one.serves("demonstration") and one.fits(data) for one in SCHEMAS.values())


def _fitting(row: Row, known: Mapping[str, Schema]) -> str | None:
    return next((name for name, schema in known.items() if schema.fits(row.data)), None)


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with `columns` {ours: theirs} under our names too; theirs stay, for verifiers."""
    here = {ours: row.data[theirs] for ours, theirs in columns.items() if theirs in row.data}
    return Row({**row.data, **here}, row.where) if here else row


def parts(schema: Schema, row: Row, reading: Reading) -> list[tuple[Schema, Row]]:
    """The rows that a row stands for, each with its schema. Raises BadRow."""
    if not schema.unfold:
        return [(schema, row)]
    unfolded = schema.unfold(row.data, reading)
    return [
        (SCHEMAS[name], Row(data, f"{row.where}, part {number}" if number > 1 else row.where))
        for number, (name, data) in enumerate(unfolded, 1)
    ]


def prompt_of(schema: Schema, row: Row, reading: Reading) -> tuple[dict, ...]:
    """The turns of a row up to the last user's, its system text in front. Raises BadRow."""
    data = row.data
    if data.get("tools") not in (None, [], {}, "", "[]"):
        raise BadRow("tools lists functions, and no prompt made here would show them")
    system = next((data[name] for name in SYSTEM if data.get(name)), None)
    return in_order(schema.prompt(data, reading), system, reading.notes)
