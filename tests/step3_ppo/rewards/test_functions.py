"""Calling the function of --reward_function: scores, failures, time."""

import functools
import math
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step3_ppo.rewards import functions as scoring
from step3_ppo.rewards.functions import RewardFunctionError, call, load

ROOT = Path(__file__).resolve().parents[3]
PROMPTS = ["one?", "two?", "three?", "four?"]
RESPONSES = ["a", "bb", "ccc", "dddd"]
ROWS = [{"answer": 1}, {"answer": 2}, {}, {"answer": 4}]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file that `load` finds by its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def failure(function, timeout=5.0, prompts=PROMPTS, responses=RESPONSES, rows=ROWS):
    with pytest.raises(RewardFunctionError) as caught:
        call(function, "my.py:f", prompts, responses, rows, timeout)
    said = str(caught.value)
    assert said.startswith("reward function 'my.py:f' ")
    return said


# What comes back.


@pytest.mark.parametrize(
    "result",
    [
        [1, 0.5, True, -2.0],
        (1, 0.5, True, -2.0),
        np.array([1, 0.5, 1, -2], dtype=np.float32),
        np.array([1, 0.5, True, -2.0], dtype=object),
        torch.tensor([1, 0.5, 1, -2], dtype=torch.bfloat16, requires_grad=True),
        [torch.tensor(1), torch.tensor(0.5), np.bool_(True), np.float16(-2)],
        [np.int64(1), Fraction(1, 2), np.array(1.0), -2],
    ],
)
def test_scores_of_every_shape_become_floats(result):
    scores = call(lambda *_: result, "my.py:f", PROMPTS, RESPONSES, ROWS, 5.0)
    assert scores == [1.0, 0.5, 1.0, -2.0] and {type(s) for s in scores} == {float}


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=8))
def test_scores_come_back_in_order(scores):
    texts = [str(i) for i in range(len(scores))]

    def function(prompts, responses, rows):
        return [scores[int(text)] for text in responses]

    assert call(function, "my.py:f", texts, texts, [{}] * len(texts), 5.0) == scores


def test_one_call_gets_the_whole_batch_and_copies_of_it():
    calls = []

    def function(prompts, responses, rows):
        calls.append((list(prompts), list(responses), [dict(row) for row in rows]))
        for row in rows:
            row.clear()
        prompts.clear()
        return [len(responses.pop()) for _ in range(4)]

    rows = [dict(row) for row in ROWS]
    prompts, responses = list(PROMPTS), list(RESPONSES)
    assert call(function, "my.py:f", prompts, responses, rows, 0) == [4.0, 3.0, 2.0, 1.0]
    assert calls == [(PROMPTS, RESPONSES, ROWS)]
    assert (prompts, responses, rows) == (PROMPTS, RESPONSES, ROWS)


def test_the_function_runs_in_a_daemon_thread_that_is_as_this_one(monkeypatch):
    seen, gpu = {}, threading.local()
    gpu.index = 3  # the current GPU belongs to a thread
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(gpu, "index", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(gpu, "index", index))

    def function(*_):
        seen.update(daemon=threading.current_thread().daemon, gpu=torch.cuda.current_device())
        return torch.full((4,), float(torch.is_grad_enabled()))

    with torch.no_grad():
        assert call(function, "my.py:f", PROMPTS, RESPONSES, ROWS, 5.0) == [0.0] * 4
    assert call(function, "my.py:f", PROMPTS, RESPONSES, ROWS, 5.0) == [1.0] * 4
    assert seen == {"daemon": True, "gpu": 3}


@pytest.mark.parametrize(
    "result, said",
    [
        (None, "returned 'None' of type NoneType"),
        (0.5, "returned '0.5' of type float"),
        ("abcd", "returned 'abcd' of type str"),
        ({0: 1.0}, "returned '{0: 1.0}' of type dict"),
        (torch.ones(4, 1), "returned an array of shape (4, 1)"),
        (np.float64(1.0), "returned '1.0' of type float64"),
        (torch.tensor(1.0), "returned an array of shape ()"),
        ([1.0] * 3, "returned 3 scores for 4 responses"),
        (np.ones(5), "returned 5 scores for 4 responses"),
        ([], "returned 0 scores for 4 responses"),
    ],
)
def test_what_is_no_list_of_scores(result, said):
    message = failure(lambda *_: result)
    assert said in message
    assert message.endswith("; return a list of 4 finite numbers, one a response")


@pytest.mark.parametrize(
    "value, said",
    [
        (math.nan, "nan, not a finite number,"),
        (-math.inf, "-inf, not a finite number,"),
        (torch.tensor(math.nan), "nan, not a finite number,"),
        (1e39, "1e+39, beyond the range of fp32,"),
        pytest.param(10**5000, "an integer beyond the range of fp32", id="huge"),
        ("0.5", "'0.5' of type str"),
        (None, "'None' of type NoneType"),
        (1j, "'1j' of type complex"),
        ([0.5], "'[0.5]' of type list"),
        (torch.ones(2), "'tensor([1., 1.])' of type Tensor"),
    ],
)
def test_a_value_that_is_no_score_is_told_with_its_row(value, said):
    assert failure(lambda *_: [1.0, 2.0, value, math.nan]) == (
        f"reward function 'my.py:f' returned {said} for row 3 of 4\n"
        "  prompt:   'three?'\n  response: 'ccc'\n"
        "return a list of 4 finite numbers, one a response"
    )


def test_long_texts_are_shortened_and_escaped():
    texts = ["\x1b[31m\n" + "x" * 500, "y" * 200]
    said = failure(
        lambda *_: [math.nan, 1], prompts=texts, responses=texts[::-1], rows=[{}, {}]
    ).split("\n")
    assert said[1] == f"  prompt:   '\\x1b[31m\\n{'x' * 194}'… (506 characters)"
    assert said[2] == f"  response: '{'y' * 200}'"


# Exceptions.

FAILING = """
def answer_of(row):
    return row["answer"]

def f(prompts, responses, rows):
    return [float(answer_of(row)) for row in rows]
"""


def test_an_exception_is_told_with_its_row_and_line(write):
    path = write("my.py", FAILING)
    assert failure(load("my.py:f")) == (
        "reward function 'my.py:f' failed on row 3 of 4: KeyError: 'answer'\n"
        f'  at {path}:3 in answer_of: return row["answer"]\n'
        "  prompt:   'three?'\n  response: 'ccc'\n"
        "mend the function or its data, or set another --reward_function"
    )


def test_what_is_told_is_the_row_s_own_exception():
    def function(prompts, responses, rows):
        raise RuntimeError(f"{responses[-1]} of {len(responses)}")

    assert "failed on row 1 of 4: RuntimeError: a of 1\n" in failure(function)


def test_the_exception_is_the_cause():
    with pytest.raises(RewardFunctionError) as caught:
        call(lambda *_: 1 / 0, "my.py:f", PROMPTS, RESPONSES, ROWS, 5.0)
    assert type(caught.value.__cause__) is ZeroDivisionError


def test_the_line_is_the_user_s_not_the_library_s(write):
    path = write("my.py", "import json\ndef f(a, b, c):\n    return json.loads(b[0])\n")
    for function in (
        load("my.py:f"),
        functools.partial(load("my.py:f")),
        torch.no_grad()(load("my.py:f")),
    ):
        said = failure(function)
        assert "failed on row 1 of 4: JSONDecodeError: Expecting value" in said
        assert f"\n  at {path}:3 in f: return json.loads(b[0])\n" in said
    write(
        "my.py", "import json\nclass S:\n    def __call__(self, a, b, c): json.loads(b[0])\ns = S()"
    )
    assert f"\n  at {path}:3 in __call__: " in failure(load("my.py:s"))
    assert "\n  at " not in failure(int)  # a builtin has no line


def test_exit_in_the_function_is_an_exception_too():
    assert "failed on row 1 of 4: SystemExit: 0\n" in failure(lambda *_: sys.exit(0))
    assert "failed on row 1 of 4: SystemExit\n" in failure(lambda *_: sys.exit())


def test_a_failure_of_the_batch_alone():
    def function(prompts, responses, rows):
        if len(responses) > 1:
            raise RuntimeError("too many")
        return [1.0]

    said = failure(function)
    assert "failed: RuntimeError: too many\n" in said
    assert "\n  no row of the 4 fails like this alone, only the batch of them does\n" in said
    assert "prompt:" not in said


def test_a_row_that_fails_for_want_of_others_is_not_blamed():
    def function(prompts, responses, rows):
        if len(responses) == 1 and "answer" in rows[0]:
            raise ZeroDivisionError("no deviation of one")
        return [row["answer"] for row in rows]

    assert "failed on row 3 of 4: KeyError: 'answer'" in failure(function)


def pretend(monkeypatch, seconds, error=None):
    """A batch that raises `error` or takes too long, rows that alone take `seconds` by a clock of
    their own; returns the limits of all calls."""
    now, limits = [0.0], []

    def within(limit, function, batch):
        limits.append(limit)
        if len(batch) > 1:
            return scoring._Call(running=error is None, error=error)
        now[0] += min(seconds, limit)
        return scoring._Call(running=seconds > limit)

    monkeypatch.setattr(scoring, "_within", within)
    monkeypatch.setattr(scoring, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return limits


@pytest.mark.parametrize(
    "timeout, seconds, limits, row",
    [
        # The search may take 2 × timeout + 10 s and starts after the first call.
        (6.0, 5.0, [6.0, 6.0, 6.0, 6.0, 6.0], 0),
        (6.0, 7.0, [6.0, 6.0, 6.0, 6.0, 4.0], 4),
        (0.0, 5.0, [0.0, 10.0, 5.0], 3),
        (0.0, 6.0, [0.0, 10.0, 4.0], 2),
    ],
)
def test_the_search_for_a_failing_row_ends_in_time(monkeypatch, timeout, seconds, limits, row):
    waited = pretend(monkeypatch, seconds, RuntimeError("too many"))
    said = failure(lambda *_: [], timeout=timeout)
    assert waited == limits
    assert "failed: RuntimeError: too many\n" in said
    if row:
        assert f"was not found: the search was given up at row {row}\n" in said
    else:
        assert "no row of the 4 fails like this alone" in said


def test_a_row_that_hangs_alone_does_not_hang_the_search():
    def function(prompts, responses, rows):
        if responses == ["a"]:
            time.sleep(600)
        return [row["answer"] for row in rows]

    started = time.monotonic()
    assert "failed on row 3 of 4: KeyError: 'answer'" in failure(function, timeout=1.5)
    assert time.monotonic() - started < 300


# Time.


def test_a_slow_row_is_told():
    def function(prompts, responses, rows):
        time.sleep(600 if "ccc" in responses else 0)
        return [1.0] * len(responses)

    started = time.monotonic()
    assert failure(function, timeout=1.5) == (
        "reward function 'my.py:f' took longer than 1.5 s for 4 responses\n"
        "  row 3 alone takes longer than 1 s\n"
        "  prompt:   'three?'\n  response: 'ccc'\n"
        "make the function faster, or raise --reward_function_timeout (0: no limit)"
    )
    assert time.monotonic() - started < 300


@pytest.mark.parametrize(
    "timeout, seconds, limits, said",
    [
        (60.0, 14.0, [60.0, 15.0, 15.0, 15.0, 15.0], "none takes longer than 15 s alone"),
        (60.0, 16.0, [60.0, 15.0], "row 1 alone takes longer than 15 s"),
        (2.0, 0.9, [2.0, 1.0, 1.0, 1.0, 1.0], "none takes longer than 1 s alone"),
        (2.0, 1.1, [2.0, 1.0], "row 1 alone takes longer than 1 s"),
    ],
)
def test_a_row_s_share_is_the_timeout_over_the_rows_or_a_second(
    monkeypatch, timeout, seconds, limits, said
):
    waited = pretend(monkeypatch, seconds)
    assert said in failure(lambda *_: [], timeout=timeout)
    assert waited == limits


def test_no_single_row_is_slow():
    def function(prompts, responses, rows):
        time.sleep(0.1 * len(responses))
        return [1.0] * len(responses)

    said = failure(function, timeout=0.3)
    assert "\n  no single row is slow: none takes longer than 1 s alone\n" in said
    assert said.endswith("raise --reward_function_timeout (0: no limit)")
    assert call(function, "my.py:f", PROMPTS, RESPONSES, ROWS, 0) == [1.0] * 4


def test_the_search_for_a_slow_row_ends_in_time(monkeypatch):
    waited = pretend(monkeypatch, 0.75)
    texts = ["t"] * 100
    said = failure(lambda *_: [], 10.0, texts, texts, [{}] * 100)
    # 2 × 10 + 10 s hold 40 rows.
    assert waited == [10.0] + [1.0] * 39 + [0.75]
    assert "\n  no slow row was found: the search was given up at row 41\n" in said


HOLDS_THE_LOCK = """
import re, sys
from step3_ppo.rewards import functions as scoring
scoring.GRACE = 0.5
def f(prompts, responses, rows):
    return [float(bool(re.match(r"(a+)+$", r))) for r in responses]
print(scoring.call(f, "f", ["p"], ["aaa"], [{}], 1.0), flush=True)
scoring.call(f, "f", ["p"], ["a" * 60 + "b"], [{}], 1.0)
"""


def test_a_function_that_blocks_python_ends_the_process(write):
    path = write("blocks.py", HOLDS_THE_LOCK)
    done = subprocess.run(
        [sys.executable, str(path)],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stdout) == (1, "[1.0]\n")
    assert "Timeout (0:00:01.5" in done.stderr and f'"{path}", line 6 in f' in done.stderr


def test_a_call_that_returned_leaves_no_clock_running(monkeypatch):
    monkeypatch.setattr(scoring, "GRACE", 0.05)
    assert call(lambda *_: [1.0], "my.py:f", ["p"], ["r"], [{}], 1.0) == [1.0]
    failure(lambda *_: 1 / 0, timeout=1.0)
    time.sleep(1.2)  # a clock left behind would end this process
