"""What only a GPU has: the varlen kernel, CUDA graphs, weights that come and go, NCCL.

Each test takes a device. On "cuda" it is behind `-m gpu` (`bash tests/gpu.sh` runs them all); on
"cpu" the same lines walk in every suite as far as a CPU knows them, so that none is first walked by
a user.
"""

import contextlib

import pytest
import torch

from tests.helpers.jobs import ppo, reward, sft
from tests.helpers.running import metrics_of, run_ranks
from tests.utils.generation.test_decoder import stop_of
from tests.utils.generation.test_sampling import LENGTHS, NEW, PAD, left_padded
from tests.utils.generation.test_sampling import tiny as model_of
from tests.utils.kernels.test_packing import rows, twins
from utils.distributed.host_memory import FrozenOffload
from utils.generation import sampling as generation
from utils.generation.decoder import Decoder
from utils.kernels import packing
from utils.models import language_model

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@pytest.fixture
def on():
    """Brings a model that other tests share to a device, and back when the test is over."""
    brought = []
    stop_of("Llama")  # is looked for once, with the model on the CPU

    def bring(model, device):
        brought.append(model)
        return model.to(device)

    yield bring
    for model in brought:
        model.to("cpu")


def whole_gradient(model, loss):
    """Every gradient of `loss`, end to end in fp32."""
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.float().flatten().cpu() for g in found if g is not None])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen3"])
def test_packed_rows_in_bf16_are_as_near_to_fp32_as_padded_ones(family, device):
    """Log-probabilities and gradients. Mistral's window is shorter than the rows."""
    ids, mask, wanted = rows()
    exact, _ = twins(family)
    padded, packed = (model.to(device) for model in twins(family, torch.bfloat16))
    if device == "cuda":
        assert packing.obstacle(padded, "cuda", "bf16") == "", "--packing auto would not pack"
    found = []
    for model, where in ((exact, "cpu"), (padded, device), (packed, device)):
        given = (x.to(where) for x in (ids, mask, wanted))
        logprobs, _ = language_model.wanted_logprobs(model, *given)
        weights = torch.linspace(-1, 1, len(logprobs), device=where)
        gradient = whole_gradient(model, (logprobs * weights).sum())
        found.append((logprobs.detach().float().cpu(), gradient))
    for right, as_padded, as_packed in zip(*found, strict=True):
        off_padded, off_packed = ((x - right).norm() / right.norm() for x in (as_padded, as_packed))
        assert off_packed < 1.5 * off_padded + 1e-3 and off_padded < 0.1


def sampled(model, device, decoder):
    """(responses, log-probabilities up to the stop token), on the CPU: some rows stop early."""
    stop, noise = stop_of("Llama")
    ids, mask = (x.to(device) for x in left_padded(LENGTHS))
    logprobs = torch.zeros(len(LENGTHS), NEW, device=device)
    responses = generation.generate(
        model,
        ids,
        mask,
        max_new_tokens=NEW,
        stop_id=stop,
        pad_id=PAD,
        temperature=1.3,
        noise=noise,
        logprobs_and_entropies=(logprobs, torch.zeros_like(logprobs)),
        decoder=decoder,
    )
    kept = generation.mask_through_stop(responses, stop)
    return responses.cpu(), (logprobs * kept).cpu()


@contextlib.contextmanager
def other_weights(model):
    """The weights of a later step: in the same memory, as an optimizer writes them."""
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.8)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(model.parameters(), before, strict=True):
                p.copy_(old)


@pytest.mark.parametrize("device", DEVICES)
def test_graphs_decode_what_eager_decodes(device, on):
    """Twice, so that a graph is found again; and after an update, whose weights it must see."""
    model, kept = on(model_of("Llama"), device), Decoder("auto" if device == "cuda" else "static")
    answers = []
    for weights in (contextlib.nullcontext, contextlib.nullcontext, lambda: other_weights(model)):
        with weights():
            expected, found = (sampled(model, device, d) for d in (Decoder("eager"), kept))
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4)
        answers.append(found[0])
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])
    if device == "cuda":
        assert kept.mode == "auto" and kept.captures, "no graph was replayed"


@pytest.mark.parametrize("device", DEVICES)
def test_a_failed_capture_is_told_and_costs_nothing_but_time(device, on):
    """A layer waits for the device, which a graph cannot hold. (On a CPU nothing captures.)"""
    model, kept, on_gpu = on(model_of("Llama"), device), Decoder("auto"), device == "cuda"
    expected = sampled(model, device, Decoder("eager"))

    def wait(module, inputs):
        if on_gpu and torch.cuda.is_current_stream_capturing():
            inputs[0].sum().item()

    hook = model.model.layers[1].register_forward_pre_hook(wait)
    told = pytest.warns(UserWarning, match="decode=auto goes on without CUDA graphs")
    with told if on_gpu else contextlib.nullcontext():
        first = sampled(model, device, kept)
    if on_gpu:
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        assert not torch.cuda.is_current_stream_capturing()
    second = sampled(model, device, kept)
    hook.remove()
    for found in (first, second):
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4)
    # What follows a rollout: a pass with gradients, and another decoder's graphs.
    ids, mask, wanted = (x.to(device) for x in rows())
    logprobs, _ = language_model.wanted_logprobs(model, ids, mask, wanted)
    assert whole_gradient(model, logprobs.sum()).isfinite().all()
    again = sampled(model, device, Decoder("graph" if on_gpu else "static"))
    assert torch.equal(again[0], expected[0])


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_weights_come_for_a_pass_and_leave(device):
    ids, mask, _ = (x.to(device) for x in rows())
    model, _ = twins("Llama", torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.to(device)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask.long()).logits
        size = sum(p.nbytes for p in model.parameters())
        held = torch.cuda.memory_allocated() if device == "cuda" else 0
        offload = FrozenOffload([model], torch.device(device))
        parked = [p.data_ptr() for p in model.parameters()]
        for _ in range(2):
            assert [p.data_ptr() for p in model.parameters()] == parked
            assert {p.device.type for p in model.parameters()} == {"cpu"}
            if device == "cuda":
                assert torch.cuda.memory_allocated() <= held - size
                assert all(p.data.is_pinned() for p in model.parameters())
            for name, p in model.named_parameters():
                assert torch.equal(p, before[name])
            found = model(input_ids=ids, attention_mask=mask.long()).logits
            assert {p.device.type for p in model.parameters()} == {device}
            assert not {p.data_ptr() for p in model.parameters()} & set(parked)
            assert torch.equal(found, expected)
            del found
            offload.park()


# Whole steps: (settings of all of them, step 3's own). G stands for graphs.
STAGES = {
    "zero0": ([], ["--decode", "G"]),
    "zero0_frozen": ([], ["--decode", "G", "--offload_frozen", "--release_decode_memory"]),
    "zero2": (["--zero_stage", 2], ["--decode", "G"]),
    "zero3": (["--zero_stage", 3], ["--decode", "G"]),
    "zero3_offload": (["--zero_stage", 3, "--offload", "all"], []),
    "zero3_layers": (["--zero_stage", 3], ["--rollout_gather", "layer"]),
}
# The batches of test_steps.py go evenly over so many with micro-batches of 2.
RANKS = next(n for n in (4, 2, 1) if n <= max(1, torch.cuda.device_count()))


@pytest.mark.parametrize(
    "device, dtype",
    [
        pytest.param("cpu", "bf16", marks=pytest.mark.slow),
        pytest.param("cuda", "bf16", marks=GPU),
        pytest.param("cuda", "fp32", marks=GPU),
    ],
)
def test_three_steps_take_one_path(tiny, chain, tmp_path, device, dtype):
    graphs, jobs = "graph" if device == "cuda" else "static", []
    # bf16 on a GPU is what users run; what the others do on a CPU is in test_steps.py.
    chosen = STAGES if (device, dtype) == ("cuda", "bf16") else ("zero0", "zero3")
    stages = {name: STAGES[name] for name in chosen}
    # By name, so that what cannot be ends the run: the varlen kernel knows no fp32.
    shared = ["--dtype", dtype, "--packing", "on" if dtype == "bf16" else "off"]
    for name, (flags, own) in stages.items():
        flags, out = [*shared, "--micro_batch_size", 2, *flags], tmp_path / name
        own = [graphs if word == "G" else word for word in own]
        jobs += [
            sft(tiny, out / "sft", *flags),
            reward(tiny, chain / "sft", out / "reward", *flags),
            ppo(tiny, chain / "sft", chain / "reward", out / "ppo", *flags, *own),
        ]
    ranks = RANKS if device == "cuda" else 1
    output = run_ranks(jobs, ranks, timeout=900, accelerator=device)
    assert "without CUDA graphs" not in output
    # bf16 keeps three digits, and a sample may fall the other way: only the first steps agree.
    close = dict(rel=1e-3) if dtype == "fp32" else dict(rel=3e-2, abs=3e-2)
    for step in ("sft", "reward"):
        expected = metrics_of(tmp_path / "zero0" / step, "loss")
        for name in stages:
            assert metrics_of(tmp_path / name / step, "loss") == pytest.approx(expected, **close)
    for name in stages:
        assert (tmp_path / name / "ppo/actor_ema/model.safetensors").exists()
        assert abs(metrics_of(tmp_path / name / "ppo", "kl")[0]) < 0.05
