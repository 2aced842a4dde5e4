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
from utils.models import adapters, freezing, loading, model_code, value_heads
from utils.models.adapters import Lora
from utils.models.freezing import Freezing
from utils.pretrained import base_of


@dataclass(frozen=True)
class FewBits:
    """Of each number in a linear layer below the head; 0: as many as its dtype has."""

    bits: int = 0

    @property
    def bytes_each(self) -> float:
        """NF4 has a scale in 8 bits for each 64, and one in fp32 for each 256 of these; 8 bits have
        one in fp32 for each row, which is nothing."""
        return 0.5 + 1 / 64 + 4 / 64 / 256 if self.bits == 4 else self.bits / 8


NOTHING, WHOLE = Freezing(), FewBits()


@dataclass(frozen=True)
class Shape:
    """Counts of one model. `scalar`: reward model or critic, with a head of one number."""

    model_config: object
    scalar: bool
    parameters: int  # tied weights once
    trained: int  # of them that are not frozen
    frozen_layers: int  # below the lowest one that has such
    trained_in_layer: frozenset[str] | None  # their names in that one; None: all are trained
    trains_head: bool
    q_width: int  # numbers for each token of the vocabulary in ILQL's trained Q heads; 0: has none
    largest: int  # in one tensor that is trained
    in_few_bits: int  # of them that are in 4 or 8 bits
    few: FewBits
    unpacked: int  # of these at once whole, while they are multiplied with
    adapters: Lora | None  # that are trained, if any are
    multiplied: int  # of them in matrix products: no norms, no embeddings only looked up
    small: int  # of them in tensors that ZeRO-3 leaves whole
    cache: int  # numbers that one token leaves in the KV cache

    def weights(self, size: int) -> int:
        """Bytes of all weights in a dtype of `size` bytes, or in few bits."""
        whole = size * (self.parameters - self.in_few_bits)
        return whole + round(self.few.bytes_each * self.in_few_bits)

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
def read(
    path: str,
    scalar: bool,
    trust_remote_code: bool = False,
    frozen: Freezing = NOTHING,
    lora: Lora | None = None,
    few: FewBits = WHOLE,
    values: bool = False,
) -> Shape:
    """The Shape of a model's or an adapter's folder or hub name; the rest as `count` takes it."""
    from transformers import AutoConfig

    base = base_of(path) or path
    model_config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    return count(model_config, scalar, frozen, lora, few, values)


def count(
    model_config,
    scalar: bool,
    frozen: Freezing = NOTHING,
    lora: Lora | None = None,
    few: FewBits = WHOLE,
    values: bool = False,
) -> Shape:
    """lora: of a model whose adapters are trained. few: in how many bits linear layers are.
    values: are ILQL's value heads trained beside it?"""
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    model_config = copy.deepcopy(model_config)
    if scalar:
        model_config.num_labels = 1
    auto = model_code.scalar_class(model_config) if scalar else AutoModelForCausalLM
    with torch.device("meta"):
        # A config whose code has been run already says that the model's may.
        model = auto.from_config(model_config, trust_remote_code=model_code.is_remote(model_config))
    head = None if scalar else model.get_output_embeddings()
    heads = (head, getattr(model, "score", None))
    linear = [
        m.weight.numel()
        for m in model.modules()
        if isinstance(m, (torch.nn.Linear, Conv1D)) and not any(m is head for head in heads)
    ]
    base = list(model.parameters())
    with torch.device("meta"):
        adapters.put_on(model, "", lora)
    if values:
        setattr(model.config, value_heads.SETTING, 1.0)
    value_heads.same_layers(model)
    freezing.apply(model, frozen)
    weights = list(model.parameters())
    trained = [w for w in weights if w.requires_grad]
    in_layers = [None]
    if len(trained) < len(weights):
        in_layers = [_trained_in(layer) for layer in freezing.layers_of(model)]
        if not in_layers[0] and model.get_input_embeddings().weight.requires_grad:
            # Their gradient comes through all layers: counted as if these were trained, which is
            # more than they keep.
            in_layers = [None]
    lowest = next((i for i, names in enumerate(in_layers) if names != set()), len(in_layers))
    looked_up = {
        id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding)
    }
    if head is not None:
        looked_up.pop(id(head.weight), None)  # a tied head multiplies after all
    matrices = sum(w.numel() for w in base if w.dim() > 1)
    return Shape(
        model_config=model_config,
        scalar=scalar,
        parameters=sum(w.numel() for w in weights),
        trained=sum(w.numel() for w in trained),
        frozen_layers=lowest,
        trained_in_layer=[*in_layers, frozenset()][lowest],
        q_width=sum(q[-1].in_features for q in head.value_heads.q) if values else 0,
        trains_head=head is not None and head.weight.requires_grad,
        largest=max(w.numel() for w in trained),
        in_few_bits=sum(linear) if few.bits else 0,
        few=few,
        unpacked=max(linear, default=0) if few.bits else 0,
        adapters=lora if lora and lora.lora_rank else None,
        multiplied=matrices - sum(looked_up.values()),
        small=sum(w.numel() for w in weights if w.numel() < PERSISTENT_BELOW),
        cache=numbers_a_token(model_config),
    )


def _trained_in(layer: torch.nn.Module) -> frozenset[str]:
    return frozenset(name for name, w in layer.named_parameters() if w.requires_grad)


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


def activations(
    shape: Shape, rows: int, length: int, dtype, checkpointing: bool, checkpointed: int = 0
) -> Activations:
    """Of a micro-batch of rows × length tokens, all layers.

    checkpointed: where `checkpointing`, so many layers from below are; 0: all. One and two layers
    are run; each further one keeps what the second one added. Frozen layers below all that is
    trained keep nothing; above them all count as if the same weights of them were trained.
    """
    layers = shape.layers - shape.frozen_layers
    again = min(checkpointed or shape.layers, shape.layers) - shape.frozen_layers
    again = max(0, again) * checkpointing
    kept = peak = 0
    for recomputed, count in ((True, again), (False, layers - again)):
        if count or not (again or recomputed):
            batch = (rows, length, dtype, recomputed)
            one = _run(shape, 1, *batch)
            two = one if shape.layers == 1 else _run(shape, 2, *batch)
            each = two.held - one.held
            kept += count * each
            peak = max(peak, two.peak - 2 * each + kept)
    return Activations(held=one.held - each + kept, peak=peak, inference=two.inference)


_runs: dict[tuple, Activations] = {}


def _run(shape: Shape, layers: int, *batch) -> Activations:
    """Of a backbone with so many of the model's layers. batch: as `_forward_and_backward`."""
    text = shape.model_config.get_text_config()
    how = shape.trained_in_layer, shape.adapters
    key = (text.to_json_string(use_diff=False), *how, layers, *batch)
    if key not in _runs:
        _runs[key] = _forward_and_backward(shape, layers, *batch)
    return _runs[key]


def _forward_and_backward(
    shape: Shape, layers: int, rows: int, length: int, dtype, checkpointing: bool
) -> Activations:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModel

    trusted, few = model_code.is_remote(shape.model_config), _of_layers(shape.model_config, layers)
    with torch.device("meta"):  # peft moves what it makes, which fake tensors do not bear
        model = AutoModel.from_config(few, dtype=dtype, trust_remote_code=trusted)
        adapters.put_on(model, "", shape.adapters)
        # As DeepSpeed does. In peft's fp32 each would keep a copy of what its layer reads.
        model.to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        model.to_empty(device="cpu")
        ids = torch.zeros(rows, length, dtype=torch.int64)
        mask = torch.ones_like(ids)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if "position_ids" in inspect.signature(type(model).forward).parameters:
            inputs["position_ids"] = mask.cumsum(-1) - 1
        for p in (p for p in model.parameters() if p.requires_grad):
            p.register_post_accumulate_grad_hook(_drop_gradient)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                # Their gradient is as large as they are, and comes when the rest is gone.
                module.weight.requires_grad_(False)
        if shape.trained_in_layer is not None:
            for layer in freezing.layers_of(model):
                for name, p in layer.named_parameters():
                    p.requires_grad_(p.requires_grad and name in shape.trained_in_layer)
        known = [*model.parameters(), *model.buffers(), ids, mask]
        with LiveBytes(known) as inference, torch.no_grad():
            model.eval()(**inputs)
        if checkpointing:
            loading.checkpoint(model)
        model.train()
        with LiveBytes(known) as training:
            hidden = model(**inputs).last_hidden_state
            held = training.now
            if hidden.requires_grad:
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
