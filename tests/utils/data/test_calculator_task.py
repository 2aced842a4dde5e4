"""The calculator task's files: what their rows hold; demonstrations ask as the tool hears."""

import json
import re

import pytest

from step3_ppo.environments.calculator import replies
from utils.data import calculator_task, toy_tasks

TERM = re.compile(r"(\d+)([-+*])(\d+)")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    sizes = dict(demonstrations=3000, prompts=600, held_out=50)
    paths = calculator_task.write(tmp_path_factory.mktemp("task"), 5, **sizes)
    return {name: [json.loads(line) for line in path.open()] for name, path in paths.items()}


def by_hand(question: str) -> str:
    return str(eval(TERM.search(question)[0]))  # the test's own question


def test_prompts_have_the_answer_that_the_verifier_takes(files):
    assert [len(files[name]) for name in ("sft", "prompts", "held_out")] == [3000, 600, 50]
    for row in files["prompts"] + files["held_out"]:
        assert toy_tasks.is_task(row) and row["answers"] == [by_hand(row["prompt"])]
        assert row["answer"] == by_hand(row["prompt"])
        assert toy_tasks.verify(row, by_hand(row["prompt"])) == 1.0
        assert toy_tasks.verify(row, str(int(by_hand(row["prompt"])) + 1)) < 1.0


def test_no_question_stands_in_two_files(files):
    prompts, held = ({row["prompt"] for row in files[name]} for name in ("prompts", "held_out"))
    asked = {row["messages"][0]["content"] for row in files["sft"]}
    assert len(prompts) == 600 and len(held) == 50 and not prompts & held and asked == prompts


def test_demonstrations_show_the_calculator_as_it_is_and_a_fifth_of_them_are_right(files):
    right = calls = 0
    for row in files["sft"]:
        turns = row["messages"]
        roles = [turn["role"] for turn in turns]
        if len(turns) == 4:
            calls += 1
            assert roles == ["user", "assistant", "tool", "assistant"]
            assert replies([turns[:2]], [{}]) == [turns[2]["content"]]
        else:
            assert roles == ["user", "assistant"]
        assert replies([turns], [{}]) == [None], "the last turn ends the episode"
        good = turns[-1]["content"] == by_hand(turns[0]["content"])
        right += good
        assert not (good and len(turns) == 2), "a guess is wrong"
    assert calls / 3000 == pytest.approx(0.35, abs=0.03)
    assert right / 3000 == pytest.approx(0.2, abs=0.025)
