"""Final answers of mathematics: `--reward_function step3_ppo.rewards.maths:final_answer`.

The right answer is the row's (rows.py). The model's, behind its thoughts, is the last \\boxed{…},
else what follows the last `####`, else the whole where it is a number, else the last "the answer
is", else the last number. Numbers are compared exactly, as fractions, and words letter by letter.
Other expressions go to equivalence.py, in a confined process: what is not done after SECONDS is
wrong. There decimals count as equal from six places on, and 6, 10 as the same roots as 10, 6.
"""

import re
import unicodedata
from fractions import Fraction

from step3_ppo.rewards.rows import truth_of
from utils.rewards.sandbox import Servants

SECONDS = 3.0
LONGEST = 500  # characters of an answer; no textbook's is longer
ANSWER_IS = re.compile(
    r"(?:answer\s*(?:is|=)|answer\s*[:：]|答案\s*(?:是|为|：|:))\s*:?\s*(.+?)(?:\.\s|\.?$|[。\n])",
    re.I | re.M,
)
NUMBER = r"[-+]?\s*(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d)\.)?(?:[eE][-+]?\d{1,3})?"
NUMBER_IN_TEXT = re.compile(
    r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?![^\W_])%?"
)
PLAIN = re.compile(rf"(?P<over>{NUMBER})\s*(?:/\s*(?P<under>{NUMBER}))?(?P<rest>.*)", re.S)
MIXED = re.compile(r"(-?)\s*(\d+)\s+(\d+)\s*/\s*(\d+)")
LATEX_FRACTION = re.compile(
    r"\\[dtc]?frac\s*(?:\{\s*(-?[\d.]+)\s*\}|(\d))\s*(?:\{\s*(-?[\d.]+)\s*\}|(\d))"
)
TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
LEFT_OUT = re.compile(
    r"\\left|\\right|(?<!\\)\\[!,;: ]|\\displaystyle|\\\$|[$£€¥]|\\(?=%)|\{,\}(?=\d{3})"
)
UNIT = re.compile(
    r"(?:\s*(?:(?<![A-Za-z])[A-Za-z]{2,}(?![A-Za-z])|\s[A-Za-z]\b|[²³]|\^\{?[23]\}?|/|°|\^\{?\\circ\}?|\.$))*\s*"
)
# Words behind a number that change its value.
NO_UNITS = re.compile(r"\b(?:pi|sqrt|sin|cos|tan|log|ln|exp|frac|or|and|to|mod|choose|dozen|hundred"
                      r"|thousand|million|billion|trillion)\b", re.I)  # fmt: skip
SPACE = re.compile(r"(?<!\d) +| +(?!\d)")  # not of "1 2", which are two numbers
WORDS = re.compile(r"[^\W\d_][^\W\d_ .'’-]*(?:[ .'’-]+[^\W\d_]+)*\.?")
checked = Servants("step3_ppo.rewards.equivalence:equal", SECONDS)


def final_answer(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """1 where the answer equals the row's, else 0."""
    truths = [answer_of(str(truth_of(row)), whole=True) for row in rows]
    answers = [answer_of(response) for response in responses]
    pairs = list(zip(truths, answers, strict=True))
    verdicts = [same(truth, answer) for truth, answer in pairs]
    open_ = [i for i, verdict in enumerate(verdicts) if verdict is None]
    for i, verdict in zip(open_, checked.call_each([pairs[i] for i in open_]), strict=True):
        verdicts[i] = bool(verdict)
    return [float(verdict) for verdict in verdicts]


def answer_of(text: str, whole: bool = False) -> str:
    """The final answer in a text, cleaned; empty where there is none. whole: where nothing marks it
    it is the text, as in the rows of most data sets, and not its last number."""
    text = text.rpartition("</think>")[2]
    alone = cleaned(text)
    boxed = last_boxed(text)
    if boxed is not None:
        return cleaned(boxed)
    if "####" in text:
        return cleaned(text.rpartition("####")[2].strip().partition("\n")[0])
    if whole or number_of(alone):
        return alone
    said = ANSWER_IS.findall(text[-5000:])
    if said:
        return cleaned(said[-1])
    numbers = [n for n in NUMBER_IN_TEXT.findall(text[-5000:]) if n.strip("-%")]
    return cleaned(numbers[-1]) if numbers else ""


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{…} or \\fbox{…}; None without one that is closed."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    begin, depth = text.find("{", start), 0
    if begin < 0 or text[start:begin].strip() not in ("\\boxed", "\\fbox"):
        return None
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin + 1 : i]
    return None


def cleaned(text: str) -> str:
    """One spelling of signs: full-width and control characters, LaTeX's spaces and currencies."""
    text = unicodedata.normalize("NFKC", text[: 2 * LONGEST]).replace("−", "-")
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    text = re.sub(r",\\!\s*(?=\d{3})", ",", text.strip("*"))
    text = " ".join(TEXT.sub(r" \1 ", LEFT_OUT.sub("", text)).split())
    return text.lstrip(" ,;:").rstrip(" .,;:")


def number_of(text: str) -> tuple[Fraction, bool] | None:
    """(value, whether it is in percent) of a cleaned number, perhaps with a unit; else None."""
    text = re.sub(r"^[A-Za-z](?:\([a-z]\))?\s*=\s*", "", text)  # x = 5
    text = re.sub(r"(\d)\s*(?=\\[dtc]?frac)", r"\1 ", text)
    text = LATEX_FRACTION.sub(lambda m: f"{m[1] or m[2]}/{m[3] or m[4]}", text)
    mixed = MIXED.fullmatch(text)
    if mixed:
        sign, whole, over, under = mixed.groups()
        if int(under) == 0:
            return None
        value = int(whole) + Fraction(int(over), int(under))
        return (-value if sign else value), False
    found = PLAIN.fullmatch(text)
    parts = [found[x] and re.sub(r"[,\s]", "", found[x]) for x in ("over", "under")]
    rest, percent = re.subn(r"^\s*(?:%|percent\b)", "", found["rest"])
    if not any(map(str.isdigit, parts[0] or "")) or NO_UNITS.search(rest):
        return None
    if not UNIT.fullmatch(rest) or not any(map(str.isdigit, parts[1] or "0")):
        return None
    try:
        return Fraction(parts[0]) / (Fraction(parts[1]) if parts[1] else 1), bool(percent)
    except (ValueError, ZeroDivisionError):
        return None


def same(truth: str, answer: str) -> bool | None:
    """Whether two cleaned answers are one; None where only a computer algebra system can tell.

    50% equals 50 and 0.5, but 0.5% does not equal 50.
    """
    if not truth or not answer or max(len(truth), len(answer)) > LONGEST:
        return False
    if SPACE.sub("", truth) == SPACE.sub("", answer):
        return True
    numbers = number_of(truth), number_of(answer)
    if all(numbers):
        (a, a_percent), (b, b_percent) = numbers
        if a_percent == b_percent:
            return a == b
        return a == b or (a / 100 == b if a_percent else a == b / 100)
    words = [len(text) > 1 and bool(WORDS.fullmatch(text)) for text in (truth, answer)]
    if any(words):
        return all(words) and truth.casefold().strip(" .") == answer.casefold().strip(" .")
    return None
