"""Text of models and data for a terminal or a page: seen, and not obeyed."""

import unicodedata

# They turn the direction of what follows, so that a line reads otherwise than it is.
DIRECTIONS = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text: str) -> str:
    """Control characters and changes of direction spelled out: no text may steer a terminal."""
    return "".join(
        c
        if c in "\n\t" or (unicodedata.category(c) != "Cc" and c not in DIRECTIONS)
        else repr(c)[1:-1]
        for c in text
    )


def coloured(text: str, learned: bool) -> str:
    """A text in green where it is learned, else in grey."""
    return f"\033[{32 if learned else 90}m{text}\033[0m"
