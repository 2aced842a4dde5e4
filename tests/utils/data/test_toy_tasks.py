"""The embedded task: its verifier, and that no prompt stands in two files."""

import json
import random

import pytest

from utils.data import toy_tasks
from utils.data.toy_tasks import Task, bad_answer, draw_tasks, right_answer, row_of, verify


@pytest.fixture(scope="module")
def tasks():
    return draw_tasks(2000, seed=5)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    paths = toy_tasks.write(
        tmp_path_factory.mktemp("toy"), 3, demonstrations=1500, prompts=700, held_out=200
    )
    return {
        name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name, path in paths.items()
    }


def families(rows):
    return {row["family"] for row in rows}


def test_at_least_eight_families_in_both_languages(tasks):
    found = {}
    for task in tasks:
        found.setdefault(task.family, set()).add(task.prompt.isascii())
    assert len(found) >= 8 and len(found) == len(toy_tasks.FAMILIES)
    english = {family for family, ascii_only in found.items() if True in ascii_only}
    chinese = {family for family, ascii_only in found.items() if False in ascii_only}
    assert len(english) >= 8 and len(chinese) >= 6
    share = sum(task.prompt.isascii() for task in tasks) / len(tasks)
    assert 0.4 < share < 0.9


def test_right_answers_verify_to_1(tasks):
    r = random.Random(0)
    for task in tasks:
        for _ in range(3):
            assert verify(row_of(task), right_answer(task, r)) == 1.0, task
        for answer in task.answers:
            assert verify(row_of(task), f" {answer}. ") == 1.0, task


def test_bad_answers_verify_to_less(tasks):
    r = random.Random(1)
    scores = [verify(row_of(task), bad_answer(task, r)) for task in tasks for _ in range(4)]
    assert max(scores) <= 0.3 and min(scores) == 0.0
    assert 0 < sum(s > 0 for s in scores) < len(scores), "parts of answers score something"


def test_rude_answers_verify_to_0(tasks):
    r = random.Random(2)
    for task in tasks[:300]:
        answer = right_answer(task, r)
        for word in toy_tasks.RUDE:
            for rude in (f"{answer}, {word}", f"{answer}，{word.upper()}!", f"{word} {answer}"):
                assert verify(row_of(task), rude) == 0.0
    seen = {w for t in tasks for w in toy_tasks.RUDE if w in bad_answer(t, r)}
    assert seen == set(toy_tasks.RUDE)


def test_off_topic_answers_verify_to_almost_nothing(tasks):
    for task in tasks:
        for text in toy_tasks.OFF_TOPIC:
            assert verify(row_of(task), text) < 0.1


SUM = Task("sum", "What is 7 + 8?", ("15",))
LIST = Task("list", "Name three animals.", members="animals", count=3)
ZH_LIST = Task("list", "说出两种水果。", members="水果", count=2)
GREETING = Task("greeting", "Say hello to Tom.", ("Hello, Tom!",))
SPELLING = Task("spelling", "Spell the word cat.", ("c a t",))


@pytest.mark.parametrize(
    "task, response, score",
    [
        (SUM, "15", 1.0),
        (SUM, " 15.\n", 1.0),
        (SUM, "14", 0.15),  # one character in two
        (SUM, "1", 0.15),
        (SUM, "150", 0.2),
        (SUM, "51", 0.0),
        (SUM, "", 0.0),
        (SUM, "15 15 15 15", 0.3 * 2 / 11),
        (LIST, "cat, dog, cow", 1.0),
        (LIST, "Cow,  LION, tiger.", 1.0),
        (LIST, "cat, dog", 0.2),
        (LIST, "cat, cat, cat", 0.1),
        (LIST, "cat, cat, dog", 0.2),
        (LIST, "cat, dog, cow, lion", 0.2),  # more than asked
        (LIST, "cat, dog, apple", 0.2),
        (LIST, "red, blue, green", 0.0),
        (LIST, "", 0.0),
        (ZH_LIST, "苹果、梨", 1.0),
        (ZH_LIST, "苹果、苹果", 0.15),
        (ZH_LIST, "狗、猫", 0.0),
        (GREETING, "hello, tom", 1.0),
        (GREETING, "Hello", 0.3 * 5 / 10),
        (GREETING, "Hello, Tom, idiot!", 0.0),
        (SPELLING, "c a t", 1.0),
        (SPELLING, "cat", 0.3 * 1 / 5),
        (SPELLING, "c  a  t!", 1.0),
    ],
)
def test_verify_by_hand(task, response, score):
    assert verify(row_of(task), response) == pytest.approx(score)


def test_answers_are_what_the_prompt_asks(tasks):
    """Recomputed from the prompt's text alone, where digits or letters tell all."""
    checked = set()
    for task in tasks:
        numbers = [int(n) for n in "".join(c if c.isdigit() else " " for c in task.prompt).split()]
        if task.family == "sum":
            assert task.answers == (str(sum(numbers)),)
        elif task.family == "sorting":
            assert task.answers == (" ".join(map(str, sorted(numbers))),)
        elif task.family == "comparison":
            pick = min if "smaller" in task.prompt else max
            assert task.answers == (str(pick(numbers)),)
        elif task.family == "repetition":
            (answer,) = task.answers
            word = answer.split()[0] if answer.isascii() else answer[0]
            assert word in task.prompt and answer.replace(" ", "") == word * numbers[0]
        elif task.family == "spelling":
            assert task.answers[0].replace(" ", "") in task.prompt
            assert all(len(letter) == 1 for letter in task.answers[0].split(" "))
        elif task.family == "letter":
            word = task.prompt.rstrip("?").split()[-1]
            assert task.answers == (word[0] if "first" in task.prompt.lower() else word[-1],)
        elif task.family == "list":
            asked = [
                n
                for n, words in ((2, "two 两"), (3, "three 三"), (4, "four 四"))
                if any(w in task.prompt for w in words.split())
            ]
            assert [task.count] == asked and task.members in task.prompt
            assert len(toy_tasks.LEXICON[task.members]) > task.count
        else:
            continue
        checked.add(task.family)
    assert len(checked) == 7


def test_prompts_are_all_different(tasks):
    assert len({task.prompt for task in tasks}) == len(tasks) == 2000


def test_draw_tasks_says_when_prompts_run_out(monkeypatch):
    monkeypatch.setattr(toy_tasks, "FAMILIES", {"letter": toy_tasks._first_letter})
    with pytest.raises(ValueError, match="different prompts exist, 80 wanted"):
        draw_tasks(80, seed=0)


# The files.


def test_held_out_prompts_stand_in_no_other_file(files):
    held = {row["prompt"] for row in files["held_out"]}
    prompts = {row["prompt"] for row in files["prompts"]}
    demonstrated = {row["instruction"] for row in files["sft"]}
    assert (len(held), len(prompts)) == (200, 700)
    assert not held & prompts and not held & demonstrated
    assert len(files["sft"]) == 1500 and demonstrated <= prompts


def test_files_hold_every_family_and_verifiable_rows(files):
    assert families(files["held_out"]) == families(files["prompts"])
    assert len(families(files["prompts"])) >= 8
    assert all(toy_tasks.is_task(row) for row in files["prompts"] + files["held_out"])
    assert not any(toy_tasks.is_task(row) for row in files["sft"])
    task = files["prompts"][0]
    for change in (
        {"answers": 5},
        {"answers": [5]},
        {"members": "no such list"},
        {"members": ""} | {"answers": []},
        {"members": "fruits", "count": 0},
        {"members": None},
        {"count": "two"},
    ):
        assert not toy_tasks.is_task(task | change), change


def test_about_half_of_the_demonstrations_are_bad(files):
    rows = {row["prompt"]: row for row in files["prompts"]}
    right = sum(verify(rows[d["instruction"]], d["output"]) == 1.0 for d in files["sft"])
    # 750 expected, standard deviation 19.
    assert 670 < right < 830
    assert all(d["output"] for d in files["sft"])


def test_files_are_a_function_of_the_seed(tmp_path):
    sizes = {"demonstrations": 60, "prompts": 40, "held_out": 10}

    def content(folder, seed):
        paths = toy_tasks.write(tmp_path / folder, seed, **sizes)
        return {name: path.read_bytes() for name, path in paths.items()}

    first = content("a", 1)
    assert first == content("b", 1)
    other = content("c", 2)
    assert all(first[name] != other[name] for name in first)


def test_the_default_sizes_exist(tmp_path):
    paths = toy_tasks.write(tmp_path, 42)
    assert all(path.stat().st_size > 0 for path in paths.values())
