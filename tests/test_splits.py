"""Weights, shares of the steps, held-out rows."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.config import RunConfig
from utils.data.instructions import load_conversations
from utils.data.rows import BadRows, DataError
from utils.data.splits import apply_weight, hold_out, split_for_step, train_and_held_out


def test_apply_weight_counts_every_row():
    items = list(range(10))
    assert apply_weight(items, 1, 0) == items
    assert Counter(apply_weight(items, 2, 0)) == dict.fromkeys(items, 2)
    half = apply_weight(items, 0.5, 7)
    assert len(half) == len(set(half)) == 5 and half == apply_weight(items, 0.5, 7)
    assert any(half != apply_weight(items, 0.5, seed) for seed in range(8, 12))
    counts = Counter(apply_weight(items, 1.5, 0))
    assert sorted(counts.values()) == [1] * 5 + [2] * 5
    assert len(apply_weight([1], 0.01, 0)) == 1
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(DataError, match="--data_weights"):
            apply_weight(items, weight, 0)


@given(st.integers(3, 200), st.lists(st.integers(1, 9), min_size=3, max_size=3), st.integers(0, 99))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_split_for_step_is_disjoint_and_complete(size, shares, seed):
    text, parts = ",".join(map(str, shares)), []
    for step, share in enumerate(shares, 1):
        try:
            part = split_for_step(range(size), text, step, seed)
        except DataError:
            part = []
        assert abs(len(part) - size * share / sum(shares)) <= 1
        parts += part
    assert sorted(parts) == list(range(size))


def test_split_for_step_settings():
    items = list(range(100))
    assert [len(split_for_step(items, "2,4,4", step)) for step in (1, 2, 3)] == [20, 40, 40]
    assert split_for_step(items, "2,4,4", 1) != items[:20]
    assert split_for_step(items, "", 2) == items
    for text in ("2,4", "a,b,c", "0,0,0", "-1,1,1", "nan,1,1"):
        with pytest.raises(DataError, match="--data_split"):
            split_for_step(items, text, 1)
    with pytest.raises(DataError, match="leaves step 2 none of 100"):
        split_for_step(items, "1,0,1", 2)


def test_hold_out():
    items = [f"row {number}" for number in range(50)]
    train, held = hold_out(items, 0.1, 3)
    assert len(held) == 5 and sorted(train + held) == sorted(items)
    assert (train, held) == hold_out(items, 0.1, 3) != hold_out(items, 0.1, 4)
    assert [len(part) for part in hold_out([1, 2], 0.001, 0)] == [1, 1]
    assert [len(part) for part in hold_out([1, 2], 0.999, 0)] == [1, 1]
    with pytest.raises(DataError, match="from 1 row"):
        hold_out([1], 0.1, 0)
    for fraction in (0, 1, float("nan")):
        with pytest.raises(DataError, match="--eval_fraction"):
            hold_out(items, fraction, 0)


def _files(tmp_path, *counts):
    paths = []
    for number, count in enumerate(counts):
        path = tmp_path / f"{number}.jsonl"
        rows = ({"instruction": f"{number} {i}", "output": "x"} for i in range(count))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(str(path))
    return paths


def _load(names, role):
    return load_conversations(names, split_role=role, bad=BadRows())


def test_weights_apply_to_training_rows_only(tmp_path):
    names = _files(tmp_path, 20, 40)
    config = RunConfig(data_weights=[2, 0.5], eval_fraction=0.1)
    train, held = train_and_held_out(names, _load, ("test",), config, step=1)
    counts = Counter(row.where for row in train)
    assert len(held) == 2 + 4 and len({row.where for row in held} & set(counts)) == 0
    assert sorted(counts.values()) == [1] * 18 + [2] * 18
    with pytest.raises(DataError, match="2 data sets; give --data_weights"):
        train_and_held_out(names, _load, ("test",), RunConfig(data_weights=[1]), step=1)


def test_a_data_split_shares_training_rows_and_not_held_out_ones(tmp_path):
    (name,) = _files(tmp_path, 100)
    parts = [
        train_and_held_out([name], _load, (), RunConfig(data_split="1,1,2"), step)
        for step in (1, 2, 3)
    ]
    assert all(held == parts[0][1] for _, held in parts)
    everything = [row.where for train, _ in parts for row in train]
    assert len(everything) == len(set(everything)) == 95
    assert len(parts[2][0]) in (47, 48)
