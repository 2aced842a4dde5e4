"""What is kept of sampled answers: ties, doubles, control bytes, cut answers."""

import itertools

import pytest

from step2_reward.kept_answers import KEEP, comparison, demonstration

PROVENANCE = {"policy": "p"}


def row(*answers) -> dict:
    """answers: (text, finished)"""
    texts, finished = map(list, zip(*answers, strict=True))
    return {"prompt": [], "responses": texts, "finished": finished, "provenance": PROVENANCE}


def test_the_best_whole_answer_is_the_demonstration():
    """By trying every order of answers of which the best is cut, the next is empty or not text."""
    answers = [("cut", False, 9.0), ("", True, 8.0), ("\0", True, 7.0)]
    answers += [("good", True, 2.0), ("bad", True, -1.0)]
    for order in itertools.permutations(answers):
        texts, finished, scores = zip(*order, strict=True)
        found = demonstration(row(*zip(texts, finished, strict=True)), list(scores))
        assert found == {
            "prompt": [],
            "provenance": PROVENANCE,
            "completion": "good",
            "score": 2.0,
        }


def test_of_equally_good_answers_the_first_is_the_demonstration():
    found = demonstration(row(("a", True), ("b", True)), [1.0, 1.0])
    assert (found["completion"], found["score"]) == ("a", 1.0)


def test_a_text_that_was_sampled_whole_and_cut_is_whole():
    for order in ([0, 1], [1, 0]):
        answers = [("same", True), ("same", False)]
        found = demonstration(row(*(answers[i] for i in order)), [[1.0, 3.0][i] for i in order])
        assert found["score"] == 1.0


@pytest.mark.parametrize("answers", [[("cut", False)], [(" ", True)], [("\0", True), ("x", False)]])
def test_a_prompt_without_a_whole_answer_teaches_nothing(answers):
    assert demonstration(row(*answers), [1.0] * len(answers)) is None


def test_a_comparison_has_each_text_once_and_a_difference():
    same = row(("a", True), ("a", False), ("\0", True))
    assert comparison(same, [1.0, 2.0, 3.0]) is None and comparison(same, None) is None
    equal = row(("a", True), ("b", True))
    assert comparison(equal, [1.0, 1.0]) is None
    assert comparison(equal, None) == equal, "people may see a difference"
    found = comparison(row(("a", True), ("b", False), ("\0", True)), [1.0, 2.0, 3.0])
    assert (found["responses"], found["finished"], found["scores"]) == (
        ["a", "b"],
        [True, False],
        [1.0, 2.0],
    )
    assert set(KEEP) == {"ranking", "best"}
