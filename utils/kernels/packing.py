"""Rows laid end to end in one row without padding, and an attention that keeps them apart.

transformers takes attention functions by name and hands them the keyword arguments of the model's
forward. Ours, `packed_rows`, looks for the rows' boundaries among them: with boundaries no token
sees another row; without (generation, a padded batch) it is transformers' own sdpa. On CUDA the
rows go through one varlen kernel, on a CPU one by one. Rows that begin alike (answers to one
prompt) may share their beginning: it goes through the model once, in the first of them.
"""

import functools
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from utils.distributed import host_memory, process_group

NAME = "packed_rows"
# On a CPU torch's fused attention is slow in bf16: plain matrix products take half its time
# forward and backward. They keep the scores, so only rows with up to so many of them (heads ×
# tokens²; 8 MB) go that way.
SCORES = 2**22
# The keyword arguments of varlen_attn that we pass, in every torch from 2.11.
SETTINGS = ("scale", "window_size")


@dataclass(frozen=True)
class Tree:
    """Rows with one beginning as one row of T tokens: seen (T,T) bool, positions (T,) int64."""

    seen: torch.Tensor
    positions: torch.Tensor


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_k: int | None = None,
    row_lengths: list[int] | None = None,
    trees: list[Tree | None] | None = None,
    key_places: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """query (B,H,T,D), key and value (B,h,T,D) → (B,T,H,D).

    With `row_lengths`, the lengths of the rows that lie end to end in T, B is 1. A CPU takes rows
    that share their beginning as one row, with a tree of what each token sees; a GPU takes each row
    with the keys of its beginning, key_places (K,) being the places of all rows' keys in turn.
    """
    if row_lengths is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        if key_places is not None:
            key, value = (x.index_select(2, key_places) for x in (key, value))
        groups, shared = query.shape[1] // key.shape[1], {}
        if _shares_heads(varlen_attn):
            shared = {"enable_gqa": groups > 1}
        elif groups > 1:  # torch 2.11 wants as many heads of keys as of queries
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        # A row that has more keys than queries has the queries at their end.
        output = varlen_attn(
            *(x[0].transpose(0, 1) for x in (query, key, value)),
            cu_seq_lens_q,
            cu_seq_lens_k,
            max_length_q,
            max_length_k,
            scale=scaling,
            # A token sees itself and what lies to its left, in a window of so many in all.
            window_size=(sliding_window - 1 if sliding_window else -1, 0),
            **shared,
        )
        return output[None], None
    rows = zip(*(x.split(row_lengths, 2) for x in (query, key, value)), strict=True)
    outputs = [
        _one_row(*row, tree, scaling, sliding_window).transpose(1, 2)
        for row, tree in zip(rows, trees, strict=True)
    ]
    return torch.cat(outputs, 1), None


@functools.cache
def _shares_heads(varlen_attn) -> bool:
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _one_row(query, key, value, tree, scaling, window) -> torch.Tensor:
    """query (1,H,T,D), key and value (1,h,T,D) → (1,H,T,D), causal, within the window."""
    _, heads, length, width = query.shape
    groups = heads // key.shape[1]
    plain = tree is None and not (window and window < length)
    if query.dtype == torch.float32 or heads * length**2 > SCORES:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if plain else _seen(length, tree, window, query.device),
            is_causal=plain,
            scale=scaling,
            enable_gqa=groups > 1,
        )
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    unseen = ~_seen(length, tree, window, query.device)
    bias = torch.zeros(length, length, dtype=query.dtype).masked_fill_(unseen, float("-inf"))
    scale = width**-0.5 if scaling is None else scaling
    scores = torch.baddbmm(bias, query[0], key[0].transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), value[0])[None]


def _seen(length: int, tree: Tree | None, window: int | None, device) -> torch.Tensor:
    """(T,T) bool: does the token of that row see that of that column?"""
    if tree is None:
        all_pairs = torch.ones(length, length, dtype=torch.bool, device=device)
        return all_pairs.tril_().triu_(1 - (window or length))
    if not window:
        return tree.seen
    return tree.seen & (tree.positions[:, None] - tree.positions < window)


def choose(model: nn.Module, packing: str, dtype: str) -> None:
    """Turn packing on or not, as `--packing` says: "on" refuses a model that cannot be packed,
    "auto" prints why its rows are padded."""
    if packing == "off":
        return
    from deepspeed.accelerator import get_accelerator

    why_not = obstacle(model, get_accelerator().device_name(), dtype)
    if not why_not:
        turn_on(model)
    elif packing == "on":
        raise SystemExit(f"packing=on: {why_not}; set --packing auto or off")
    elif process_group.is_main():
        _say_once(f"packing=auto: rows are padded, as {why_not}")


@functools.cache  # a run loads several models
def _say_once(text: str) -> None:
    print(text, flush=True)


def turn_on(model: nn.Module) -> None:
    """From now on `model` takes rows end to end as well as padded ones."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def is_on(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == NAME


def obstacle(model: nn.Module, device: str, dtype: str) -> str:
    """Why rows of this model cannot go end to end here; empty where they can."""
    model_config, kind = model.config.get_text_config(), type(model).__name__
    known = {"full_attention", "sliding_attention"}
    others = sorted(set(getattr(model_config, "layer_types", None) or ()) - known)
    if not getattr(model, "_supports_attention_backend", False):
        return f"{kind} takes no attention function of ours"
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return f"{kind} takes no position ids"
    if model_config._attn_implementation != "sdpa":
        return f"its attention is {model_config._attn_implementation}; only sdpa can be replaced"
    if others or getattr(model_config, "attention_chunk_size", None):
        return f"{kind} has layers of another kind: {', '.join(others) or 'chunked'}"
    return _kernel_obstacle(model_config, dtype) if device == "cuda" else ""


def _kernel_obstacle(model_config, dtype: str) -> str:
    """Why the varlen kernel does not take a text model's heads on this GPU; empty where it does."""
    try:
        from torch.nn.attention.varlen import varlen_attn

        inspect.signature(varlen_attn).bind(*range(7), **dict.fromkeys(SETTINGS))
    except ImportError:
        return f"torch {torch.__version__} has no varlen attention"
    except TypeError as error:
        return f"the varlen attention of torch {torch.__version__} is another one: {error}"
    if dtype == "fp32":
        return "the varlen kernel computes in bf16 and fp16 only"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the varlen kernel needs compute capability 8.0, this GPU has {major}.{minor}"
    # Some families have heads of another size for values, or for keys than head_dim says.
    size = getattr(model_config, "qk_head_dim", None) or getattr(model_config, "head_dim", None)
    size = size or model_config.hidden_size // model_config.num_attention_heads
    values = getattr(model_config, "v_head_dim", None) or size
    if size != values or size % 8 or size > 256:
        return (
            "the varlen kernel takes heads of one size, a multiple of 8 up to 256, and these have "
            f"{size} for keys and {values} for values"
        )
    return ""


def shared_beginnings(groups: Sequence[Sequence[list[int]]]) -> list[tuple[int, int]]:
    """Groups of rows of token ids → for each row in turn (the number of its group's first row, how
    many tokens it takes from there). A row keeps at least its last token; a first row takes none.
    """
    shared: list[tuple[int, int]] = []
    for group in groups:
        shortest, first = min(map(len, group)), len(shared)
        same = (len(set(column)) == 1 for column in zip(*group, strict=False))
        alike = next((n for n, one in enumerate(same) if not one), shortest)
        shared += [(first, 0)] + [(first, min(alike, shortest - 1))] * (len(group) - 1)
    return shared


def own(mask: torch.Tensor, shared: Sequence[tuple[int, int]] | None) -> torch.Tensor:
    """The (B,T) mask of right-padded rows, on the CPU, without what is another row's."""
    if shared is None:
        return mask
    lengths = torch.tensor([tokens for _, tokens in shared])
    return mask.cpu() & (torch.arange(mask.shape[1]) >= lengths[:, None])


def inputs(
    input_ids: torch.Tensor, mask: torch.Tensor, shared: Sequence[tuple[int, int]] | None = None
) -> dict:
    """Keyword arguments of one forward pass on (B,T) padded rows, laid end to end in (1,N).

    shared: as shared_beginnings makes them; `mask` is then what `own` leaves of the rows'. With a
    mask on the CPU, nothing waits for the device of `input_ids`.
    """
    device, mask = input_ids.device, mask.cpu()
    rows = mask.sum(1).tolist()
    shared = shared or [(i, 0) for i in range(len(rows))]
    seen = [n + common for n, (_, common) in zip(rows, shared, strict=True)]
    positions = [torch.arange(k - n, k) for n, k in zip(rows, seen, strict=True)]
    ends = F.pad(mask.sum(1).cumsum(0), (1, 0))
    given = {
        "input_ids": input_ids.flatten().index_select(0, places(mask, device))[None],
        "position_ids": host_memory.send(torch.cat(positions)[None], device),
        # A mask of four dimensions is one that transformers leaves alone; nothing reads it.
        "attention_mask": torch.empty(1, 1, 1, 1, device=device),
        "cu_seq_lens_q": host_memory.send(ends.int(), device),
        "max_length_q": max(rows),
        "max_length_k": max(seen),
        "row_lengths": rows,
        "trees": [None] * len(rows),
    }
    given["cu_seq_lens_k"] = given["cu_seq_lens_q"]
    if seen == rows:
        return given
    if device.type != "cpu":
        return given | keys_of_rows(ends.tolist(), seen, shared, device)
    groups = [list(g) for _, g in itertools.groupby(range(len(rows)), lambda i: shared[i][0])]
    given["row_lengths"] = [sum(rows[i] for i in group) for group in groups]
    given["trees"] = [_tree(group, positions, shared) for group in groups]
    return given


def keys_of_rows(starts: list[int], seen: list[int], shared, device) -> dict:
    """The varlen kernel's arguments for keys: each row's own follow those of its beginning.
    starts: each row's first place among all tokens, and the end. seen: how many keys each has."""
    keys = []
    for row, (first, common) in enumerate(shared):
        keys.append(torch.arange(starts[first], starts[first] + common))
        keys.append(torch.arange(starts[row], starts[row + 1]))
    ends = F.pad(torch.tensor(seen).cumsum(0), (1, 0))
    return {
        "cu_seq_lens_k": host_memory.send(ends.int(), device),
        "key_places": host_memory.send(torch.cat(keys), device),
    }


def _tree(group: list[int], positions: list[torch.Tensor], shared) -> Tree | None:
    """Neighbouring rows that share what the first of them begins with, as one row."""
    if len(group) == 1:
        return None
    at = torch.cat([positions[i] for i in group])
    row = torch.cat([torch.full_like(positions[i], i) for i in group])
    common = torch.cat([torch.full_like(positions[i], shared[i][1]) for i in group])
    same = (row[:, None] == row) & (at[:, None] >= at)
    return Tree(same | (at < common[:, None]), at)  # only the first row has tokens that early


def places(mask: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Where a bool mask is True: its flat positions, (N,) int64 on `device`. With a mask on the
    CPU, nothing waits for the device, as indexing by a mask there would (how many are True?)."""
    return host_memory.send(mask.cpu().flatten().nonzero().squeeze(1), device)


def predecessors(
    wanted: torch.Tensor, mask: torch.Tensor, shared: Sequence[tuple[int, int]] | None = None
) -> torch.Tensor:
    """Where the tokens before those of `wanted` (B,T) stand, in rows laid end to end: (N,) int64.

    mask (B,T) and shared: as `inputs` takes them, but for `own`. What a row shares stands in the
    first row of its group, so one place may come several times. `wanted` has no first column.
    """
    there = own(mask, shared)
    number = there.flatten().cumsum(0).view(mask.shape) - 1
    if shared is not None:
        number = number.where(there, number[[first for first, _ in shared]])
    return number[:, :-1][wanted[:, 1:]]


def spread(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """N numbers → the shape of `mask`, each in the place of a True, 0 elsewhere."""
    whole = values.new_zeros(mask.numel())
    return whole.index_copy(0, places(mask, values.device), values.flatten()).view(mask.shape)
