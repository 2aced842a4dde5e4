"""Rollouts of an actor that trains under ZeRO: who samples, with which weights, at what cost."""

import pytest
import torch
import transformers

from tests.helpers.families import FAMILIES
from tests.helpers.running import run_ranks
from utils.distributed.host_memory import FrozenOffload
from utils.generation import hybrid_engine, injected_kernels

WORKER = "tests/helpers/hybrid_engine_checks.py"


def test_one_rank(tiny):
    """Modes, memory, families, who is chosen."""
    checks = ["modes", "choice_of_gather", "families", "choice_of_engine", "parity_sees_faults"]
    settings = ("tests/helpers/engine_settings_checks.py", ["no_waiting", "overlapped", "moments"])
    output = run_ranks([(WORKER, [tiny / "base_model", *checks]), settings], 1)
    for held in ("no waiting", "overlapped", "moments", "choice of gather"):
        assert f"held: {held}" in output, output
    assert output.count("family held") == 2 * (1 + len(FAMILIES)), output
    assert output.count("choice held") == 2 and "held: DeepSpeedHybridEngine" in output, output


def test_ranks_that_stop_far_apart_finish_and_gather_once(tiny):
    output = run_ranks([(WORKER, [tiny / "base_model", "uneven_rollouts"])], 2)
    assert output.count("held: uneven rollouts") == 2, output


def model_of(family):
    config = getattr(transformers, f"{family}Config")(vocab_size=96, **FAMILIES[family])
    return transformers.AutoModelForCausalLM.from_config(config).float()


@pytest.mark.parametrize(
    "family, stage, reason",
    [
        ("Qwen2", 0, "no inference layer for Qwen2ForCausalLM"),
        ("Mistral", 3, "no inference layer for MistralForCausalLM"),
        ("Llama", 0, "wrong rows"),
        ("Llama", 0, "not implemented on cpu"),
        ("Llama", 3, "returns a tensor"),
        ("GPT2", 0, "set_params_wo_copy"),
        ("OPT", 0, "transformers' Cache"),
        ("GPTNeoX", 0, "hidden_size"),
        ("Bloom", 0, "RuntimeError: Transformers version"),
    ],
)
def test_why_deepspeeds_layers_cannot_generate(family, stage, reason):
    model = model_of(family)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert any(reason in found for found in injected_kernels.problems(model, stage))
    assert before == {name: p.data_ptr() for name, p in model.named_parameters()}


def test_without_a_cuda_toolkit_there_is_a_reason_and_no_crash(monkeypatch):
    """The real builder on a pretended GPU: torch finds the device, and no nvcc is there."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder import transformer_inference
    from torch.utils import cpp_extension

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    builder = transformer_inference.InferenceBuilder
    with pytest.raises(injected_kernels.MissingCUDAException):
        builder().is_compatible()
    monkeypatch.setattr(type(get_accelerator()), "get_op_builder", lambda self, name: builder)
    found = injected_kernels.problems(model_of("Llama"), 0)
    assert any("cannot be compiled here (CUDA_HOME does not exist" in x for x in found), found
    assert any("wrong rows" in x for x in found), "the other reasons are still looked for"


def test_a_reason_goes_with_its_cause():
    """Heads without groups, and groups under ZeRO-3, are not cut at wrong rows."""
    assert not any("wrong rows" in r for r in injected_kernels.problems(model_of("Llama"), 3))
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    assert not any("wrong rows" in r for r in injected_kernels.problems(model, 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_size_of_the_cache_is_that_of_transformers(family):
    model, ids = model_of(family), torch.ones(3, 5, dtype=torch.int64)
    layers = model(input_ids=ids, use_cache=True).past_key_values.layers
    real = sum(t.numel() * t.element_size() for one in layers for t in (one.keys, one.values))
    assert hybrid_engine.cache_bytes(model.config, 3, 5, 4) == real


def test_frozen_models_leave_and_come_back():
    """With the CPU in the place of a device: a copy of the weights is made, used and forgotten."""
    models = [torch.nn.Linear(3, 3).requires_grad_(False) for _ in range(2)]
    ids = torch.randn(2, 3)
    expected = [m(ids) for m in models]
    parking = FrozenOffload(models, torch.device("cpu"))
    at_home = [m.weight.data_ptr() for m in models]
    assert not parking.present
    for _ in range(2):
        assert torch.equal(models[0](ids), expected[0])
        away = models[0].weight.data_ptr()
        assert parking.present == {models[0]} and away != at_home[0]
        assert torch.equal(models[0](ids), expected[0]) and models[0].weight.data_ptr() == away
        assert models[1].weight.data_ptr() == at_home[1]
        parking.park()
        assert not parking.present and [m.weight.data_ptr() for m in models] == at_home
    assert torch.equal(models[1](ids), expected[1])
