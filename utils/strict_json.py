"""JSON in which no name stands twice in an object: `json` silently takes the last one."""

import json
from typing import Any


def once(pairs: list[tuple[str, Any]]) -> dict:
    """An object's names and values as a dict; ValueError that tells the doubled names."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{', '.join(map(repr, twice))} stands there twice")
    return values


DECODER = json.JSONDecoder(object_pairs_hook=once)


def loads(text: str) -> Any:
    """The value of a whole text; ValueError where it is none, RecursionError where too deep."""
    if text.startswith("\ufeff"):
        raise json.JSONDecodeError("a byte order mark in the middle of a file", text, 0)
    return DECODER.decode(text)
