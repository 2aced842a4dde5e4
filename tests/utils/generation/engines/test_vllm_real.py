"""The real vLLM: VLLM_PYTHON=… pytest -m vllm."""

import copy
import os
import re
import signal
import threading
import time

import psutil
import pytest
import torch
import transformers

from tests.helpers.jobs import job, sft
from tests.helpers.running import metrics_of, run_ranks
from utils.generation import vllm_server
from utils.generation.engine import Request, Sampling, Setup, Untrained
from utils.generation.engines import vllm
from utils.models import from_scratch

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no environment"),
]


@pytest.fixture(scope="module")
def policy(tiny, tmp_path_factory):
    """An SFT model with heads of 32, the smallest that vLLM has on a CPU."""
    folder = tmp_path_factory.mktemp("policy")
    sizes = dict(vocab_size=512, hidden_size=64, layers=2, heads=2, intermediate_size=128)
    texts = from_scratch.texts_of([str(tiny / "data/sft.jsonl")])
    from_scratch.build(folder / "base", texts, max_positions=256, seed=0, **sizes)
    flags = ("--model_name_or_path", folder / "base", "--max_steps", 60)
    run_ranks([sft(tiny, folder / "sft", *flags)], 1)
    return folder / "sft"


def ppo(tiny, policy, out, *flags):
    settings = {
        "model_name_or_path": policy,
        "prompt_data": tiny / "data/prompts.jsonl",
        "reward_function": "step3_ppo.rewards.shipped:toy_verifier",
        "output_dir": out,
        "max_steps": 10,
        "algorithm": "grpo",
        "samples_per_prompt": 4,
        "prompts_per_rollout": 8,
        "global_batch_size": 32,
        "learning_rate": 1e-3,
        "max_prompt_length": 48,
        "max_response_length": 12,
        "max_eval_rows": 8,
        "dtype": "fp32",
        "tensorboard": "false",
        "rollout_engine": "vllm",
    }
    return job("step3_ppo/main.py", settings, *flags)


LORA = ("--lora_rank", 8, "--learning_rate", 1e-2)
DORA = (*LORA, "--lora_variant", "dora", "--lora_target_modules", "q_proj", "down_proj")


@pytest.mark.parametrize(
    "ranks, stage, flags",
    [(1, 0, ()), (2, 3, ()), (1, 0, (*LORA, "--load_in_4bit")), (2, 3, DORA)],
    ids=["zero0", "zero3", "zero0-qlora", "zero3-dora"],
)
def test_ten_rollouts_and_updates(policy, tiny, tmp_path, ranks, stage, flags):
    if "--load_in_4bit" in flags:
        pytest.importorskip("bitsandbytes", reason="requirements-quantised.txt is not installed")
    run = ppo(tiny, policy, tmp_path / "run", "--zero_stage", stage, *flags)
    output = run_ranks([run], ranks)
    greedy = re.findall(r"greedy tokens equal up to (\S+) nats", output)
    assert len(greedy) == 2 and all(float(gap) < 1e-4 for gap in greedy), output
    gaps = metrics_of(tmp_path / "run", "engine_gap")
    assert len(gaps) == 10 and 0 < max(gaps) < 1e-5, gaps


def test_a_killed_server_is_started_again(policy, tiny, tmp_path):
    run, killed = tmp_path / "run", []

    def kill_after_two_rollouts():
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
            time.sleep(0.1)
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "utils.generation.vllm_worker" in words and str(run / "vllm") in words:
                killed.append(process.pid)
                process.send_signal(signal.SIGKILL)

    threading.Thread(target=kill_after_two_rollouts, daemon=True).start()
    output = run_ranks([ppo(tiny, policy, run)], 1)
    assert killed and "started again with the present weights" in output, output
    assert len(metrics_of(run, "engine_gap")) == 10
    assert max(metrics_of(run, "engine_gap")) < 1e-5


def test_a_rollout_ahead_follows_one_rollout_behind(policy, tiny, tmp_path):
    flags = ("--rollout_ahead", 1, "--importance_cap", 2, "--global_batch_size", 16)
    run_ranks([ppo(tiny, policy, tmp_path / "run", *flags)], 1)
    assert metrics_of(tmp_path / "run", "staleness") == [0.0, *9 * [2.0]]
    gaps = metrics_of(tmp_path / "run", "engine_gap")
    assert gaps[0] < 1e-5 and all(gap > 1e-4 for gap in gaps[1:]), gaps


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_bf16_takes_it_no_further_from_fp32_than_the_trainer(family, tmp_path):
    """Rounding through 24 random layers costs both 0.05 nats a token: a rotation, scale or norm of
    another kind would cost vLLM alone."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=1000, hidden_size=256, intermediate_size=1024, num_hidden_layers=24,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.075,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5}, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    exact = transformers.AutoModelForCausalLM.from_config(config).eval()
    rounded = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(rounded.state_dict())  # the same weights, multiplied in fp32
    rows, width, new = 8, 12, 24
    ids, mask = torch.randint(10, 900, (rows, width)), torch.ones(rows, width, dtype=torch.bool)
    settings = vllm_server.Settings(str(tmp_path), "", "", "", 0.3, 60.0, False)
    setup = Setup(Untrained(rounded), None, rows_at_once=rows, longest=width + new, vllm=settings)
    engine = vllm.build(setup)
    try:
        engine.sync(Untrained(rounded))
        request = Request(ids, mask, torch.rand(rows, new))
        samples = engine.generate(request, Sampling(new, 3, 0, 1.0, logprobs=True))
    finally:
        engine.server.stop()
    assert samples.response_mask.sum() > 100
    whole = torch.cat([ids, samples.response_ids], 1)
    logs = {}
    for name, model in (("trainer", rounded), ("exact", exact)):
        with torch.no_grad():
            logits = model(whole).logits[:, width - 1 : -1].float()
        logs[name] = logits.log_softmax(-1).gather(2, whole[:, width:, None]).squeeze(2)
    trainer, sampler = (
        (found - logs["exact"]).abs()[samples.response_mask].mean()
        for found in (logs["trainer"], samples.logprobs)
    )
    assert 0.01 < trainer < 0.1 and sampler < 1.5 * trainer, (trainer, sampler)
