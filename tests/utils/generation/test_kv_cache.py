"""The preallocated cache against transformers' own growing one."""

import pytest
import torch
import transformers

from tests.helpers.families import FAMILIES
from utils.generation.kv_cache import KVCache, numbers_a_token

HEADS, SIZE, LENGTH, WINDOW = 2, 4, 12, 5


def config_of(window: bool):
    sizes = FAMILIES["Mistral"] | {"sliding_window": WINDOW if window else None}
    return transformers.MistralConfig(**sizes)


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_a_token_are_those_that_transformers_keeps(family):
    config = getattr(transformers, f"{family}Config")(vocab_size=96, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    ids = torch.ones(3, 5, dtype=torch.int64)
    layers = model(input_ids=ids, use_cache=True).past_key_values.layers
    kept = sum(t.numel() for layer in layers for t in (layer.keys, layer.values))
    assert numbers_a_token(config) * ids.numel() == kept


def states(rows: int, new: int, generator):
    return [torch.randn(rows, HEADS, new, SIZE, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("window", [True, False])
@pytest.mark.parametrize("pieces", [[4, 1, 1, 1, 1, 1, 1], [1] * 9, [7, 1, 1, 1], [3, 2, 4, 1]])
def test_hands_out_what_a_growing_cache_does(window, pieces):
    config, generator = config_of(window), torch.Generator().manual_seed(0)
    ours, theirs = KVCache(config), transformers.DynamicCache(config=config)
    ours.begin(3, LENGTH)
    assert ours.is_sliding == theirs.is_sliding == [window] * 2
    for new in pieces:
        for layer in range(2):
            assert ours.get_mask_sizes(new, layer) == theirs.get_mask_sizes(new, layer)
            keys, values = states(3, new, generator)
            expected = theirs.update(keys, values, layer)
            got = ours.update(keys, values, layer)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_memory_is_taken_once():
    """Few long rows and many short ones take turns in it; what does not fit makes it grow."""
    cache, generator = KVCache(config_of(False)), torch.Generator().manual_seed(0)

    def fill(rows, length):
        cache.begin(rows, length)
        for layer in range(2):
            cache.update(*states(rows, length, generator), layer)
        return [store.data_ptr() for x in cache.layers for store in x.stores]

    first = fill(6, 4)
    assert cache.nbytes() == 2 * 2 * 6 * 4 * HEADS * SIZE * 4
    assert fill(2, 12) == first and fill(3, 5) == first
    fill(5, 12)
    assert cache.nbytes() == 2 * 2 * 5 * 12 * HEADS * SIZE * 4


def test_a_static_batch_hands_out_zeros_where_nothing_is_filled():
    """Whatever was left there: what is masked is multiplied by 0, and 0 × NaN is NaN."""
    cache, generator = KVCache(config_of(True)), torch.Generator().manual_seed(0)
    cache.begin(4, LENGTH)
    for layer in range(2):
        cache.update(*(torch.full((4, HEADS, LENGTH, SIZE), torch.nan) for _ in range(2)), layer)
    position = torch.zeros(1, dtype=torch.int64)
    cache.begin(3, LENGTH, position)
    prompt, one = states(3, 4, generator), states(3, 1, generator)
    for layer in range(2):
        cache.update(*prompt, layer)
    position.fill_(4)
    assert cache.is_compileable and cache.get_seq_length() is position
    for layer in range(2):
        assert cache.get_mask_sizes(1, layer) == (LENGTH, 0)
        for got, before, now in zip(cache.update(*one, layer), prompt, one, strict=True):
            assert torch.equal(got[:, :, :5], torch.cat([before, now], 2))
            assert got.shape[2] == LENGTH and not got[:, :, 5:].any()


@pytest.mark.parametrize("window", [True, False])
def test_a_batch_in_blocks_hands_out_rows_without_gaps(window):
    """All that was seen and zeros up to the block's end, also behind rows that have left."""
    cache, generator = KVCache(config_of(window)), torch.Generator().manual_seed(0)
    cache.begin(4, LENGTH)
    for layer in range(2):
        cache.update(*(torch.full((4, HEADS, LENGTH, SIZE), torch.nan) for _ in range(2)), layer)
    memory = cache.nbytes()
    cache.begin(4, LENGTH - 1, block=4)
    seen = states(4, 3, generator)
    for layer in range(2):
        assert cache.get_mask_sizes(3, layer) == (3, 0)
        got = cache.update(*seen, layer)
        assert all(torch.equal(a, b) for a, b in zip(got, seen, strict=True))
    lengths = []
    for tokens in range(4, LENGTH):
        if tokens == 7:  # row 1 stops, row 3 takes its place
            cache.move(torch.tensor([3]), torch.tensor([1]), 6)
            seen = [x[[0, 3, 2]] for x in seen]
        one = states(len(seen[0]), 1, generator)
        seen = [torch.cat(pair, 2) for pair in zip(seen, one, strict=True)]
        for layer in range(2):
            sizes = cache.get_mask_sizes(1, layer)
            for got, expected in zip(cache.update(*one, layer), seen, strict=True):
                assert got.is_contiguous() and sizes == (got.shape[2], 0)
                assert torch.equal(got[:, :, :tokens], expected)
                assert not got[:, :, tokens:].any()
        assert cache.get_seq_length() == tokens
        lengths.append(got.shape[2])
    assert lengths == [4, 8, 8, 8, 8, 11, 11, 11] and cache.nbytes() == memory


def test_rows_spread_and_move():
    cache, generator = KVCache(config_of(False)), torch.Generator().manual_seed(0)
    cache.begin(4, LENGTH)
    keys, values = states(2, 3, generator)
    for layer in range(2):
        cache.update(keys, values, layer)
    cache.spread(torch.tensor([1, 0, 1, 1]))
    more = states(4, 1, generator)
    for layer in range(2):
        got, _ = cache.update(*more, layer)
        assert torch.equal(got[:, :, :3], keys[[1, 0, 1, 1]])
    cache.move(torch.tensor([3]), torch.tensor([1]), 4)
    last = states(3, 1, generator)
    for layer in range(2):
        got, _ = cache.update(*last, layer)
        assert torch.equal(got[:, :, :3], keys[[1, 1, 1]])
        assert torch.equal(got[:, :, 3:4], more[0][[0, 3, 2]])
        assert torch.equal(got[:, :, 4:], last[0])


def test_memory_between_tokens_that_is_no_attention_is_refused():
    config = transformers.Qwen3NextConfig(num_hidden_layers=4)
    with pytest.raises(ValueError, match="qwen3_next keeps Linear"):
        KVCache(config)
