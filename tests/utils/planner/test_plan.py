"""Plans of whole runs: what fits, the cheapest change, what a run says at its start."""

import dataclasses
import json
import sys

import pytest
import torch

from step1_sft.config import SFTConfig
from step3_ppo.config import PPOConfig
from tests.helpers.llama_shape import LLAMA
from tests.helpers.running import ROOT
from utils.planner import memory, shapes
from utils.planner import plan as planner
from utils.planner.workload import Workload


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape")
    LLAMA.save_pretrained(path)
    return str(path)


def sft(folder, **settings) -> Workload:
    given = {"output_dir": "-", "model_name_or_path": folder, "sft_data": ["-"]} | settings
    return SFTConfig(**given).workload()


def ppo(folder, **settings) -> Workload:
    given = {"output_dir": "-", "model_name_or_path": folder, "prompt_data": ["-"]}
    return PPOConfig(**(given | {"reward_model": folder} | settings)).workload()


def test_the_largest_micro_batch_fits_and_the_next_does_not(folder):
    work = sft(folder, global_batch_size=64, max_length=128)
    at = {
        n: planner.plan(dataclasses.replace(work, micro_batch_size=n), "fp32", 1, "cpu")
        for n in (8, 16)
    }
    between = (at[8].peak + at[16].peak) / 2 / planner.USABLE["cpu"]
    machine = planner.Machine("cpu", 1, between, between)
    assert planner.largest_micro_batch(work, "fp32", machine) == 8


@pytest.mark.parametrize(
    "memory, expected",
    [
        (190, {"micro_batch_size": 4, "micro_batch_tokens": 0}),
        (110, {"offload": "optimizer", "zero_stage": 2}),
    ],
)
def test_the_cheapest_change_fits_and_none_cheaper_does(memory, expected):
    """A 7B model on one GPU, bf16: weights, gradients and moments alone are 121 GB."""
    work = sft(str(ROOT / "docs/shapes/7b"), global_batch_size=16, max_length=1024)
    machine = planner.Machine("cuda", 1, memory * planner.GB, 10**12)
    assert planner.cheapest_change(work, "bf16", machine) == (expected, 1)
    for change, fits in (({}, False), (expected, True)):
        changed = dataclasses.replace(work, **change)
        assert machine.holds(planner.plan(changed, "bf16", 1, "cuda")) == fits


def test_zero_shards_and_offload_moves(folder):
    peaks = []
    for stage in (1, 2, 3):
        work = ppo(folder, zero_stage=stage, rollout_gather="layer")
        peaks.append(planner.plan(work, "bf16", 8, "cuda"))
    kept = [sum(sum(part.values()) for part in p.parts.values()) for p in peaks]
    assert kept[0] > kept[1]
    moved = planner.plan(ppo(folder, zero_stage=2, offload="optimizer"), "bf16", 8, "cuda")
    share = -(-shapes.read(folder, False).parameters // 8)
    assert moved.host["actor"]["optimizer"] == 12 * share
    assert "optimizer" not in moved.parts["actor"]
    assert "optimizer" in peaks[1].parts["actor"]


def test_ppo_has_every_model_and_phase(folder):
    found = planner.plan(ppo(folder), "fp32", 1, "cpu")
    assert set(found.shapes) == {"actor", "critic", "reference", "reward model"}
    assert {"generate", "score", "train actor", "step critic"} <= set(found.phases)
    reinforce = ppo(folder, algorithm="reinforce", global_batch_size=64)
    assert "critic" not in planner.plan(reinforce, "fp32", 1, "cpu").shapes


def test_a_run_says_its_plan_and_survives_what_cannot_be_planned(folder, tmp_path):
    lines = []
    planner.first_lines(sft(folder), "fp32", torch.device("cpu"), lines.append)
    assert len(lines) == 1 and lines[0].endswith(": fits")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    lines.clear()
    planner.first_lines(sft(str(tmp_path)), "fp32", torch.device("cpu"), lines.append)
    assert len(lines) == 1 and lines[0].startswith("plan: not estimated: ValueError")


def test_a_run_that_does_not_fit_is_warned_and_told_what_to_change(folder):
    need = planner.plan(sft(folder, micro_batch_size=64), "fp32", 1, "cpu").peak
    machine = planner.Machine("cpu", 1, need * 0.5, need * 0.5)
    lines = planner.summary(sft(folder, micro_batch_size=64), "fp32", machine)
    assert len(lines) == 2
    assert "WARNING" in lines[1] and "--micro_batch_size" in lines[1]


def test_models_on_one_base_count_it_once_and_in_the_bits_it_has(folder):
    """AdamW's state is of what is trained, and NF4 has 4 bits and their scales."""
    from utils.models.adapters import Lora

    whole, shared = (
        ppo(folder, lora_rank=4, share_backbone=roles) for roles in ("", "actor,critic,reward")
    )
    plain = shapes.read(folder, False)
    actor = shapes.read(folder, False, False, shapes.NOTHING, Lora(4))
    critic = shapes.read(folder, True, False, shapes.NOTHING, Lora(4))
    parts = planner.plan(whole, "fp32", 1, "cpu").parts
    assert parts["actor"] == {"weights": 4 * actor.parameters, "optimizer": 8 * actor.trained}
    assert actor.parameters == plain.parameters + actor.trained and actor.trained == 46_240
    assert parts["reference"]["weights"] == 0 < 4 * actor.trained < parts["reward model"]["weights"]
    parts = planner.plan(shared, "fp32", 1, "cpu").parts
    assert parts["critic"] == {"weights": 4 * critic.trained, "optimizer": 8 * critic.trained}
    assert parts["reward model"]["weights"] == parts["reference"]["weights"] == 0
    four = planner.plan(dataclasses.replace(shared, load_in_4bit=True), "fp32", 1, "cpu").parts
    layers = 5 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 344)  # of LLAMA
    saved = parts["actor"]["weights"] - four["actor"]["weights"]
    assert saved == pytest.approx(layers * (4 - 0.5 - 1 / 64), rel=1e-3)
    eight = dataclasses.replace(ppo(folder), optimizer="adamw8bit")
    moments = planner.plan(eight, "fp32", 1, "cpu").parts["actor"]["optimizer"]
    assert moments == pytest.approx((2 + 8 / 256) * plain.parameters, rel=1e-6)


def test_an_earlier_policy_and_replies_are_counted(folder):
    ours, nlpo = (ppo(folder, **more) for more in ({}, {"algorithm": "nlpo"}))
    before, after = (planner.plan(work, "fp32", 1, "cpu") for work in (ours, nlpo))
    n = shapes.read(folder, False).parameters
    cache = before.parts["rollout"]["KV cache"]
    assert after.parts["earlier policy"] == {"weights": 4 * n, "copy": 4 * n, "KV cache": cache}
    assert after.kept == before.kept + 8 * n + cache
    talks = ppo(folder, environment="a:b", max_prompt_length=30, max_response_length=50)
    alone = ppo(folder, max_prompt_length=30, max_response_length=50)
    caches = [planner.plan(w, "fp32", 1, "cpu").parts["rollout"] for w in (talks, alone)]
    assert [c["KV cache"] for c in caches] == [c * caches[1]["KV cache"] // 80 for c in (130, 80)]


def test_vllm_in_turns_on_cards_of_its_own_and_on_a_cpu(folder):
    """With a base in 4 bits it is sent whole weights all the same."""

    def planned(device="cuda", ranks=1, **more):
        work = ppo(folder, lora_rank=4, load_in_4bit=True, max_response_length=300, **more)
        return work, planner.plan(work, "bf16", ranks, device)

    engine = {"rollout_engine": "vllm"}
    _, native = planned()
    work, found = planned(**engine)
    n, cache, length = found.shapes["actor"].parameters, 2 * found.shapes["actor"].cache, 512 + 300
    least = found.vllm.least
    assert least == 2 * n + cache * length
    assert "rollout" in native.parts and "rollout" not in found.parts
    own = sum(sum(part.values()) for name, part in native.parts.items() if name != "rollout")
    assert found.kept == own + memory.ASLEEP
    beside = found.phases["generate"] - memory.ASLEEP
    for size, share, said in (
        (100 * found.peak, 0.9 * least / (100 * found.peak), "and weights with the keys and va"),
        (10 * beside, 0.9, f"while the training keeps {beside / planner.GB:.1f} GB there; lower"),
        (13 * beside, 0.8, ""),
    ):
        machine = planner.Machine("cuda", 1, size, 10**12)
        tried = dataclasses.replace(work, rollout_memory=share)
        problem = machine.vllm_problem(planner.plan(tried, "bf16", 1, "cuda"))
        assert said in problem and bool(problem) == bool(said), problem
    machine = planner.Machine("cuda", 1, 100 * found.peak, 10**12)
    for share, told in ((1e-6, "WARNING: vLLM fills 0.0 GB of a card"), (0.5, ": fits")):
        tried = dataclasses.replace(work, rollout_memory=share)
        assert told in planner.summary(tried, "bf16", machine)[-1]
    _, apart = planned(**engine, rollout_devices="4,5")
    assert apart.kept == own and apart.vllm.least == least // 2
    machine = planner.Machine("cuda", 1, 10 * beside, 10**12)
    full = dataclasses.replace(apart.vllm, share=0.9)
    assert not machine.vllm_problem(dataclasses.replace(apart, vllm=full)), "on other cards"
    _, elsewhere = planned(**engine, rollout_url="http://127.0.0.1:1")
    assert elsewhere.kept == own and elsewhere.vllm is None
    _, cpu = planned("cpu", 2, **engine)
    assert cpu.parts["vLLM"] == {"weights": n, "KV cache": cache * work.rollout_rows * length // 2}


@pytest.mark.slow
def test_the_measured_peak_is_within_15_percent(tmp_path, monkeypatch):
    from benchmarks import planner_check

    result = tmp_path / "found.json"
    words = ["planner_check", "--cases", "sft-20M-fp32-zero0", "--output", str(result)]
    monkeypatch.setattr(sys, "argv", words)
    planner_check.main()
    assert abs(json.loads(result.read_text())[0]["ratio"] - 1) < 0.15
