"""Whether a pattern is found in a text; asked in processes of their own (formats.py)."""

import re


def found(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None
