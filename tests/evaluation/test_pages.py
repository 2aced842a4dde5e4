"""No text of a model breaks out of its block or steers the terminal; what the tables count."""

import re

from evaluation import pages
from evaluation.prompt_eval import Answer
from evaluation.questions import Question
from tests.helpers.evaluated_models import blocks_of
from utils import terminal

NASTY = "```\n# not a heading\n``````\n<script>alert(1)</script>\n\x1b[2J\rgone `\n~~~\n| a | b |"


def nasty_results():
    question = Question(({"role": "system", "content": NASTY},), (NASTY, "Again?"), "file `x`:1")
    talk, groups = question.context, []
    for turn, said in enumerate(question.turns, 1):
        talk += ({"role": "user", "content": said}, {"role": "assistant", "content": NASTY})
        groups.append(Answer("out/`a`", turn, talk, 4 * turn, turn == 1, float(turn)))
    return [question], {"out/`a`": [groups]}


def test_no_text_breaks_out_of_its_block():
    questions, results = nasty_results()
    page = pages.as_markdown(questions, results, {"strategy": "greedy"}, "a summary")
    inside, outside = blocks_of(page)
    shown = NASTY.replace("\x1b", "\\x1b").replace("\r", "\\r")
    assert inside == ["strategy: greedy", "a summary", shown, shown, shown, "Again?", shown]
    assert [line for line in outside if line] == [
        "# Answers side by side",
        "## `` prompt 1 of 1, file `x`:1 ``",
        "### ` system `",
        "### ` user `",
        "#### `` out/`a` (4 tokens, finished, score 1.000) ``",
        "### ` user `",
        "#### `` out/`a` (8 tokens, cut off, score 2.000) ``",
    ]


def test_printed_text_cannot_steer_the_terminal():
    text = pages.as_text(*nasty_results())
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    assert "\\x1b[2J" in text and "    # not a heading\n" in text
    assert terminal.visible("a\tb\n中文 é🙂\x00\x9b") == "a\tb\n中文 é🙂\\x00\\x9b"


def test_summary_is_of_all_answers():
    _, results = nasty_results()
    header, _, line = pages.summary_table(results, {"out/`a`": 4.0}).split("\n")
    columns = ["checkpoint", "answers", "tokens/answer", "finished", "tokens/s", "mean score"]
    assert re.split("  +", header) == columns
    assert line.split() == ["out/`a`", "2", "6.0", "50%", "3.0", "1.500"]
