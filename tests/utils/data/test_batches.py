"""Which rows a step takes, how they are dealt and padded, what becomes of long ones."""

import copy
import itertools
import json
from collections import Counter
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.loading import load_step
from tests.helpers.small_models import config_of
from utils.data import batches, chat_template, demonstrations, prompts
from utils.data.demonstrations import Conversation
from utils.data.fitting import Counts
from utils.data.prompts import Prompt
from utils.data.rows import BadRows, DataError
from utils.data.tables import encode_all
from utils.models.from_scratch import train_tokenizer

# Rows of a step.


@pytest.mark.parametrize("n, batch_size", [(12, 4), (10, 4), (7, 3), (5, 5), (3, 8), (1, 2)])
def test_every_epoch_holds_each_row_once(n, batch_size):
    epochs = 4
    steps = -(-epochs * n // batch_size)
    taken = [batches.rows_of_step(s, batch_size, n, seed=3) for s in range(steps)]
    assert all(len(rows) == batch_size for rows in taken)
    stream = list(chain.from_iterable(taken))
    orders = [stream[e * n : (e + 1) * n] for e in range(epochs)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    if n >= 5:
        assert len({tuple(order) for order in orders}) == epochs, "reshuffled each time"
        assert list(range(n)) not in orders


def test_order_is_a_function_of_the_seed():
    def order(seed):
        return batches.rows_of_step(0, 50, 50, seed)

    assert order(1) == order(1) and order(1) != order(2)
    # A step asked for out of turn, as after a resume, is the same.
    assert batches.rows_of_step(7, 4, 10, 5) == [
        batches.rows_of_step(28 + i, 1, 10, 5)[0] for i in range(4)
    ]


@pytest.mark.parametrize("lengths", [[], [3], [5, 1, 4, 1, 3], list(range(8, 0, -1))])
def test_every_rank_is_dealt_as_many_rows_and_none_is_missing(lengths, monkeypatch):
    for world in (1, 2, 3, 8):
        monkeypatch.setattr(batches.process_group, "world_size", lambda world=world: world)
        hands = []
        for rank in range(world):
            monkeypatch.setattr(batches.process_group, "rank", lambda rank=rank: rank)
            hands.append(batches.dealt(lengths))
        assert {len(hand) for hand in hands} == {-(-len(lengths) // world)}
        assert set(chain(*hands)) == set(range(len(lengths)))
        for hand in hands if world == 1 else []:
            assert [lengths[i] for i in hand] == sorted(lengths)


def test_rows_move_between_epochs():
    """Each row lands in every third of the epoch about equally often."""
    n, epochs = 9, 600
    where = Counter()
    for epoch in range(epochs):
        order = batches.rows_of_step(epoch, n, n, seed=0)
        where.update((row, place // 3) for place, row in enumerate(order))
    assert len(where) == 27
    # 200 expected, standard deviation 11.5.
    assert all(140 < count < 260 for count in where.values())


@pytest.mark.parametrize(
    "epochs, batch_size, n, expected",
    [(1, 4, 12, 3), (2, 4, 10, 5), (0.5, 2, 8, 2), (0.1, 64, 8, 1), (3, 1, 7, 21)]
    + [(1, 64, 95, 2), (2, 64, 95, 3), (0.1, 64, 640, 1), (0.7, 7, 110, 11), (1, 64, 1, 1)],
)
def test_steps_of(epochs, batch_size, n, expected):
    assert batches.steps_of(epochs, batch_size, n) == expected


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 40))
def test_every_row_is_seen_in_every_epoch(epochs, batch_size, n):
    steps = batches.steps_of(epochs, batch_size, n)
    seen = Counter(row for s in range(steps) for row in batches.rows_of_step(s, batch_size, n, 0))
    assert len(seen) == n and min(seen.values()) >= epochs
    assert sum(seen.values()) - epochs * n < batch_size


# Dealing to ranks.


@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 3]),
    st.integers(1, 4),
    st.lists(st.integers(1, 40), min_size=60, max_size=60),
    st.integers(0, 50),
)
@settings(max_examples=80, derandomize=True, deadline=None)
def test_deal_partitions_the_batch_evenly(world, micro, accumulation, lengths, step):
    size = world * micro * accumulation
    rows = batches.rows_of_step(step, size, len(lengths), seed=1)
    dealt = [batches.deal(rows, lengths, rank, world, micro) for rank in range(world)]
    assert [len(d) for d in dealt] == [accumulation] * world
    assert all(len(m) == micro for d in dealt for m in d)
    flat = [row for d in dealt for m in d for row in m]
    assert Counter(flat) == Counter(rows), "the same rows on any number of ranks"
    # Rows of like length together: micro-batch k of every rank is no longer than any k + 1.
    for k in range(accumulation - 1):
        longest = max(lengths[row] for d in dealt for row in d[k])
        assert longest <= min(lengths[row] for d in dealt for row in d[k + 1])


@given(
    world=st.integers(1, 4),
    groups=st.integers(1, 8),
    tokens=st.integers(1, 60),
    lengths=st.lists(st.integers(1, 20), min_size=40, max_size=50),
    counts=st.lists(st.integers(1, 4), min_size=50, max_size=50),
    missing=st.integers(0, 3),
)
def test_deal_by_tokens(world, groups, tokens, lengths, counts, missing):
    """As many rows as the budget holds, as many micro-batches on every rank."""
    rows = batches.rows_of_step(0, max(1, world * groups - missing % world), len(lengths), seed=1)
    dealt = [batches.deal(rows, lengths, r, world, 1, tokens, counts) for r in range(world)]
    assert len({len(d) for d in dealt}) == 1
    assert Counter(row for d in dealt for m in d for row in m) == Counter(rows)
    sizes = []
    for together in zip(*dealt, strict=True):
        longest = max(lengths[row] for m in together for row in m)
        sizes.append([sum(counts[row] for row in m) * longest for m in together])
        assert max(sizes[-1]) <= tokens or max(map(len, together)) == 1, "a long row goes alone"
    # No two neighbours of one rank would have fitted together, at any rank's length and count.
    if world == 1:
        for first, second in itertools.pairwise(dealt[0]):
            more = sum(counts[row] for row in [*first, second[0]]) * lengths[second[0]]
            assert more > tokens


def test_deal_by_tokens_by_hand():
    lengths = [4, 9, 2, 3, 3, 8]
    assert batches.deal(range(6), lengths, 0, 1, 1, 9) == [[2, 3, 4], [0], [5], [1]]
    assert batches.deal(range(6), lengths, 0, 1, 1, 18) == [[2, 3, 4, 0], [5, 1]]
    # By the longer of two neighbours: 2 and 3, 3 and 4, 8 and 9.
    assert batches.deal(range(6), lengths, 0, 2, 1, 8) == [[2, 4], [5]]
    assert batches.deal(range(6), lengths, 1, 2, 1, 8) == [[3, 0], [1]]
    assert batches.in_step(lengths, 1, 9) == [[2, 3, 4], [0], [5], [1]]
    assert batches.in_step(lengths, 4) == [[2, 3, 4, 0], [5, 1]]


# Padding.


def test_pad_by_hand():
    rows = [[1, 2], [3], [4, 5, 6]]
    assert batches.pad(rows, 9).tolist() == [[1, 2, 9], [3, 9, 9], [4, 5, 6]]
    assert batches.pad(rows, 9, side="left").tolist() == [[9, 1, 2], [9, 9, 3], [4, 5, 6]]
    assert batches.pad([[1]], 0, to=3).tolist() == [[1, 0, 0]]
    assert batches.pad([[1]], 0, side="left", to=3).tolist() == [[0, 0, 1]]
    assert batches.pad(rows, 0, to=2).shape == (3, 3)
    assert batches.pad(rows, 9).dtype == torch.int64
    assert batches.pad([[True], [True, False]], False).dtype == torch.bool


def test_supervised_batch():
    examples = [
        chat_template.Encoded([5, 6, 7], [False, True, True]),
        chat_template.Encoded([8], [True]),
    ]
    ids, mask, supervised = batches.supervised_batch(examples, pad_id=7)
    assert ids.tolist() == [[5, 6, 7], [8, 7, 7]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    assert supervised.tolist() == [[False, True, True], [True, False, False]]
    assert (ids.dtype, mask.dtype, supervised.dtype) == (torch.int64, torch.bool, torch.bool)


def test_prompt_batch():
    ids, mask = batches.prompt_batch([[5, 6, 7], [8]], pad_id=7)
    assert ids.tolist() == [[5, 6, 7], [7, 7, 8]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool


# Data sets → tokens.


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Name two fruits.", "apple, pear", "请列出两种水果。"] * 20, 320)


def conversation(question, answer, *earlier, where="somewhere:1"):
    turns = [*earlier, question, answer]
    messages = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": text}
        for i, text in enumerate(turns)
    ]
    return Conversation(tuple(messages), where)


def test_encode_conversations_counts(tokenizer):
    rows = [
        conversation("a", "pear"),
        conversation("x" * 100, "pear"),
        conversation("a", "p" * 100),
        conversation("a", "pear", "b" * 100, "apple"),
    ]
    whole = [chat_template.encode_conversation(tokenizer, r.messages) for r in rows]
    assert len(whole[0].ids) <= 48 < min(len(e.ids) for e in whole[1:])

    bad = BadRows()
    examples, counts = encode_all(rows, demonstrations.Encode(tokenizer, 48, "cut", "drop"), bad)
    assert counts == Counts(kept=3, cut_prompts=2, dropped=1)
    assert counts.line("training data").startswith("training data: 3 rows kept")
    assert examples[0] == whole[0]
    assert examples[2] == whole[0], "the long exchange goes, the last one stays"
    for example in examples:
        answer = example.ids[example.last_answer :]
        assert tokenizer.decode(answer) == "pear" + tokenizer.eos_token

    examples, counts = encode_all(rows, demonstrations.Encode(tokenizer, 48, "cut", "cut"), bad)
    assert counts == Counts(kept=4, cut_prompts=2, cut_answers=1)
    assert len(examples[2].ids) == 48 and examples[2].ids[-1] == tokenizer.eos_token_id
    assert examples[2].ids[:-1] == whole[2].ids[:47]
    assert examples[2].supervised == whole[2].supervised[:48]
    assert all(len(e.ids) == len(e.supervised) for e in examples)

    examples, counts = encode_all(rows, demonstrations.Encode(tokenizer, 48, "drop", "drop"), bad)
    assert examples == whole[:1] and counts == Counts(kept=1, dropped=3)
    assert len(bad) == 0


def test_encode_conversations_sets_aside_the_rows_a_template_refuses(tokenizer):
    rewriting = copy.deepcopy(tokenizer)
    rewriting.chat_template = "{{ messages | length }}" + chat_template.CHATML
    rows = [
        conversation("a", "b", "c", "d"),
        conversation("a", "pear<|im_end|>", where="there:2"),
        conversation("x" * 100, "pear<|im_end|>", where="there:3"),
    ]
    bad = BadRows()
    assert encode_all(rows[:1], demonstrations.Encode(rewriting, 60, "cut", "drop"), bad) == (
        [],
        Counts(),
    )
    fine = conversation("a", "pear")
    examples, counts = encode_all(
        [*rows, fine], demonstrations.Encode(tokenizer, 60, "cut", "cut"), bad
    )
    whole = [chat_template.encode_conversation(tokenizer, r.messages) for r in (rows[0], fine)]
    assert examples == whole and counts == Counts(kept=2)
    assert len(bad) == 3
    assert bad.problems[0].startswith("somewhere:1: the chat template asks for turn 2 with '1<|im_")
    for where, problem in zip(("there:2", "there:3"), bad.problems[1:], strict=True):
        assert problem.startswith(f"{where}: turn 2 holds the stop token <|im_end|> 2 times")
    with pytest.raises(DataError, match="3 bad row"):
        bad.finish("demonstrations")


def test_encode_conversations_counts_cut_prompts_of_kept_rows_only(tokenizer):
    rows = [conversation("x" * 100, "p" * 100), conversation("x" * 100, "pear")]
    examples, counts = encode_all(
        rows, demonstrations.Encode(tokenizer, 48, "cut", "drop"), BadRows()
    )
    assert len(examples) == 1 and counts == Counts(kept=1, cut_prompts=1, dropped=1)


def test_encode_prompts_cuts_or_drops_the_long_ones(tokenizer):
    rows = [
        Prompt(messages=({"role": "user", "content": text},), where="", row={})
        for text in ("a", "z" * 90)
    ]
    whole = [chat_template.encode_prompt(tokenizer, r.messages) for r in rows]
    kept, counts = encode_all(rows, prompts.Encode(tokenizer, 40, "cut"), BadRows())
    assert [p.messages for p in kept] == [p.messages for p in rows]
    assert kept[0].ids == whole[0] and len(kept[1].ids) == 40 < len(whole[1])
    assert counts == Counts(kept=2, cut_prompts=1)
    kept, counts = encode_all(rows, prompts.Encode(tokenizer, 40, "drop"), BadRows())
    assert [p.ids for p in kept] == whole[:1] and counts == Counts(kept=1, dropped=1)


def test_a_run_whose_prompts_are_all_too_long_says_so(tokenizer, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "z" * n}) + "\n" for n in range(80, 90)))
    said = []
    config = config_of(
        prompt_data=[str(path)], max_prompt_length=60, long_prompts="drop", reward_model=""
    )
    with pytest.raises(SystemExit, match="max_prompt_length=60, long_prompts=drop: raise --max_p"):
        load_step(config, tokenizer, said.append)
    assert said[0] == "prompts: 0 rows kept, 9 dropped as too long"
