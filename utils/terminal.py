"""Text of models and data on a terminal or a page, which it must not control."""

import unicodedata

# They change the direction of the text after them, so that a line shows another order.
DIRECTIONS = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text: str) -> str:
    """The text with control characters, changes of direction and halves of surrogate pairs, which
    no file could hold, as escape sequences."""
    return "".join(
        c
        if c in "\n\t" or (unicodedata.category(c) not in ("Cc", "Cs") and c not in DIRECTIONS)
        else repr(c)[1:-1]
        for c in text
    )


def coloured(text: str, learned: bool) -> str:
    """A text in green where it is learned, else in grey."""
    return f"\033[{32 if learned else 90}m{text}\033[0m"
