"""Weights, shares of the steps, held-out rows."""

import json
from collections import Counter

import numpy as np
import pytest

from utils.data.comparisons import Comparison
from utils.data.demonstrations import DEMONSTRATIONS, Conversation
from utils.data.loading import DataSettings
from utils.data.prompts import Prompt
from utils.data.rows import BadRows, DataError
from utils.data.splits import held_out, in_share, repeated, train_and_held_out
from utils.data.tables import place, prompt_of
from utils.settings.run_config import shares_of


def apply_weight(items, weight, seed):
    return [items[i] for i in repeated(len(items), weight, seed)]


def split_for_step(items, data_split, step):
    places = np.array([place(item, "data_split") for item in items])
    flags = in_share(places, shares_of(data_split), step)
    return [item for item, flag in zip(items, flags, strict=True) if flag]


def hold_out(items, fraction, seed):
    flags = held_out(np.array([place(item, f"hold_out {seed}") for item in items]), fraction)
    return tuple(
        [item for item, flag in zip(items, flags, strict=True) if flag == on]
        for on in (False, True)
    )


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


def asks(count):
    return [Prompt(({"role": "user", "content": f"prompt {n}"},), "", {}) for n in range(count)]


@pytest.mark.parametrize("shares", [(2, 4, 4), (1, 1, 1), (0.5, 0.1, 0.4)])
def test_split_for_step_is_disjoint_complete_and_in_proportion(shares):
    items, text = asks(2000), ",".join(map(str, shares))
    parts = [split_for_step(items, text, step) for step in (1, 2, 3)]
    assert sorted(map(id, sum(parts, []))) == sorted(map(id, items))
    for part, share in zip(parts, shares, strict=True):
        assert len(part) / 2000 == pytest.approx(share / sum(shares), abs=0.04)


def test_the_prompt_decides_whose_part_a_row_is():
    """Not its place, its schema, or what other rows there are."""
    prompts = asks(300)
    conversations = [
        Conversation((*p.messages, {"role": "assistant", "content": "x"}), "") for p in prompts
    ]
    comparisons = [Comparison(p.messages, ("a", "b"), (1.0, 0.0), "") for p in prompts]
    for step in (1, 2, 3):
        chosen = {prompt_of(p) for p in split_for_step(prompts, "1,1,1", step)}
        for others in (conversations, comparisons, prompts[::-1]):
            assert {prompt_of(p) for p in split_for_step(others, "1,1,1", step)} == chosen
        fewer = {prompt_of(p) for p in split_for_step(prompts[7:200], "1,1,1", step)}
        assert fewer == chosen & {prompt_of(p) for p in prompts[7:200]}


def test_split_for_step_settings():
    items = asks(100)
    for text in ("2,4", "a,b,c", "0,0,0", "-1,1,1", "nan,1,1"):
        with pytest.raises(ValueError, match="--data_split"):
            split_for_step(items, text, 1)
    with pytest.raises(DataError, match="leaves step 2 none of 100"):
        split_for_step(items, "1,0,1", 2)


def test_hold_out_keeps_prompts_together():
    items = asks(1000) * 2
    train, held = hold_out(items, 0.1, 3)
    assert len(held) / 2000 == pytest.approx(0.1, abs=0.03)
    assert {prompt_of(i) for i in train}.isdisjoint(prompt_of(i) for i in held)
    assert len(train) + len(held) == 2000
    assert (train, held) == hold_out(items, 0.1, 3) != hold_out(items, 0.1, 4)
    # The same prompts are held out of another selection of the rows.
    _, part = hold_out(items[500:900], 0.1, 3)
    assert {prompt_of(i) for i in part} <= {prompt_of(i) for i in held}
    for fraction in (0.001, 0.999):
        train, held = hold_out(asks(2), fraction, 0)
        assert len(train) == len(held) == 1
    with pytest.raises(DataError, match="from 3 row.* 1 different prompt"):
        hold_out(asks(1) * 3, 0.1, 0)


def _files(tmp_path, *counts):
    paths = []
    for number, count in enumerate(counts):
        path = tmp_path / f"{number}.jsonl"
        rows = ({"instruction": f"{number} {i}", "output": "x"} for i in range(count))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(str(path))
    return paths


def load(names, step=1, **settings):
    """(training conversations, held-out ones)."""
    settings = DataSettings("", **settings)
    parts = train_and_held_out(DEMONSTRATIONS, names, None, settings, step, BadRows())
    return [list(part) for part in parts]


def test_weights_apply_to_training_rows_only(tmp_path):
    names = _files(tmp_path, 200, 400)
    train, held = load(names, data_weights=[2, 0.5], eval_fraction=0.1)
    counts = Counter(row.where for row in train)
    out = [sum(row.where.startswith(name) for row in held) for name in names]
    assert 5 < out[0] < 35 and 20 < out[1] < 60
    assert not {row.where for row in held} & set(counts)
    kept = Counter(counts.values())
    assert kept[2] == 200 - out[0] and kept[1] == round(0.5 * (400 - out[1]))
    with pytest.raises(DataError, match="2 data sets; give --data_weights"):
        load(names, data_weights=[1])


def test_a_data_split_shares_training_rows_and_not_held_out_ones(tmp_path):
    (name,) = _files(tmp_path, 400)
    parts = [load([name], step, data_split="1,1,2") for step in (1, 2, 3)]
    assert all(held == parts[0][1] for _, held in parts)
    everything = [row.where for train, _ in parts for row in train]
    assert len(everything) == len(set(everything)) == 400 - len(parts[0][1])


def test_a_pinned_split_is_trained_on_without_the_rows_it_is_measured_on(tmp_path):
    from datasets import Dataset, DatasetDict

    def rows(text, count):
        return Dataset.from_list([{"prompt": f"{text} {n}", "response": "x"} for n in range(count)])

    DatasetDict(train=rows("a", 30), test=rows("b", 60)).save_to_disk(str(tmp_path / "set"))
    name = str(tmp_path / "set")
    train, held = load([name], eval_fraction=0.2)
    assert (len(train), len(held)) == (30, 60)
    train, held = load([f"{name}:test"], eval_fraction=0.2)
    assert len(train) + len(held) == 60 and 4 < len(held) < 24
    assert {prompt_of(i) for i in train}.isdisjoint(prompt_of(i) for i in held)


def test_a_test_split_of_which_no_row_is_left_is_empty(tmp_path):
    """KTO's bad answers are no demonstrations, so such a split has rows and none to evaluate on."""
    for name, label in (("train", True), ("test", False)):
        rows = [{"prompt": str(i), "completion": "x", "label": label} for i in range(3)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    train, held = load([str(tmp_path)])
    assert len(train) == 3 and held == []
