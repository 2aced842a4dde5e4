"""The function of --reward_function: finding it, and its scores, failures and time."""

import functools
import importlib
import math
import os
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

from step3_ppo.rewards import shipped
from utils.rewards import functions as scoring
from utils.rewards.functions import FunctionError, call, load

ROOT = Path(__file__).resolve().parents[3]
PROMPTS = ["one?", "two?", "three?", "four?"]
RESPONSES = ["a", "bb", "ccc", "dddd"]
ROWS = [{"answer": 1}, {"answer": 2}, {}, {"answer": 4}]


LISTS = ["one?", "two?"], ["a", "bb"], [{}, {}]
FORMS = "give package.module:function or path/to/file.py:function"


@pytest.fixture(autouse=True)
def own_imports(monkeypatch, tmp_path):
    """Each test has its own current folder, sys.path and modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    importlib.invalidate_caches()
    yield
    for name in set(sys.modules) - before:
        module = sys.modules[name]
        if str(tmp_path) in str(getattr(module, "__file__", "")):
            del sys.modules[name]


def write_at(path, text):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path.absolute()


def refusal(name):
    with pytest.raises(SystemExit) as caught:
        load(name)
    said = str(caught.value)
    assert said.startswith(f"--reward_function {name!r}: ")
    return said


GOOD = "def f(prompts, responses, rows):\n    return [1.0] * len(responses)\n"


def test_a_module_s_function():
    name = "step3_ppo.rewards.shipped:rouge_l"
    assert load(name) is shipped.rouge_l


@pytest.mark.parametrize("form", ["{}:f", "./{}:f", "{absolute}:f"])
def test_a_file_s_function(form):
    path = write_at("sub/my rewards.py", GOOD)
    function = load(form.format("sub/my rewards.py", absolute=path))
    assert function(*LISTS) == [1.0, 1.0]


def test_files_of_the_same_name_are_two_modules():
    for folder in "ab":
        write_at(f"{folder}/json.py", f"NAME = {folder!r}\ndef f(prompts, responses, rows): ...")
    first, second = load("a/json.py:f"), load("b/json.py:f")
    assert (first.__globals__["NAME"], second.__globals__["NAME"]) == ("a", "b")
    assert first.__module__ != second.__module__
    assert sys.modules[first.__module__].NAME == "a"  # where pickle and dataclasses look
    import json

    assert json.loads("1") == 1


def test_a_file_imports_what_stands_beside_it():
    write_at("sub/its_neighbour.py", "SCORE = 7.0")
    write_at("sub/mine.py", "from its_neighbour import SCORE\ndef f(a, b, c): return [SCORE]")
    assert load("sub/mine.py:f")(1, 2, 3) == [7.0]


def test_a_module_of_the_current_folder_unless_one_of_that_name_is_installed(tmp_path):
    write_at("own_rewards/inner.py", GOOD)
    assert load("own_rewards.inner:f")(*LISTS) == [1.0, 1.0]
    sys.path.insert(0, str(tmp_path / "installed"))
    write_at("installed/the_same_name.py", "def f(a, b, c): return 'installed'")
    write_at("here/the_same_name.py", "def f(a, b, c): return 'here'")
    os.chdir("here")
    assert load("the_same_name:f")(*LISTS) == "installed"
    assert load("the_same_name.py:f")(*LISTS) == "here"


def test_any_callable_will_do():
    write_at(
        "kinds.py",
        "import functools\n"
        "class Scorer:\n"
        "    def __call__(self, prompts, responses, rows, scale=1.0): return [scale]\n"
        "scorer = Scorer()\n"
        "half = functools.partial(scorer, scale=0.5)\n"
        "def any_number(*lists): return [2.0]\n",
    )
    names = ("scorer", "half", "any_number")
    assert [load(f"kinds.py:{n}")([], [], []) for n in names] == [[1.0], [0.5], [2.0]]


@pytest.mark.parametrize("name", ["", "f", "my.py", "my.py:", ":f", "my.py:f()", "my.py:a.b"])
def test_a_name_without_function(name):
    assert refusal(name).endswith(f"names no function; {FORMS}")


def test_a_file_that_is_not_there(tmp_path):
    assert f"the file {tmp_path}/no.py is not there; {FORMS}" in refusal("no.py:f")
    (tmp_path / "folder.py").mkdir()
    assert f"the file {tmp_path}/folder.py is a folder; {FORMS}" in refusal("folder.py:f")
    write_at("a/file", GOOD)
    assert f"the file {tmp_path}/a/file does not end in .py; {FORMS}" in refusal("a/file:f")


def test_a_module_that_is_not_there(tmp_path):
    said = refusal("no_such_module:f")
    assert f"there is no module 'no_such_module', in {tmp_path} or where Python looks" in said
    assert said.endswith(FORMS)
    assert "there is no module 'no_such_package'" in refusal("no_such_package.inner:f")
    assert "there is no module 'step3_ppo.nothing'" in refusal("step3_ppo.nothing:f")
    assert "'my rewards' is neither a module's name nor a file's" in refusal("my rewards:f")
    assert "'..up' is neither a module's name nor a file's" in refusal("..up:f")


@pytest.mark.parametrize("form", ["broken.py:f", "broken:f"])
@pytest.mark.parametrize(
    "line, said",
    [
        ("import nothing_such", "ModuleNotFoundError: No module named 'nothing_such'"),
        ("__import__('importlib').import_module('nothing_such')", "ModuleNotFoundError: No module"),
        ("from json import nothing", "ImportError: cannot import name 'nothing' from 'json'"),
        ("x = 1 +", "SyntaxError: invalid syntax"),
        ("x = undefined", "NameError: name 'undefined' is not defined"),
        ("raise SystemExit(0)", "SystemExit: 0"),
    ],
)
def test_a_module_that_fails_keeps_its_own_words(form, line, said):
    path = write_at("broken.py", f"import os\n{line}\n{GOOD}")
    loaded = set(sys.modules)
    message = refusal(form)
    assert f"importing it failed with {said}" in message
    assert message.endswith(f"({path}:2)")
    assert not [name for name in set(sys.modules) - loaded if name.startswith("user_function_")]


def test_a_function_that_is_not_there():
    rest = "def _hidden(): ...\nclass Other: ...\nLIMIT = 3\n"
    write_at("my.py", f"from pathlib import Path\n{GOOD}{rest}")
    for form in ("my.py", "my"):
        said = refusal(f"{form}:g")
        assert said.endswith(f"there is no 'g' in {form}; callable there: f, Other")
    write_at("imports.py", "from my import f, _hidden, LIMIT")
    assert refusal("imports.py:g").endswith("callable there: f")
    write_at("bare.py", "LIMIT = 3")
    assert refusal("bare.py:g").endswith("callable there: nothing")
    write_at("many.py", "\n".join(f"def f{i}(): ..." for i in range(25)))
    assert refusal("many.py:g").endswith("f18, f19 …")


def test_what_is_not_callable():
    write_at("my.py", GOOD + "LIMIT = 3\n")
    said = refusal("my.py:LIMIT")
    assert said.endswith("'LIMIT' is a value of type int, not callable; callable there: f")


@pytest.mark.parametrize(
    "parameters, why",
    [
        ("response", "too many positional arguments"),
        ("a, b, c, d", "missing a required argument: 'd'"),
        ("a, b, c, *, scale", "missing a required"),
    ],
)
def test_a_function_of_other_parameters(parameters, why):
    write_at("my.py", f"def f({parameters}): ...")
    said = refusal("my.py:f")
    assert f"takes ({parameters}), but is called with (prompts, responses, rows): {why}" in said


# Calling it.


def failure(function, timeout=5.0, prompts=PROMPTS, responses=RESPONSES, rows=ROWS):
    with pytest.raises(FunctionError) as caught:
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


def test_an_exception_is_told_with_its_row_and_line():
    path = write_at("my.py", FAILING)
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
    with pytest.raises(FunctionError) as caught:
        call(lambda *_: 1 / 0, "my.py:f", PROMPTS, RESPONSES, ROWS, 5.0)
    assert type(caught.value.__cause__) is ZeroDivisionError


def test_the_line_is_the_user_s_not_the_library_s():
    path = write_at("my.py", "import json\ndef f(a, b, c):\n    return json.loads(b[0])\n")
    for function in (
        load("my.py:f"),
        functools.partial(load("my.py:f")),
        torch.no_grad()(load("my.py:f")),
    ):
        said = failure(function)
        assert "failed on row 1 of 4: JSONDecodeError: Expecting value" in said
        assert f"\n  at {path}:3 in f: return json.loads(b[0])\n" in said
    write_at(
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
from utils.rewards import functions as scoring
scoring.GRACE = 0.5
def f(prompts, responses, rows):
    return [float(bool(re.match(r"(a+)+$", r))) for r in responses]
print(scoring.call(f, "f", ["p"], ["aaa"], [{}], 1.0), flush=True)
scoring.call(f, "f", ["p"], ["a" * 60 + "b"], [{}], 1.0)
"""


def test_a_function_that_blocks_python_ends_the_process():
    path = write_at("blocks.py", HOLDS_THE_LOCK)
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
