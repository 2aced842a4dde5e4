"""NLPO's action mask: the policy of some rollouts ago says which tokens may be drawn (Ramamurthy et
al. 2022, "Is Reinforcement Learning (Not) for Natural Language Processing?").

At each position these are its likeliest tokens, as many as hold --mask_top_p of its probability.
The policy that is trained draws among them alone, and its log-probabilities, of sampling as of the
updates, are normalised over them.
"""

import torch
from torch import nn

from utils.distributed import zero
from utils.generation.decoder import Decoder
from utils.generation.weights import plain_twin
from utils.kernels import vocabulary_head
from utils.models.ema import EMA

IMPOSSIBLE = torch.finfo(torch.float32).min  # not −∞, of which 0 × it were no number


def top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """(N,V) fp32 logits → (N,V) bool: the fewest likeliest tokens with probability `p` together."""
    likeliest, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = likeliest.cumsum(-1) - likeliest
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, before < p)


class Nucleus(EMA):
    """The policy as it was at the last `update`: an average without memory, of which checkpoints
    keep each rank's part, and a module with whole weights, on each rank under every ZeRO stage."""

    def __init__(self, module: nn.Module, p: float, temperature: float, decode: str):
        super().__init__(module, decay=0.0)
        self.p, self.temperature = p, temperature
        self.twin, self.decoder = plain_twin(module), Decoder(decode)
        self.fill()

    def update(self) -> None:
        super().update()
        self.fill()

    @torch.no_grad()
    def fill(self) -> None:
        """What is kept → the module that says what may be drawn. A collective under ZeRO-3."""
        targets = dict(self.twin.named_parameters())
        for name, p in self.module.named_parameters():
            whole = self.shadow.get(name, zero.local(p))  # what adapters stand beside is frozen
            if hasattr(p, "ds_id"):
                (whole,) = zero.all_gathered([whole.to(targets[name].device)], [p])
            if targets[name].numel() == 0:
                targets[name].data = torch.empty_like(whole, dtype=targets[name].dtype)
            targets[name].copy_(whole)

    @torch.no_grad()
    def allowed(self, inputs: dict, sources: torch.Tensor, targets: torch.Tensor):
        """A function: slice of N predictions → (n,V) bool, what may stand there. inputs: of one
        forward pass; sources, targets (N,): as VocabularyHead.logprobs has them. A target, which
        was drawn, may: where rounding differs it could fall out of the mask that it is on."""
        head = vocabulary_head.of(self.twin)
        if head is not None and head.changes_logits is None:
            head.probe(self.twin, inputs)
        if head is None or head.changes_logits:
            found = self.twin(**inputs, use_cache=False).logits.flatten(0, 1)
            found, finish = found.index_select(0, sources), nn.Identity()
        else:
            finish = head
            with head.giving(lambda hidden: hidden.flatten(0, 1).index_select(0, sources)):
                found = self.twin(**inputs, use_cache=False).logits

        @torch.no_grad()
        def mask(rows: slice) -> torch.Tensor:
            logits = finish(found[rows]).float() / self.temperature
            return top_p(logits, self.p).scatter_(1, targets[rows, None], True)

        return mask

    def beside(self, decoder: Decoder) -> "Masked":
        return Masked(decoder, self)


class Masked:
    """A Decoder whose logits are IMPOSSIBLE where `nucleus` allows no token."""

    def __init__(self, decoder: Decoder, nucleus: Nucleus):
        self.decoder, self.nucleus = decoder, nucleus

    def begin(self, model: nn.Module, *batch) -> torch.Tensor:
        other = self.nucleus.decoder.begin(self.nucleus.twin, *batch)
        return self._masked(self.decoder.begin(model, *batch), other)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._masked(self.decoder.step(tokens), self.nucleus.decoder.step(tokens))

    def keep_running(self, finished: torch.Tensor) -> torch.Tensor | None:
        self.nucleus.decoder.keep_running(finished)
        return self.decoder.keep_running(finished)

    def _masked(self, logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        may = top_p(other.float() / self.nucleus.temperature, self.nucleus.p)
        return logits.float().masked_fill(~may, IMPOSSIBLE)
