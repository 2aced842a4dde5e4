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

from tests.helpers import nccl_over_gloo
from tests.helpers.jobs import job, sft
from tests.helpers.running import metrics_of, run_ranks
from utils.generation import vllm_server, vllm_weights
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
SPLIT = ("--rollout_devices", "0,1")  # two workers of vLLM, with half of each layer
DORA = (*LORA, "--lora_variant", "dora", "--lora_target_modules", "q_proj", "down_proj")


@pytest.mark.parametrize(
    "ranks, stage, flags",
    [(1, 0, ()), (2, 3, ()), (1, 0, (*LORA, "--load_in_4bit")), (2, 3, DORA), (1, 0, SPLIT)],
    ids=["zero0", "zero3", "zero0-qlora", "zero3-dora", "zero0-two-workers"],
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


HOW = dict(vllm_python="", rollout_url="", rollout_devices="0,1", rollout_memory=0.3)
HOW |= dict(rollout_timeout=10.0, trust_remote_code=False)
ROWS, WIDTH, NEW = 8, 12, 24
FEW = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=128)


def random_model(family="Llama", **sizes):
    """With heads of 32; a vocabulary that two workers cannot halve without padding it."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=1001, intermediate_size=256, initializer_range=0.3, bos_token_id=None,
        eos_token_id=3, **FEW | sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def engine_of(tmp_path):
    """engine_of(model) → vLLM in two workers, not yet with its weights."""
    started = []

    def make(model):
        settings = vllm_server.Settings(str(tmp_path), **HOW)
        setup = Setup(Untrained(model), None, rows_at_once=ROWS, longest=WIDTH + NEW, vllm=settings)
        started.append(vllm.build(setup))
        return started[-1]

    yield make
    for engine in started:
        shared = engine.server.shared
        assert any("vllm_dist" in name for name in shared), "what the two workers share"
        engine.server.stop()
        assert not any(os.path.exists(name) for name in shared), shared


def gap(engine, model) -> float:
    """Nats a token between the log-probabilities of drawn answers and the model's own."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 900, (ROWS, WIDTH), generator=generator)
    noise = torch.rand(ROWS, NEW, generator=generator)
    request = Request(ids, torch.ones_like(ids, dtype=torch.bool), noise)
    found = engine.generate(request, Sampling(NEW, 3, 0, 1.0, logprobs=True))
    assert found.response_mask.sum() > 50
    whole = torch.cat([ids, found.response_ids], 1)
    with torch.no_grad():
        logits = model(whole).logits[:, WIDTH - 1 : -1].float()
    known = logits.log_softmax(-1).gather(2, whole[:, WIDTH:, None]).squeeze(2)
    return (known - found.logprobs).abs()[found.response_mask].mean().item()


def move(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))


def workers_of(engine) -> list[psutil.Process]:
    """The two processes that each hold half of every layer."""
    below = psutil.Process(engine.server.process.pid).children(recursive=True)
    return [process for process in below if "Worker" in process.name()]


@pytest.mark.parametrize(
    "number, moment", [(signal.SIGKILL, "answers"), (signal.SIGSTOP, "weights")]
)
def test_one_of_two_workers_that_fails_is_named_and_all_start_again(
    engine_of, monkeypatch, number, moment
):
    model, named, said = random_model(), [], []
    engine = engine_of(model)
    engine.sync(Untrained(model))
    assert gap(engine, model) < 1e-5
    old = workers_of(engine)
    assert len(old) == 2
    monkeypatch.setattr(
        vllm.process_group, "say", lambda text: (said.append(text), named.append(time.monotonic()))
    )
    shared = engine.server.shared
    old[1].send_signal(number)
    began = time.monotonic()
    if moment == "weights":
        move(model, 1)
        engine.sync(Untrained(model))
    assert gap(engine, model) < 1e-5
    (text,), (when,) = said, named
    assert "started again" in text and when - began < HOW["rollout_timeout"] + 15, text
    assert not any(process.is_running() for process in old) and len(workers_of(engine)) == 2
    assert not any(os.path.exists(name) for name in shared), "it takes memory until the next boot"


def test_weights_reach_both_workers_by_the_code_for_nccl(engine_of, monkeypatch, capsys):
    """Gloo takes NCCL's place on both sides, all else is what runs between GPUs: a group that the
    two workers join, each weight broadcast to both, checksums of each, a worker that is killed."""
    nccl_over_gloo.for_the_trainer(monkeypatch)
    monkeypatch.setitem(vllm_weights.TRANSFERS, "file", vllm_weights.Nccl)
    command = vllm_server.Launch.command

    def by_nccl(launch, name):
        words = command(launch, name)
        words[words.index("--worker-extension-cls") + 1] = "tests.helpers.nccl_over_gloo.Extension"
        return [word.replace("counted_file", "counted_nccl") for word in words]

    monkeypatch.setattr(vllm_server.Launch, "command", by_nccl)
    model = random_model()
    engine = engine_of(model)
    groups = set()
    for seed in (1, 2):
        move(model, seed)
        engine.sync(Untrained(model))
        assert gap(engine, model) < 1e-5
        groups.add(engine.transfer.groups[0])
    assert len(groups) == 1 and len(workers_of(engine)) == 2
    workers_of(engine)[0].kill()
    move(model, 3)
    engine.sync(Untrained(model))
    assert "it is started again with the present weights" in capsys.readouterr().out
    assert gap(engine, model) < 1e-5 and engine.transfer.groups[0] not in groups


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
