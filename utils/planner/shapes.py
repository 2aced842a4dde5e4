"""What a model's config says about its size, without a single weight: counts and activations.

Everything is built on the meta device or with fake tensors, which have shapes and no memory, so a
70B model costs a second and no byte. Activations are not guessed from a formula: the backbone runs
forward and backward on fake tensors, and what would be alive is added up. That holds for every
family, whatever it saves.
"""

import copy
import functools
import inspect
import weakref
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils.distributed.zero import PERSISTENT_BELOW
from utils.generation.kv_cache import numbers_a_token
from utils.models import model_code


@dataclass(frozen=True)
class Shape:
    """Counts of one model. `scalar`: reward model or critic, with a head of one number."""

    model_config: object
    scalar: bool
    parameters: int  # tied weights once
    largest: int  # of them in one tensor
    multiplied: int  # of them in matrix products: no norms, no embeddings only looked up
    small: int  # of them in tensors that ZeRO-3 leaves whole
    cache: int  # numbers that one token leaves in the KV cache

    @property
    def layers(self) -> int:
        return self.model_config.get_text_config().num_hidden_layers

    @property
    def vocabulary(self) -> int:
        return self.model_config.get_text_config().vocab_size

    @property
    def hidden(self) -> int:
        return self.model_config.get_text_config().hidden_size


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch in the backbone."""

    held: int  # from the end of the forward pass until the backward pass takes it
    peak: int  # the most at once, forward or backward, without the weights' gradients
    inference: int  # the most at once in a forward pass without gradients


@functools.lru_cache(maxsize=16)
def read(path: str, scalar: bool, trust_remote_code: bool = False) -> Shape:
    """The Shape of a folder or hub name that holds a config.json."""
    from transformers import AutoConfig

    model_config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    return count(model_config, scalar)


def count(model_config, scalar: bool) -> Shape:
    from transformers import AutoModelForCausalLM

    model_config = copy.deepcopy(model_config)
    if scalar:
        model_config.num_labels = 1
    auto = model_code.scalar_class(model_config) if scalar else AutoModelForCausalLM
    with torch.device("meta"):
        # A config whose code has been run already says that the model's may.
        model = auto.from_config(model_config, trust_remote_code=model_code.is_remote(model_config))
    weights = list(model.parameters())
    looked_up = {
        id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding)
    }
    head = None if scalar else model.get_output_embeddings()
    if head is not None:
        looked_up.pop(id(head.weight), None)  # a tied head multiplies after all
    matrices = sum(w.numel() for w in weights if w.dim() > 1)
    return Shape(
        model_config=model_config,
        scalar=scalar,
        parameters=sum(w.numel() for w in weights),
        largest=max(w.numel() for w in weights),
        multiplied=matrices - sum(looked_up.values()),
        small=sum(w.numel() for w in weights if w.numel() < PERSISTENT_BELOW),
        cache=numbers_a_token(model_config),
    )


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations inside made and that are still alive.

    known: tensors that were there before; views of them are nothing new.
    """

    def __init__(self, known=()):
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet(t.untyped_storage() for t in known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage() not in self._seen:
                storage = t.untyped_storage()
                self._seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, nbytes: int) -> None:
        self.now -= nbytes


_measured: dict[tuple, Activations] = {}


def activations(shape: Shape, rows: int, length: int, dtype, checkpointing: bool) -> Activations:
    """Of a micro-batch of rows × length tokens, all layers.

    One and two layers are run; each further one keeps what the second one added.
    """
    text = shape.model_config.get_text_config()
    batch = (rows, length, dtype, checkpointing)
    key = (text.to_json_string(use_diff=False), *batch)
    if key not in _measured:
        one = _run(shape.model_config, 1, *batch)
        two = one if shape.layers == 1 else _run(shape.model_config, 2, *batch)
        more = two.held - one.held
        _measured[key] = Activations(
            held=one.held + (shape.layers - 1) * more,
            peak=two.peak + (shape.layers - 2) * more,
            inference=two.inference,
        )
    return _measured[key]


def _run(
    model_config, layers: int, rows: int, length: int, dtype, checkpointing: bool
) -> Activations:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModel

    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        trusted = model_code.is_remote(model_config)
        model = AutoModel.from_config(
            _of_layers(model_config, layers), dtype=dtype, trust_remote_code=trusted
        )
        ids = torch.zeros(rows, length, dtype=torch.int64)
        mask = torch.ones_like(ids)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if "position_ids" in inspect.signature(type(model).forward).parameters:
            inputs["position_ids"] = mask.cumsum(-1) - 1
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(_drop_gradient)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                # Their gradient is as large as they are, and comes when the rest is gone.
                module.weight.requires_grad_(False)
        known = [*model.parameters(), *model.buffers(), ids, mask]
        with LiveBytes(known) as inference, torch.no_grad():
            model.eval()(**inputs)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with LiveBytes(known) as training:
            hidden = model(**inputs).last_hidden_state
            held = training.now
            hidden.backward(torch.empty_like(hidden))
        return Activations(held, training.peak, inference.peak)


def _drop_gradient(p: torch.Tensor) -> None:
    p.grad = None


def _of_layers(model_config, layers: int):
    """The same model with fewer layers, and without dropout, as the steps train."""
    model_config = copy.deepcopy(model_config)
    text = model_config.get_text_config()
    for name, value in list(vars(text).items()):
        if "drop" in name and isinstance(value, float):
            setattr(text, name, 0.0)
        elif isinstance(value, (list, tuple)) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return model_config
