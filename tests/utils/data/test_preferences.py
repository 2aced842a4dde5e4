"""Comparisons as tokens: where answers begin, which have a stop token, which answers are kept."""

import json

import pytest

from utils.data import chat_template, preferences
from utils.data.comparisons import Comparison
from utils.data.loading import DataSettings
from utils.data.preferences import Encode
from utils.data.rows import BadRow

PROMPT = ({"role": "user", "content": "What is 3 + 4?"},)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return chat_template.load_tokenizer(str(tiny / "base_model"))


def compared(responses=("7", "It is 8.", "9"), scores=(1.0, 0.0, 0.5), **more):
    return Comparison(PROMPT, responses, scores, "here:1", **more)


def texts(tokenizer, made) -> list[str]:
    return [
        tokenizer.decode(ids[begin:]) for ids, begin in zip(made.answers, made.begins, strict=True)
    ]


def test_an_answer_begins_behind_its_prompt_and_ends_with_its_stop_token(tokenizer):
    made, counts = Encode(tokenizer, 96, "cut")(compared())
    stop, prompt = tokenizer.eos_token, chat_template.encode_prompt(tokenizer, PROMPT)
    assert texts(tokenizer, made) == [f"7{stop}", f"It is 8.{stop}", f"9{stop}"]
    for ids, begin in zip(made.answers, made.begins, strict=True):
        assert ids[:begin] == prompt
    assert made.labels == [1.0, 0.0, 0.5] and made.characters == [1, 8, 1] and counts.kept == 3


def test_an_answer_cut_when_it_was_sampled_has_no_stop_token(tokenizer):
    made, _ = Encode(tokenizer, 96, "cut")(compared(finished=(True, False, True)))
    stop = tokenizer.eos_token
    assert texts(tokenizer, made) == [f"7{stop}", "It is 8.", f"9{stop}"]


def test_one_cut_here_keeps_it(tokenizer):
    long = compared(("7", "eight " * 40), (1.0, 0.0))
    made, counts = Encode(tokenizer, 40, "cut")(long)
    assert len(made.answers[1]) == 40 and made.answers[1][-1] == tokenizer.eos_token_id
    assert counts.cut_answers == 1 and made.begins[0] == made.begins[1]


def test_best_against_worst(tokenizer):
    scores, finished = (0.5, 2.0, 0.0, 2.0, 0.0), (True, False, True, True, True)
    row = compared(("a", "b", "c", "d", "e"), scores, finished=finished)
    made, _ = Encode(tokenizer, 96, "cut", "best_worst")(row)
    assert texts(tokenizer, made) == ["b", f"c{tokenizer.eos_token}"]
    assert made.labels == [2.0, 0.0] and made.characters == [1, 1]


def test_an_answer_without_a_token_is_refused(tokenizer):
    class Nothing:
        ids, last_answer = [1, 2], 2

    row = compared(("a", "b"), (1.0, 0.0), finished=(False, True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preferences.fitting, "encode_answers", lambda *_: ([Nothing] * 2, None))
        with pytest.raises(BadRow, match="has no token"):
            Encode(tokenizer, 96, "cut")(row)


def test_rows_that_are_all_ties_are_left_out_and_counted(tokenizer, tmp_path):
    rows = [
        {"prompt": f"p{n}", "responses": ["a", "b"], "scores": [1, 1 if n == 0 else 0]}
        for n in range(8)
    ]
    file, said = tmp_path / "rows.jsonl", []
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DataSettings(str(tmp_path), eval_fraction=0.2)
    train, held = preferences.load([str(file)], tokenizer, settings, 96, "all", said.append)
    assert len(train) + len(held) == 7 and "1 left out" in said[0]
    assert all(len(row.answers) == len(row.begins) == 2 for row in [*train, *held])
    assert not {row.prompt for row in train} & {row.prompt for row in held}
