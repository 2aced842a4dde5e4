"""Keys and values of decoded rows, in memory that is allocated once.

One tensor pair a layer, reused between batches and rollouts: a flat store that each batch views in
its own shape, so that many short rows and few long ones take turns in the same memory. A layer
hands out views up to the current length, and attention never runs over what is not filled yet. In
a batch of fixed shape (for CUDA graphs) it hands out the whole length instead, and writes at a
position that is kept on the device: one step is then the same operations on the same addresses.
"""

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


class Layer(CacheLayerMixin):
    """One layer's part. sliding_window: tokens that it attends to, or None for all."""

    def __init__(self, sliding_window: int | None):
        super().__init__()
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.stores: tuple[torch.Tensor, torch.Tensor] | None = None  # flat
        self.begin(0, 0, None)

    def begin(self, rows: int, length: int, position: torch.Tensor | None) -> None:
        """The next batch: empty, rows × length tokens. position: (1,) int64, of fixed shape."""
        self.shape, self.position, self.seen = (rows, length), position, 0
        self.keys = self.values = None
        self.is_initialized = False
        self.is_compileable = position is not None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        states, (rows, length) = (key_states, value_states), self.shape
        shapes = [(rows, s.shape[1], length, s.shape[3]) for s in states]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        if self.stores is None or any(
            (store.dtype, store.device) != (s.dtype, s.device) or len(store) < size
            for store, s, size in zip(self.stores, states, sizes, strict=True)
        ):
            self.stores = None  # before the new ones: both need not fit
            self.stores = tuple(s.new_empty(n) for s, n in zip(states, sizes, strict=True))
        self.keys, self.values = (
            store[:size].view(shape)
            for store, size, shape in zip(self.stores, sizes, shapes, strict=True)
        )
        if self.position is not None:
            # What is masked is still multiplied, by 0: no NaN may lie there.
            self.keys.zero_(), self.values.zero_()
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """(B,heads,Q,D) of the new tokens → keys and values (B,heads,T,D) to attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, _, new, _ = key_states.shape
        keys, values = self.keys[:rows], self.values[:rows]
        if self.position is not None and self.seen:  # a step of fixed shape
            keys.index_copy_(2, self.position, key_states)
            values.index_copy_(2, self.position, value_states)
            return keys, values
        start, end = self.get_mask_sizes(new)[1], self.seen + new
        keys[:, :, self.seen : end] = key_states
        values[:, :, self.seen : end] = value_states
        self.seen = end
        return keys[:, :, start:end], values[:, :, start:end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys, position of the first) that the next update hands out."""
        if self.position is not None and self.seen:
            return self.shape[1], 0
        start = max(self.seen - self.sliding_window + 1, 0) if self.is_sliding else 0
        return self.seen + query_length - start, start

    def get_seq_length(self) -> int | torch.Tensor:
        return self.position if self.position is not None and self.seen else self.seen

    def get_max_length(self) -> int:
        return self.shape[1]


class KVCache(Cache):
    """A transformers cache for a model of `config`. `begin` before each batch's first pass."""

    def __init__(self, config):
        layers = DynamicCache(config=config).layers  # transformers reads the layers' kinds
        strange = {type(x).__name__ for x in layers} - {
            DynamicLayer.__name__,
            DynamicSlidingWindowLayer.__name__,
        }
        if strange:
            raise ValueError(
                f"{config.model_type} keeps {', '.join(sorted(strange))} between tokens; the "
                "decode loop knows attention over all tokens or a window only; see "
                "utils/models/kv_cache.py"
            )
        super().__init__(layers=[Layer(getattr(x, "sliding_window", None)) for x in layers])
        self.rows = self.length = 0
        self.position: torch.Tensor | None = None

    def begin(self, rows: int, length: int, position: torch.Tensor | None = None) -> None:
        """Forget what is there and make room for rows × length tokens. position: (1,) int64 makes
        it a batch of fixed shape, in which the steps after the first pass write there."""
        self.rows, self.length, self.position = rows, length, position
        for layer in self.layers:
            layer.begin(rows, length, position)

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

    def release(self) -> None:
        """Give the memory back. The next batch allocates anew."""
        for layer in self.layers:
            layer.begin(0, 0, None)
            layer.stores = None
