"""Keys and values of decoded rows, in memory that is allocated once.

One tensor pair a layer, reused between batches and rollouts: a flat store that each batch views in
its own shape, so that many short rows and few long ones take turns in the same memory. A layer
hands out views up to the current length, and attention never runs over what is not filled yet. Two
kinds of batches differ:

Of fixed shape (for CUDA graphs): it hands out the whole length, and writes at a position that is
kept on the device: one step is then the same operations on the same addresses.

In blocks (for matrix products on a CPU, which copy what does not lie without gaps): its view is as
long as the filled blocks and handed out whole, zeros at its end. Once in a block the rows move
apart to make room; a view of the final length would have a gap in every row at every step.
"""

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


def numbers_a_token(model_config, parts: int = 1) -> int:
    """How many numbers one token leaves in the cache: its keys and values in every layer. parts: of
    one of so many processes, which share the heads, each with one at least."""
    text = model_config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    heads = getattr(text, "num_key_value_heads", None) or heads
    return 2 * text.num_hidden_layers * max(1, heads // parts) * width


class Layer(CacheLayerMixin):
    """One layer's part. sliding_window: tokens that it attends to, or None for all."""

    def __init__(self, sliding_window: int | None):
        super().__init__()
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.stores: tuple[torch.Tensor, torch.Tensor] | None = None  # flat
        self.begin(0, 0, None, 0)

    def begin(self, rows: int, length: int, position: torch.Tensor | None, block: int) -> None:
        """The next batch: empty, rows × length tokens. position: (1,) int64, of fixed shape.
        block: in blocks of so many tokens, if above 0."""
        self.shape, self.position, self.block, self.seen = (rows, length), position, block, 0
        self.keys = self.values = None
        self.is_initialized = False
        self.is_compileable = position is not None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        states, (rows, length) = (key_states, value_states), self.shape
        sizes = [rows * s.shape[1] * length * s.shape[3] for s in states]
        if self.stores is None or any(
            (store.dtype, store.device) != (s.dtype, s.device) or len(store) < size
            for store, s, size in zip(self.stores, states, sizes, strict=True)
        ):
            self.stores = None  # before the new ones: both need not fit
            self.stores = tuple(s.new_empty(n) for s, n in zip(states, sizes, strict=True))
        self._view(self._room_for(key_states.shape[2] + 1), *(s.shape[1::2] for s in states))
        if self.position is not None or self.block:
            # What is masked is still multiplied, by 0: no NaN may lie there.
            self.keys.zero_(), self.values.zero_()
        self.is_initialized = True

    def _view(self, room: int, *sizes: tuple[int, int]) -> None:
        """Keys and values as rows of `room` tokens; sizes: (heads, size of each) of either."""
        shapes = [(self.shape[0], heads, room, size) for heads, size in sizes]
        self.keys, self.values = (
            store[: torch.Size(shape).numel()].view(shape)
            for store, shape in zip(self.stores, shapes, strict=True)
        )

    def _room_for(self, tokens: int) -> int:
        """Tokens of a row's view that holds so many."""
        length = self.shape[1]
        return min(length, -(-tokens // self.block) * self.block) if self.block else length

    def _make_room(self, rows: int, tokens: int) -> None:
        """Move the first `rows` rows apart, if they are to hold more tokens than their view."""
        if tokens <= self.keys.shape[2]:
            return
        before = self.keys, self.values
        self._view(self._room_for(tokens), *(x.shape[1::2] for x in before))
        for old, new in zip(before, (self.keys, self.values), strict=True):
            # Both lie in the same memory, hence the copy.
            new[:rows, :, : self.seen] = old[:rows, :, : self.seen].clone()
            new[:rows, :, self.seen :] = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """(B,heads,Q,D) of the new tokens → keys and values (B,heads,T,D) to attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, _, new, _ = key_states.shape
        self._make_room(rows, self.seen + new)
        keys, values = self.keys[:rows], self.values[:rows]
        if self.position is not None and self.seen:  # a step of fixed shape
            keys.index_copy_(2, self.position, key_states)
            values.index_copy_(2, self.position, value_states)
            return keys, values
        length, start = self.get_mask_sizes(new)
        keys[:, :, self.seen : self.seen + new] = key_states
        values[:, :, self.seen : self.seen + new] = value_states
        self.seen += new
        return keys[:, :, start : start + length], values[:, :, start : start + length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys, position of the first) that the next update hands out."""
        if self.position is not None and self.seen:
            return self.shape[1], 0
        if self.block and self.seen:
            return self._room_for(self.seen + query_length), 0
        start = max(self.seen - self.sliding_window + 1, 0) if self.is_sliding else 0
        return self.seen + query_length - start, start

    def get_seq_length(self) -> int | torch.Tensor:
        return self.position if self.position is not None and self.seen else self.seen

    def get_max_length(self) -> int:
        return self.shape[1]


class KVCache(Cache):
    """A transformers cache. `begin` before each batch's first pass."""

    def __init__(self, model_config):
        # transformers reads the layers' kinds.
        layers = DynamicCache(config=model_config).layers
        strange = {type(x).__name__ for x in layers} - {
            DynamicLayer.__name__,
            DynamicSlidingWindowLayer.__name__,
        }
        if strange:
            raise ValueError(
                f"{model_config.model_type} keeps {', '.join(sorted(strange))} between tokens; the "
                "decode loop handles attention over all tokens or a window only; see "
                "utils/generation/kv_cache.py"
            )
        super().__init__(layers=[Layer(getattr(x, "sliding_window", None)) for x in layers])
        self.position: torch.Tensor | None = None

    def begin(
        self, rows: int, length: int, position: torch.Tensor | None = None, block: int = 0
    ) -> None:
        """Forget what is there and make room for rows × length tokens. position: (1,) int64 makes
        it a batch of fixed shape, in which the steps after the first pass write there; block: one
        in blocks of so many tokens."""
        self.position = position
        for layer in self.layers:
            layer.begin(rows, length, position, block)

    def spread(self, source: torch.Tensor) -> None:
        """Row i takes what row source[i] holds: a prompt read once, for each of its samples."""
        for layer in self.layers:
            for store in (layer.keys, layer.values):
                store[: len(source), :, : layer.seen] = store[source, :, : layer.seen]

    def move(self, source: torch.Tensor, target: torch.Tensor, filled: int) -> None:
        """Rows `source` to rows `target`, `filled` tokens of each."""
        for layer in self.layers:
            for store in (layer.keys, layer.values):
                store[target, :, :filled] = store[source, :, :filled]

    def nbytes(self) -> int:
        return sum(s.nbytes for x in self.layers for s in x.stores or ())
