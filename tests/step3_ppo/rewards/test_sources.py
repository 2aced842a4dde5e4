"""Mixed data: each row's verifier by its source, each score in its place; and a row's columns."""

import json

import pytest

from step3_ppo.rewards import code, formats, maths
from step3_ppo.rewards.rows import truth_of
from step3_ppo.rewards.sources import by_data_source, verifier_of


def verl(source, truth, style="rule"):
    return {"data_source": source, "reward_model": {"style": style, "ground_truth": truth}}


def test_mixed_rows_keep_their_places():
    rows = [verl("openai/gsm8k", "7"), verl("cais/mmlu", "B"), verl("openai/gsm8k", "8")]
    rows += [verl("taco", json.dumps({"inputs": [""], "outputs": ["5"]})), verl("cais/mmlu", "C")]
    responses = ["#### 7", "B", "#### 7", "```python\nprint(5)\n```", "B"]
    assert by_data_source(["p"] * 5, responses, rows) == [1, 1, 0, 1, 0]


@pytest.mark.parametrize(
    "source, verifier",
    [
        ("openai/gsm8k", maths.final_answer),
        ("lighteval/MATH", maths.final_answer),
        ("HuggingFaceH4/MATH-500", maths.final_answer),
        ("DigitalLearningGmbH/MATH-lighteval", maths.final_answer),
        ("math_dapo", maths.final_answer),
        ("aime_2024", maths.final_answer),
        ("numina_olympiads", maths.final_answer),
        ("google-research-datasets/mbpp", code.all_tests),
        ("codeforces", code.all_tests),
        ("allenai/ai2_arc", formats.multiple_choice),
    ],
)
def test_the_sources_of_verl(source, verifier):
    assert verifier_of({"data_source": source}) is verifier


@pytest.mark.parametrize(
    "row, said",
    [
        ({"prompt": "p"}, "no column 'data_source'; it has 'prompt'"),
        (verl("searchR1_nq", "x"), "data_source 'searchR1_nq' has no verifier; there are .*gsm8k"),
        (verl("openai/gsm8k", "x", "model"), "reward_model.style 'model': no program can"),
    ],
)
def test_a_row_without_a_verifier_is_told(row, said):
    with pytest.raises(ValueError, match=said):
        by_data_source(["p"], ["a"], [row])


@pytest.mark.parametrize(
    "row, truth",
    [
        (verl("a", "x") | {"answer": "y"}, "x"),
        ({"reward_model": None, "answer": "y"}, "y"),
        ({"reward_model": "not a record", "solution": "y"}, "y"),
        ({"ground_truth": "", "answer": 0}, 0),
    ],
)
def test_where_the_right_answer_stands(row, truth):
    assert truth_of(row) == truth
