"""Bases in 4 and 8 bits: NF4 by the paper's table, what stays whole, and runs with adapters on it.

Where bitsandbytes is not installed (requirements-quantised.txt) only the refusals are tested. What
takes a device walks on the CPU too, see tests/whole/test_gpu.py.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from step1_sft.config import SFTConfig
from step3_ppo.config import PPOConfig
from tests.helpers.jobs import ppo, reward, sft
from tests.helpers.running import ROOT, assert_same_path, built_once, metrics_of, run_ranks
from tests.helpers.same_end import assert_same_end
from tests.utils.models.test_adapters import logits_of, moved
from tests.utils.settings.test_command_line import NEEDED, problems_of
from tests.whole.test_gpu import GPU
from utils.distributed import zero
from utils.generation import vllm_weights
from utils.models import freezing, from_scratch, language_model, quantised
from utils.models.adapters import Lora
from utils.models.loading import Loading
from utils.planner.shapes import LiveBytes

INSTALLED = quantised.importlib.util.find_spec("bitsandbytes") is not None
installed = pytest.mark.skipif(not INSTALLED, reason="requirements-quantised.txt not installed")
# The values of NF4, Dettmers et al. 2023, appendix E.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NF4 += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
NF4 += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
NF4 += [0.7229568362236023, 1.0]
ON_GPU = pytest.param("cuda", marks=GPU)
LORA = ["--lora_rank", 4, "--learning_rate", 1e-2]


@pytest.fixture(scope="module")
def wide(chain, tiny, tmp_path_factory):
    """The tiny task with a model whose rows fill blocks of 64."""

    def build(folder):
        shutil.copytree(tiny / "data", folder / "data")
        texts = from_scratch.texts_of([str(folder / "data/sft.jsonl")])
        sizes = dict(hidden_size=64, layers=2, heads=4, intermediate_size=128, max_positions=256)
        from_scratch.build(folder / "base_model", texts, vocab_size=512, seed=0, **sizes)

    return built_once(tmp_path_factory, "wide", build)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    quantised.check(False, False)
    for four in (True, False):
        with pytest.raises(SystemExit, match="needs the package bitsandbytes, .* pip install -r"):
            quantised.check(four, not four)


@pytest.mark.parametrize(
    "config_class, flags, problem",
    [
        (SFTConfig, "--load_in_4bit", "read only with --lora_rank"),
        (SFTConfig, "--load_in_4bit --load_in_8bit --lora_rank 4", "give one of them"),
        (SFTConfig, "--load_in_4bit --lora_rank 4 --zero_stage 3", "set --zero_stage 2"),
        (PPOConfig, "--load_in_8bit --lora_rank 4 --algorithm nlpo", "leave these out"),
    ],
)
def test_what_cannot_be_is_refused_before_loading(config_class, flags, problem):
    (found,) = problems_of(config_class, [*NEEDED[config_class], *flags.split()])
    assert problem in found


def in_nf4(layer) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 weight of a layer in NF4 and the scale of each of its numbers, by the paper: two codes a
    byte, a scale for each 64, itself in 8 bits with a scale for each 256."""
    state, codes = layer.weight.quant_state, layer.weight.data.flatten().long().cpu()
    values = torch.tensor(NF4, dtype=torch.float64)[torch.stack([codes // 16, codes % 16], 1)]
    scales = state.state2.code.double().cpu()[state.absmax.long().cpu()]
    scales = scales * state.state2.absmax.double().cpu().repeat_interleave(256)[: len(scales)]
    scales = (scales + state.offset.double().cpu()).repeat_interleave(64)
    return (values.flatten() * scales).view(state.shape), scales.view(state.shape)


def in_8_bits(layer) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a layer of LLM.int8(): a scale for each row."""
    scales = layer.state.SCB.double().cpu()[:, None] / 127
    codes = layer.state.CB.double().cpu()
    return codes * scales, scales.expand_as(codes)


def rounded_to_8_bits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As LLM.int8() on a GPU rounds what is multiplied, in fp16; and the scale of each row."""
    x = x.half().float()
    scales = x.abs().amax(-1, keepdim=True) / 127
    return ((x / scales).round() * scales).double(), scales.double()


@installed
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "device, dtype",
    [
        ("cpu", "fp32"),
        ("cpu", "bf16"),
        pytest.param("cuda", "fp32", marks=GPU),
        pytest.param("cuda", "bf16", marks=GPU),
    ],
)
def test_layers_multiply_by_the_nearest_values_of_few_bits(wide, device, dtype, bits):
    """Of one row, as in decoding, and of several, in training and in eval mode."""
    path, how = str(wide / "base_model"), Loading(**{f"load_in_{bits}bit": True})
    plain = language_model.load(Loading(), path, dtype=dtype)
    model = language_model.load(how, path, dtype=dtype, lora=Lora(lora_rank=4)).to(device)
    weights, few = dict(plain.named_parameters()), 0
    # A product's sum of 64 to 128 numbers: each rounded once, and what is added.
    close = {"fp32": 1e-5, "bf16": 2**-7}[dtype]
    if bits == 8 and device == "cuda":
        close = max(close, 2e-3)  # bitsandbytes gives it in fp16
    for name, layer in model.named_modules():
        if not name.endswith(".base_layer"):
            continue
        assert layer.weight.device.type == device and layer.weight.element_size() == 1
        original = weights[name.removesuffix(".base_layer") + ".weight"].double()
        if bits == 4:
            found, scales = in_nf4(layer)
            values = torch.tensor(NF4, dtype=torch.float64)
            nearest = values[(original[..., None] / scales[..., None] - values).abs().argmin(-1)]
            # Codes are chosen by the scale before that is rounded to 8 bits itself.
            assert (nearest * scales == found).double().mean() > 0.97, name
        else:
            found, scales = in_8_bits(layer)
            # Rounded to fp16 first: by up to 127 / 2048 of a step.
            assert ((original - found).abs() <= 0.57 * scales).all(), name
        for rows, mode in ((5, True), (5, False), (1, False), (5, True)):
            x = torch.randn(rows, found.shape[1]).to(zero.DTYPES[dtype])
            layer.train(mode)
            y = layer(x.to(device).requires_grad_(mode)).double().cpu()
            read, bound = x.double(), close * (x.double().abs() @ found.abs().T)
            if bits == 8 and device == "cuda":
                read, step = rounded_to_8_bits(x)
                bound += step * found.abs().amax(1)  # one number half-way may fall otherwise
            assert ((y - read @ found.T).abs() <= bound).all(), (name, rows, mode)
        few += 1
    assert few == 2 * 7
    whole = {n for n, p in model.named_parameters() if p.dtype == zero.DTYPES[dtype]}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= whole
    total = sum(p.numel() for p in plain.parameters())
    trained = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert freezing.counts(model) == f"{trained:,} weights are trained, {total:,} are frozen"
    assert "quantization" not in model.config.to_json_string()


@installed
@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_layers_read_is_free_after_the_backward_pass(wide, device, bits):
    """Whoever still holds the loss, as the loops of all steps do until the next one is there."""
    how = Loading(**{f"load_in_{bits}bit": True})
    path, lora = str(wide / "base_model"), Lora(lora_rank=4)
    model = language_model.load(how, path, dtype="fp32", lora=lora).to(device)
    ids = torch.randint(10, 300, (4, 64), device=device)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    with LiveBytes([*model.parameters(), *model.buffers(), ids]) as live:
        before = live.now
        loss = model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum()
        held = live.now - before
        loss.backward()
        kept = live.now - before
    assert loss.requires_grad and kept < 0.05 * held, (kept, held)


@installed
@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_in_few_bits_goes_to_vllm_whole_and_merged(wide, bits):
    """Layers with an adapter and layers without; to a plain model, which then computes as much."""
    path, how = str(wide / "base_model"), Loading(**{f"load_in_{bits}bit": True})
    lora = Lora(lora_rank=4, lora_target_modules=("q_proj", "down_proj"))
    model = moved(language_model.load(how, path, dtype="fp32", lora=lora))
    plain = language_model.load(Loading(), path, dtype="fp32")
    sent = {k: w for b in vllm_weights.buckets_as_saved(model) for k, w in b.items()}
    assert sent.keys() == dict(plain.named_parameters()).keys()
    decode = in_nf4 if bits == 4 else in_8_bits
    up, down = (getattr(model.model.layers[1].mlp, f"{name}_proj") for name in ("up", "down"))
    expected = decode(down.base_layer)[0]
    expected = expected + 16 / 4 * (
        down.lora_B.default.weight.double() @ down.lora_A.default.weight.double()
    )
    for name, weight in (("up", decode(up)[0]), ("down", expected)):
        found = sent[f"model.layers.1.mlp.{name}_proj.weight"]
        torch.testing.assert_close(found.double(), weight, rtol=1e-5, atol=1e-6)
    before = logits_of(plain)
    plain.load_state_dict(sent, strict=False)
    torch.testing.assert_close(logits_of(plain), logits_of(model), rtol=1e-4, atol=1e-4)
    assert (logits_of(plain) - before).abs().max() > 0.1


@installed
def test_rows_that_fill_no_block_are_refused_on_a_cpu(tiny):
    with pytest.raises(SystemExit, match="reads 32 numbers, no multiple of 64"):
        language_model.load(Loading(load_in_4bit=True), str(tiny / "base_model"), dtype="fp32")


@installed
@pytest.mark.slow
def test_qlora_learns_and_resumes_to_the_last_bit_under_zero_0_to_2(wide, tmp_path):
    def job(name, *flags):
        return sft(wide, tmp_path / name, "--max_steps", 12, *LORA, *flags)

    four = ["--load_in_4bit", "--save_every", 6]
    ways = {"zero0": ["--zero_stage", 0], "zero2": ["--zero_stage", 2]}
    ways |= {"zero1": ["--zero_stage", 1, "--packing", "on", "--gradient_checkpointing"]}
    jobs = [job(name, *four, *flags) for name, flags in ways.items()]
    jobs.append(job("whole"))
    program, argv = job("crashed", *four, *ways["zero2"])
    jobs.append(("tests/helpers/stop_at.py", [ROOT / program, 7, "crash", *argv]))
    jobs.append(job("crashed", *four, *ways["zero2"], "--resume", "auto"))
    jobs.append(job("eight", "--load_in_8bit"))
    jobs.append(job("bf16", *four, *ways["zero1"], "--dtype", "bf16"))
    run_ranks(jobs, 2)
    run_ranks([job("one", *four)], 1)
    assert_same_path({n: tmp_path / n for n in (*ways, "one")}, ["loss", "grad_norm"])
    assert_same_end(tmp_path / "crashed", tmp_path / "zero2")
    gained = {}
    for name in ("whole", "zero0", "eight", "bf16"):
        result = json.loads((tmp_path / name / "result.json").read_text())
        gained[name] = result["eval_loss_before"] - result["eval_loss_after"]
        saved = load_file(tmp_path / name / "adapter_model.safetensors")
        assert all(".lora_" in key for key in saved)
    assert min(gained.values()) > 0.1 and min(gained.values()) > 0.7 * gained["whole"], gained
    starts = [metrics_of(tmp_path / name, "loss")[0] for name in ("zero0", "eight", "whole")]
    assert len(set(starts)) == 3 and max(starts) - min(starts) < 0.1, starts


@installed
@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_steps_2_and_3_start_from_what_qlora_saved(wide, tmp_path, bits):
    few = [*LORA, f"--load_in_{bits}bit"]
    jobs = [
        sft(wide, tmp_path / "sft", "--max_steps", 4, *few),
        reward(wide, tmp_path / "sft", tmp_path / "reward", "--max_steps", 2, *few),
        ppo(wide, tmp_path / "sft", tmp_path / "reward", tmp_path / "ppo", "--max_steps", 2, *few),
    ]
    said = run_ranks(jobs, 1)
    assert "base unchanged" in said and (tmp_path / "ppo/actor/adapter_model.safetensors").exists()
    assert abs(metrics_of(tmp_path / "ppo", "kl")[0]) < 1e-4  # the reference is in as few bits


@installed
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), ON_GPU])
def test_qlora_in_bf16_through_all_steps_and_resumed_to_the_last_bit(wide, tmp_path, device):
    """Step 1 cut by a crash, step 3 by a signal, with moments in 8 bits and on one base."""
    few = [*LORA, "--load_in_4bit", "--dtype", "bf16", "--packing", "auto"]
    few += ["--optimizer", "adamw8bit"]
    apart = [*LORA, "--load_in_8bit", "--dtype", "bf16", "--max_steps", 2]
    at = {name: tmp_path / name for name in ("sft", "cut_sft", "reward", "ppo", "cut_ppo")}

    def step1(out):
        return sft(wide, out, "--max_steps", 12, "--save_every", 6, *few)

    def step3(out):
        shared = ["--share_backbone", "actor,critic,reward", "--save_every", 1]
        return ppo(wide, at["sft"], at["reward"], out, *few, *shared)

    def cut(job, step, how):
        program, argv = job
        first = ("tests/helpers/stop_at.py", [ROOT / program, step, how, *argv])
        return [first, (program, [*argv, "--resume", "auto"])]

    jobs = [step1(at["sft"]), *cut(step1(at["cut_sft"]), 7, "crash")]
    jobs.append(reward(wide, at["sft"], at["reward"], "--max_steps", 4, *few))
    jobs += [step3(at["ppo"]), *cut(step3(at["cut_ppo"]), 2, "SIGTERM")]
    jobs.append(reward(wide, at["sft"], tmp_path / "reward8", *apart))
    jobs.append(ppo(wide, at["sft"], tmp_path / "reward8", tmp_path / "ppo8", *apart))
    said = run_ranks(jobs, 1, accelerator=device)
    assert said.count("base unchanged") == 4
    assert_same_end(at["cut_sft"], at["sft"])
    assert_same_end(at["cut_ppo"], at["ppo"])
    losses = metrics_of(at["sft"], "loss")
    assert losses[-1] < losses[0] - 0.1, losses
    for name in ("ppo", "ppo8"):
        assert abs(metrics_of(tmp_path / name, "kl")[0]) < 1e-2, name
