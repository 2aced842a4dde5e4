"""Final answers of mathematics, as models write them."""

import importlib.util
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step3_ppo.rewards import maths
from step3_ppo.rewards.maths import answer_of, final_answer, number_of, same

# Right answer, what a model wrote, verdict. No algebra is needed for these.
PLAIN = [
    ("42", "The answer is 42.", 1),
    ("1000", "The answer is 1,000.", 1),
    ("1,000", "1000.", 1),
    ("1{,}000", r"\boxed{1000}", 1),
    (r"11,\! 111", r"\boxed{11111}", 1),
    ("3.50", "$3.50", 1),
    ("3.5", r"So he pays \$3.50 in total", 1),
    ("18", "Natalia sold 48/2 = 24 clips.\n#### 18", 1),
    ("Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 24", "24", 1),
    ("18", "#### $18.00", 1),
    ("18", "#### 18 dollars", 1),
    ("18", "#### 19", 0),
    ("50", "50%", 1),
    ("0.5", r"\boxed{50\%}", 1),
    ("50%", r"\boxed{0.5}", 1),
    ("50%", r"\boxed{0.5\%}", 0),
    ("50", "0.5", 0),
    ("0.5", r"\frac{1}{2}", 1),
    ("1/2", "0.5", 1),
    (r"\frac12", r"\boxed{0.5}", 1),
    (r"\dfrac{3}{4}", r"\boxed{.75}", 1),
    (r"-\frac{1}{2}", r"\boxed{-1/2}", 1),
    (r"1 \frac{1}{2}", r"\boxed{1.5}", 1),
    ("1.5", r"\boxed{1\frac{1}{2}}", 1),
    ("-1.5", "The answer is -1 1/2.", 1),
    ("0.333", r"\boxed{1/3}", 0),
    ("1/3", r"\boxed{0.3333333}", 0),
    ("1e3", r"\boxed{1000}", 1),
    ("2.0", r"\boxed{2}", 1),
    ("5", "x=5", 1),
    ("x=5", r"\boxed{5}", 1),
    ("-3", "the answer is -3", 1),
    ("-3", "the answer is 3", 0),
    ("-3", r"\boxed{−3}", 1),  # a minus sign that is no hyphen
    ("10", r"\boxed{10\text{ cm}}", 1),
    ("10", "It weighs 10 kg", 1),
    (r"90^\circ", r"\boxed{90}", 1),
    ("5", r"\boxed{4} No, wait: \boxed{5}", 1),
    ("4", r"\boxed{4} No, wait: \boxed{5}", 0),
    ("7", r"<think>\boxed{8}</think> so 7", 1),
    ("7", r"<think>\boxed{7}</think> I do not know", 0),
    ("5", "", 0),
    ("5", r"\boxed{}", 0),
    ("3", "It is 3pi", 0),
    ("3", "three", 0),
    ("3", "答案是3。", 1),
    ("3", "The answer is: **3**", 1),
    ("3", "So the final answer is $3$.", 1),
    ("12", "１２", 1),
    ("24", "\u202e24\u202c", 1),
    ("24", "#### 24\0", 1),
    ("5", "5" * 100_000, 0),
    ("5", r"\boxed{" + "(" * 600 + "5" + ")" * 600 + "}", 0),
    ("5", r"\boxed{5", 1),  # cut: its last number
    (r"\text{Monday}", r"\boxed{Monday}", 1),
    ("Monday", "The answer is Monday.", 1),
    ("Monday", "The answer is Tuesday.", 0),
    ("even", r"\boxed{\text{odd}}", 0),
    ("C", r"\boxed{C}", 1),
]
ALGEBRA = [
    ("1/0", r"\boxed{1}", 0),
    ("12", r"\boxed{1 2}", 0),
    ("5", r"\boxed{5 6}", 0),
    ("x^2+2x+1", r"\boxed{(x+1)^2}", 1),
    ("(x+1)(x-1)", r"\boxed{x^2+1}", 0),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", 1),
    (r"\frac{\pi}{4}", r"\boxed{\pi/4}", 1),
    ("3", r"\boxed{3\pi}", 0),
    ("3", r"\boxed{3 million}", 0),
    ("5", r"\boxed{5x}", 0),
    ("3.14", r"\boxed{\pi}", 0),
    ("(1,2)", r"\boxed{\left( 1, 2 \right)}", 1),
    ("(1,2)", r"\boxed{(2,1)}", 0),
    ("[0,1)", r"\boxed{[0,1]}", 0),
    (r"\{1,2\}", r"\boxed{\{2,1\}}", 1),
    ("5", r"\boxed{5 \text{ or } 6}", 0),
    ("1000000", r"\boxed{10^6}", 1),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", 1),
    ("5", r"\boxed{9^{9^{9^9}}}", 0),
    ("5", r"\boxed{__import__('os').system('false')}", 0),
]
needs_algebra = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None,
    reason="math-verify of requirements.txt is not installed",
)


@pytest.mark.parametrize("truth, response, verdict", PLAIN)
def test_answers_that_need_no_algebra(truth, response, verdict, monkeypatch):
    monkeypatch.setattr(maths, "checked", None)  # an answer that needs it fails here
    pair = answer_of(truth, whole=True), answer_of(response)
    assert same(*pair) is bool(verdict), pair


@pytest.mark.slow
@needs_algebra
def test_answers_that_need_algebra(monkeypatch):
    """In one batch, each answer in its place, with one that would never end."""
    monkeypatch.setattr(maths, "checked", maths.Servants(maths.checked.name, 1.0))
    truths, responses, verdicts = zip(*PLAIN[:4], *ALGEBRA, strict=True)
    rows = [{"answer": truth} for truth in truths]
    scores = final_answer(["p"] * len(rows), list(responses), rows)
    cases = zip(truths, responses, verdicts, scores, strict=True)
    assert not [case for case in cases if case[2] != case[3]]


@given(st.fractions(max_denominator=10_000), st.booleans())
@settings(max_examples=50, deadline=None)
def test_a_number_is_read_as_it_is_written(value, latex):
    sign, over, under = "-" * (value < 0), abs(value.numerator), value.denominator
    text = rf"{sign}\frac{{{over}}}{{{under}}}" if latex else f"{sign}{over}/{under}"
    assert number_of(maths.cleaned(text)) == (value, False)
    apples = maths.cleaned(f"{value.numerator:,} apples")
    assert number_of(apples) == (Fraction(value.numerator), False)


EVIL = r"5aaaa!|5 a a a a!|answer is |1,|aaaa1|\text{|\boxed{|$|5 /|\frac|- "


@pytest.mark.parametrize("text", EVIL.split("|"))
def test_no_text_takes_long(text):
    """These patterns run in the trainer's process."""
    began = time.monotonic()
    for whole in (True, False):
        same("5", answer_of("5" + text[1:-1] * 400 + text, whole))
        same("5", answer_of(text * 400, whole))
    assert time.monotonic() - began < 2


def test_a_row_without_an_answer_is_told():
    with pytest.raises(ValueError, match="no right answer to compare with: .*; it has 'prompt'"):
        final_answer(["p"], ["1"], [{"prompt": "p", "answer": None}])
