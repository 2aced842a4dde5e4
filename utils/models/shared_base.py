"""Several models on the weights of one base, each with adapters and a head of its own.

Adapters are put on afterwards, see adapters.put_on; a folder that changes the base, or holds other
weights in its place, gets a base of its own (adapters.replaces_weights).
"""

import copy
import itertools

import torch
from torch import nn

from utils.models import quantised


def twin(model: nn.Module) -> nn.Module:
    """Another module of the same shape whose parameters and buffers are those of `model`."""
    held = itertools.chain(model.parameters(), model.buffers(), quantised.states(model))
    return copy.deepcopy(model, {id(t): t for t in held})


def standing_on(bare: nn.Module, auto_class, *, dtype: torch.dtype, config=None, **settings):
    """A model whose weights are those of the language model `bare`: the same one or, with the
    config of a scalar model, one whose backbone they are, with a head of its own."""
    model = twin(bare)
    if config is None:
        return model
    make = getattr(auto_class, "from_config", None) or auto_class._from_config
    with torch.device("meta"):
        classifier = make(config, **settings)
    setattr(classifier, classifier.base_model_prefix, model.base_model)
    for module in classifier.modules():
        if getattr(module, "config", None) is model.config:
            # One config for all, as of a model that is read: what is set on it reaches the layers.
            module.config = classifier.config
    width, device = bare.get_input_embeddings().embedding_dim, next(bare.parameters()).device
    classifier.score = nn.Linear(width, 1, bias=False, dtype=dtype, device=device)
    classifier.head_was_missing = True
    return classifier


def shares(module: nn.Module, other: nn.Module) -> bool:
    """Do the two have a weight in common?"""
    held = {id(p) for p in module.parameters()}
    return any(id(p) in held for p in other.parameters())
