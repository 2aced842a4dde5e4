"""Comparisons as tokens: where answers begin, which have a stop token, which answers are kept."""

import json
from collections import Counter
from functools import partial

import pytest

from utils.data import chat_template, preferences
from utils.data.comparisons import Comparison
from utils.data.loading import DataSettings
from utils.data.preferences import Encode
from utils.data.rows import BadRow, DataError

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


def test_best_against_a_random_one_below_it(tokenizer):
    """Each of those that score less, equally often and always the same; never one as good."""
    encode, drawn = Encode(tokenizer, 96, "cut", "best_random"), Counter()
    for n in range(600):
        row = compared(("a", "b", "c", f"{n}", "e"), (2.0, 0.5, 2.0, 0.0, 1.0))
        made, _ = encode(row)
        assert made.labels[0] == 2.0 and texts(tokenizer, made)[0].startswith("a")
        assert encode(row)[0].labels == made.labels
        drawn[made.labels[1]] += 1
    assert drawn.keys() == {0.5, 0.0, 1.0} and min(drawn.values()) > 160  # 200 ± 12
    made, _ = encode(compared(("a", "b"), (1.0, 1.0)))
    assert made.labels == [1.0, 1.0]


@pytest.mark.parametrize("margin, kept", [(0.0, 3), (0.5, 2), (1.0, 1), (1.5, 0)])
def test_pairs_that_are_no_further_apart_than_the_margin_are_left_out(
    tokenizer, tmp_path, margin, kept
):
    rows = [(0.0, 0.5), (1.0, 0.0), (0.2, 1.7, 0.9), (1.0, 1.0)]
    file, said = tmp_path / "c.jsonl", []
    file.write_text(
        "".join(
            json.dumps({"prompt": f"p{n}", "responses": list("abc"[: len(s)]), "scores": s}) + "\n"
            for half in range(2)
            for n, s in enumerate(rows, 10 * half)
        )
    )
    settings = DataSettings(str(tmp_path), eval_fraction=0.5)
    load = partial(preferences.load, [str(file)], tokenizer, settings, 96)
    if not kept:
        with pytest.raises(SystemExit, match=r"lower --pair_margin \(now 1.5\)"):
            load("best_worst", False, said.append, margin)
        return
    parts = load("best_worst", False, said.append, margin)
    assert sum(map(len, parts)) == 2 * kept
    assert f"; {8 - 2 * kept} left out, whose answers are " in said[0]
    assert ("all equally good" if margin == 0 else f"no more than {margin:g} apart") in said[0]


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
    train, held = preferences.load([str(file)], tokenizer, settings, 96, "all", False, said.append)
    assert len(train) + len(held) == 7 and "1 left out" in said[0]
    assert all(len(row.answers) == len(row.begins) == 2 for row in [*train, *held])
    assert not {row.prompt for row in train} & {row.prompt for row in held}


def save(path, rows) -> list[str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path)]


def judged_rows(count: int) -> list[dict]:
    return [
        {"prompt": f"p{n}", "completion": f"answer {n}", "label": n % 3 > 0} for n in range(count)
    ]


def test_answers_judged_one_by_one_stand_beside_comparisons(tokenizer, tmp_path):
    rows = [*judged_rows(8), {"prompt": "q", "completion": "x", "label": "maybe"}]
    files = save(tmp_path / "judged.jsonl", rows)
    pairs = [{"prompt": f"r{n}", "chosen": "a", "rejected": "b"} for n in range(8)]
    files += save(tmp_path / "pairs.jsonl", pairs)
    settings = DataSettings(str(tmp_path), eval_fraction=0.2, max_bad_rows=0.5)
    parts = preferences.load(files, tokenizer, settings, 96, "all", True, lambda _: None)
    every = [row for part in parts for row in part]
    labels = {
        text.removesuffix(tokenizer.eos_token): label
        for row in every
        for text, label in zip(texts(tokenizer, row), row.labels, strict=True)
    }
    expected = {row["completion"]: float(row["label"]) for row in rows[:8]} | {"a": 1.0, "b": 0.0}
    assert labels == expected and len(every) == 16
    bad = (tmp_path / "bad_rows.jsonl").read_text()
    assert "label is 'maybe', neither true (a good answer) nor false" in bad
    with pytest.raises(DataError, match="fit no schema known here"):
        preferences.load(files, tokenizer, settings, 96, "all", False, lambda _: None)


def test_a_mismatched_answer_is_another_prompts(tokenizer, tmp_path):
    rows = [{**row, "prompt": f"p{n // 2}"} for n, row in enumerate(judged_rows(20))]
    settings = DataSettings(str(tmp_path), eval_fraction=0.5)
    files = save(tmp_path / "judged.jsonl", rows)
    parts = preferences.load(files, tokenizer, settings, 96, "all", True, lambda _: None)
    for part in parts:
        made = preferences.Mismatched(part, 96)
        assert len(made) == len(part) == len(list(made))
        for i, row in enumerate(made):
            (ids,), (begin,) = row.answers, row.begins
            own = part[i]
            assert ids[:begin] == own.answers[0][: own.begins[0]]
            givers = [other for other in part if ids[begin:] == other.answers[0][other.begins[0] :]]
            assert len(givers) == 1 and givers[0].prompt != own.prompt
    long, short = (preferences.Mismatched(parts[0], length) for length in (96, 16))
    assert max(len(row.answers[0]) for row in short) == 16
    assert short.fingerprint() != long.fingerprint(), "of other tokens, where rows are the same"


def test_mismatched_answers_take_turns_and_need_two_prompts(tokenizer, tmp_path):
    rows = [{"prompt": f"p{n}", "responses": ["a", "b"], "scores": [1, 0]} for n in range(6)]
    settings = DataSettings(str(tmp_path), eval_fraction=0.1)
    files = save(tmp_path / "ranked.jsonl", rows)
    train, held = preferences.load(files, tokenizer, settings, 96, "all", True, lambda _: None)
    found = [texts(tokenizer, row)[0][0] for row in preferences.Mismatched(train, 96)]
    assert found == ["a", "b"] * (len(train) // 2) + ["a"] * (len(train) % 2)
    assert len(held) == 1
    with pytest.raises(SystemExit, match="all of 1 rows have one prompt"):
        preferences.Mismatched(held, 96)
