"""JSON in which no name stands twice in an object: `json` takes the last one without a word."""

import json
from typing import Any


def once(pairs: list[tuple[str, Any]]) -> dict:
    """An object's names and values as a dict; ValueError that tells the doubled names."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{', '.join(map(repr, twice))} stands there twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=once)


def loads(text: str) -> Any:
    """The value of a whole text; ValueError where it is none, RecursionError where too deep."""
    if text.startswith("\ufeff"):
        raise json.JSONDecodeError("a byte order mark in the middle of a file", text, 0)
    return DECODER.decode(text)
