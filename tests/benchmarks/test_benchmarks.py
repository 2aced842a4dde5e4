"""The throughput benchmarks: their work, their arithmetic, their figures; not their timings."""

import json
import math
import runpy
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import figures, measure, ppo_throughput, sft_throughput, worker, workload
from step3_ppo.config import PPOConfig
from utils.data import (
    chat_template,
    comparisons,
    demonstrations,
    rows,
    splits,
    tables,
)
from utils.data import prompts as prompt_data
from utils.distributed import zero
from utils.settings import command_line

SMALL = workload.Shape(vocabulary=512, hidden=96, intermediate=128, layers=2, heads=4, kv_heads=4)


@pytest.fixture(scope="module")
def small_work(tmp_path_factory):
    """(work of answers of 3 to 12 tokens, the folder of its models)."""
    work = workload.Work(shape=SMALL, prompts=8, prompt_length=6, new_tokens=12, shortest=3)
    return work, workload.save_models(work, tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_policy_answers_as_long_as_the_work_says(small_work, dtype):
    from transformers import AutoModelForCausalLM

    work, folder = small_work
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=zero.DTYPES[dtype])
    # Rows in another order and padded: the length belongs to the row, not to its place.
    order = list(range(work.prompts))[::-1]
    ids = torch.tensor([workload.prompt_rows(work)[i] for i in order])
    ids = torch.cat([torch.full((len(ids), 3), workload.PAD), ids], 1)
    mask = (ids != workload.PAD).long()
    torch.manual_seed(0)
    found = model.generate(
        ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=12
    )[:, ids.shape[1] :]
    lengths = [(row.tolist() + [workload.STOP]).index(workload.STOP) + 1 for row in found]
    assert lengths == [work.answers()[i] for i in order]
    assert len(set(found.flatten().tolist())) > 30  # drawn, not one answer for all


def test_nobody_stops_where_the_length_is_fixed(small_work):
    from transformers import AutoModelForCausalLM

    work = replace(small_work[0], shortest=0)
    model = AutoModelForCausalLM.from_pretrained(small_work[1] / "policy")
    ids = torch.tensor(workload.prompt_rows(work))
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                           max_new_tokens=work.new_tokens)  # fmt: skip
    assert found.shape[1] == work.prompt_length + work.new_tokens
    assert not torch.isin(found, torch.tensor([workload.PAD, workload.STOP])).any()


def test_work_w_is_the_issues():
    work = workload.Work()
    assert (work.shape.vocabulary, work.prompts, work.prompt_length) == (8192, 32, 64)
    assert work.answers() == [128] * 32
    var = sorted(replace(work, shortest=16).answers())
    steps = {b - a for a, b in zip(var, var[1:], strict=False)}
    assert (var[0], var[-1]) == (16, 128) and steps == {3, 4}
    # In groups the same rows answer fewer prompts, one length a prompt.
    grouped = replace(work, shortest=16, samples=8)
    assert len(workload.prompt_rows(grouped)) == grouped.asked() == 4
    lengths = grouped.answers()
    assert sorted(lengths[::8]) == [16, 53, 91, 128]
    assert lengths == [n for n in lengths[::8] for _ in range(8)]
    last = [ids[-1] for ids in workload.prompt_rows(grouped)]
    assert [workload.level_of(t, grouped.levels()) for t in last] == lengths[::8]


def test_flops_against_torchs_counter(small_work):
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    work, folder = small_work
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", attn_implementation="eager")
    batch, length = 3, 40
    ids = torch.full((batch, length), 7)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    counted = counter.get_total_flops()
    ours = workload.flops(work.shape, [length] * batch, batch * length)
    # The counter sees the whole square of attention, of which we count the causal half.
    upper = 2 * SMALL.hidden * SMALL.layers * batch * length * (length - 1)
    # …and the rotary table's small product.
    assert ours + upper == pytest.approx(counted, rel=1e-3)
    phases = workload.ppo_flops(work)
    assert phases["train"] == pytest.approx(3 * (phases["score"] - _headless(work)))


def _headless(work) -> float:
    return workload.flops(work.shape, [work.prompt_length + n for n in work.answers()], 0)


def test_decode_reads_the_weights_once_a_step():
    one = workload.Work(shape=SMALL, prompts=1, prompt_length=1, new_tokens=1)
    weights = SMALL.matrix_weights() + SMALL.head_weights()
    keys_and_values = 2 * SMALL.layers * SMALL.hidden
    assert workload.decode_bytes(one) == 2 * (weights + keys_and_values)
    two = replace(one, new_tokens=2)
    assert workload.decode_bytes(two) == 2 * (2 * weights + 3 * keys_and_values)


def test_only_the_spare_row_is_held_out(small_work, tmp_path):
    work, folder = small_work
    tokenizer = chat_template.load_tokenizer(str(folder / "policy"))
    file, bad = workload.write_prompts(work, tmp_path), rows.BadRows()
    loaded = prompt_data.load_prompts([str(file)], split_role="train", bad=bad)
    places = np.array([tables.place(prompt, "hold_out 42") for prompt in loaded])
    flags = splits.held_out(places, workload.HELD_OUT)
    train, held = ([x for x, f in zip(loaded, flags, strict=True) if f == on] for on in (0, 1))
    ids = [chat_template.encode_prompt(tokenizer, p.messages) for p in train]
    assert ids == workload.prompt_rows(work) and len(held) == 1


def test_answered_rows_are_the_same_tokens_to_us_and_to_the_peer(small_work, tmp_path):
    from benchmarks import reward_throughput

    work, folder = small_work
    tokenizer = chat_template.load_tokenizer(str(folder / "policy"))
    answered, bad = workload.answered_rows(work), rows.BadRows()
    for name, module in (("sft", sft_throughput), ("reward", reward_throughput)):
        file = tmp_path / f"{name}.jsonl"
        workload.write_rows(file, [module.to_row(r) for r in answered], work.shape, seed=42)
        if name == "sft":
            loaded = demonstrations.load_conversations([str(file)], split_role="train", bad=bad)
            found = [chat_template.encode_conversation(tokenizer, c.messages) for c in loaded]
            assert [e.ids for e in found[:-1]] == [[*p, *a] for p, a, _ in answered]
            assert [sum(e.supervised) for e in found[:-1]] == work.answers()
        else:
            loaded = comparisons.load_comparisons([str(file)], split_role="train", bad=bad)
            for (prompt, *answers), row in zip(answered, loaded[:-1], strict=True):
                for ids, text in zip(answers, row.responses, strict=True):
                    turns = (*row.prompt, {"role": "assistant", "content": text})
                    encoded = chat_template.encode_conversation(tokenizer, turns)
                    assert encoded.ids == [*prompt, *ids]
    assert len(bad) == 0


def test_every_side_gets_flags_that_work(small_work, tmp_path):
    work, folder = small_work
    arguments = SimpleNamespace(device="cpu", core=-1, flags=["--kl_coef", "0.1"])
    for arguments.algorithm, samples in (("ppo", 1), ("grpo", 4), ("rloo", 4)):
        names = ["ours-fp32", "ours-bf16", "generate-fp32"]
        asked = replace(work, samples=samples)
        systems = ppo_throughput.sides(names, asked, folder, tmp_path, arguments)
        for system in systems[:2]:
            config = command_line.build(PPOConfig, system.arguments["argv"], world_size=1)
            assert config.minibatches() == 4 and config.gradient_clipping == 1.0
            assert config.kl_coef == 0.1 and config.algorithm == arguments.algorithm
            assert (config.rollout_size(), config.samples_per_prompt) == (8, samples)
        assert [s.name for s in systems] == names
        assert len(systems[2].arguments["prompts"]) == 8


@pytest.mark.parametrize("name", ["ppo", "rollout", "sft", "reward", "dpo"])
def test_help_says_how_to_run_it(name, monkeypatch, capsys):
    script = measure.ROOT / f"benchmarks/{name}_throughput.py"
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    shown = capsys.readouterr().out
    assert (
        ended.value.code == 0
        and "--repeats" in shown
        and f"python benchmarks/{script.name}" in shown
    )


@pytest.mark.slow
def test_the_pause_for_a_checkpoint_is_told():
    small = ["--hidden", "32", "--layers", "2", "--rows", "4", "--rounds", "1"]
    command = [sys.executable, str(measure.ROOT / "benchmarks/checkpoint_pause.py"), *small]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    *_, header, first, second = told.splitlines()
    for line in (first, second):
        step, off, on, off_share, on_share, _, writer = map(float, line.split("|"))
        # Of so small a file the writer's time is lost in that of other threads, and the pause in
        # the milliseconds that reading two clocks takes on a busy machine.
        assert (
            min(step, off) > 0
            and on > -0.05
            and math.isfinite(writer)
            and len(header.split("|")) == 7
        )
        for seconds, share in ((off, off_share), (on, on_share)):
            # Three decimals are printed of each of the three.
            assert abs(share * step - seconds) < 0.001 * (1 + share + step)


def a_system(name, seconds, core=1.0):
    turns = [
        {"seconds": s, "core": core, "peak_memory": 2e6, "tokens": 10, "seconds_generate": s / 2,
         "seconds_train": s / 2}
        for s in seconds
    ]  # fmt: skip
    system = measure.System(name, "", {}, None, [0], facts={"memory": 1e6})
    system.turns = turns
    return system


def test_ratios_are_of_the_same_round():
    # Twice as fast in every round, though the machine slowed down fourfold in between.
    assert figures.ratio([2.0, 8.0], [1.0, 4.0]) == figures.Spread(2.0, 2.0, 2.0)


def test_a_turn_of_other_length_is_refused():
    work = workload.Work(shape=SMALL, prompts=2, new_tokens=6)
    with pytest.raises(SystemExit, match="answered 10 tokens where 12 were due"):
        ppo_throughput.numbers(a_system("ours-fp32", [1.0]), work)


def test_compare_writes_ratios_floors_and_the_machine(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(figures, "take_turns", _only_rates_run)
    work = workload.Work(shape=SMALL, prompts=2, new_tokens=5)
    arguments = SimpleNamespace(device="cpu", repeats=2, output_dir=str(tmp_path))
    systems = [a_system("ours-fp32", [1.0, 3.0]), a_system("trl-fp32", [2.0, 6.0], core=0.5)]
    found = figures.compare(
        "W",
        systems,
        lambda s: ppo_throughput.numbers(s, work),
        lambda dtype, rate: {"generate": 0.1, "train": 0.2, "total": 0.3},
        ppo_throughput.peers_of,
        10,
        arguments,
    )
    path = figures.write("ppo", arguments, figures.machine([0], "cpu"), [found])
    kept = json.loads(path.read_text(encoding="utf-8"))
    ours = kept["results"][0]["systems"][0]
    assert ours["speed_against"]["total"]["trl-fp32"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    # TRL waited half of its time for the core: by CPU time the two are equal.
    assert ours["speed_against_by_cpu_time"]["trl-fp32"]["median"] == 1.0
    assert kept["machine"]["cores_used"] == [0] and kept["machine"]["torch"] == torch.__version__
    shown = capsys.readouterr().out
    assert "6.67 (3.33–10)" in shown  # tokens a second of 1 and 3 seconds
    assert "2 (1–3)      6.67" in shown  # seconds, and how many times the floor's 0.3 they are


def _only_rates_run(systems, repeats):
    systems[-1].turns = [{"fp32": 1e9, "bf16": 2e9}] * repeats


def test_a_worker_that_dies_is_told_with_its_log(tmp_path):
    system = measure.System("broken", "benchmarks.sides:no_such", {}, tmp_path, [0])
    with pytest.raises(SystemExit, match="broken, rank 0, ended early:(.|\n)*no_such"):
        measure.take_turns([system], repeats=1)


def test_worker_keeps_prints_apart_from_answers(tmp_path):
    code = (
        "from benchmarks.worker import Turns; import torch; t = Turns(); print('noise');"
        "t.ready(); t.done(x=1)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], input="go\n", capture_output=True, text=True, cwd=measure.ROOT
    )
    first, second = map(json.loads, found.stdout.splitlines())
    assert first["memory"] > 0 and second["x"] == 1 and second["seconds"] >= 0
    assert "noise" in found.stderr and worker.__doc__


@pytest.mark.slow
def test_a_second_start_finds_the_rows_of_the_first(tmp_path):
    command = [sys.executable, "benchmarks/data_loading.py", "--folder", str(tmp_path)]
    command += ["--rows", "20000", "--tokens", "120"]
    told = subprocess.run(
        command, check=True, cwd=measure.ROOT, capture_output=True, text=True
    ).stdout
    alone, first, second = (
        json.loads(line.split(" ", 1)[1])
        for line in told.splitlines()
        if line.startswith(("alone {", "first {", "second {"))
    )
    assert first["rows"] == second["rows"] == 20000
    assert first["tokens_per_row"] == second["tokens_per_row"] == pytest.approx(120, rel=0.2)
    assert second["core_seconds"] < 0.8 * first["core_seconds"] and alone["rows_per_second"] > 0
    assert "of the tokenizer's own speed" in told and not any(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize("python, kept", [(sys.executable, True), ("trl/bin/python", False)])
def test_a_side_finds_our_packages_and_trl_only_its_own(monkeypatch, tmp_path, python, kept):
    asked = []
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setattr(measure.subprocess, "Popen", lambda command, env, **_: asked.append(env))
    measure.System("ours", "m:f", {}, tmp_path, [0], python=python).start()
    assert asked[0]["PYTHONPATH"].split(":") == [str(measure.ROOT), "elsewhere"][: 1 + kept]
