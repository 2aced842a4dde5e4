import torch
from torch import nn
from torch.nn import functional as F


class SmallLayer(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.number, self.heads = number, config.num_attention_heads
        size = config.hidden_size
        self.before, self.between = nn.LayerNorm(size), nn.LayerNorm(size)
        self.c_attn, self.c_proj = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.wide, self.narrow = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x, seen, cache):
        """x (B,Q,H); seen (B,1,Q,T) bool: which of all tokens each new one attends to."""
        rows, length, size = x.shape
        split = self.c_attn(self.before(x)).view(rows, length, 3, self.heads, size // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        if cache is not None:
            key, value = cache.update(key, value, self.number)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        x = x + self.c_proj(mixed.transpose(1, 2).reshape(rows, length, size))
        return x + self.narrow(F.silu(self.wide(self.between(x))))


def seen_tokens(mask, rows, new, total, device):
    """(B,1,new,total) bool: itself and what lies to its left, where the mask says it is real."""
    places = torch.arange(total, device=device)
    seen = places[None, :] <= places[total - new :, None]
    if mask is None:
        return seen[None, None].expand(rows, 1, new, total)
    own = places[None, :] == places[total - new :, None]  # a pad sees itself, or nothing would
    return ((seen & mask[:, None, :].bool()) | own)[:, None]
