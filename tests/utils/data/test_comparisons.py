"""Preference pairs and K-wise rankings -> comparisons; contradictions named."""

import json
from pathlib import Path

import pytest

from utils.data.comparisons import Comparison, load_comparisons
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


Q = {"role": "user", "content": "q"}
S = {"role": "system", "content": "s"}


def side(answer, prompt=(Q,)):
    return [*prompt, {"role": "assistant", "content": answer}]


PAIR = {"chosen": side("a"), "rejected": side("b")}
TEXTS = {"prompt": "q", "chosen": "a", "rejected": "b"}
RANKED = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 3, 3]}


@pytest.mark.parametrize(
    "row, responses, scores",
    [
        (PAIR, ("a", "b"), (1.0, 0.0)),
        ({**PAIR, "score_chosen": 9.5, "score_rejected": 2}, ("a", "b"), (9.5, 2.0)),
        ({**PAIR, "score_chosen": 4, "score_rejected": 4}, ("a", "b"), (4.0, 4.0)),
        ({**PAIR, "score_chosen": 4, "score_rejected": None}, ("a", "b"), (1.0, 0.0)),
        ({**PAIR, "score_chosen": "good", "score_rejected": 1}, ("a", "b"), (1.0, 0.0)),
        (TEXTS, ("a", "b"), (1.0, 0.0)),
        ({**PAIR, "prompt": "q", "messages": side("a")}, ("a", "b"), (1.0, 0.0)),
        (RANKED, ("a", "b", "c"), (1.0, 3.0, 3.0)),
        ({**RANKED, "extra": None, "prompt": [Q]}, ("a", "b", "c"), (1.0, 3.0, 3.0)),
        ({"prompt": "q", "responses": ["a", "b"], "ranks": [2, 1]}, ("a", "b"), (-2.0, -1.0)),
        ({**RANKED, "responses": ["a", "b", "b"]}, ("a", "b", "b"), (1.0, 3.0, 3.0)),
    ],
)
def test_rows_become_comparisons(tmp_path, row, responses, scores):
    path, bad = save(tmp_path / "a.jsonl", row), BadRows()
    assert load_comparisons([path], bad=bad) == [Comparison((Q,), responses, scores, f"{path}:1")]
    assert not len(bad)


def test_system_column_and_many_turns(tmp_path):
    first = [Q, {"role": "assistant", "content": "x"}, Q]
    row = {"chosen": side("a", first), "rejected": side("b", first), "system": "s"}
    path = save(tmp_path / "a.jsonl", row)
    (one,) = load_comparisons(path, bad=BadRows())
    assert one.prompt == ({"role": "system", "content": "s"}, *first)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({**PAIR, "rejected": side("a")}, "chosen and rejected are the same text"),
        ({**PAIR, "rejected": side("b", [{**Q, "content": "p"}])}, "the same prompt"),
        ({**PAIR, "score_chosen": 1, "score_rejected": 2.5}, "score_chosen 1.0 is below"),
        ({**PAIR, "rejected": side("")}, "the answer of rejected is empty"),
        ({**PAIR, "chosen": [Q]}, "the last turn of chosen is not the assistant's"),
        ({**PAIR, "chosen": []}, "chosen is an empty list"),
        ({**PAIR, "rejected": 3}, "rejected is int, not a list of turns"),
        ({**PAIR, "chosen": "a"}, "prompt is null, not a string"),
        ({"chosen": side("a", []), "rejected": side("b", [])}, "the prompt is empty"),
        ({"chosen": side("a", [Q, S, Q]), "rejected": side("b", [Q, S, Q])}, "do not alternate"),
        ({"chosen": side("a")}, "lacks rejected, which schema preference needs"),
        (RANKED, "lacks chosen, rejected"),
    ],
)
def test_bad_pairs_are_named(tmp_path, row, reason):
    path, bad = save(tmp_path / "a.jsonl", PAIR, row), BadRows()
    assert len(load_comparisons([path], bad=bad)) == 1
    assert len(bad) == 1 and bad.problems[0].startswith(f"{path}:2: ")
    assert reason in bad.problems[0]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"scores": [1, 2]}, "there are 3 responses but 2 scores"),
        ({"scores": [1, 2, "3"]}, "number 3 of scores is str, not a number"),
        ({"scores": [1, 2, True]}, "number 3 of scores is bool, not a number"),
        ({"scores": [1, 2, float("nan")]}, "holds nan"),
        ({"scores": [1, 2, 10**400]}, "beyond all floats"),
        ({"scores": [1, 2, float("inf")]}, "holds inf"),
        ({"scores": 1}, "scores is int, not a list"),
        ({"responses": "abc"}, "responses is str, not a list"),
        ({"responses": ["a"], "scores": [1]}, "responses holds 1, at least 2"),
        ({"responses": ["a", "a", "b"]}, "response 2 is there before with score 1.0, not 3.0"),
        ({"responses": ["a", " ", "b"]}, "response 2 is blank"),
        ({"responses": ["a", None, "b"]}, "response 2 is null"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": side("a")}, "two assistant turns follow each other"),
    ],
)
def test_bad_rankings_are_named(tmp_path, change, reason):
    path, bad = save(tmp_path / "a.jsonl", RANKED, {**RANKED, **change}), BadRows()
    assert len(load_comparisons([path], bad=bad)) == 1
    assert len(bad) == 1 and bad.problems[0].startswith(f"{path}:2: ")
    assert reason in bad.problems[0]


def test_scores_that_json_cannot_hold_are_refused_from_parquet_too(tmp_path):
    from datasets import Dataset

    path = str(tmp_path / "a.parquet")
    rows = [{**RANKED, "scores": [1.0, 2.0, x]} for x in (3.0, float("nan"), float("-inf"))]
    Dataset.from_list(rows).to_parquet(path)
    bad = BadRows()
    assert len(load_comparisons([path], bad=bad)) == 1
    assert bad.problems == [
        f"{path} row 2: number 3 of scores is nan, not a finite number",
        f"{path} row 3: number 3 of scores is -inf, not a finite number",
    ]


def test_csv_pairs_and_their_scores(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected,score_chosen,score_rejected\nq,a,b,9,1\nq,a,b,1,9\n")
    bad = BadRows()
    (one,) = load_comparisons([str(path)], bad=bad)
    assert one.scores == (9.0, 1.0)
    assert bad.problems == [f"{path}:3: score_chosen 1.0 is below score_rejected 9.0"]


def test_schema(tmp_path):
    path = save(tmp_path / "a.jsonl", *[{**TEXTS, "prompt": f"q{n}"} for n in range(8)])
    assert len(load_comparisons([path, path], bad=BadRows())) == 16
    with pytest.raises(DataError, match="--data_schema to auto, .*preference, kwise"):
        load_comparisons([path], schema="alpaca", bad=BadRows())
    bad = BadRows()
    assert load_comparisons([path], schema="kwise", bad=bad) == [] and len(bad) == 8


@needs_real
def test_real_ultrafeedback():
    name, bad = str(REAL / "ultrafeedback_binarized"), BadRows()
    assert len(load_comparisons([name], bad=bad)) == 3424
    held = load_comparisons([name], split_role="eval", bad=bad)
    assert len(held) == 426 and bad.problems == []
    assert all(len(c.responses) == 2 and c.scores[0] > c.scores[1] for c in held)
    # The data's own README says how often the longer answer is the chosen one.
    longer = sum(len(c.responses[0]) > len(c.responses[1]) for c in held)
    assert round(100 * longer / len(held), 1) == 68.8


@needs_real
def test_real_rankings():
    path = REAL / "rankings" / "kwise.jsonl"
    raw = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    tied = {n for n, row in enumerate(raw, 1) if min(row["scores"]) == max(row["scores"])}
    bad = BadRows()
    found = load_comparisons([str(path)], bad=bad)
    assert len(raw) == len(found) == 300 and bad.problems == []
    assert {n for n, c in enumerate(found, 1) if len(set(c.scores)) == 1} == tied != set()
    assert all(4 <= len(c.responses) == len(c.scores) <= 9 for c in found)
