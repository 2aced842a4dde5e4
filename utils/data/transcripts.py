"""Conversations written down as one text, "Human: … Assistant: …" → turns.

Three spellings are known: Anthropic's (HH, rm-static, full-hh-rlhf, Nectar), where a blank line
stands before each mark; Belle's, where each mark begins a line; Guanaco's `### Human: …`.
"""

from __future__ import annotations

import re

from utils.data.rows import BadRow

MARK = r"(Human|Assistant)[ \t]*[:：]"
BEGINNING = re.compile(r"\s*(###[ \t]*)?" + MARK)  # most texts are none: a cheap question first
# The first spelling in which a text begins with Human and goes on with Assistant is its own.
SPELLINGS = tuple(re.compile(before + MARK) for before in (r"###[ \t]*", r"\n[ \t\r]*\n", r"\n"))
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def is_transcript(text: str) -> bool:
    """Whether a text begins with `Human:` and has the assistant's mark where a turn begins.

    Prose that mentions either elsewhere is none, nor is a lone "Human: …".
    """
    return bool(_marks(text)[1])


def _marks(text: str) -> tuple[str, list[re.Match]]:
    """The text as it is read, and the marks of its turns; none where it is no transcript."""
    if not BEGINNING.match(text):
        return text, []
    text = "\n\n" + text.lstrip()
    for spelling in SPELLINGS:
        marks = list(spelling.finditer(text))
        speakers = [mark[1] for mark in marks]
        if speakers[:1] == ["Human"] and marks[0].start() <= 2 and "Assistant" in speakers:
            return text, marks
    return text, []


def turns_of_text(text: str, name: str) -> list[dict]:
    """The turns of a transcript, whitespace around each left out. Raises BadRow for other texts.

    The assistant's mark at the end, after which the answer is to come, makes no turn.
    """
    text, marks = _marks(text)
    if not marks:
        raise BadRow(f'{name} is no transcript: it does not go "Human: … Assistant: …"')
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    turns = [
        {"role": SPEAKERS[mark[1]], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]
    if turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    if silent := [n for n, turn in enumerate(turns, 1) if not turn["content"]]:
        raise BadRow(f"turn {silent[0]} of the transcript in {name} is empty")
    return turns
