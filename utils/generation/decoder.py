"""The forward passes of decoding: what is kept between tokens, batches and rollouts.

Prompts that come several times are read once. Rows that have stopped leave the batch. Modes:
"eager" grows its shapes with the text; "static" keeps them fixed, so that each step is the same
operations on the same addresses; "graph" is "static" with each step replayed as one CUDA graph;
"auto" is "graph" on CUDA where it can be, else "eager".
"""

import sys
import warnings

import torch
from torch import nn

from utils.generation import graphs
from utils.generation.kv_cache import KVCache
from utils.kernels import packing, token_attention
from utils.models import language_model
from utils.pretrained import positions_of

MODES = ("auto", "eager", "static", "graph")
LEAVE_TOGETHER = 4  # stopped rows stay until so many can leave: each time other rows must move
STATIC_MULTIPLE = 128  # tokens; a length rounded up to it finds its graph again
# Attention that takes a mask over all of a fixed length, the unfilled end included.
STATIC_ATTENTION = ("sdpa", "eager", packing.NAME, token_attention.NAME)


class Decoder:
    """`begin` a batch, `step` through its tokens, let rows go with `keep_running`.

    One that is used again finds its memory and its graphs.
    """

    def __init__(self, mode: str = "auto"):
        if mode not in MODES:
            raise ValueError(f"decode={mode!r} is none of {', '.join(MODES)}; set --decode")
        self.mode = mode
        self.cache: KVCache | None = None
        self.model: nn.Module | None = None
        self._graphs = graphs.Graphs()

    def begin(
        self, model, prompt_ids, prompt_mask, new_tokens: int, in_step: bool = False
    ) -> torch.Tensor:
        """(B,P) left-padded prompts, each to be followed by up to `new_tokens` → (B,V) logits of
        the first. in_step: the model's forward pass is one of all ranks together."""
        if self.cache is None or self.model is not model:
            self.release()
            self.model, self.cache = model, KVCache(model.config)
        (rows, width), device = prompt_ids.shape, prompt_ids.device
        self.static = self._is_static(device, in_step)
        self.captures = self.static and self.mode != "static"
        length = width + new_tokens - 1  # the last token is never read
        position = None
        if self.static:
            length = -(-length // STATIC_MULTIPLE) * STATIC_MULTIPLE
            position = self.cache.position
            if position is None or position.device != device:
                position = torch.zeros(1, dtype=torch.int64, device=device)
        block = 0 if self.static else token_attention.block_of(model)
        self.cache.begin(rows, length, position, block)
        first, source = _distinct(prompt_ids, prompt_mask)
        ids, mask, self.filled = prompt_ids[first], prompt_mask[first], width
        logits = self._forward(ids, language_model.positions(mask), mask)
        if source is not None:
            self.cache.spread(source)
            logits = logits[source]
        # Ends of rows that are not filled yet are no keys to anyone, so they may count as text.
        self.mask = torch.ones(rows, length, dtype=torch.bool, device=device)
        self.mask[:, :width] = prompt_mask
        self.positions = language_model.positions(prompt_mask)[:, -1:]
        self.last_position = (positions_of(model.config) or sys.maxsize) - 1
        if self.static:
            position.fill_(width)
        if self.captures:
            addresses = [p.data_ptr() for p in model.parameters()]
            addresses += [x.keys.data_ptr() for x in self.cache.layers]
            self._graphs.forget_others(tuple(addresses))
        return logits

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B,) tokens drawn → (B,V) logits of the next; with graphs, valid until the next step."""
        # A row may run on beyond its own room, for its neighbours; what it draws there is dropped.
        self.positions = (self.positions + 1).clamp(max=self.last_position)
        ids = tokens[:, None]
        self.filled += 1
        if not self.static:
            return self._forward(ids, self.positions, self.mask[:, : self.filled])
        run = self._replay if self.captures else self._forward
        logits = run(ids, self.positions, self.mask)
        self.cache.position.add_(1)
        return logits

    def keep_running(self, finished: torch.Tensor) -> torch.Tensor | None:
        """(B,) which rows have stopped → (b,) the rows that stay, in their new order; None: all.

        One row always stays: ranks that decode in step go on until the last row of all has stopped.
        """
        rows = len(finished)
        live = rows - int(finished.sum())
        if self.static:  # powers of two, whatever it began with: few shapes, few graphs
            size = min(rows, 1 << max(live - 1, 0).bit_length())
        else:
            size = max(live, 1) if rows - live >= LEAVE_TOGETHER else rows
        if size == rows:
            return None
        # The rows from the end fill the gaps; the others stay where they are.
        stay = torch.arange(size, device=finished.device)
        movers = (~finished[size:]).nonzero().squeeze(1) + size
        gaps = finished[:size].nonzero().squeeze(1)[: len(movers)]
        stay[gaps] = movers
        self.cache.move(movers, gaps, self.filled)
        self.mask, self.positions = self.mask[stay], self.positions[stay]
        return stay

    def release(self) -> None:
        """Give the memory back; the next batch allocates anew."""
        self._graphs.clear()
        self.cache = self.model = None

    def _is_static(self, device, in_step: bool) -> bool:
        attention = self.model.config._attn_implementation
        able = attention in STATIC_ATTENTION and not in_step
        if self.mode == "auto":
            return able and device.type == "cuda"
        if self.mode == "eager":
            return False
        if not able or (self.mode == "graph" and device.type != "cuda"):
            ranks = "in step" if in_step else "apart"
            raise ValueError(
                f"decode={self.mode} cannot be: device {device.type}, attention {attention}, ranks "
                f"{ranks}; it needs attention sdpa or eager, ranks that decode apart and, for "
                "graphs, a GPU; set --decode auto"
            )
        return True

    def _forward(self, ids, positions, mask) -> torch.Tensor:
        """(B,Q) ids and positions, (B,T) mask → (B,V) logits after the last."""
        known = {"position_ids": positions, "logits_to_keep": 1}
        kind = type(self.model)
        extra = {name: x for name, x in known.items() if language_model.accepts(kind, name)}
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            **extra,
        ).logits[:, -1]

    def _replay(self, *inputs) -> torch.Tensor:
        try:
            return self._graphs.run(self._forward, inputs)
        except graphs.NotCapturable as error:
            if self.mode == "graph":
                raise
            warnings.warn(
                f"decode=auto goes on without CUDA graphs, which this model refused: {error}",
                stacklevel=2,
            )
            self.mode, self.captures = "eager", False
            return self._forward(*inputs)


def _distinct(ids: torch.Tensor, mask: torch.Tensor) -> tuple:
    """(rows to read, for each row which of those it equals); (all, None) where no two are equal."""
    found, source = torch.cat([ids, mask.long()], 1).unique(dim=0, return_inverse=True)
    if len(found) == len(ids):
        return slice(None), None
    first = torch.full((len(found),), len(ids), device=ids.device)
    everyone = torch.arange(len(ids), device=ids.device)
    return first.scatter_reduce(0, source, everyone, "amin"), source
