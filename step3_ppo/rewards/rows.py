"""What a data row says the right answer is, under the names that public data sets use."""

import json

TRUTH_COLUMNS = ("ground_truth", "answer", "final_answer", "solution", "target", "label")


def columns(row: dict) -> str:
    return ", ".join(map(repr, row)) or "no columns"


def given(value: object) -> bool:
    """Whether a column holds something: Parquet and CSV have every column in every row."""
    return value is not None and value != "" and value != []


def truth_of(row: dict) -> object:
    """The row's right answer: reward_model.ground_truth as in verl's Parquet files, else the first
    column of TRUTH_COLUMNS that holds something. Raises ValueError with the columns there are."""
    own = row.get("reward_model")
    if isinstance(own, dict) and given(own.get("ground_truth")):
        return own["ground_truth"]
    for name in TRUTH_COLUMNS:
        if given(row.get(name)):
            return row[name]
    raise ValueError(
        "the row has no right answer to compare with: nothing in reward_model.ground_truth or "
        f"{', '.join(TRUTH_COLUMNS)}; it has {columns(row)}"
    )


def parsed(value: object, what: str) -> object:
    """JSON text as what it says; anything else as it is. ValueError where it is no JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{what} is no JSON: {error}; it begins {value[:80]!r}") from None
