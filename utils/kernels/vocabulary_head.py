"""The layer that turns hidden states into logits, or log-probabilities instead.

Logits are the largest tensor of training: 2,048 tokens of a vocabulary of 152,000 take 1.2 GB in
fp32, and autograd keeps two or three of that size. Here they exist a chunk of tokens at a time,
forward and backward, whatever the batch.

Only the head can do that, deep inside the model's forward pass, and its answer takes the way that
logits take: ZeRO-3 gathers the head's weight around its `forward`, and for the backward pass of
what `forward` returned.

    language_model.wanted_logprobs                    the model (or DeepSpeed's engine around it)
        with head.giving(logprobs_of):
            output = forward(ids, …)          ──►     layers → hidden (B,T,H) → head
                                                                                 │ logprobs_of
            output.logits, (N,)               ◄──     returned in place of logits, (N,)

That needs a model that returns what its head gave. Some families scale or cap their logits after
the head; `probe` finds out, once a model, and their logits are then computed whole.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from utils.kernels.cpu_products import OneDNNLinear, multiply, suits

# Logits that exist at once, forward or backward: on a CPU 4 MB, which stay in its cache; on a GPU
# 256 MB, 440 rows of a matrix product at the largest vocabularies.
CHUNK = {"cpu": 2**20, "cuda": 2**26}
# Up to so many (64 MB in fp32) the forward pass keeps the probabilities for the backward pass;
# above, the backward pass computes them once more, a fourth of the head's arithmetic.
KEPT = 2**24


class _LogProbs(torch.autograd.Function):
    """hidden (N,H), weight (V,H), bias (V,) or None, targets (N,) → fp32 log-probabilities (N,)
    and, where asked for, entropies (N,), which have no gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, with_entropies, allowed):
        logprobs = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        entropies = torch.empty_like(logprobs) if with_entropies else None
        keep = any(ctx.needs_input_grad) and targets.numel() * len(weight) <= KEPT
        kept = hidden.new_empty(len(targets), len(weight)) if keep else None
        for rows in chunks(hidden, weight):
            logits = _logits(hidden[rows], weight, bias, temperature, allowed, rows)
            most = logits.amax(-1)
            chosen = logits.gather(1, targets[rows, None]).squeeze(1)
            if kept is None or kept.dtype != torch.float32:
                p = torch.softmax(logits, -1)
            else:
                p = torch.softmax(logits, -1, out=kept[rows])
            if kept is not None and p.dtype != kept.dtype:
                kept[rows] = p
            # The likeliest token's probability is at least 1/V, so its logarithm is safe.
            normaliser = most - p.amax(-1).log()
            logprobs[rows] = chosen - normaliser
            if with_entropies:
                # −Σ p log p with log p = logit − normaliser, and Σ p = 1.
                entropies[rows] = normaliser - torch.linalg.vecdot(p, logits)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.kept, ctx.temperature, ctx.allowed = kept, temperature, allowed
        if with_entropies:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        hidden, weight, bias, targets = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        # One buffer for all chunks; sums of many in bf16 would lose the small ones.
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        scale = grad.float() / ctx.temperature
        for rows in chunks(hidden, weight):
            if ctx.kept is not None:
                p = ctx.kept[rows]
            else:
                settings = ctx.temperature, ctx.allowed, rows
                p = torch.softmax(_logits(hidden[rows], weight, bias, *settings), -1)
            # d logprob(y) / d logit = (1 at y) − p, over the temperature.
            slope = (p * -scale[rows, None]).to(hidden.dtype)
            slope.scatter_add_(1, targets[rows, None], scale[rows, None].to(hidden.dtype))
            if wants_hidden:
                if suits(slope):
                    grad_hidden[rows] = multiply(slope, weight.t())
                else:
                    torch.mm(slope, weight, out=grad_hidden[rows])
            if wants_weight:
                _add_product(grad_weight, slope.T, hidden[rows])
            if wants_bias:
                grad_bias += slope.sum(0, dtype=torch.float32)
        if wants_weight:
            grad_weight = grad_weight.to(weight.dtype)
        if wants_bias:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def chunks(hidden: torch.Tensor, weight: torch.Tensor):
    """Slices of the rows of `hidden`, each so short that its logits fit CHUNK."""
    rows = max(1, CHUNK[hidden.device.type] // len(weight))
    for start in range(0, len(hidden), rows):
        yield slice(start, min(start + rows, len(hidden)))


def _logits(hidden, weight, bias, temperature: float, allowed=None, rows=None) -> torch.Tensor:
    if suits(hidden):
        logits = multiply(hidden, weight, bias)
    else:
        logits = F.linear(hidden, weight, bias).float()
    logits = logits if temperature == 1.0 else logits.div_(temperature)
    if allowed is not None:
        logits = logits.masked_fill(~allowed(rows), torch.finfo(logits.dtype).min)
    return logits


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total (V,H) fp32 += a (V,n) @ b (n,H), without a temporary of V × H."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    rows = max(1, CHUNK[total.device.type] // total.shape[1])
    for start in range(0, len(total), rows):
        total[start : start + rows] += a[start : start + rows] @ b


class VocabularyHead(OneDNNLinear):
    """(…,H) → (…,V) logits, or what another function makes of the hidden states."""

    changes_logits: bool | None = None  # does the model, after the head? None: not probed yet
    _instead: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) if self._instead is None else self._instead(hidden)

    @contextlib.contextmanager
    def giving(self, function: Callable[[torch.Tensor], torch.Tensor]):
        """While inside, the head gives function(hidden (B,T,H)) in place of logits."""
        self._instead = function
        try:
            yield
        finally:
            self._instead = None

    @torch.no_grad()
    def probe(self, forward: Callable, inputs: dict) -> None:
        """Does the model return what its head gave? One forward pass with marks for logits, as the
        model's code alone does not tell; every rank must make it together, as any pass."""
        marks = torch.tensor([-70.0, 0.3, 5.0], device=inputs["input_ids"].device)
        with self.giving(lambda hidden: marks):
            returned = forward(**inputs, use_cache=False).logits
        same = returned.dtype == marks.dtype and torch.equal(returned, marks)
        self.changes_logits = not same

    def logprobs(
        self,
        hidden: torch.Tensor,
        sources: torch.Tensor,
        targets: torch.Tensor,
        temperature: float = 1.0,
        with_entropies: bool = False,
        allowed: Callable[[slice], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden (B,T,H) → fp32 log-probabilities (N,) of `targets` (N,), each predicted at its
        position of B × T in `sources` (N,); and, where asked for, the entropies (N,) of these
        predictions, in nats and without a gradient. allowed: slice of the N → (n,V) bool; other
        tokens have probability 0."""
        wanted = hidden.flatten(0, 1).index_select(0, sources)
        return self.logprobs_at(wanted, targets, temperature, with_entropies, allowed)

    def logprobs_at(self, wanted, targets, temperature=1.0, with_entropies=False, allowed=None):
        """As `logprobs`, of hidden states (N,H) that are the predictions' own."""
        settings = targets, temperature, with_entropies, allowed
        return _LogProbs.apply(wanted, self.weight, self.bias, *settings)


def of(model: nn.Module) -> VocabularyHead | None:
    """The model's head, able to answer; None where it is not a plain linear layer."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) in (nn.Linear, OneDNNLinear):
        # The class is swapped in place: the parameter, its name and ZeRO's hooks stay.
        head.__class__ = VocabularyHead
    return head if isinstance(head, VocabularyHead) else None
