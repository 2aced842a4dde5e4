"""Checkpoints written while training goes on: of the step they were made at, all or nothing."""

import os
import signal
import threading
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from step1_sft.config import SFTConfig
from tests.helpers import small_runs
from utils.checkpoints import background, manifest
from utils.checkpoints.model_folder import ModelFolder
from utils.data import chat_template
from utils.distributed import preemption
from utils.distributed.process_group import StopRun


@pytest.fixture
def config(tmp_path):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield SFTConfig(output_dir=str(tmp_path / "out"), save_every=2)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def held(monkeypatch):
    """Writers wait until it is set."""
    event, write = threading.Event(), manifest.write_tensors

    def waiting(*arguments):
        assert event.wait(60)
        return write(*arguments)

    monkeypatch.setattr(manifest, "write_tensors", waiting)
    yield event
    event.set()


def folders(config) -> list[str]:
    return sorted(p.name for p in manifest.folder_of(config.output_dir, 0).parent.iterdir())


def whole(config, step: int) -> dict:
    """The record of a checkpoint that is what its manifest says."""
    folder = manifest.folder_of(config.output_dir, step)
    record = manifest.read(folder)
    manifest.verify(folder, record)
    return record


def test_what_is_written_is_the_state_of_its_step(config, held):
    weights, state = small_runs.Weights(), small_runs.State()
    run = small_runs.follow(config, {"actor": weights}, {"thing": state})
    with run:
        for step in range(1, 4):
            torch.manual_seed(step)
            weights.tensor.fill_(step)
            state.seen.append(step)
            run.facts.setdefault("losses", []).append(0.5 * step)
            run.after_step(step, {})
            assert folders(config) == [".step-000002.writing"] if step > 1 else True
        held.set()
        run._pending.writing.join()
        run.after_step(3, {})
        assert folders(config) == ["step-000002"], "sealed at the first boundary after the writing"
    record, folder = whole(config, 2), manifest.folder_of(config.output_dir, 2)
    assert (folder / "weights/actor/weights.txt").read_text() == "[2.0, 2.0, 2.0, 2.0]"
    assert record["state"] == {"thing": {"seen": [1, 2]}}
    assert record["facts"]["losses"] == [0.5, 1.0] and record["step"] == 2
    reader = manifest.Reader(folder, ["rank-0000-of-0001.safetensors"])
    torch.manual_seed(2)
    assert torch.equal(reader.whole("random", "0", "torch"), torch.get_rng_state())
    assert set(record["files"]) == {"weights/actor/weights.txt", "rank-0000-of-0001.safetensors"}


def test_a_checkpoint_waits_for_the_one_before_it(config, held):
    run = small_runs.follow(config)
    with run:
        run.after_step(2, {})
        threading.Timer(0.2, held.set).start()
        run.after_step(4, {})
        assert "step-000002" in folders(config)
    assert folders(config) == ["step-000002", "step-000004"]
    assert len(run.report.lines) == 2
    assert all("written in the background" in line for line in run.report.lines)


def test_the_memory_of_the_copies_is_taken_once():
    copies, tensors = background.Copies(), [torch.rand(3, 5), torch.arange(4)]
    addresses = []
    for turn in range(2):
        tensors[0] += turn
        copies.begin()
        found = [copies(tensors[0]), copies(tensors[1]), copies(tensors[0], torch.bfloat16)]
        assert torch.equal(found[0], tensors[0]) and torch.equal(found[1], tensors[1])
        assert torch.equal(found[2], tensors[0].bfloat16())
        addresses.append([t.data_ptr() for t in found])
    assert addresses[0] == addresses[1] and len({*addresses[0]}) == 3
    copies.begin()
    assert torch.equal(copies(tensors[1]), tensors[1]), "another tensor than before in its place"


def test_a_models_folder_is_of_the_moment_it_was_copied(tiny, tmp_path):
    base = str(tiny / "base_model")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base),
        chat_template.load_tokenizer(base),
    )
    model.config.reward_bias = 1.0
    expected = {name: p.clone() for name, p in model.named_parameters()}
    write = ModelFolder(model, tokenizer, "").snapshot(background.Copies())
    model.config.reward_bias = 2.0
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    write(tmp_path / "model")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert found.config.reward_bias == 1.0
    for name, p in found.named_parameters():
        assert torch.equal(p, expected[name]), name


def test_the_run_goes_on_where_the_background_cannot_write(config, monkeypatch):
    write, full = manifest.write_tensors, threading.Event()

    def writing(*arguments):
        if full.is_set():
            raise OSError(28, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(manifest, "write_tensors", writing)
    run = small_runs.follow(replace(config, save_every=1))
    with run:
        run.after_step(1, {})
        run._pending.writing.join()
        full.set()
        run.after_step(2, {})
        run._pending.writing.join()
        full.clear()
        run.after_step(3, {})
        assert "checkpoint at step 2 could not be written" in run.report.lines[1]
        assert "No space left" in run.report.lines[1] and "steps: 1." in run.report.lines[1]
    assert folders(config) == ["step-000001", "step-000003"]


def test_a_mistake_in_the_background_is_no_full_disk(config, monkeypatch):
    monkeypatch.setattr(manifest, "write_tensors", lambda *arguments: 1 / 0)
    run = small_runs.follow(config)
    run.after_step(2, {})
    with pytest.raises(ZeroDivisionError):
        run.seal()


def test_without_the_memory_training_waits(config, monkeypatch):
    monkeypatch.setattr(background.host_memory, "free_bytes", lambda: 30_000)
    run = small_runs.follow(config)
    needed = run._bytes_to_copy()
    assert 15_000 < needed < 30_000, "it would fit, but not with a margin"
    run.after_step(2, {})
    assert folders(config) == ["step-000002"]
    run.after_step(4, {})
    assert [line.split(":")[0] for line in run.report.lines] == [
        "checkpoints are written while training waits",
        f"checkpoint {manifest.folder_of(config.output_dir, 2)}",
        f"checkpoint {manifest.folder_of(config.output_dir, 4)}",
    ]
    assert f"takes {needed / 1e9:.3g} GB" in run.report.lines[0]
    assert "3e-05 GB are free" in run.report.lines[0]
    assert "--save_in_background on" in run.report.lines[0]
    assert "in the background" not in run.report.lines[1]
    for how in ("on", "off"):
        run = small_runs.follow(replace(config, save_in_background=how))
        with run:
            run.after_step(6, {})
        assert len(run.report.lines) == 1
        assert ("in the background" in run.report.lines[0]) == (how == "on")


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_leaves_both_checkpoints_whole(config, held, signal_name):
    run = small_runs.follow(config)
    with pytest.raises(SystemExit) as ended, run:
        run.after_step(2, {})
        os.kill(os.getpid(), getattr(signal, signal_name))
        threading.Timer(0.2, held.set).start()
        run.after_step(3, {})
    assert ended.value.code == preemption.EXIT_CODE
    assert folders(config) == ["step-000002", "step-000003"]
    assert whole(config, 2)["step"] == 2 and whole(config, 3)["step"] == 3


def test_a_run_that_all_ranks_stop_seals_and_one_that_breaks_leaves_nothing_whole(config, held):
    for step, error, left in (
        (2, StopRun("bad"), ["step-000002"]),
        (4, OSError("x"), [".step-000004.writing", "step-000002"]),
    ):
        run = small_runs.follow(config)
        with pytest.raises(type(error)), run:
            run.after_step(step, {})
            if step == 2:
                threading.Timer(0.2, held.set).start()
            else:
                held.clear()
            raise error
        assert folders(config) == left


def test_the_best_stays_until_a_better_one_is_whole(config, held, monkeypatch):
    """Better than checkpoint 1 is step 3, found while checkpoint 2 is being written; its own
    checkpoint finds the disk full."""
    best = replace(config, keep_last=1, keep_best="eval/loss:min")
    with small_runs.follow(best) as run:
        held.set()
        run.after_step(1, {"eval/loss": 2.0})
        run._pending.writing.join()
        held.clear()
        run.after_step(2, {"eval/loss": 3.0})
        threading.Timer(0.2, held.set).start()
        seal = manifest.seal

        def full_from_step_3(temporary, folder, record):
            if record["step"] == 3:
                raise OSError(28, "No space left on device")
            seal(temporary, folder, record)

        monkeypatch.setattr(manifest, "seal", full_from_step_3)
        run.after_step(3, {"eval/loss": 1.0})
        assert folders(config) == [".step-000003.writing", "step-000001", "step-000002"]
    assert folders(config) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("how", ["on", "off"])
def test_a_best_one_that_was_not_written_is_not_remembered(config, monkeypatch, how):
    """Step 2 is the best and finds the disk full; step 1 must outlive step 3."""
    best = replace(config, keep_last=1, keep_best="eval/loss:min", save_in_background=how)
    seal = manifest.seal

    def full_at_step_2(temporary, folder, record):
        if record["step"] == 2:
            raise OSError(28, "No space left on device")
        seal(temporary, folder, record)

    monkeypatch.setattr(manifest, "seal", full_at_step_2)
    left = []
    with small_runs.follow(replace(best, save_every=1)) as run:
        for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 1.5)):
            run.after_step(step, {"eval/loss": loss})
            run.seal()
            left.append(folders(config))
    first, third, fourth = (f"step-00000{step}" for step in (1, 3, 4))
    assert left == [[first], [first], [first, third], [fourth]]
    assert whole(config, 4)["facts"]["best"]["step"] == 4
