"""Rewards for the form of an answer, for `--reward_function step3_ppo.rewards.formats:NAME`.

    multiple_choice   the letter of the right choice
    think_answer      <think>…</think><answer>…</answer> and nothing else
    matches           the row's regular expression
    follows_schema    JSON by the row's schema
    length_budget     not longer than the row allows

Regular expressions and schemas run in confined processes that are ended after SECONDS: a pattern
may take for ever on the right text. An answer that does so scores 0.
"""

import json
import re

from step3_ppo.rewards.maths import last_boxed
from step3_ppo.rewards.rows import columns, given, parsed, truth_of
from step3_ppo.rewards.shipped import count_words
from utils.rewards.sandbox import Servants

SECONDS = 1.0
LETTERS = "ABCDEFGHIJ"
# What may stand before a letter that is chosen. A small one counts only before a sign or at the end
# of its line: "the answer is a dog" and "we choose a card" choose nothing.
STATED = re.compile(
    r"(?:answer\s*(?:is|:|=)|answer\s*[:：]|答案\s*(?:是|为|选|：|:)|选择?|choose)"
    r"[\s:：]*(?:option\s*|choice\s*)?"
    r"[(（\[*]*((?-i:[A-J])(?![A-Za-z])|[A-J](?=[)）\].*]|\s*$))",
    re.I | re.M,
)
ALONE = re.compile(r"^[\s(（\[*]*([A-J])[\s)）\]*.:：,]*(?:$|(?<=[)）\].:：,])\s)", re.M)
BLOCK = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.S | re.I)
patterns = Servants("step3_ppo.rewards.patterns:found", SECONDS)
schemas = Servants("step3_ppo.rewards.schemas:valid", SECONDS)


def multiple_choice(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """1 where the answer chooses the row's letter: in \\boxed{…}, else by the last "the answer is
    (B)", 答案是B or 选B, else alone at the beginning of the last such line. The row has a letter,
    or the number of the choice from 0 (MMLU)."""
    truths = [_letter(truth_of(row)) for row in rows]
    return [float(chosen(r) == truth) for r, truth in zip(responses, truths, strict=True)]


def _letter(truth: object) -> str:
    if isinstance(truth, int) and 0 <= truth < len(LETTERS):
        return LETTERS[truth]
    letter = str(truth).strip(" ().").upper()
    if len(letter) != 1 or letter not in LETTERS:
        raise ValueError(f"the row's answer {truth!r} is neither a letter A to J nor 0 to 9")
    return letter


def chosen(response: str) -> str:
    """The letter that an answer chooses; empty where it chooses none."""
    text = response.rpartition("</think>")[2]
    boxed = last_boxed(text)
    if boxed is not None:
        boxed = re.sub(r"\\\w+|[{}()\s.]", "", boxed).upper()
        return boxed if len(boxed) == 1 and boxed in LETTERS else ""
    found = STATED.findall(text) or ALONE.findall(text)
    return found[-1].upper() if found else ""


def think_answer(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """1 for <think>…</think><answer>…</answer>, each once and not empty, with nothing around."""
    return [float(_is_think_answer(response.strip())) for response in responses]


def _is_think_answer(text: str) -> bool:
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    if any(text.count(tag) != 1 for tag in tags) or not text.startswith("<think>"):
        return False
    thought, _, rest = text.removeprefix("<think>").partition("</think>")
    rest = rest.strip()
    if not rest.startswith("<answer>") or not rest.endswith("</answer>"):
        return False
    answer = rest.removeprefix("<answer>").removesuffix("</answer>")
    return bool(thought.strip() and answer.strip())


def matches(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """1 where the row's `regex` is found in the answer (^ and $ hold it to the whole)."""
    for row in rows:
        pattern = row.get("regex")
        if not given(pattern):
            raise ValueError(f"the row has no column 'regex'; it has {columns(row)}")
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"the row's regex {pattern!r} is none: {error}") from None
    calls = [[row["regex"], response] for row, response in zip(rows, responses, strict=True)]
    return [float(bool(found)) for found in patterns.call_each(calls)]


def follows_schema(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """1 where the answer, or its last ```json block, is JSON that the row's `json_schema` has."""
    calls = []
    for row, response in zip(rows, responses, strict=True):
        if not given(row.get("json_schema")):
            raise ValueError(f"the row has no column 'json_schema'; it has {columns(row)}")
        blocks = BLOCK.findall(response)
        schema = parsed(row["json_schema"], "the row's json_schema")
        calls.append([json.dumps(schema), blocks[-1] if blocks else response])
    verdicts = schemas.call_each(calls)
    wrong = [verdict for verdict in verdicts if isinstance(verdict, str)]
    if wrong:
        raise ValueError(f"the row's json_schema is none: {wrong[0]}")
    return [float(bool(verdict)) for verdict in verdicts]


def length_budget(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """1 up to the row's `max_words`, falling linearly to 0 at twice as many (count_words)."""
    scores = []
    for response, row in zip(responses, rows, strict=True):
        most = row.get("max_words")
        if isinstance(most, bool) or not isinstance(most, (int, float)) or not most > 0:
            raise ValueError(f"the row's max_words={most!r} is no number above 0: {columns(row)}")
        scores.append(min(1.0, max(0.0, 2 - count_words(response) / most)))
    return scores
