"""Rows that are easily misread: transcripts, bad demonstrations, ties, tools, other names."""

import copy
import json
import re

import pytest

from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig
from tests.helpers.data_formats import FULL, SINGLE, TREES, flat, tools
from tests.helpers.loading import load_step
from utils.data import chat_template
from utils.data.comparisons import load_comparisons
from utils.data.demonstrations import load_conversations
from utils.data.prompts import load_prompts
from utils.data.rows import BadRows, DataError
from utils.data.sources import has_split
from utils.data.turns import is_transcript
from utils.models import from_scratch
from utils.settings.command_line import build
from utils.settings.fields import ConfigError
from utils.settings.run_config import columns_of

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TALK = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"


@pytest.fixture
def save(tmp_path):
    def write(*rows):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture(scope="module")
def tokenizer():
    return from_scratch.train_tokenizer(["one two three look_up word found"] * 20, 300)


def texts(turns):
    return [turn["content"] for turn in turns]


# Transcripts.


@pytest.mark.parametrize(
    "text",
    [
        "Human: what is a colon for?",
        "What does Human: mean?\n\nAssistant: is not it.",
        "Write a talk.\n\nHuman: hello\n\nAssistant: hello",
        "Humans: a history\n\nAssistant: none",
        "Human: rights\nThe Assistant: a novel",
        "Assistant: hello\n\nHuman: hello",
        "",
    ],
)
def test_prose_is_no_transcript(save, text):
    assert not is_transcript(text)
    if text:
        (one,) = load_prompts([save({"prompt": text})], bad=BadRows())
        assert one.messages == ({"role": "user", "content": text},)


@pytest.mark.parametrize(
    "text",
    [
        TALK,
        TALK + " ",
        "Human: one\n\nAssistant: two\n\nHuman: three",
        "Human:one\nAssistant:two\nHuman:three\nAssistant:\n",
        "Human：one\nAssistant：two\nHuman：three\nAssistant：",
        "### Human: one### Assistant: two### Human: three### Assistant:",
        TALK.replace("\n", "\r\n"),
    ],
)
def test_transcripts_become_turns(save, text, capsys):
    (one,) = load_prompts([save({"prompt": text})], bad=BadRows())
    assert [t["role"] for t in one.messages] == ["user", "assistant", "user"]
    assert texts(one.messages) == ["one", "two", "three"]
    assert "1 row(s) hold a transcript" in capsys.readouterr().out


@pytest.mark.parametrize("schema", ["plain", "prompt:plain", "transcript", "prompt:transcript"])
def test_data_schema_forces_how_texts_are_taken(save, schema):
    bad = BadRows()
    found = load_prompts([save({"prompt": TALK}, {"prompt": "Human: one"})], schema=schema, bad=bad)
    if schema.endswith("plain"):
        assert [texts(one.messages) for one in found] == [[TALK], ["Human: one"]]
    else:
        assert [texts(one.messages) for one in found] == [["one", "two", "three"]]
        assert len(bad) == 1 and ":2: prompt is no transcript" in bad.problems[0]


@pytest.mark.parametrize("schema", ["transcripts", "plain:prompt", "prompt:", "auto:html", ""])
def test_other_words_are_refused(save, schema):
    with pytest.raises(DataError, match="set --data_schema to auto, .*NAME:plain"):
        load_prompts([save({"prompt": TALK})], schema=schema, bad=BadRows())


# What is no demonstration, and what teaches nothing.


@pytest.mark.parametrize("label", [False, 0, 0.0, "False", "false "])
def test_a_bad_answer_is_never_learnt(save, label, capsys):
    good = {"prompt": "q", "completion": "a", "label": True}
    bad_one = {"prompt": "q", "completion": "nonsense", "label": label}
    chat = {"messages": [Q, {**A, "content": "nonsense"}], "label": label}
    bad = BadRows()
    found = load_conversations([save(good, bad_one)], bad=bad)
    assert [texts(one.messages) for one in found] == [["q", "a"]] and not len(bad)
    assert "1 row(s) have label false" in capsys.readouterr().out
    assert load_conversations([save(chat)], bad=bad) == [] and not len(bad)


@pytest.mark.parametrize(
    "names",
    ["score_chosen score_rejected", "chosen_score rejected_score", "chosen-rating rejected-rating"],
)
def test_equal_scores_are_a_tie_that_step_2_leaves_out(save, tmp_path, tokenizer, names):
    ours, theirs = names.split()
    rows = [
        {"prompt": f"q{n}", "chosen": "one", "rejected": "two", ours: 4 + n % 2, theirs: 4}
        for n in range(20)
    ]
    path, said = save(*rows), []
    found = load_comparisons([path], bad=BadRows())
    assert [c.scores for c in found] == [(4.0 + n % 2, 4.0) for n in range(20)]
    config = RewardConfig(
        model_name_or_path="m", preference_data=[path], output_dir=str(tmp_path), eval_fraction=0.2
    )
    train, held, _ = load_step(config, tokenizer, said.append)
    assert len(train) + len(held) == 10 and "10 left out" in said[0]


def test_texts_that_go_beyond_their_prompt_are_not_cut_into_turns(save):
    """A dialogue as an answer is an answer, where there is a prompt that it does not begin with."""
    script = "Human: hello\n\nAssistant: hello yourself"
    row = {"prompt": "Write a dialogue.", "chosen": script, "rejected": "no"}
    (one,) = load_comparisons([save(row)], bad=BadRows())
    assert texts(one.prompt) == ["Write a dialogue."] and one.responses == (script, "no")


def test_a_prompt_repeated_in_its_answers_is_not_repeated(save):
    row = {"prompt": TALK, "chosen": TALK + " four", "rejected": TALK + " five"}
    (one,) = load_comparisons([save(row)], bad=BadRows())
    assert texts(one.prompt) == ["one", "two", "three"] and one.responses == ("four", "five")


BAD_COMPARISONS = [
    ({"chosen": TALK + " a", "rejected": TALK.replace("two", "2") + " b"}, "not answer the same"),
    ({"chosen": TALK + " a", "rejected": TALK + " b\n\nHuman: c"}, "rejected is not the assist"),
    ({"chosen": TALK + " a", "rejected": TALK}, "rejected is not the assistant's"),
    ({"chosen": "a", "rejected": "b"}, "prompt is null"),
    ({"instruction": "q", "completions": [{"response": "a", "overall_score": 1}]}, "holds 1, at"),
    ({"instruction": "q", "completions": [{"response": "a"}] * 2}, "not all of completions have"),
    ({"prompt": "q", "answers": [{"answer": "a", "rank": 1}, "b"]}, "no list of objects"),
    ({"prompt": "q", "answers": [{"rank": 1}, {"rank": 2}]}, "response 1 is null"),
    (
        {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 2},
        "labels is 2, neither 1",
    ),
    ({"message_tree_id": "t", "prompt": "q"}, "a message of the tree is str, not an object"),
    (
        {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "q", "replies": 3}},
        "no list of objects",
    ),
]


@pytest.mark.parametrize("row, reason", BAD_COMPARISONS)
def test_bad_rows_of_each_format_are_named(save, row, reason):
    path, bad = save(row), BadRows()
    assert load_comparisons([path], bad=bad) == []
    assert len(bad) == 1 and bad.problems[0].startswith(f"{path}:1: ") and reason in bad.problems[0]


BAD_TURNS = [
    ([{**Q, "content": [{"type": "image_url", "image_url": "x"}]}, A], "is image_url, and only"),
    ([Q, {"role": "assistant", "content": None}], "is null, not a string"),
    ([Q, {**A, "weight": 0}], "has weight 0"),
    (
        [
            Q,
            {**A, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}]},
        ],
        "holds a lone surrogate",
    ),
    ([Q, {**A, "tool_calls": [{"function": {"name": "f"}}]}], "lacks a function's name or arg"),
    ([Q, {**A, "function_call": {"name": "f", "arguments": "{"}}], "call 1 .* not JSON"),
    ([Q, A, {"role": "tool", "content": "x"}, Q, A], "do not alternate"),
    ([Q, A, {"role": "system", "content": "s"}, A], "do not alternate"),
]


@pytest.mark.parametrize("turns, reason", BAD_TURNS)
def test_bad_turns_are_named(save, turns, reason):
    bad = BadRows()
    assert load_conversations([save({"messages": turns})], bad=bad) == []
    with pytest.raises(DataError, match=reason):
        bad.finish("data")


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"messages": [Q, A], "tools": [{"name": "f"}]}, "tools lists functions"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "history is no list of pairs"),
        ({"question": "q", "context": ["x"], "answer": "a"}, "context is list, not a string"),
        ({"prompt": "q", "completion": [Q]}, "the last turn of completion is not the assistant's"),
        ({"prompt": "q", "answer": 3}, "answer is int"),
    ],
)
def test_what_would_be_lost_is_refused(save, row, reason):
    bad = BadRows()
    assert load_conversations([save(row)], bad=bad) == []
    assert reason in bad.problems[0]


def test_trimmed_and_joined_turns_are_counted(save, capsys):
    rows = [[A, Q, A], [Q, A, Q], [Q, Q, A], [Q, A]]
    found = load_conversations([save(*({"messages": one} for one in rows))], bad=BadRows())
    assert [texts(one.messages) for one in found] == [["q", "a"]] * 2 + [
        ["q\n\nq", "a"],
        ["q", "a"],
    ]
    said = capsys.readouterr().out
    for note in (
        "began with the assistant",
        "ended without an answer",
        "several turns of the user",
    ):
        assert sum(": 1 row(s)" in line and note in line for line in said.splitlines()) == 1


# Tools.

SHOWS_TOOLS = chat_template.CHATML.replace(
    "message['content'] +",
    "message['content'] + (message.tool_calls | tojson if message.tool_calls else '') +",
)


def test_tool_calls_are_learnt_where_the_template_shows_them(save, tokenizer):
    bad = BadRows()
    found = load_conversations([save(*({"messages": tools(d)} for d in FULL))], bad=bad)
    assert bad.problems == [] and len(found) == 20
    refused = [one for one in found if _refusal(tokenizer, one)]
    assert len(refused) == 20 and "leaves out a tool's call" in _refusal(tokenizer, found[0])
    shows = from_scratch.train_tokenizer(["one two three look_up word found"] * 20, 300)
    shows.chat_template = SHOWS_TOOLS
    for one, dialogue in zip(found, FULL, strict=True):
        encoded = chat_template.encode_conversation(shows, one.messages)
        learnt = shows.decode([i for i, on in zip(*_pairs(encoded), strict=True) if on])
        call = {"name": "look_up", "arguments": {"word": dialogue.last[0]}}
        calls = json.dumps([{"type": "function", "function": call}], ensure_ascii=False)
        answers = [text for _, text in dialogue.turns[:-1]] + [calls, dialogue.last[1]]
        assert learnt == "".join(f"{text}<|im_end|>" for text in answers)


def _pairs(encoded):
    return encoded.ids, encoded.supervised


def _refusal(tokenizer, one):
    try:
        chat_template.encode_conversation(tokenizer, one.messages)
    except chat_template.TemplateError as error:
        return str(error)
    return ""


# Trees.


def test_messages_without_their_parent_are_counted(save, capsys):
    rows = flat(TREES[0]["prompt"])
    rows.append({**rows[0], "message_id": "lost", "parent_id": "nowhere"})
    rows += [{**rows[0], "message_id": a, "parent_id": b} for a, b in ("xy", "yx")]  # a ring
    rows += [rows[0], {"message_id": 3, "parent_id": None, "text": "a", "role": "prompter"}]
    path, bad = save(*rows), BadRows()
    found = load_conversations([path], bad=bad)
    assert [texts(one.messages) for one in found] == [list(SINGLE[0].turns[0])]
    assert "3 row(s) were left out: the message that they answer" in capsys.readouterr().out
    assert [problem.partition(": ")[2] for problem in bad.problems] == [
        f"message_id {rows[0]['message_id']} is there before",
        "message_id or parent_id is no text",
    ]


def test_a_deleted_tree_is_left_out_and_counted(save, capsys):
    gone = {**TREES[1], "prompt": {**TREES[1]["prompt"], "deleted": True}}
    assert len(load_conversations([save(TREES[0], gone)], bad=BadRows())) == 1
    assert "1 row(s) are trees whose first message was deleted" in capsys.readouterr().out


# Columns under other names, and configurations.


def test_columns_under_other_names(save):
    row = {"problem": "q", "solution": "a", "messages": [Q, {**A, "content": "other"}]}
    columns = columns_of(["prompt=problem,answer=solution"])
    assert columns == columns_of(["prompt=problem", "answer = solution"])
    (one,) = load_conversations([save(row)], columns=columns, bad=BadRows())
    assert texts(one.messages) == ["q", "a"]
    (prompt,) = load_prompts([save(row)], columns=columns, bad=BadRows())
    assert prompt.row == row | {"prompt": "q", "answer": "a"}
    pair = {"query": "q", "good": "a", "poor": "b", "note": "s"}
    columns = {"prompt": "query", "chosen": "good", "rejected": "poor", "system": "note"}
    (one,) = load_comparisons([save(pair)], columns=columns, bad=BadRows())
    assert texts(one.prompt) == ["s", "q"] and one.responses == ("a", "b")
    with pytest.raises(DataError, match="has no column poor, note, which --columns names"):
        load_comparisons([save({"query": "q", "good": "a"})], columns=columns, bad=BadRows())
    with pytest.raises(DataError, match="no schema has a column promt"):
        load_prompts([save(row)], columns={"promt": "problem"}, bad=BadRows())
    bad = BadRows()
    assert len(load_prompts([save(row, {"other": 1})], columns={"prompt": "problem"}, bad=bad)) == 1
    assert "lacks prompt or question" in bad.problems[0]


def test_every_step_takes_columns(save, tmp_path, tokenizer):
    rows = [{"ask": f"one {n}", "say": "two", "worse": "three"} for n in range(20)]
    common = {"model_name_or_path": "m", "output_dir": str(tmp_path), "eval_fraction": 0.2}
    path = save(*rows)
    sft = SFTConfig(**common, sft_data=[path], columns=["prompt=ask,answer=say"])
    train, held = load_step(sft, tokenizer)
    assert len(train) + len(held) == 20 and texts(held.item(0).messages)[1] == "two"
    pairs = ["prompt=ask", "chosen=say", "rejected=worse"]
    reward = RewardConfig(**common, preference_data=[path], sft_data=[path], columns=pairs)
    train, held, demonstrations = load_step(reward, tokenizer)
    assert len(train) + len(held) == 20 and len(demonstrations) == len(held)
    ppo = PPOConfig(**common, prompt_data=[path], columns=["prompt=ask"])
    train, held = load_step(ppo, tokenizer)
    assert sorted(p.row["ask"] for p in [*train, *held]) == sorted(row["ask"] for row in rows)
    assert set(from_scratch.texts_of([path], columns_of(pairs))) >= {"one 0", "two", "three"}


def test_comparisons_left_out_as_too_long_are_told(save, tmp_path, tokenizer):
    rows = [{"prompt": f"q{n} " + "w " * (60 if n % 4 == 0 else 1)} for n in range(20)]
    path = save(*({**row, "chosen": "good", "rejected": "poor"} for row in rows))
    said = []
    config = RewardConfig(
        model_name_or_path="m",
        output_dir=str(tmp_path),
        preference_data=[path],
        eval_fraction=0.2,
        max_length=64,
        long_prompts="drop",
    )
    train, held, _ = load_step(config, tokenizer, said.append)
    told = [re.search(r"(\d+) rows kept(?:, (\d+) dropped)?", line) for line in said[1:]]
    assert [int(found[1]) for found in told] == [2 * len(train), 2 * len(held)]
    assert sum(int(found[2] or 0) for found in told) == 10 and len(train) + len(held) == 15


def test_rows_that_the_template_refused_are_not_shown(save, tmp_path, tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + strict.chat_template
    )
    talks = [[Q, A] if n % 2 else [{"role": "system", "content": "s"}, Q, A] for n in range(40)]
    rows = [
        {"messages": [*t[:-2], {**t[-2], "content": f"q{n}"}, t[-1]]} for n, t in enumerate(talks)
    ]
    config = SFTConfig(
        model_name_or_path="m",
        output_dir=str(tmp_path),
        sft_data=[save(*rows)],
        max_bad_rows=1.0,
        eval_fraction=0.4,
    )
    _, held = load_step(config, strict)
    assert len(held) and all(held.item(i).messages[0]["role"] == "user" for i in range(len(held)))


@pytest.mark.parametrize("words", ["prompt", "prompt=", "=q", "prompt=a,prompt=b", "a=b,c"])
def test_columns_that_are_no_pairs_are_refused(words):
    argv = ["--model_name_or_path", "m", "--preference_data", "d", "--output_dir", "o"]
    with pytest.raises(ConfigError, match="are not pairs.*; set --columns"):
        build(RewardConfig, [*argv, "--columns", words], 1)


README = """---
configs:
- config_name: easy
  data_files:
  - {split: train, path: easy/train.jsonl}
  - {split: test, path: easy/test.jsonl}
- config_name: hard
  data_files: hard.jsonl
---
"""


def test_a_data_set_of_several_configurations(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    (folder / "easy").mkdir(parents=True)
    (folder / "README.md").write_text(README)
    for name in ("easy/train", "easy/test", "hard"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"prompt": name}) + "\n")

    def read(name, role="train"):
        (one,) = load_prompts([f"{folder}{name}"], split_role=role, bad=BadRows())
        return one.row["prompt"]

    assert read(":easy") == "easy/train" and read(":easy", "eval") == "easy/test"
    assert read(":easy:test") == "easy/test" and read(":hard") == read(":hard:train") == "hard"
    assert has_split(f"{folder}:easy", ("test",)) and not has_split(f"{folder}:hard", ("test",))
    assert not has_split(f"{folder}:easy:test", ("test",))
    for name, reason in (
        ("", f"has the configurations easy, hard; name one of them as {folder}:easy"),
        (":test", f"name one of them as {folder}:easy:test"),
        (":mild:test", "has the configurations easy, hard, but not mild"),
        (":easy:dev", "has the splits train, test, but not dev"),
    ):
        with pytest.raises(DataError, match=reason):
            read(name)
