"""The planner against counts made another way: real tensors, hooks, running engines."""

import dataclasses
import json
import sys

import pytest
import torch
import transformers

from step1_sft.config import SFTConfig
from step3_ppo.config import PPOConfig
from tests.helpers import families
from tests.helpers.running import ROOT, run_ranks
from utils.kernels import vocabulary_head
from utils.planner import (
    memory as plan_memory,
)
from utils.planner import (
    plan as planner,
)
from utils.planner import (
    shapes as plan_shapes,
)
from utils.planner import (
    time as plan_time,
)

LLAMA = transformers.LlamaConfig(
    vocab_size=1000,
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape")
    LLAMA.save_pretrained(path)
    return str(path)


def sft(folder, **settings) -> SFTConfig:
    given = {"output_dir": "-", "model_name_or_path": folder, "sft_data": ["-"]} | settings
    return SFTConfig(**given)


def ppo(folder, **settings) -> PPOConfig:
    given = {"output_dir": "-", "model_name_or_path": folder, "prompt_data": ["-"]}
    return PPOConfig(**(given | {"reward_model": folder} | settings))


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
        assert plan_shapes.count(config, scalar).parameters == weights


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
    held = plan_shapes.activations(plan_shapes.count(LLAMA, False), 3, 64, dtype, False).held
    # Beside what is saved, the result itself and what the mask was made from are alive.
    assert 0.99 * saved < held < 1.05 * saved


def test_checkpointing_keeps_one_hidden_state_a_layer():
    shape = plan_shapes.count(LLAMA, False)
    found = plan_shapes.activations(shape, 3, 64, torch.float32, True)
    deeper = dataclasses.replace(shape, config=plan_shapes._of_layers(LLAMA, 5))
    deeper.config.num_hidden_layers = 15
    more = plan_shapes.activations(deeper, 3, 64, torch.float32, True)
    assert more.held - found.held == 10 * 3 * 64 * 128 * 4
    assert (
        found.held < found.peak < plan_shapes.activations(shape, 3, 64, torch.float32, False).peak
    )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_engines_keep_what_the_planner_says(tmp_path, ranks):
    transformers.AutoModelForCausalLM.from_config(LLAMA).save_pretrained(tmp_path)
    assert "all stages counted" in run_ranks([("tests/helpers/plan_checks.py", [tmp_path])], ranks)


def test_the_head_is_counted_as_it_is_computed():
    assert plan_memory.LOGITS_AT_ONCE == vocabulary_head.CHUNK
    assert plan_memory.LOGITS_KEPT == vocabulary_head.KEPT


def test_the_kv_cache_is_what_a_forward_pass_leaves():
    cache = transformers.DynamicCache(config=LLAMA)
    model = transformers.AutoModelForCausalLM.from_config(LLAMA)
    model(torch.zeros(2, 7, dtype=torch.int64), past_key_values=cache, use_cache=True)
    tokens = sum(x.keys.numel() + x.values.numel() for x in cache.layers)
    shape = plan_shapes.count(LLAMA, False)
    assert plan_memory.generating(shape, 2, 7, "fp32")["KV cache"] == 4 * tokens


def test_the_largest_micro_batch_fits_and_the_next_does_not(folder):
    config = sft(folder, global_batch_size=64, max_length=128)
    at = {
        n: planner.plan("sft", dataclasses.replace(config, micro_batch_size=n), "fp32", 1, "cpu")
        for n in (8, 16)
    }
    between = (at[8].peak + at[16].peak) / 2 / planner.USABLE["cpu"]
    machine = planner.Machine("cpu", 1, between, between)
    assert planner.largest_micro_batch("sft", config, "fp32", machine) == 8


@pytest.mark.parametrize(
    "memory, expected",
    [
        (190, {"micro_batch_size": 4, "micro_batch_tokens": 0}),
        (110, {"offload": "optimizer", "zero_stage": 2}),
    ],
)
def test_the_cheapest_change_fits_and_none_cheaper_does(memory, expected):
    """A 7B model on one GPU, bf16: weights, gradients and moments alone are 121 GB."""
    config = sft(str(ROOT / "docs/shapes/7b"), global_batch_size=16, max_length=1024)
    machine = planner.Machine("cuda", 1, memory * planner.GB, 10**12)
    assert planner.cheapest_change("sft", config, "bf16", machine) == (expected, 1)
    for change, fits in (({}, False), (expected, True)):
        changed = dataclasses.replace(config, **change)
        assert machine.holds(planner.plan("sft", changed, "bf16", 1, "cuda")) == fits


def test_zero_shards_and_offload_moves(folder):
    peaks = []
    for stage in (1, 2, 3):
        config = ppo(folder, zero_stage=stage, rollout_gather="layer")
        peaks.append(planner.plan("ppo", config, "bf16", 8, "cuda"))
    kept = [sum(sum(part.values()) for part in p.parts.values()) for p in peaks]
    assert kept[0] > kept[1]
    moved = planner.plan("ppo", ppo(folder, zero_stage=2, offload="optimizer"), "bf16", 8, "cuda")
    share = -(-plan_shapes.read(folder, False).parameters // 8)
    assert moved.host["actor"]["optimizer"] == 12 * share
    assert "optimizer" not in moved.parts["actor"]
    assert "optimizer" in peaks[1].parts["actor"]


def test_ppo_has_every_model_and_phase(folder):
    found = planner.plan("ppo", ppo(folder), "fp32", 1, "cpu")
    assert set(found.shapes) == {"actor", "critic", "reference", "reward model"}
    assert {"generate", "score", "train actor", "step critic"} <= set(found.phases)
    reinforce = ppo(folder, algorithm="reinforce", global_batch_size=64)
    assert "critic" not in planner.plan("ppo", reinforce, "fp32", 1, "cpu").shapes


def test_flops_are_those_that_torch_counts(folder):
    from torch.utils.flop_counter import FlopCounterMode

    model = transformers.AutoModelForCausalLM.from_config(LLAMA, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 32, dtype=torch.int64))
    shape = plan_shapes.count(LLAMA, False)
    said = plan_time.forward_flops(shape, 64, 32, 64)
    # Eager attention multiplies over all of the length, causal attention over half.
    assert said + 64 * 2 * 5 * 128 * 32 == counter.get_total_flops()


def test_a_run_says_its_plan_and_survives_what_cannot_be_planned(folder, tmp_path):
    lines = []
    planner.first_lines("sft", sft(folder), torch.device("cpu"), lines.append)
    assert len(lines) == 1 and lines[0].endswith(": fits")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    lines.clear()
    planner.first_lines("sft", sft(str(tmp_path)), torch.device("cpu"), lines.append)
    assert len(lines) == 1 and lines[0].startswith("plan: not estimated: ValueError")


def test_a_run_that_does_not_fit_is_warned_and_told_what_to_change(folder):
    need = planner.plan("sft", sft(folder, micro_batch_size=64), "fp32", 1, "cpu").peak
    machine = planner.Machine("cpu", 1, need * 0.5, need * 0.5)
    lines = planner.summary("sft", sft(folder, micro_batch_size=64), "fp32", machine)
    assert len(lines) == 2
    assert "WARNING" in lines[1] and "--micro_batch_size" in lines[1]


def test_the_command_prints_a_table(folder, monkeypatch, capsys):
    words = "planner --step ppo --ranks 8 --memory_gb 80 --zero_stage 3 --dtype bf16 --tflops 100 "
    words += f"--bandwidth 1000 --model_name_or_path {folder} --reward_model {folder}"
    monkeypatch.setattr(sys, "argv", words.split())
    planner.main()
    shown = capsys.readouterr().out
    assert f"actor: {plan_shapes.read(folder, False).parameters:,} parameters" in shown
    assert "largest micro batch that fits: 8" in shown and "← peak" in shown
    assert "at 100.00 TFLOP/s and 1000 GB/s, as given" in shown


@pytest.mark.slow
def test_the_measured_peak_is_within_15_percent(tmp_path, monkeypatch):
    from benchmarks import planner_check

    result = tmp_path / "found.json"
    words = ["planner_check", "--cases", "sft-20M-fp32-zero0", "--output", str(result)]
    monkeypatch.setattr(sys, "argv", words)
    planner_check.main()
    assert abs(json.loads(result.read_text())[0]["ratio"] - 1) < 0.15
