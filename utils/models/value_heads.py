"""ILQL's value heads on a language model's last hidden states, and the policy that follows them.

Two Q heads with copies that follow them slowly (targets), and V; each is Linear, ReLU, Linear, as
in trlX. The vocabulary head of a model that has them gives logits + β · min Q of the targets, whose
softmax is ILQL's policy, π ∝ π_LM · exp(β (min Q − V)), as V is one number for all tokens. These
are the model's logits, so whatever samples from it or scores by it has that policy.

On disk the language model is a folder as any other, which plain transformers loads without the
heads; `ilql_beta` of its config.json says that they are there, in a file of their own.

Source: Snell et al. 2022, "Offline RL for Natural Language Generation with Implicit Language Q
Learning".
"""

import torch
from torch import nn

from utils.distributed import zero
from utils.kernels import vocabulary_head
from utils.kernels.cpu_products import OneDNNLinear
from utils.kernels.vocabulary_head import VocabularyHead
from utils.models.ema import EMA
from utils.pretrained import config_of, refused
from utils.seeding import undisturbed

FILE, NAME, SETTING = "ilql_heads.safetensors", "value_heads", "ilql_beta"
# What `numbers` says of each token: its log-probability under the language model, Q of both heads
# with log softmax Q, the least Q of the targets, and V before it.
NUMBERS = ("logprob", "q1", "log_softmax_q1", "q2", "log_softmax_q2", "target", "v")


def _mlp(width: int, last: nn.Linear) -> nn.Sequential:
    """It gives 0 at first: the policy begins as the language model."""
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), last)


class _Fp32Linear(nn.Linear):
    """In fp32 whatever its weight's dtype: in bf16 V would move in steps of 0.004."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.float(), self.weight.float(), self.bias.float())


class ValueHeads(nn.Module):
    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.q, self.target = (
            nn.ModuleList(_mlp(width, VocabularyHead(2 * width, vocabulary)) for _ in range(2))
            for _ in range(2)
        )
        self.v = _mlp(width, _Fp32Linear(2 * width, 1))
        self.target.load_state_dict(self.q.state_dict())
        self.target.requires_grad_(False)


class PerturbedHead(VocabularyHead):
    """A vocabulary head with `value_heads` and `beta`."""

    can_be_packed = False  # its forward is more than a product

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._perturbed(hidden) if self._instead is None else self._instead(hidden)

    def _perturbed(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…,H) → (…,V) fp32."""
        with torch.no_grad():
            q = torch.minimum(*(target(hidden) for target in self.value_heads.target))
        return OneDNNLinear.forward(self, hidden).float() + self.beta * q.float()

    def logprobs_at(self, wanted, targets, temperature=1.0, with_entropies=False, allowed=None):
        """Of the policy that is sampled from, as VocabularyHead's; without entropies, which only
        training by rollouts asks for."""
        if with_entropies or allowed is not None:
            raise NotImplementedError("a policy with value heads is not trained by rollouts")
        found = []
        for rows in vocabulary_head.chunks(wanted, self.weight):
            logs = (self._perturbed(wanted[rows]) / temperature).log_softmax(-1)
            found.append(logs.gather(1, targets[rows, None]).squeeze(1))
        return torch.cat(found), None

    def numbers(self, hidden, sources, targets) -> torch.Tensor:
        """hidden (B,T,H) → (N,7) fp32, NUMBERS of the tokens `targets` (N,), each predicted at its
        position of B × T in `sources` (N,). The targets' least Q has no gradient."""
        wanted, heads = hidden.flatten(0, 1).index_select(0, sources), self.value_heads
        columns = [VocabularyHead.logprobs_at(self, wanted, targets)[0]]
        for q in heads.q:
            columns += _of_tokens(q, wanted, targets, with_logprobs=True).unbind(-1)
        with torch.no_grad():
            columns.append(torch.minimum(*(_of_tokens(q, wanted, targets) for q in heads.target)))
        columns.append(heads.v(wanted).squeeze(-1))
        return torch.stack(columns, -1)


def _of_tokens(q: nn.Sequential, wanted, targets, with_logprobs: bool = False) -> torch.Tensor:
    """(N,H), tokens (N,) → (N,) fp32 Q of these tokens; with_logprobs: (N,2), with log softmax Q.
    Values of the whole vocabulary exist a chunk at a time, see vocabulary_head."""
    last = q[-1]

    def of(inner: torch.Tensor) -> torch.Tensor:
        values = torch.linalg.vecdot(inner.float(), last.weight[targets].float())
        values = values + last.bias[targets].float()
        if not with_logprobs:
            return values
        return torch.stack([values, last.logprobs_at(inner, targets)[0]], -1)

    with last.giving(of):  # inside its forward, where ZeRO-3 has gathered its weight
        return q(wanted)


class Targets(EMA):
    """The copies of the Q heads, `rate` of the way nearer to them at each update; in fp32, as steps
    so small are lost on weights in bf16."""

    def __init__(self, heads: ValueHeads, rate: float):
        super().__init__(heads.q, 1 - rate)
        self.copies = dict(heads.target.named_parameters())
        self.shadow = {name: zero.local(p).float().clone() for name, p in self.copies.items()}

    def update(self) -> None:
        super().update()
        self.copy()

    @torch.no_grad()
    def copy(self) -> None:
        """To the weights that the model computes with. A collective."""
        for name, p in self.copies.items():
            zero.fill(p, self.whole(name, p))


def put_on(model: nn.Module, path: str, beta: float | None = None) -> None:
    """The heads that the folder `path` holds, where it holds any; beta: of a model whose heads are
    trained, which are new ones otherwise. Raises SystemExit where the model can have none."""
    saved = getattr(model.config, SETTING, None)
    if hasattr(model, "score") or (saved is None and beta is None):
        return
    head = model.get_output_embeddings()
    # An instance's own forward (accelerate's, of a model over several devices) would be called past
    # the head's class.
    if not isinstance(head, nn.Linear) or "forward" in vars(head):
        raise SystemExit(
            f"{path!r}: ILQL's value heads stand beside a vocabulary head that is one plain layer "
            f"on one device, and here it is {type(head).__name__}; use another model, and no "
            "device_map"
        )
    setattr(model.config, SETTING, saved if beta is None else beta)
    same_layers(model)
    if saved is not None:
        _fill(head.value_heads, path)


def same_layers(model: nn.Module) -> None:
    """Heads with new numbers on a language model whose config tells of them."""
    beta = getattr(model.config, SETTING, None)
    if beta is None or hasattr(model, "score"):
        return
    head = model.get_output_embeddings()
    device = head.weight.device
    with undisturbed(device), torch.device(device):
        torch.manual_seed((torch.initial_seed() + 2) % 2**63)  # the same numbers on every rank
        heads = ValueHeads(head.in_features, head.out_features).to(head.weight.dtype)
    # The class is swapped in place: the parameter, its name and ZeRO's hooks stay.
    head.__class__, head.beta = PerturbedHead, float(beta)
    head.value_heads = heads


def _fill(heads: ValueHeads, path: str) -> None:
    from safetensors.torch import load_file
    from transformers.utils import cached_file

    with refused(path, f"ILQL's value heads ({FILE})"):
        heads.load_state_dict(load_file(cached_file(path, FILE)))


def part_of(state: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """Weights of a model → (those of the language model, the heads' by their names on disk)."""
    own = {name for name in state if f".{NAME}." in name}
    heads = {name.partition(f".{NAME}.")[2]: state[name].contiguous() for name in own}
    return {name: t for name, t in state.items() if name not in own}, heads


def check_not_there(path: str, trust_remote_code: bool) -> None:
    """Refuse a folder with heads where its language model alone would be taken."""
    if hasattr(config_of(path, trust_remote_code), SETTING):
        raise SystemExit(
            f"{path!r} is ILQL's policy, of which this would take the language model without its "
            "value heads; only --loss ilql of step3_preference trains on it. If the language model "
            f"alone is meant, give a copy of the folder without {SETTING} in config.json"
        )
