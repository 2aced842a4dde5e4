"""Two answers to one prompt, and the words in which they differ."""

import difflib
import re

# A word, a Chinese, Japanese or Korean character, a run of spaces, or any other character.
WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u9fff\uac00-\ud7af]+|\s+|."
)


def changed(before: str, after: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts as (part, is it only in this one?), whose parts laid end to end are the texts."""
    a, b = (WORD.findall(text) for text in (before, after))
    ours, theirs = [], []
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    for kind, i, j, k, n in matcher.get_opcodes():
        for parts, words in ((ours, a[i:j]), (theirs, b[k:n])):
            if words:
                parts.append(("".join(words), kind != "equal"))
    return ours, theirs
