"""Every program on a pretended GPU: no tensor is on the wrong device, wherever code is walked."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from tests.helpers.jobs import ppo, preference, reward, sft
from tests.helpers.pretended_device import Pretended
from tests.helpers.running import CLOSE, ROOT, metrics_of, run_ranks
from tests.helpers.same_end import assert_same_end

# What may be mixed, and what may not. The same on a GPU, where there is one.

LEGAL, ILLEGAL = True, False
CASES = {
    "cat": (lambda h, d, i: torch.cat([h, d]), ILLEGAL),
    "cat of tensors that were moved": (lambda h, d, i: torch.cat([h.to(d.device), d]), LEGAL),
    "stack of single numbers": (lambda h, d, i: torch.stack([h.sum(), d.sum()]), ILLEGAL),
    "binary operation": (lambda h, d, i: h + d, ILLEGAL),
    "comparison": (lambda h, d, i: h > d, ILLEGAL),
    "where": (lambda h, d, i: torch.where(d > 0, d, h), ILLEGAL),
    "a single number of the host": (lambda h, d, i: d * h.sum() + h[0, 0], LEGAL),
    "a single number to fill with": (lambda h, d, i: d.masked_fill(d > 0, h.sum()), LEGAL),
    "a single number of the device at host": (lambda h, d, i: h * d.sum(), ILLEGAL),
    "written to a single number of the host": (lambda h, d, i: h.sum().add_(d.sum()), ILLEGAL),
    "matmul": (lambda h, d, i: d @ h.T, ILLEGAL),
    "linear layer left behind": (lambda h, d, i: torch.nn.Linear(3, 2)(d), ILLEGAL),
    "linear layer that was moved": (lambda h, d, i: torch.nn.Linear(3, 2).cuda()(d), LEGAL),
    "index by a host tensor": (lambda h, d, i: d[i], LEGAL),
    "index by a host mask": (lambda h, d, i: d[h > 0], LEGAL),
    "host indexed by the device": (lambda h, d, i: h[i.cuda()], ILLEGAL),
    "index_select": (lambda h, d, i: d.index_select(0, i), ILLEGAL),
    "gather": (lambda h, d, i: d.gather(0, i[None]), ILLEGAL),
    "embedding": (lambda h, d, i: torch.nn.functional.embedding(i, d), ILLEGAL),
    "assignment of a host tensor": (lambda h, d, i: d.__setitem__(i[:2], h), ILLEGAL),
    "assignment of a slice": (lambda h, d, i: d.__setitem__(slice(0, 1), h[:1]), LEGAL),
    "assignment of a number": (lambda h, d, i: d.__setitem__(i, 2.0), LEGAL),
    "copy in place": (lambda h, d, i: h.copy_(d), LEGAL),
    "equal": (lambda h, d, i: torch.equal(h, d), ILLEGAL),
    "numpy": (lambda h, d, i: d.numpy(), ILLEGAL),
    "numpy of a copy": (lambda h, d, i: d.cpu().numpy(), LEGAL),
    "tolist": (lambda h, d, i: d.tolist(), LEGAL),
    "pinned": (lambda h, d, i: d.pin_memory(), ILLEGAL),
    "masked_scatter": (lambda h, d, i: d.masked_scatter(d > 0, h), ILLEGAL),
    "cross entropy": (lambda h, d, i: torch.nn.functional.cross_entropy(d, i[:2]), ILLEGAL),
    "gradient through a move": (lambda h, d, i: _gradient_through_a_move(h, d), LEGAL),
    "gradient of another device": (lambda h, d, i: _assign_gradient(h, d), ILLEGAL),
}


def _gradient_through_a_move(h, d):
    weight = h.clone().requires_grad_()
    (weight.to(d.device) * d).sum().backward()
    return weight + weight.grad  # both on the host


def _assign_gradient(h, d):
    h.grad = d


GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


@pytest.fixture(params=["pretended", pytest.param("real", marks=GPU)])
def device(request):
    if request.param == "real":
        yield "cuda:0"
    else:
        with Pretended():
            yield "cuda:0"


@pytest.mark.parametrize("name", CASES)
def test_what_may_be_mixed(device, name):
    operation, verdict = CASES[name]
    h, d, i = torch.ones(2, 3), torch.ones(2, 3, device=device), torch.tensor([0, 1, 0])
    assert (h.device.type, str(d.device), d.is_cuda) == ("cpu", "cuda:0", True)
    if verdict is LEGAL:
        operation(h, d, i)
    else:
        with pytest.raises((RuntimeError, TypeError), match="device|cannot pin"):
            operation(h, d, i)


def test_where_things_are(device):
    """What is made and moved is where it was asked for; views and results stay with their own."""
    h, d = torch.ones(2, 3), torch.ones(2, 3, device=device)
    on_device = [
        torch.zeros_like(d),
        d.new_zeros(2),
        d.T[1:],
        d.float(),
        d.double(),
        d.sum(),
        d.to(d),
    ]
    on_device += [h.to(device), h.cuda(), h.to(d), torch.tensor([1.0], device=device), d * h.sum()]
    on_device += [torch.as_tensor(h, device=device), torch.nn.Linear(2, 2, device=device).weight]
    on_host = [d.cpu(), d.to("cpu", torch.float64, copy=True), d.to(h), torch.tensor([1]), h.sum()]
    on_host += [torch.zeros_like(d, device="cpu"), torch.from_numpy(h.numpy()), h, h.bfloat16()]
    assert [t.device.type for t in on_device] == ["cuda"] * len(on_device)
    assert [t.device.type for t in on_host] == ["cpu"] * len(on_host)
    with torch.device("meta"):
        assert torch.nn.Linear(2, 2).weight.device.type == "meta"
    before = h.clone()
    h.to(device).zero_(), d.cpu().zero_()
    assert torch.equal(h, before) and d.sum().item() == 6.0, "a move shared its memory"


def test_a_tensor_from_before_counts_as_the_hosts():
    """As do those that C++ makes: a model that was loaded and never moved may be such."""
    before, number = torch.ones(2, 3), torch.ones(())
    with Pretended():
        d = torch.ones(2, 3, device="cuda")
        with pytest.raises(RuntimeError, match="on the same device"):
            before + d
        assert (d + number).is_cuda and torch.equal(before.cuda(), d)
        assert before.device.type == "cpu"


def test_a_captured_graph_is_replayed_and_may_not_wait():
    from tests.helpers import pretended_cuda

    with Pretended():
        x, total = torch.ones(3, device="cuda"), torch.zeros((), device="cuda")
        graph = pretended_cuda.Graph()
        with pretended_cuda.capturing(graph):
            y = (x * 2).exp()
            total.add_(y.sum())
        total.zero_()
        x.fill_(3.0)
        graph.replay()
        assert torch.equal(y, torch.full((3,), 6.0, device="cuda").exp())
        assert total.item() == pytest.approx(3 * y[0].item())
        for waits in (lambda: x.sum().item(), x.cpu, lambda: x[x > 0], lambda: bool(x[0] > 1)):
            with (
                pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
                pretended_cuda.capturing(pretended_cuda.Graph()),
            ):
                waits()


# Walks.

FEW = ("--max_steps", 2, "--global_batch_size", 8, "--max_eval_rows", 4)
ROLLOUTS = ("--max_steps", 2, "--prompts_per_rollout", 8, "--max_eval_rows", 4)
ROLLOUTS += ("--max_response_length", 6, "--sample_answers", 0)
PACKED = ("--dtype", "bf16", "--packing", "on")
FUNCTION = "from step3_ppo.rewards.shipped import length_target as score\n"


def job(name, program, argv, **more):
    return {"name": name, "program": program, "argv": [str(a) for a in argv], **more}


def walk(jobs) -> tuple[dict[str, dict], str]:
    """{name: what was counted} of each job, and all that they printed."""
    run = subprocess.run(
        [sys.executable, ROOT / "tests/helpers/pretended_worker.py", json.dumps(jobs)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout
    found = re.findall(r"^walked ([\w ]+): (\{.*?\})", run.stdout, re.MULTILINE)
    counted = {name: json.loads(numbers) for name, numbers in found}
    assert list(counted) == [j["name"] for j in jobs], run.stdout
    return counted, run.stdout


def part(said: str, name: str) -> str:
    """What was printed while job `name` was walked."""
    return said.split(f"walking {name}\n")[1].split(f"walked {name}:")[0]


def interrupted(make, out) -> list[dict]:
    """The jobs of a run of three steps, of one that crashes after the second, whose checkpoint is
    not whole, and of its resumption after the first."""
    own = ("--save_every", 1)
    program, argv = make(out / "crashed", *own)
    return [
        job(f"{out.name} whole", *make(out / "whole")),
        job(f"{out.name} crashed", "tests/helpers/stop_at.py", [ROOT / program, 2, "crash", *argv]),
        job(f"{out.name} resumed", *make(out / "crashed", *own, "--resume", "auto")),
    ]


def test_sft_reward_model_comparisons_and_evaluation(tiny, chain, tmp_path):
    policy, scorer = chain / "sft", chain / "reward"

    def sharded_sft(out, *flags):
        own = (*PACKED, "--zero_stage", 2, "--offload", "optimizer", "--max_steps", 3)
        return sft(tiny, out, *FEW, *own, "--sample_answers", 0, *flags)

    collect = ["--policy", policy, "--prompt_data", tiny / "data/prompts.jsonl", "--num_prompts", 8]
    collect += ["--output_file", tmp_path / "pairs.jsonl", "--max_response_length", 6]
    collect += ["--labeller", "reward_model", "--reward_model", scorer, "--dtype", "fp32"]
    answers = ["--checkpoints", policy, "--reward_model", scorer, "--max_prompts", 3]
    answers += ["--strategy", "sample", "--max_new_tokens", 6, "--dtype", "fp32"]
    beside = ["--policies", f"sft={policy}", f"base={tiny / 'base_model'}", "--judge_model", scorer]
    beside += ["--held_out_data", tiny / "data/held_out.jsonl", "--max_response_length", 6]
    beside += ["--output_file", tmp_path / "methods.json", "--dtype", "fp32"]
    talk = ["--checkpoint", policy, "--max_new_tokens", 6, "--dtype", "fp32"]
    shards = ("--zero_stage", 3, "--offload", "all")
    unpaired = ("--loss", "kto", "--eval_fraction", 0.5, "--ema_decay", 0.9)
    rankings = ("--loss", "plackett_luce", "--eval_fraction", 0.5)
    bad = sft(tiny, tmp_path / "bad", *FEW, "--sample_answers", 0)
    jobs = [
        job("sft", *sft(tiny, tmp_path / "sft", *FEW, "--sample_answers", 1)),
        job("sft in shards", *sft(tiny, tmp_path / "sft3", *FEW, "--sample_answers", 1, *shards)),
        *interrupted(sharded_sft, tmp_path / "packed"),
        job("sft bad", *bad, plant=["nan_logprobs_in_training"]),
        job("reward", *reward(tiny, policy, tmp_path / "reward", *FEW)),
        job("reward packed", *reward(tiny, policy, tmp_path / "rp", *FEW, *PACKED, *shards)),
        job("kto", *preference(tiny, policy, tmp_path / "kto", *FEW, *PACKED, *unpaired)),
        job("ranking", *preference(tiny, policy, tmp_path / "pl", *FEW, *shards, *rankings)),
        job("comparisons", "step2_reward/collect.py", collect),
        job("answers", "evaluation/prompt_eval.py", answers),
        job("methods", "evaluation/methods.py", beside),
        job("chat", "evaluation/chat.py", talk, plant=["typed_lines"]),
    ]
    counted, said = walk(jobs)
    assert min(c["operations"] for c in counted.values()) > 500, counted
    for name in ("packed whole", "packed resumed", "reward packed", "kto"):
        assert counted[name]["packed attentions"] > 0
    assert counted["comparisons"]["replays"] > 0
    assert "FAULT" not in part(said, "kto") + part(said, "ranking")
    assert part(said, "sft bad").count("skipped on all ranks") == 2
    assert_same_end(tmp_path / "packed/crashed", tmp_path / "packed/whole")
    assert "mean score" in part(said, "answers") and part(said, "chat").count("assistant: ") == 2
    run_ranks([sft(tiny, tmp_path / "plain", *FEW)], 1)
    pair = [metrics_of(tmp_path / name, "loss") for name in ("sft", "plain")]
    assert len(pair[0]) == 2 and pair[0] == pytest.approx(pair[1], **CLOSE)


def test_ppo_with_every_option_that_moves_tensors(tiny, chain, other, tmp_path):
    def make(out, *flags, reward_model=chain / "reward"):
        return ppo(tiny, chain / "sft", reward_model, tmp_path / out, *ROLLOUTS, *flags)

    (tmp_path / "own.py").write_text(FUNCTION)
    options = [
        "--reward_function",
        f"{tmp_path / 'own.py'}:score",
        "--judge_model",
        chain / "reward",
    ]
    options += ["--ptx_coef", 0.5, "--ptx_data", tiny / "data/sft.jsonl", "--decode", "static"]
    options += ["--action_level", "sequence", "--generation_tokens", 200]
    options += ["--prompts_per_rollout", 4, "--samples_per_prompt", 2, "--micro_batch_tokens", 150]
    options += ["--score_normalisation", "running", "--logprobs_from", "forward"]
    parked = ["--offload_frozen", "true", "--release_decode_memory", "true"]
    packed = [*PACKED, "--zero_stage", 2, "--offload", "optimizer", "--gradient_checkpointing"]
    layers = ["--zero_stage", 3, "--offload", "all", "--rollout_gather", "layer"]

    def shards(out, *flags):
        return make(out, "--zero_stage", 3, "--ppo_epochs", 1, "--max_steps", 3, *flags)

    jobs = [
        job("ppo", *make("ppo")),
        job("options", *make("options", *options)),
        job("parked", *make("parked", *parked, reward_model=other)),
        job("packed", *make("packed", *packed), plant=["nan_losses_on_the_last_rank"]),
        *interrupted(shards, tmp_path / "shards"),
        job("layers", *make("layers", *layers)),
        job("theirs", *make("theirs", "--rollout_engine", "deepspeed")),
    ]
    counted, said = walk(jobs)
    assert min(c["operations"] for c in counted.values()) > 10_000, counted
    assert "FAULT" not in said
    assert "goes on without CUDA graphs" not in said
    assert counted["ppo"]["replays"] > 0 and counted["parked"]["replays"] > 0
    assert counted["packed"]["packed attentions"] > 0
    assert "another tokenizer or template: answers go to it as text" in part(said, "parked")
    assert metrics_of(tmp_path / "options", "ptx_loss") and metrics_of(
        tmp_path / "options", "eval/judge"
    )
    assert max(metrics_of(tmp_path / "packed", "actor_skipped")) > 0
    assert "rollouts: deepspeed engine" in part(said, "theirs")
    assert_same_end(tmp_path / "shards/crashed", tmp_path / "shards/whole")
    run_ranks([make("plain")], 1)
    for name in ("score", "kl", "policy_loss", "value_loss", "actor_grad_norm"):
        pair = [metrics_of(tmp_path / run, name) for run in ("ppo", "plain")]
        assert len(pair[0]) == 2 and pair[0] == pytest.approx(pair[1], **CLOSE), name


def test_a_misplaced_tensor_breaks_the_walk(tiny, chain, tmp_path):
    faults = [
        "probe_left_on_the_host",
        "positions_on_the_host",
        "reference_left_on_the_host",
        "answers_left_on_the_device",
    ]
    given = ppo(tiny, chain / "sft", chain / "reward", tmp_path, *ROLLOUTS, "--overwrite")
    _, said = walk([job(name, *given, plant=[name], breaks=True) for name in faults])
    for name in faults:
        line = next(x for x in said.splitlines() if x.startswith(f"walked {name}:"))
        assert "broken by Expected all tensors to be on the same device" in line
    broke_off = "self-check, before the first step: 'samples follow the policy' broke off on rank 0"
    assert broke_off in part(said, "probe_left_on_the_host")
