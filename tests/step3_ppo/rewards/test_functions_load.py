"""Loading the function of --reward_function: what is said where it cannot be had."""

import importlib
import os
import sys
from pathlib import Path

import pytest

from step3_ppo.rewards import shipped as reward_functions
from step3_ppo.rewards.functions import load

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


def write(path, text):
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
    assert load(name) is reward_functions.rouge_l


def test_the_old_name_of_the_shipped_functions_is_told_the_new_one():
    said = refusal("step3_ppo.reward_functions:rouge_l")
    assert said.endswith("give step3_ppo.rewards.shipped:rouge_l")


@pytest.mark.parametrize("form", ["{}:f", "./{}:f", "{absolute}:f"])
def test_a_file_s_function(form):
    path = write("sub/my rewards.py", GOOD)
    function = load(form.format("sub/my rewards.py", absolute=path))
    assert function(*LISTS) == [1.0, 1.0]


def test_files_of_the_same_name_are_two_modules():
    for folder in "ab":
        write(f"{folder}/json.py", f"NAME = {folder!r}\ndef f(prompts, responses, rows): ...")
    first, second = load("a/json.py:f"), load("b/json.py:f")
    assert (first.__globals__["NAME"], second.__globals__["NAME"]) == ("a", "b")
    assert first.__module__ != second.__module__
    assert sys.modules[first.__module__].NAME == "a"  # where pickle and dataclasses look
    import json

    assert json.loads("1") == 1


def test_a_file_imports_what_stands_beside_it():
    write("sub/its_neighbour.py", "SCORE = 7.0")
    write("sub/mine.py", "from its_neighbour import SCORE\ndef f(a, b, c): return [SCORE]")
    assert load("sub/mine.py:f")(1, 2, 3) == [7.0]


def test_a_module_of_the_current_folder_unless_one_of_that_name_is_installed(tmp_path):
    write("own_rewards/inner.py", GOOD)
    assert load("own_rewards.inner:f")(*LISTS) == [1.0, 1.0]
    sys.path.insert(0, str(tmp_path / "installed"))
    write("installed/the_same_name.py", "def f(a, b, c): return 'installed'")
    write("here/the_same_name.py", "def f(a, b, c): return 'here'")
    os.chdir("here")
    assert load("the_same_name:f")(*LISTS) == "installed"
    assert load("the_same_name.py:f")(*LISTS) == "here"


def test_any_callable_will_do():
    write(
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
    write("a/file", GOOD)
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
    path = write("broken.py", f"import os\n{line}\n{GOOD}")
    loaded = set(sys.modules)
    message = refusal(form)
    assert f"importing it failed with {said}" in message
    assert message.endswith(f"({path}:2)")
    assert not [name for name in set(sys.modules) - loaded if name.startswith("reward_function_")]


def test_a_function_that_is_not_there():
    rest = "def _hidden(): ...\nclass Other: ...\nLIMIT = 3\n"
    write("my.py", f"from pathlib import Path\n{GOOD}{rest}")
    for form in ("my.py", "my"):
        said = refusal(f"{form}:g")
        assert said.endswith(f"there is no 'g' in {form}; callable there: f, Other")
    write("imports.py", "from my import f, _hidden, LIMIT")
    assert refusal("imports.py:g").endswith("callable there: f")
    write("bare.py", "LIMIT = 3")
    assert refusal("bare.py:g").endswith("callable there: nothing")
    write("many.py", "\n".join(f"def f{i}(): ..." for i in range(25)))
    assert refusal("many.py:g").endswith("f18, f19 …")


def test_what_is_not_callable():
    write("my.py", GOOD + "LIMIT = 3\n")
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
    write("my.py", f"def f({parameters}): ...")
    said = refusal("my.py:f")
    assert f"takes ({parameters}), but is called with (prompts, responses, rows): {why}" in said
