"""The reward functions that come along, against definitions of their own and hand-worked cases."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from step3_ppo.rewards import shipped as reward_functions
from step3_ppo.rewards.shipped import (
    bleu,
    count_of_numbers,
    count_words,
    length_target,
    reference_of,
    rouge_l,
    toy_verifier,
)
from utils.data import toy_tasks

ALL = (count_of_numbers, length_target, toy_verifier, rouge_l, bleu)


def score(function, response, row=None):
    """Of one response."""
    (value,) = function(["p"], [response], [row or {}])
    assert type(value) is float
    return value


def refusal(function, row, response="a"):
    with pytest.raises(ValueError) as caught:
        function(["p"], [response], [row])
    return str(caught.value)


@pytest.mark.parametrize(
    "response, expected",
    [
        ("", -0.2),
        ("no numbers, not three", -0.2),
        ("7", 0.2),
        ("12", 0.2),
        ("12 34", 0.4),
        ("pi is 3.14", 0.2),
        ("It is 5.", 0.2),
        ("1,000", 0.4),
        ("1.2.3", 0.4),
        ("v2 and a-3", 0.4),
        ("１２", 0.2),
        ("１２．５", 0.2),
        ("答案是３和4。", 0.4),
        ("三加二十等于二十三", -0.2),
        ("一起", -0.2),
        ("1 2 3", 0.6),
        ("1 2 3 4", 0.8),
        ("1 2 3 4 5", 1.0),
        ("1 2 3 4 5 6 7", 1.0),
    ],
)
def test_count_of_numbers(response, expected):
    assert score(count_of_numbers, response) == expected


@given(st.lists(st.integers(0, 10**12), max_size=9))
def test_count_of_numbers_is_a_fifth_a_number(numbers):
    expected = min(0.2 * len(numbers), 1.0) if numbers else -0.2
    assert score(count_of_numbers, " and ".join(map(str, numbers))) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", 0),
        (" \n", 0),
        ("one", 1),
        ("I don't know.", 3),
        ("C++ - or 3.5 ?", 3),
        ("我喜欢茶。", 4),
        ("「これ」はペン", 5),
        ("用 Python 3 写", 4),
        ("用Python3写", 3),
        ("한국어 문장", 2),
        ("… — !", 0),
    ],
)
def test_count_words(text, words):
    assert count_words(text) == words


@pytest.mark.parametrize(
    "words, row, expected",
    [
        (20, {}, 1.0),
        (0, {}, 0.0),
        (5, {}, 0.25),
        (19, {}, 0.95),
        (21, {}, 0.95),
        (30, {}, 0.5),
        (40, {}, 0.0),
        (41, {}, 0.0),
        (1000, {}, 0.0),
        (4, {"target_length": 4}, 1.0),
        (3, {"target_length": 4}, 0.75),
        (6, {"target_length": 4}, 0.5),
        (8, {"target_length": 4}, 0.0),
        (3, {"target_length": "4"}, 0.75),  # as a CSV has it
        (2, {"target_length": 2.5}, 0.8),
        (20, {"target_length": None}, 1.0),
        (20, {"target_length": ""}, 1.0),
    ],
)
def test_length_target(words, row, expected):
    assert score(length_target, "word " * words, row) == pytest.approx(expected)
    assert score(length_target, "字" * words + "。", row) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0, -3, "many", True, math.nan, math.inf, [5]])
def test_length_target_refuses_what_is_no_length(value):
    said = refusal(length_target, {"target_length": value})
    assert said.startswith(f"target_length={value!r} is not a number of words above 0")
    assert said.endswith("mend the row's column target_length, or leave it out for 20")


def test_toy_verifier_is_verify_row_by_row():
    r = random.Random(0)
    tasks = toy_tasks.draw_tasks(40, seed=2)
    rows = [toy_tasks.row_of(task) for task in tasks]
    responses = [
        (toy_tasks.bad_answer if i % 2 else toy_tasks.right_answer)(task, r)
        for i, task in enumerate(tasks)
    ]
    scores = toy_verifier([task.prompt for task in tasks], responses, rows)
    assert scores == [toy_tasks.verify(*pair) for pair in zip(rows, responses, strict=True)]
    assert set(scores[::2]) == {1.0} and max(scores[1::2]) < 1.0


def test_toy_verifier_names_what_a_row_lacks():
    said = refusal(toy_verifier, {"prompt": "Hi", "answers": ["a"]})
    assert "it lacks 'members', 'count'; it has 'prompt', 'answers';" in said
    assert "--prompt_data" in said
    assert "it lacks 'answers', 'members', 'count'; it has no columns" in refusal(toy_verifier, {})
    row = {"answers": [], "members": "planets", "count": 2}
    said = refusal(toy_verifier, row)
    assert "members='planets' names no word list" in said and "fruits, animals" in said


def lcs(a, b):
    """Length of the longest common subsequence, by its recursion."""
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + lcs(a[:-1], b[:-1])
    return max(lcs(a[:-1], b), lcs(a, b[:-1]))


def f_measure(a, b):
    common = lcs(a, b)
    if not common:
        return 0.0
    precision, recall = common / len(a), common / len(b)
    return 2 * precision * recall / (precision + recall)


@given(
    st.lists(st.sampled_from("cat dog the sun 7".split()), max_size=6),
    st.lists(st.sampled_from("cat dog the sun 7".split()), min_size=1, max_size=6),
)
def test_rouge_l_by_longest_common_subsequence(response, reference):
    row = {"output": " ".join(reference)}
    expected = pytest.approx(f_measure(response, reference))
    assert score(rouge_l, " ".join(response).capitalize() + ".", row) == expected


@given(st.text("我喜欢喝茶", max_size=6), st.text("我喜欢喝茶", min_size=1, max_size=6))
def test_rouge_l_takes_chinese_characters_as_tokens(response, reference):
    expected = pytest.approx(f_measure(response, reference))
    assert score(rouge_l, response + "。", {"output": reference}) == expected


ASCII = st.text(st.characters(min_codepoint=9, max_codepoint=126), max_size=40)


@given(ASCII, ASCII.filter(str.strip))
def test_rouge_l_of_ascii_is_the_package_s_own(response, reference):
    own = RougeScorer(["rougeL"]).score(reference, response)["rougeL"].fmeasure
    assert score(rouge_l, response, {"output": reference}) == own


@pytest.mark.parametrize(
    "response, reference, expected",
    [
        ("the cat sat", "The cat sat.", 1.0),
        ("the dog", "the cat sat", 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)),
        ("", "the cat", 0.0),
        ("file_name", "file name", 1.0),
        ("一只cafe", "一只 café", 2 / 3),
        ("用 Python 写", "用Python写。", 1.0),
        ("привет мир", "Привет, мир!", 1.0),
        ("ペン", "ペ", 2 / 3),
    ],
)
def test_rouge_l_by_hand(response, reference, expected):
    assert score(rouge_l, response, {"output": reference}) == pytest.approx(expected)


def test_bleu_by_hand():
    # Six words of six: 1-grams 5/6, 2-grams 3/5, 3-grams 2/4, 4-grams 1/3, no brevity penalty.
    row = {"output": "the cat sat on the mat"}
    expected = (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert score(bleu, "the cat sat on a mat", row) == pytest.approx(expected)
    # Four of six words, all right: only the brevity penalty exp(1 − 6/4).
    assert score(bleu, "the cat sat on", row) == pytest.approx(math.exp(-0.5))
    # Two words: 1- and 2-grams are all there is.
    assert score(bleu, "the cat", row) == pytest.approx(math.exp(-2))
    # 1-grams 5/5, 2-grams 2/4, 3-grams 1/3, no 4-gram of two: smoothing takes half a one.
    row = {"output": "a b c d e"}
    assert score(bleu, "a b c e d", row) == pytest.approx((1 * 2 / 4 * 1 / 3 * 0.5 / 2) ** 0.25)
    assert score(bleu, "x y z", row) == 0.0
    assert score(bleu, "", row) == 0.0


def test_bleu_of_chinese_goes_by_characters():
    row = {"output": "我喜欢喝茶"}
    expected = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert score(bleu, "我喜欢喝水", row) == pytest.approx(expected)


def test_bleu_keeps_typographic_quotes_on_english_words():
    # By the tokenizer 13a: one word of four is another. (By zh: ’ and s would be tokens and right.)
    row = {"output": "it is Tom’s book"}
    expected = (3 / 4 * 1 / 3 * 0.5 / 2 * 0.25 / 1) ** 0.25
    assert score(bleu, "it is Ann’s book", row) == pytest.approx(expected)


@pytest.mark.parametrize("function", [rouge_l, bleu])
@pytest.mark.parametrize("text", ["yes", "The sky is blue.", "我喜欢喝茶。", "The 3 cats, 三只猫!"])
def test_the_reference_itself_scores_1(function, text):
    assert score(function, text, {"output": text}) == pytest.approx(1.0, abs=1e-12)
    assert score(function, text, {"output": text}) <= 1.0


@pytest.mark.parametrize("function", [rouge_l, bleu])
@given(response=st.text(max_size=30), reference=st.text(min_size=1, max_size=30))
def test_scores_of_any_text_lie_between_0_and_1(function, response, reference):
    if reference.strip():
        assert 0.0 <= score(function, response, {"output": reference}) <= 1.0


USER, OTHER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "other"}
TRUE = {"role": "assistant", "content": "true"}


@pytest.mark.parametrize(
    "row",
    [
        {"output": "true", "reference": "b", "completion": "c", "response": "d"},
        {"reference": "true", "completion": "c", "response": "d", "messages": [USER, OTHER]},
        {"completion": "true", "response": "d"},
        {"response": "true", "messages": [USER, OTHER]},
        {"output": None, "reference": " ", "completion": 3, "response": "true"},
        {"messages": [USER, OTHER, USER, TRUE]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "true"}]},
    ],
)
def test_where_the_reference_stands(row):
    assert reference_of(row) == "true"


@pytest.mark.parametrize("function", [rouge_l, bleu])
def test_a_row_without_reference_is_told_with_its_columns(function):
    # The assistant's turn answers an earlier prompt than the last.
    said = refusal(function, {"prompt": "q", "messages": [USER, OTHER, USER], "output": ""})
    assert "no text in output, reference, completion, response" in said
    assert "no assistant turn at the end of messages or conversations" in said
    assert said.endswith("it has 'prompt', 'messages', 'output'")
    assert refusal(function, {}).endswith("it has no columns")
    said = refusal(function, {"messages": [USER, {"role": "wizard", "content": "x"}]})
    assert "the role of turn 2 of messages is 'wizard'" in said


def test_each_takes_a_batch_and_scores_rows_apart():
    rows = [
        toy_tasks.row_of(task) | {"output": text, "target_length": 3}
        for task, text in zip(toy_tasks.draw_tasks(3, 0), ("a b c", "1 2", "我们"), strict=True)
    ]
    responses = ["a b 1", "2 1", "们"]
    for function in ALL:
        together = function(["p"] * 3, responses, rows)
        assert together == [score(function, *pair) for pair in zip(responses, rows, strict=True)]
        assert function([], [], []) == []


def test_all_reward_functions_are_tested_here():
    public = {
        name
        for name, value in vars(reward_functions).items()
        if getattr(value, "__module__", "") == reward_functions.__name__ and name[0] != "_"
    }
    assert public - {"count_words", "reference_of"} == {function.__name__ for function in ALL}
