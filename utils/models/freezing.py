"""Which weights of a model are trained, and how many they are."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from utils.distributed import zero


@dataclass(frozen=True)
class Freezing:
    """The settings of these names; for what they mean see RunConfig and step 2's config."""

    freeze: Sequence[str] = ()
    freeze_bottom_layers: int = 0
    trainable_modules: Sequence[str] = ()


def apply(model: nn.Module, how: Freezing) -> str:
    """Freeze the weights that `how` names; → `counts`.

    Before the optimizer is made, which holds the trained ones only. Weights that are frozen already
    stay so. Raises SystemExit where that leaves nothing to train.
    """
    held = frozen_by(model, how)
    for name, p in model.named_parameters():
        if name in held:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise SystemExit(f"every weight is frozen: {how}; freeze fewer")
    return counts(model)


def counts(model: nn.Module) -> str:
    """How many numbers are trained and how many are not."""
    sizes = [(zero.size_of(p), p.requires_grad) for p in model.parameters()]
    trained = sum(n for n, own in sizes if own)
    return f"{trained:,} weights are trained, {sum(n for n, _ in sizes) - trained:,} are frozen"


def frozen_by(model: nn.Module, how: Freezing) -> set[str]:
    """Names of the weights that `how` freezes. A head of one number is never among them. Raises
    SystemExit where a pattern matches no weight."""
    names = [name for name, _ in model.named_parameters()]
    free = {name for name in names if ".score." in name or name.startswith("score.")}
    held = set(_bottom_of(model, how.freeze_bottom_layers))
    held |= set(_matching("freeze", how.freeze, names))
    if how.trainable_modules:
        trainable = set(names) - free
        held |= trainable - set(_matching("trainable_modules", how.trainable_modules, trainable))
    return held - free


def _matching(flag: str, patterns: Sequence[str], names) -> Iterator[str]:
    for pattern in patterns:
        matching = [name for name in names if re.search(pattern, name)]
        if not matching:
            example = sorted(names)[len(names) // 2]
            raise SystemExit(
                f"{flag}: {pattern!r} matches no weight; names look like {example!r}; change "
                f"--{flag}"
            )
        yield from matching


def _bottom_of(model: nn.Module, layers: int) -> Iterator[str]:
    """Names of the weights below layer number `layers`: the embeddings, with a head that is tied
    to them, and the first `layers` layers. None for 0."""
    if not layers:
        return
    depth = len(layers_of(model))
    if layers > depth:
        raise SystemExit(
            f"freeze_bottom_layers={layers}: the model has {depth} layers; set "
            f"--freeze_bottom_layers to {depth} at most"
        )
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    held = {id(p) for m in (*embeddings, *layers_of(model)[:layers]) for p in m.parameters()}
    yield from (name for name, p in model.named_parameters() if id(p) in held)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers, from below."""
    whole = next(m for m in model.modules() if hasattr(m, "config"))
    depth = whole.config.get_text_config().num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
