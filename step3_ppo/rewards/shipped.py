"""Reward functions that come along, for `--reward_function step3_ppo.rewards.shipped:NAME`.

Each is a plain callable (prompts, responses, rows) -> scores, one float a response, higher better:
prompts[i] is the text of the last user turn, responses[i] the policy's answer to it, rows[i] the
data row that the prompt came from, as read from disk. A row that lacks what a function needs
raises ValueError with the columns it has. One's own function looks the same and stands in any file
or module; `utils/rewards/functions.py` loads and calls it.
"""

import functools
import math
import re

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from utils.data import toy_tasks, turns

DEFAULT_TARGET_LENGTH = 20  # words
REFERENCE_COLUMNS = ("output", "reference", "completion", "response")
CHAT_COLUMNS = ("messages", "conversations")
# Han characters and kana: scripts without spaces, in which a character counts as a word. (Korean
# has spaces.)
CJK = "々〇ぁ-ゖァ-ヺー\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
CJK_CHARACTER = re.compile(f"[{CJK}]")
# \d is a decimal digit of any script, full-width １２ and Devanagari १२ among them.
NUMBER = re.compile(r"\d+(?:[.．]\d+)?")
TOKEN = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")


def count_of_numbers(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """0.2 for each number in the response, 1.0 at most; -0.2 where there is none.

    A number is a run of digits, perhaps with a decimal part: "12", "3.14" and "１２．５" are one,
    "12 34" and "1,000" two. Chinese numerals (三, 二十) are none: 一 and 万 stand in everyday words
    such as 一起 and 万一, which would be paid as numbers.
    """
    counts = [len(NUMBER.findall(response)) for response in responses]
    return [min(count, 5) / 5 if count else -0.2 for count in counts]


def length_target(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """Closeness of the response's length to a target: 1 at the target, falling linearly to 0 at
    no words and at twice the target; 0 beyond.

    The target is the row's `target_length` where it has one, else 20. See `count_words`.
    """
    scores = []
    for response, row in zip(responses, rows, strict=True):
        target = _target_length(row)
        scores.append(max(0.0, 1 - abs(count_words(response) - target) / target))
    return scores


def count_words(text: str) -> int:
    """Pieces between spaces that hold a letter or digit; a Han character or kana is one by itself.

    "I don't know." is 3, "我喜欢茶。" 4, "用 Python 3 写" 4.
    """
    pieces = CJK_CHARACTER.sub(lambda character: f" {character.group()} ", text).split()
    return sum(any(c.isalnum() for c in piece) for piece in pieces)


def _target_length(row: dict) -> float:
    given = row.get("target_length")
    if given is None or given == "":  # Parquet and CSV have every column in every row
        return DEFAULT_TARGET_LENGTH
    try:
        target = math.nan if isinstance(given, bool) else float(given)  # CSV holds texts
    except (TypeError, ValueError):
        target = math.nan
    if not 0 < target < math.inf:
        raise ValueError(
            f"target_length={given!r} is not a number of words above 0; mend the row's column "
            f"target_length, or leave it out for {DEFAULT_TARGET_LENGTH}"
        )
    return target


def toy_verifier(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """The embedded task's verifier, in [0, 1]: see utils.data.toy_tasks.verify."""
    return [_verdict(row, response) for response, row in zip(responses, rows, strict=True)]


def _verdict(row: dict, response: str) -> float:
    lacks = [name for name in ("answers", "members", "count") if name not in row]
    if lacks:
        raise ValueError(
            f"the row is no task of utils.data.toy_tasks: it lacks {', '.join(map(repr, lacks))}; "
            f"it has {_columns(row)}; give prompts.jsonl of that module as --prompt_data"
        )
    if row["members"] and row["members"] not in toy_tasks.LEXICON:
        raise ValueError(
            f"members={row['members']!r} names no word list of utils.data.toy_tasks; there are "
            + ", ".join(toy_tasks.LEXICON)
        )
    return toy_tasks.verify(row, response)


def rouge_l(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """ROUGE-L F-measure, in [0, 1], of the response to the row's reference (Lin 2004).

    By the package rouge-score, without stemming. On ASCII the tokens are its own: runs of letters
    and digits. It would drop all other text; here letters and digits of any script make words,
    and each Han character or kana is one.
    """
    scorer = RougeScorer(["rougeL"], tokenizer=_Tokenizer())
    return [
        float(scorer.score(reference_of(row), response)["rougeL"].fmeasure)
        for response, row in zip(responses, rows, strict=True)
    ]


class _Tokenizer:
    """What RougeScorer takes as `tokenizer`."""

    def tokenize(self, text: str) -> list[str]:
        return TOKEN.findall(text.lower())


def bleu(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """Sentence BLEU, in [0, 1], of the response to the row's reference (Papineni et al. 2002).

    By sacrebleu, divided by 100: up to 4-grams (fewer where the response is shorter), exponential
    smoothing, its tokenizer `zh` where the reference holds Han characters or kana, else `13a`.
    (`zh` splits Han characters, not kana.)
    """
    scores = []
    for response, row in zip(responses, rows, strict=True):
        reference = reference_of(row)
        # Not `zh` for all: it splits typographic quotes and dashes off words, which 13a keeps.
        metric = _bleu("zh" if CJK_CHARACTER.search(reference) else "13a")
        score = metric.sentence_score(response, [reference]).score
        scores.append(min(score / 100, 1.0))  # the same text scores 1 + 4e-16
    return scores


@functools.cache
def _bleu(tokenizer: str) -> BLEU:
    # effective_order: else every response of fewer than four tokens would score 0.
    return BLEU(tokenize=tokenizer, effective_order=True)


def reference_of(row: dict) -> str:
    """The row's reference text: its `output`, `reference`, `completion` or `response`, whichever
    first holds a text, else the assistant turn that ends `messages` or `conversations`.

    Only the turn that ends them: an earlier one answers another prompt. Raises ValueError with the
    columns that are there.
    """
    for name in REFERENCE_COLUMNS:
        if isinstance(row.get(name), str) and row[name].strip():
            return row[name]
    for name in CHAT_COLUMNS:
        _, last = turns.split_answer(row.get(name), name)
        if last is not None:
            return turns.turns_of([last], f"the last of {name}")[0]["content"]
    raise ValueError(
        f"the row has no reference to compare with: no text in {', '.join(REFERENCE_COLUMNS)}, no "
        f"assistant turn at the end of {' or '.join(CHAT_COLUMNS)}; it has {_columns(row)}"
    )


def _columns(row: dict) -> str:
    return ", ".join(map(repr, row)) or "no columns"
