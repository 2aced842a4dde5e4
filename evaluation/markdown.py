"""Text of models in Markdown, so that it cannot break out of its block."""

import re

from utils.terminal import visible


def fence(text: str) -> str:
    """A code block that nothing in `text` can close: its fence is longer than any run there."""
    text = visible(text)
    ticks = "`" * max(3, _longest_run(text) + 1)
    return f"{ticks}text\n{text}\n{ticks}"


def code_span(text: str) -> str:
    text = " ".join(visible(text).split())
    ticks = "`" * (_longest_run(text) + 1)
    return f"{ticks} {text} {ticks}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
