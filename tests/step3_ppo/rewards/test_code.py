"""Programs by unit tests: every way in which public data sets hold them, and answers that cheat."""

import json

import pytest

from step3_ppo.rewards import code
from step3_ppo.rewards.code import all_tests, program_of, same_text, same_value, share_of_tests
from utils.rewards import sandbox

ADD = "def add(a, b):\n    return a + b"
DOUBLE = {"inputs": ["1\n", "20\n"], "outputs": ["2\n", "40"]}
CALLED = {"inputs": [[1, 2], [3, 4]], "outputs": [3, 7], "fn_name": "add"}
# Of verl's PRIME: arguments a line, results as JSON.
PRIME = {"inputs": ["1\n2", '"a"\n"b"'], "outputs": ["3", '"ab"'], "fn_name": "add"}
MBPP = {"test_list": ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'"]}
HUMAN = {"test": "def check(f):\n    assert f(1, 2) == 3\n", "entry_point": "add"}


def verl(tests):
    return {"data_source": "taco", "reward_model": {"ground_truth": json.dumps(tests)}}


@pytest.mark.parametrize(
    "row, program, share",
    [
        (DOUBLE, "print(int(input()) * 2)", 1),
        (DOUBLE, "print(2)", 0.5),
        (DOUBLE, "print(3)", 0),
        (DOUBLE, "print(2)\nraise SystemExit(1)", 0),
        (DOUBLE, "if __name__ == '__main__':\n    print(int(input()) * 2)", 1),
        (verl(DOUBLE), "print(int(input()) * 2)", 1),
        ({"input_output": json.dumps(DOUBLE)}, "print(int(input()) * 2)", 1),
        ({"inputs": [["3", "4"]], "outputs": [["3 4"]]}, "print(*open(0).read().split())", 1),
        (CALLED, ADD, 1),
        (CALLED, f"class Solution:\n    {ADD.replace(chr(10), chr(10) + '    ')}", 0),  # no self
        (
            CALLED,
            "class Solution:\n    def add(self, a, b):\n        print('?')\n        return a + b",
        )
        + (1,),
        (CALLED, "def add(a, b):\n    return 3", 0.5),
        (CALLED, "def add(a, b):\n    return str(a + b)", 0),
        (CALLED | {"outputs": [[3], [7]]}, ADD, 1),
        (verl(PRIME), ADD, 1),
        (MBPP, ADD, 1),
        (MBPP, "def add(a, b):\n    return 3", 0.5),
        (MBPP, f"json = os = sys = None\n{ADD}\nprint('noise')", 1),
        (HUMAN, ADD, 1),
        (HUMAN, "def add(a, b):\n    return a - b", 0),
        ({"tests": "assert add(1, 1) == 2"}, ADD, 1),
        # Programs that end before they are tested, or say that they have passed.
        (HUMAN, "raise SystemExit(0)", 0),
        (HUMAN, "import os\nos._exit(0)", 0),
        (HUMAN, "print('passed')\nimport sys\nsys.exit()", 0),
        (HUMAN, '"""', 0),
        (HUMAN, "", 0),
        (CALLED, "import os\nos.write(1, b'3')\nos._exit(0)", 0),
        (CALLED, f"{ADD}\nprint(add(1, 2))", 1),  # an example of its use
        # What is read of an answer must not end the run.
        (CALLED, "_os.write(_out, b'[' * 100_000)\n_os._exit(0)", 0),
        (CALLED | {"outputs": [0.5, 7.5]}, "def add(a, b):\n    return 10**400", 0),
        (DOUBLE, "while True: pass", 0),
    ],
)
def test_the_share_of_tests_that_pass(row, program, share, monkeypatch):
    monkeypatch.setattr(code, "LIMITS", sandbox.Limits(seconds=1))
    response = f"Like this:\n```python\n{program}\n```\nDone."
    assert share_of_tests(["p"], [response], [row]) == [share]
    assert all_tests(["p"], [response], [row]) == [float(share == 1)]


def test_answers_keep_their_places():
    rows = [{"inputs": [""], "outputs": [str(n)]} for n in range(8)]
    responses = [f"print({n if n % 3 else -1})" for n in range(8)]
    expected = [float(n % 3 > 0) for n in range(8)]
    assert all_tests(["p"] * 8, responses, rows) == expected


@pytest.mark.parametrize(
    "response, program",
    [
        ("x = 1", "x = 1"),
        ("a\n```python\nx = 1\n```\nb\n```py\nx = 2\n```\nc\n```\nout\n```", "x = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1", "x = 1"),
        ("", ""),
    ],
)
def test_which_block_is_the_program(response, program):
    assert program_of(response) == program


@pytest.mark.parametrize(
    "written, expected, same",
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1  2 \n3", "1 2\n3\n\n", True),
        ("1\n2", "1 2", False),
        ("", "", True),
        ("", "0", False),
        ("0.3333333333", "0.333333333", True),
        ("0.3334", "0.3333", False),
        ("10", "10.0", True),
        ("10", "11", False),
        ("nan.", "1.0", False),
        ("1000000001", "1000000002", False),
    ],
)
def test_output_is_compared_by_words(written, expected, same):
    assert same_text(written, expected) is same


@pytest.mark.parametrize(
    "a, b, same",
    [
        ([1, [2]], (1, (2,)), True),
        ({"1": 2}, {1: 2}, True),
        ({"1": 2}, {"2": 2}, False),
        (0.1 + 0.2, 0.3, True),
        (1, True, False),
        (1.0, True, False),
        (1, 1.0, True),
        ([1], [1, 2], False),
        ("1", 1, False),
        (None, None, True),
    ],
)
def test_results_are_compared_as_json_has_them(a, b, same):
    assert same_value(a, b) is same


@pytest.mark.parametrize(
    "row, said",
    [
        ({"prompt": "p"}, "the row has no tests: .*; it has 'prompt'"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs for 0 outputs"),
        ({"inputs": "12", "outputs": "34"}, "must be lists, not '12' and '34'"),
        ({"input_output": "{"}, "the row's tests is no JSON"),
        ({"input_output": "[1]"}, "are no JSON object of inputs and outputs: .1."),
    ],
)
def test_a_row_without_tests_is_told(row, said):
    with pytest.raises(ValueError, match=said):
        all_tests(["p"], ["x"], [row])


def test_where_nothing_can_be_confined_it_refuses(monkeypatch):
    monkeypatch.setattr(sandbox, "refusal", lambda: "programs cannot be confined here: old")
    with pytest.raises(RuntimeError, match="here: old; .*rewards.code:all_tests_unconfined"):
        all_tests(["p"], ["x"], [MBPP])
    assert code.all_tests_unconfined(["p"], [ADD], [MBPP]) == [1.0]
