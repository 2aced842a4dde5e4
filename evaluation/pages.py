"""A side-by-side evaluation as text, Markdown, HTML and tables. No text of a model can steer a
terminal, end its block of Markdown or be markup."""

import re
from html import escape

from evaluation.questions import Question
from utils import report
from utils.terminal import visible


def _blocks(questions: list[Question], results: dict):
    """(level, heading, text) of all there is to show: level 2 a prompt, 3 who asks, 4 who answers.
    results: checkpoint → the answers to each question."""
    for i, question in enumerate(questions):
        yield 2, f"prompt {i + 1} of {len(questions)}, {question.where}", ""
        for message in question.context:
            yield 3, message["role"], message["content"]
        for turn, text in enumerate(question.turns):
            yield 3, "user", text
            for checkpoint, groups in results.items():
                a = groups[i][turn]
                ending = "finished" if a.finished else "cut off"
                score = "" if a.score is None else f", score {a.score:.3f}"
                yield 4, f"{checkpoint} ({a.tokens} tokens, {ending}{score})", a.answer


def as_text(questions: list[Question], results: dict) -> str:
    marks = {2: "\n══ ", 3: "── ", 4: "→ "}
    lines = []
    for level, heading, text in _blocks(questions, results):
        lines.append(marks[level] + visible(heading))
        lines += ["    " + line for line in visible(text).split("\n")] if level > 2 else []
    return "\n".join(lines)


def last_turns(answered: list[tuple]) -> str:
    """(question, answer) of answers that have just come, for a terminal."""
    lines = []
    for question, a in answered:
        lines += [f"── {visible(question.where)}: {visible(question.turns[a.turn - 1])}"]
        lines += ["    " + line for line in visible(a.answer).split("\n")]
    return "\n".join(lines)


def as_markdown(questions: list[Question], results: dict, settings: dict, summary: str) -> str:
    shown = "\n".join(f"{name}: {value}" for name, value in settings.items())
    parts = ["# Answers side by side", fence(shown), fence(summary)]
    for level, heading, text in _blocks(questions, results):
        parts.append("#" * level + " " + code_span(heading))
        parts += [fence(text)] if level > 2 else []
    return "\n\n".join(parts) + "\n"


STYLE = (
    ":root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;"
    "margin:auto;padding:1rem}pre{white-space:pre-wrap;overflow-wrap:anywhere;padding:.6rem;"
    "border:1px solid #8886;border-radius:.4rem;unicode-bidi:isolate}"
    "h2{border-top:2px solid #8886;padding-top:1rem}"
)


def as_html(questions: list[Question], results: dict, settings: dict, summary: str) -> str:
    """A page that needs no other file."""
    shown = "\n".join(f"{name}: {value}" for name, value in settings.items())
    parts = ["<h1>Answers side by side</h1>", preformatted(shown), preformatted(summary)]
    for level, heading, text in _blocks(questions, results):
        parts.append(f"<h{level}>{escape(visible(heading))}</h{level}>")
        parts += [preformatted(text)] if level > 2 else []
    head = f'<meta charset="utf-8"><title>Answers side by side</title><style>{STYLE}</style>'
    head += '<meta name="viewport" content="width=device-width">'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def preformatted(text: str) -> str:
    return f"<pre>{escape(visible(text))}</pre>"


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


def summary_table(results: dict, seconds: dict[str, float]) -> str:
    """A line a checkpoint: means over its answers."""
    header = ("checkpoint", "answers", "tokens/answer", "finished", "tokens/s", "mean score")
    lines = []
    for checkpoint, groups in results.items():
        answers = [a for group in groups for a in group]
        n, tokens = len(answers), sum(a.tokens for a in answers)
        finished = sum(a.finished for a in answers) / n
        scored = [a.score for a in answers if a.score is not None]
        score = f"{sum(scored) / len(scored):.3f}" if scored else "-"
        speed = f"{tokens / seconds[checkpoint]:.1f}"
        lines.append((checkpoint, n, f"{tokens / n:.1f}", f"{finished:.0%}", speed, score))
    if all(line[-1] == "-" for line in lines):
        header, lines = header[:-1], [line[:-1] for line in lines]
    return report.table(lines, header)


def score_table(questions: list[Question], results: dict) -> str:
    """Every answer's score, "-" where it has none: a line a turn, a column a checkpoint."""
    lines = []
    for i, question in enumerate(questions):
        for turn in range(len(question.turns)):
            scores = [groups[i][turn].score for groups in results.values()]
            shown = ["-" if score is None else f"{score:.3f}" for score in scores]
            lines.append((i + 1, turn + 1, *shown))
    return report.table(lines, ("prompt", "turn", *(f"score of {name}" for name in results)))
