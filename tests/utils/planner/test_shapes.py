"""Counts from a config against real models and what autograd saves."""

import copy
import dataclasses
import itertools

import pytest
import torch
import transformers

from tests.helpers import families
from tests.helpers.llama_shape import LLAMA
from utils.models import adapters, freezing, loading, value_heads
from utils.models.adapters import Lora
from utils.models.freezing import Freezing
from utils.planner import memory, shapes


@pytest.mark.parametrize("family", ["Llama", "Gemma", "GPT2", "OPT", "Bloom", "GPTNeoX", "Qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(family, tied):
    ids = {"vocab_size": 100, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = families.with_dropout(family, tie_word_embeddings=tied, **ids)
    for scalar, auto in (
        (False, transformers.AutoModelForCausalLM),
        (True, transformers.AutoModelForSequenceClassification),
    ):
        config.num_labels = 1
        model = auto.from_config(config)
        buffers = {b.data_ptr() for b in model.buffers()}
        # A tied weight stands in the state dict under two names, at one address.
        storages = {w.data_ptr(): w.numel() for w in model.state_dict().values()}
        weights = sum(n for at, n in storages.items() if at not in buffers)
        assert shapes.count(config, scalar).parameters == weights


def saved_bytes(config, rows: int, length: int, dtype) -> int:
    """What autograd saves in the backbone's forward pass on real tensors, weights left out."""
    model = transformers.AutoModel.from_config(config, dtype=dtype).train()
    weights = {w.untyped_storage().data_ptr() for w in [*model.parameters(), *model.buffers()]}
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        kept.append(t)  # an address must not be used twice
        return t

    kept = []
    ids = torch.zeros(rows, length, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert output.requires_grad
    return sum(n for at, n in saved.items() if at not in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_saves(dtype):
    saved = saved_bytes(LLAMA, 3, 64, dtype)
    held = shapes.activations(shapes.count(LLAMA, False), 3, 64, dtype, False).held
    # Beside what is saved, the result itself and what the mask was made from are alive.
    assert 0.99 * saved < held < 1.05 * saved


def test_checkpointing_keeps_one_hidden_state_a_layer():
    shape = shapes.count(LLAMA, False)
    found = shapes.activations(shape, 3, 64, torch.float32, True)
    deeper = dataclasses.replace(shape, model_config=shapes._of_layers(LLAMA, 5))
    deeper.model_config.num_hidden_layers = 15
    more = shapes.activations(deeper, 3, 64, torch.float32, True)
    assert more.held - found.held == 10 * 3 * 64 * 128 * 4
    assert found.held < found.peak < shapes.activations(shape, 3, 64, torch.float32, False).peak


FROZEN = {
    "nothing": Freezing(),
    "two layers": Freezing(freeze_bottom_layers=2),
    "all layers": Freezing(freeze_bottom_layers=5),
    "products": Freezing(freeze=(r"layers\.\d\.mlp",)),
    "all but one": Freezing(trainable_modules=(r"layers\.4\.", r"model\.norm")),
}


ADAPTED, LORA = "all but adapters", Lora(lora_rank=4)


@pytest.mark.parametrize(
    "frozen, checkpointed, dtype",
    [
        *itertools.product([*FROZEN, ADAPTED], [None, 0, 1, 3], [torch.float32]),
        (ADAPTED, None, torch.bfloat16),
    ],
)
def test_activations_of_frozen_and_of_some_checkpointed_layers(frozen, checkpointed, dtype):
    """Beside the whole model, with all its layers, on real tensors."""
    model = transformers.AutoModelForCausalLM.from_config(LLAMA, dtype=dtype).train()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(shapes._drop_gradient)
    how, lora = FROZEN.get(frozen, Freezing()), None if frozen in FROZEN else LORA
    adapters.put_on(model, "", lora)
    model.to(dtype)  # peft makes them in fp32, and DeepSpeed all in one dtype
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.register_post_accumulate_grad_hook(shapes._drop_gradient)
    freezing.apply(model, how)
    model.model.embed_tokens.requires_grad_(False)
    if checkpointed is not None:
        loading.checkpoint(model, checkpointed)
    ids = torch.zeros(3, 64, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    positions = mask.cumsum(-1) - 1
    known = [*model.parameters(), *model.buffers(), ids, mask, positions]
    with shapes.LiveBytes(known) as live:
        hidden = model.model(ids, attention_mask=mask, position_ids=positions, use_cache=False)[0]
        held = live.now
        hidden.backward(torch.empty_like(hidden))
    shape = shapes.count(LLAMA, False, how, lora)
    found = shapes.activations(shape, 3, 64, dtype, checkpointed is not None, checkpointed or 0)
    hidden_state = 3 * 64 * LLAMA.hidden_size * 4  # norms compute in fp32
    assert found.held == pytest.approx(held, abs=1.2 * hidden_state)
    assert found.peak == pytest.approx(live.peak, abs=1.2 * hidden_state)
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.trained == own + (
        LLAMA.vocab_size * LLAMA.hidden_size * (frozen in ("nothing", "products"))
    )


def test_value_heads_are_counted():
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(LLAMA))
    value_heads.put_on(model, "", 1.0)
    shape = shapes.count(LLAMA, False, values=True)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.q_width == 2 * 2 * LLAMA.hidden_size
    assert shape.small == sum(p.numel() for p in model.parameters() if p.numel() < 10**5)
    asked = (
        64,
        "fp32",
        "cpu",
        True,
    )  # kept probabilities and the weights' gradients, thrice and five
    more = memory.logits(shape, *asked) - memory.logits(shapes.count(LLAMA, False), *asked)
    assert more == 4 * 64 * 1000 * 2 + 4 * 1000 * 128 * 4
    saved = copy.deepcopy(LLAMA)
    saved.ilql_beta = 1.0
    assert shapes.count(saved, False).parameters == shape.parameters, "of a folder that holds them"
    assert not hasattr(LLAMA, "ilql_beta")


@pytest.mark.parametrize("pattern", [r"layers\.", r"layers\.[01]\."])
def test_frozen_layers_above_trained_embeddings_keep_activations(pattern):
    model = transformers.AutoModelForCausalLM.from_config(LLAMA, dtype=torch.float32).train()
    how = Freezing(freeze=(pattern,))
    freezing.apply(model, how)
    ids = torch.zeros(3, 64, dtype=torch.int64)
    known = [*model.parameters(), *model.buffers(), ids]
    with shapes.LiveBytes(known) as live:
        hidden = model.model(ids, use_cache=False)[0]
        held = live.now
    del hidden
    found, whole = (
        shapes.activations(shapes.count(LLAMA, False, x), 3, 64, torch.float32, False)
        for x in (how, Freezing())
    )
    assert held <= found.held <= 1.01 * whole.held
