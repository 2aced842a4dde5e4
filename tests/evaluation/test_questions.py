"""Prompts of text files, data files and folders, and what is said of bad ones."""

import json
import re

import pytest

from evaluation import questions
from utils.data import rows


def test_text_file_gives_a_prompt_a_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufefffirst\r\n\n 第二 \nthird".encode())
    found = questions.load([str(path)])
    assert [q.turns for q in found] == [("first",), ("第二",), ("third",)]
    assert [q.where for q in found] == [f"{path}:1", f"{path}:3", f"{path}:4"]
    assert all(q.context == () for q in found)


def test_data_files_keep_what_was_said_before(tmp_path):
    jsonl, mt_bench = tmp_path / "p.jsonl", tmp_path / "mt.jsonl"
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
    ]
    jsonl.write_text(json.dumps({"messages": said}) + "\n")
    mt_bench.write_text(json.dumps({"question_id": 1, "turns": ["a", "b", "c"]}) + "\n")
    names = [str(jsonl), str(mt_bench)]
    first, second = questions.load(names)
    assert first.context == tuple(said[:3]) and first.turns == ("Two?",)
    assert second.context == () and second.turns == ("a", "b", "c")
    assert questions.load(names, 1) == [first]


def test_folder_gives_its_test_split_or_else_its_train_split(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "from train"}\n')
    assert questions.load([str(folder)])[0].turns == ("from train",)
    (folder / "test.jsonl").write_text('{"prompt": "from test"}\n')
    assert questions.load([str(folder)])[0].turns == ("from test",)
    assert questions.load([f"{folder}:train"])[0].turns == ("from train",)


def test_a_tools_result_is_not_asked_as_if_the_user_had_said_it(tmp_path):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [{"role": "user", "content": "q"}]
    turns += [{"role": "assistant", "content": None, "tool_calls": [call]}]
    turns += [{"role": "tool", "tool_call_id": "1", "content": "RESULT"}]
    path = tmp_path / "tools.jsonl"
    path.write_text(json.dumps({"prompt": turns}) + "\n")
    with pytest.raises(rows.DataError, match="tools.jsonl:1: a tool's result stands last"):
        questions.load([str(path)])


def test_bad_prompts_are_all_named_once(tmp_path):
    text, mt_bench, empty = tmp_path / "p.txt", tmp_path / "mt.jsonl", tmp_path / "empty.txt"
    text.write_bytes(b"fine\n\xff\xfe\nnul \0 here\n")
    mt_bench.write_text('{"turns": ["a", 7]}\n{"turns": []}\n')
    empty.write_text("\n")
    names = [str(text), str(mt_bench), str(empty)]
    with pytest.raises(rows.DataError) as caught:
        questions.load(names)
    message = str(caught.value)
    assert f"{text}:2: not UTF-8" in message and f"{text}:3: the line holds a NUL" in message
    assert f"{mt_bench}:1: turn 2 of turns is int" in message
    assert f"{empty}: holds no prompts" in message
    assert message.count(f"{mt_bench}:2:") == 1 and message.count("\n") == 5


def test_built_in_prompts_are_english_and_chinese():
    found = questions.load([])
    chinese = [q for q in found if re.search("[一-鿿]", q.turns[0])]
    assert len(found) == 10 and 3 <= len(chinese) <= 7
    assert len(questions.load([], 3)) == 3
