"""Several reward functions: whose weight is whose, and what each is called and given."""

import pytest
import torch

from utils.rewards import sums
from utils.rewards.functions import FunctionError

ANSWERS = sums.Answers(
    [({"role": "user", "content": "old"}, {"role": "user", "content": f"{n}?"}) for n in (1, 2)],
    ["a", "bb"],
    [{"x": 3.0}, {"x": 5.0}],
    [True, False],
)
OWN = """
def length(prompts, responses, rows):
    return [len(r) for r in responses]
def column(prompts, responses, rows):
    return [row["x"] + int(prompt[0]) for row, prompt in zip(rows, prompts)]
def fails(prompts, responses, rows):
    raise RuntimeError("out of order")
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "other.py").write_text(OWN)
    return lambda name, file="own": f"{tmp_path / file}.py:{name}"


def test_each_part_has_its_weight(own):
    both = sums.load([own("length"), own("column")], [-0.5, 2.0], 5.0)
    scores = both.scores(ANSWERS)
    assert scores.tolist() == [[1, 2], [4, 7]] and scores.dtype == torch.float32
    assert both.total(scores).tolist() == [-0.5 * 1 + 2 * 4, -0.5 * 2 + 2 * 7]
    assert both.means(scores) == {"score_function/length": 1.5, "score_function/column": 5.5}


def test_one_alone_has_weight_1_and_no_metric_of_its_own(own):
    one = sums.load([own("column")], [], 5.0)
    scores = one.scores(ANSWERS)
    assert one.total(scores).tolist() == [4, 7] and one.means(scores) == {}


def test_functions_of_one_name_are_told_apart(own):
    names = [own("length"), own("length", "other"), own("column")]
    both = sums.load(names, [], 5.0)
    assert list(both.parts) == [*names[:2], "column"]
    assert both.total(both.scores(ANSWERS)).tolist() == [1 + 1 + 4, 2 + 2 + 7]


def test_the_one_that_fails_is_named(own):
    with pytest.raises(FunctionError, match="own.py:fails' failed on row 1 of 2: RuntimeError"):
        sums.load([own("length"), own("fails")], [], 5.0).scores(ANSWERS)


def test_a_function_called_url_stands_beside_the_server(own, tmp_path):
    (tmp_path / "own.py").write_text(OWN + "url = length")
    both = sums.load([own("url")], [], 5.0, server=lambda answers: [7.0] * len(answers))
    assert list(both.parts) == [own("url"), "url"]
    assert both.total(both.scores(ANSWERS)).tolist() == [1 + 7, 2 + 7]
