"""Rows of every schema -> conversations and prompts; unusable rows named with their reason."""

import json
from pathlib import Path

import pytest

from utils.data.demonstrations import load_conversations
from utils.data.prompts import load_prompts
from utils.data.rows import BadRows, DataError

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real data is not at {REAL}")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def save(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


CHAT = [user("q1"), bot("a1"), user("q2"), bot("a2")]
BELLE = [
    {"from": "human", "value": "q1"},
    {"from": "gpt", "value": "a1"},
    {"from": "user", "value": "q2"},
    {"from": "assistant", "value": "a2"},
]
# schema, row, prompt, answer (None: the schema has none)
CASES = [
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, [user("q")], "a"),
    ("alpaca", {"instruction": "q", "input": "i", "output": "a"}, [user("q\n\ni")], "a"),
    ("alpaca", {"instruction": "q", "input": None, "output": " a "}, [user("q")], " a "),
    ("alpaca", {"instruction": "q", "output": "a", "system": "s"}, [system("s"), user("q")], "a"),
    ("conversations", {"conversations": BELLE}, CHAT[:3], "a2"),
    ("conversations", {"conversations": CHAT}, CHAT[:3], "a2"),
    ("messages", {"messages": [system("s"), *CHAT]}, [system("s"), *CHAT[:3]], "a2"),
    ("messages", {"messages": [system(""), *CHAT], "prompt": "no"}, CHAT[:3], "a2"),
    ("messages", {"messages": CHAT, "system": " "}, CHAT[:3], "a2"),
    ("preference", {"chosen": CHAT, "rejected": CHAT[:3], "prompt": "no"}, CHAT[:3], "a2"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, [user("q")], "a"),
    ("preference", {"prompt": CHAT[:3], "chosen": [bot("a")], "rejected": []}, CHAT[:3], "a"),
    ("kwise", {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]}, [user("q")], "b"),
    ("kwise", {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]}, [user("q")], "a"),
    ("prompt_completion", {"prompt": "q", "completion": "a"}, [user("q")], "a"),
    ("prompt_completion", {"prompt": CHAT[:3], "response": "a"}, CHAT[:3], "a"),
    ("prompt", {"prompt": "q", "solution": 4}, [user("q")], None),
    ("prompt", {"prompt": CHAT[:3]}, CHAT[:3], None),
    ("turns", {"turns": ["q", "then"]}, [user("q")], None),
    ("instruction", {"instruction": "q", "input": "i"}, [user("q\n\ni")], None),
]


@pytest.mark.parametrize("schema, row, prompt, answer", CASES)
@pytest.mark.parametrize("forced", [False, True])
def test_every_schema(tmp_path, schema, row, prompt, answer, forced):
    path, bad = save(tmp_path / "a.jsonl", row), BadRows()
    name = schema if forced else "auto"
    (found,) = load_prompts([path], schema=name, bad=bad)
    assert found.messages == tuple(prompt) and found.where == f"{path}:1" and found.row == row
    if answer is None:
        with pytest.raises(DataError, match="schema"):
            load_conversations([path], schema=name, bad=bad)
    else:
        (found,) = load_conversations([path], schema=name, bad=bad)
        assert found.messages == (*prompt, bot(answer)) and found.where == f"{path}:1"
    assert not len(bad)


def test_trailing_user_turn_is_a_prompt(tmp_path):
    path, bad = save(tmp_path / "a.jsonl", {"messages": CHAT[:1]}), BadRows()
    assert load_prompts(path, bad=bad)[0].messages == tuple(CHAT[:1])
    assert load_conversations(path, bad=bad) == []
    assert bad.problems == [
        f"{path}:1: the last turn of messages is not the assistant's, so there is no answer"
    ]


ALPACA = {"instruction": "q", "input": "", "output": "a"}
BAD = [
    ({"instruction": "q", "input": ""}, "lacks output or response, which schema alpaca needs"),
    (
        {"messages": CHAT},
        "lacks instruction, output or response, which schema alpaca needs; it has",
    ),
    ({**ALPACA, "output": ["a"]}, "turn 1 of output is str, not an object"),
    ({**ALPACA, "output": None}, "output is null, not a string"),
    ({**ALPACA, "output": ""}, "output is empty"),
    ({**ALPACA, "output": " \n"}, "output is blank"),
    ({**ALPACA, "instruction": ""}, "instruction is empty"),
    ({**ALPACA, "instruction": 3}, "instruction is int, not a string"),
    ({**ALPACA, "input": {"a": 1}}, "input is dict, not a string"),
    ({**ALPACA, "output": "\ud800"}, "lone surrogate, U+D800"),
    ({**ALPACA, "system": 1}, "system is int, not a string"),
]
BAD_CHATS = [
    ([], "messages is an empty list"),
    ("text", "messages is str, not a list of turns"),
    (["text"], "turn 1 of messages is str, not an object"),
    ([bot("a")], "the prompt is empty"),
    ([system("s"), bot("a")], "the prompt is empty"),
    ([bot("hello"), bot("a")], "the prompt is empty"),
    ([user("q"), bot("a"), bot("a")], "two assistant turns follow each other"),
    ([user("q"), system("s"), bot("a")], "do not alternate user, assistant: user, system"),
    ([{"role": "tool", "content": "x"}, bot("a")], "do not alternate user, assistant: tool"),
    ([{"role": "robot", "content": "x"}, bot("a")], "the role of turn 1 of messages is 'robot'"),
    ([{"role": 7, "content": "x"}, bot("a")], "the role of turn 1 of messages is int"),
    ([user("q"), {"content": "x"}], "the role of turn 2 of messages is null"),
    ([user([7]), bot("a")], "part 1 of the content of turn 1 of messages is int, and only text"),
    ([user([]), bot("a")], "the content of turn 1 of messages is list, not a string"),
    ([user(" "), bot("a")], "the content of turn 1 of messages is blank"),
]
BAD_ANSWERS = [
    {"messages": [user("q"), bot("")]},
    {"chosen": [user("q"), bot(" ")], "rejected": []},
    {"prompt": "q", "response": "\n"},
    {"prompt": "q", "responses": ["", "b"], "scores": [2, 1]},
]


@pytest.mark.parametrize("row, reason", BAD)
def test_bad_alpaca_rows_are_named(tmp_path, row, reason):
    path, bad = save(tmp_path / "a.jsonl", ALPACA, row, ALPACA), BadRows()
    assert [c.where for c in load_conversations([path], bad=bad)] == [f"{path}:1", f"{path}:3"]
    assert len(bad) == 1 and bad.problems[0].startswith(f"{path}:2: ")
    assert reason in bad.problems[0]


@pytest.mark.parametrize("turns, reason", BAD_CHATS)
@pytest.mark.parametrize("load", [load_conversations, load_prompts])
def test_bad_chats_are_named(tmp_path, load, turns, reason):
    path = save(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": turns})
    bad = BadRows()
    assert len(load([path], bad=bad)) == 1
    assert len(bad) == 1 and bad.problems[0].startswith(f"{path}:2: ")
    assert reason in bad.problems[0]


@pytest.mark.parametrize("row", BAD_ANSWERS)
def test_answers_without_text_are_named_and_do_not_spoil_prompts(tmp_path, row):
    path, bad = save(tmp_path / "a.jsonl", row), BadRows()
    assert load_conversations([path], bad=bad) == [] and len(bad) == 1
    assert bad.problems[0].startswith(f"{path}:1: ")
    assert "is empty" in bad.problems[0] or "is blank" in bad.problems[0]
    assert load_prompts([path], bad=BadRows())[0].messages == (user("q"),)


def test_unknown_columns_are_refused_with_the_schemas(tmp_path):
    path = save(tmp_path / "a.jsonl", {"frage": "q"})
    with pytest.raises(DataError) as caught:
        load_conversations([path], bad=BadRows())
    assert str(caught.value).startswith(f"{path}:1: the columns 'frage' fit no schema known here")
    assert "alpaca" in str(caught.value) and "--data_schema" in str(caught.value)


def test_problems_of_all_names_come_in_one_message(tmp_path):
    gone, empty = str(tmp_path / "gone.json"), str(tmp_path / "empty.jsonl")
    Path(empty).touch()
    rows = save(tmp_path / "a.jsonl", ALPACA, {**ALPACA, "output": ""})
    with pytest.raises(DataError) as caught:
        load_conversations([gone, rows, empty], bad=BadRows())
    starts = [problem.split(": ")[0] for problem in caught.value.problems]
    assert starts == [gone, empty, f"{rows}:2"]


def test_skip_mode_refuses_a_name_with_nothing_left(tmp_path):
    path = save(tmp_path / "a.jsonl", {**ALPACA, "output": ""})
    with pytest.raises(DataError, match="not one of its rows can be used; first: .*:1: output is"):
        load_conversations([path], bad=BadRows(1.0))
    mixed = save(tmp_path / "b.jsonl", {**ALPACA, "output": ""}, ALPACA)
    assert len(load_conversations([mixed], bad=BadRows(1.0))) == 1


def test_settings_that_do_not_exist_are_named(tmp_path):
    path = save(tmp_path / "a.jsonl", ALPACA)
    for options in ({"schema": "sharegpt"}, {"split_role": "dev"}):
        with pytest.raises(DataError, match=next(iter(options.values()))):
            load_conversations([path], bad=BadRows(), **options)
    with pytest.raises(DataError, match="no data is named"):
        load_prompts([], bad=BadRows())


@needs_real
@pytest.mark.parametrize(
    "name, role, conversations, prompts",
    [
        ("alpaca/alpaca_en.json", "train", 2095, 2095),
        ("belle/Belle_open_source_zh.json", "train", 806, 806),
        ("ultrafeedback_binarized", "train", 621, 621),
        ("ultrafeedback_binarized", "eval", 76, 76),
        ("ultrafeedback_binarized:train_prefs", "train", 3424, 3424),
        ("rankings/kwise.jsonl", "train", 300, 300),
        ("mt_bench/question.jsonl", "train", None, 80),
    ],
)
def test_real_data(name, role, conversations, prompts):
    bad = BadRows()
    found = load_prompts([str(REAL / name)], split_role=role, bad=bad)
    assert len(found) == prompts
    assert all(one.messages[-1]["role"] == "user" for one in found)
    if conversations is not None:
        learnt = load_conversations([str(REAL / name)], split_role=role, bad=bad)
        assert len(learnt) == conversations
        assert all(one.messages[-1]["role"] == "assistant" for one in learnt)
    assert bad.problems == []


@needs_real
def test_real_belle_text_arrives_unchanged():
    path = REAL / "belle" / "Belle_open_source_zh.json"
    raw = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    found = load_conversations([str(path)], bad=BadRows())
    for row, one in zip(raw, found, strict=True):
        first = row["instruction"] + ("\n\n" + row["input"] if row["input"].strip() else "")
        assert one.messages == (user(first), bot(row["output"]))
