"""Forms of answers: choices, tags, patterns, schemas, budgets."""

import importlib.util
import json

import pytest

from step3_ppo.rewards import formats

LIKE_B = [
    ("B", 1),
    ("(B)", 1),
    ("B. Paris", 1),
    ("b) Paris", 0),  # no line of a list of choices begins with a small letter and means itself
    ("The answer is B.", 1),
    ("The answer is (B).", 1),
    ("the correct answer is: **B**", 1),
    ("Answer: b", 1),
    (r"so \boxed{B}", 1),
    (r"so \boxed{\text{(B)}}", 1),
    (r"The answer is B. \boxed{C}", 0),
    ("答案是B。", 1),
    ("选B", 1),
    ("我选择 B", 1),
    ("A is wrong, so the answer is B", 1),
    ("The answer is A. No: the answer is B.", 1),
    ("The answer is B. No: the answer is A.", 0),
    ("The answer is Berlin.", 0),
    ("<think>the answer is A</think>\nB", 1),
    ("<think>the answer is B</think>", 0),
    ("A good question. I like B", 0),
    ("The answer is B, for we choose a card", 1),
    ("The answer is B. In short: the answer is a town.", 1),
    ("The answer is (b).", 1),
    ("the answer is b\nas said", 1),
    ("Because it is so", 0),
    ("A\nB", 1),
    ("", 0),
]


@pytest.mark.parametrize("response, verdict", LIKE_B)
@pytest.mark.parametrize("truth", ["B", "(b)", 1])
def test_multiple_choice(response, verdict, truth):
    assert formats.multiple_choice(["p"], [response], [{"answer": truth}]) == [verdict]


@pytest.mark.parametrize("truth", ["Paris", "", 10, -1, True])
def test_a_truth_that_is_no_choice_is_told(truth):
    with pytest.raises(ValueError, match="neither a letter|no right answer"):
        if truth is True:
            truth = "True"
        formats.multiple_choice(["p"], ["B"], [{"answer": truth}])


@pytest.mark.parametrize(
    "response, verdict",
    [
        ("<think>a</think><answer>b</answer>", 1),
        (" <think>\na\n</think>\n\n<answer>\nb</answer>\n", 1),
        ("<think></think><answer>b</answer>", 0),
        ("<think>a</think><answer> </answer>", 0),
        ("x<think>a</think><answer>b</answer>", 0),
        ("<think>a</think>x<answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer>x", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("<think><think>a</think><answer>b</answer>", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a<answer>b</answer></think>", 0),
        ("<think>a</think><answer>b", 0),
        ("", 0),
    ],
)
def test_think_answer(response, verdict):
    assert formats.think_answer(["p"], [response], [{}]) == [verdict]


def test_patterns_and_the_one_that_never_ends():
    rows = [{"regex": r"\d"}, {"regex": r"^\d+$"}, {"regex": "(a+)+$"}, {"regex": "(?i)yes"}] * 2
    responses = ["a1", "a1", "a" * 60 + "b", "YES", "", "12", "aaa", "no"]
    assert formats.matches(["p"] * 8, responses, rows) == [1, 0, 0, 1, 0, 1, 1, 0]
    for row, said in (({"regex": "("}, "is none"), ({"x": 1}, "no column 'regex'; it has 'x'")):
        with pytest.raises(ValueError, match=said):
            formats.matches(["p"], ["a"], [row])


SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0}, "name": {"type": "string"}},
    "required": ["age"],
    "additionalProperties": False,
}


@pytest.mark.skipif(
    importlib.util.find_spec("jsonschema") is None,
    reason="jsonschema of requirements.txt is not installed",
)
def test_schemas():
    cases = [
        ('{"age": 3}', 1),
        ('Here: ```json\n{"age": 3, "name": "a"}\n```', 1),
        ('```json\n{"age": 3}\n```\nor\n```json\n{"age": -3}\n```', 0),
        ('{"age": "3"}', 0),
        ('{"age": 3, "x": 1}', 0),
        ('{"age": NaN}', 0),
        ("{'age': 3}", 0),
        ('{"age": 3} and more', 0),
        ("[" * 100_000, 0),
        ("", 0),
    ]
    texts, verdicts = zip(*cases, strict=True)
    rows = [{"json_schema": SCHEMA}, {"json_schema": json.dumps(SCHEMA)}] * 5
    assert formats.follows_schema(["p"] * 10, list(texts), rows) == list(verdicts)
    with pytest.raises(ValueError, match="json_schema is none: 'what' is not valid"):
        formats.follows_schema(["p"], ["1"], [{"json_schema": {"type": "what"}}])


@pytest.mark.parametrize("words, score", [(0, 1), (10, 1), (15, 0.5), (20, 0), (30, 0)])
def test_length_budget(words, score):
    assert formats.length_budget(["p"], ["a " * words], [{"max_words": 10}]) == [score]
    with pytest.raises(ValueError, match="max_words=None is no number above 0"):
        formats.length_budget(["p"], ["a"], [{}])
