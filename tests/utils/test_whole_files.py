"""Every writer on a full disk, a read-only one and below a file: what was whole stays whole."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import subprocess
from unittest import mock

import pytest
import torch

from evaluation import prompt_eval, summary
from evaluation.prompt_eval import Answer, PromptEvalConfig
from evaluation.questions import Question
from step1_sft.config import SFTConfig
from step2_reward import collect
from step3_ppo.checks.watch import Watch
from step3_ppo.config import PPOConfig
from step3_ppo.rollout import Rollout
from step3_ppo.state import State
from tests.helpers import small_runs
from utils import report as reporting
from utils import whole_files
from utils.checkpoints import manifest, model_folder
from utils.data import chat_template, toy_tasks
from utils.data import prompts as prompt_data
from utils.data.rows import BadRows
from utils.distributed import program
from utils.models import from_scratch
from utils.run import BadSteps
from utils.settings import command_line

LIMIT = 4096  # bytes of a file, where no disk can be made


@pytest.fixture(scope="module")
def model(tiny):
    from transformers import AutoModelForCausalLM

    folder = str(tiny / "base_model")
    return AutoModelForCausalLM.from_pretrained(folder), chat_template.load_tokenizer(folder)


# The writers: each (folder, amount) writes more of the same for a larger amount.


def config_yaml(folder, amount):
    names = [f"data{n}" for n in range(200 * amount)]
    command_line.save(SFTConfig(output_dir="o", sft_data=names), folder, 1)


def result_json(folder, amount):
    reporting.save_result(folder, {f"measure {n}": 1.0 for n in range(300 * amount)})


def state_json(folder, amount):
    State(kl_coef=0.1 * amount).snapshot(None)(folder)


def bad_step(folder, amount):
    tensor = torch.zeros(amount * 50, 20)
    rollout = Rollout(**{f.name: tensor for f in dataclasses.fields(Rollout)})
    config = PPOConfig(output_dir=str(folder))
    Watch(config, print, BadSteps(5, print, lambda: None)).dump(rollout, "a reason", 0)


def metrics_jsonl(folder, amount):
    report = reporting.Report(str(folder), 10**9, tensorboard=False, resumed_at=10**6)
    for step in range(40 * amount):
        report.log(step, {"seconds": 1.0, "critic_learning_rate": 2.0, "critic_grad_norm": 2.0})


def tensorboard(folder, amount):
    report = reporting.Report(str(folder), 10**9, tensorboard=True, resumed_at=10**6)
    for step in range(1, 300 * amount):
        report.log(step, {"seconds": 1.0})
    report.close()


def bad_rows_jsonl(folder, amount):
    bad = BadRows(1.0, str(folder / "bad_rows.jsonl"))
    for number in range(20 * amount):
        bad.add(f"f:{number}", "blank", {"a": "x" * 100})
    bad.finish("data")


def comparisons(folder, amount):
    config = collect.CollectConfig(output_file=str(folder / "c.jsonl"), output_dir=str(folder))
    prompts = [prompt_data.Prompt(({"role": "user", "content": "q"},), "f:1", {})] * 10 * amount
    sampled = [collect.Sampled("a", True), collect.Sampled("b", False)]
    lines = collect.rows_of(config, prompts, [sampled] * len(prompts))
    collect.write(config, lines, [[1.0, 0.0]] * len(prompts))


def toy_data(folder, amount):
    toy_tasks.write(folder, 0, demonstrations=20 * amount, prompts=20, held_out=5)


def answers(folder, amount):
    config = PromptEvalConfig(checkpoints=["m"], output_dir=str(folder))
    question = Question((), ("q",), "f:1")
    said = Answer("m", 1, ({"role": "assistant", "content": "x" * 1500 * amount},), 3, True)
    prompt_eval.write(config, [question], {"m": [[said]]}, "table")


def curves_png(folder, amount):
    with mock.patch.object(summary, "read_metrics", lambda folder: [{"step": 1, "loss": 1.0}]):
        summary.plot(folder, folder, {"ppo": folder})


def saved_model(folder, amount, model):
    model_folder.save(folder, {"model": model_folder.ModelFolder(*model, "settings")})


def new_model(folder, amount, model):
    size = 32 * amount
    texts = [f"word{n} and {n * n}" for n in range(400)]
    from_scratch.build(
        folder / "base",
        texts,
        vocab_size=400,
        hidden_size=size,
        layers=1,
        heads=2,
        intermediate_size=size,
        max_positions=64,
        seed=0,
    )


WRITERS = [
    config_yaml,
    result_json,
    state_json,
    bad_step,
    metrics_jsonl,
    tensorboard,
    bad_rows_jsonl,
    comparisons,
    toy_data,
    answers,
    curves_png,
    saved_model,
    new_model,
]
OF_ONE_SIZE = (state_json, curves_png)
GROWING = (metrics_jsonl, bad_rows_jsonl, tensorboard)  # logs, which may gain whole lines


# The disks.


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of 4 MB of its own; skipped where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder, leave: int) -> None:
    """Leave so many bytes free."""
    free = shutil.disk_usage(folder).free
    (folder / "filler").write_bytes(b"x" * max(0, free - leave))


@contextlib.contextmanager
def small_files():
    """No file may grow beyond LIMIT bytes: a full disk for whoever may not mount one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def snapshot(folder) -> dict:
    """{relative path: content} of all files but the filler."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "filler")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def call(writer, folder, amount, model):
    extra = (model,) if writer in (saved_model, new_model) else ()
    writer(folder, amount, *extra)


def assert_refused_and_whole(writer, folder, model, cause: str, amount: int = 3) -> None:
    before = snapshot(folder)
    with pytest.raises(OSError) as caught:
        call(writer, folder, amount, model)
    told = str(caught.value)
    assert "cannot write " in told and str(folder) in told and cause in told, told
    assert "(--output_" in told and "write elsewhere" in told, told
    after = snapshot(folder)
    if writer not in GROWING:
        new = {name for name in after if after[name] != before.get(name)}
        # Of several files some may be new by then, each of them whole.
        of_several = {"sft.jsonl", "prompts.jsonl", "held_out.jsonl", "answers.jsonl"}
        assert new <= of_several | {"c.result.json"}, new
        assert before.keys() <= after.keys()
    for name, content in after.items():
        assert ".writing" not in name, "half a file was left behind"
        if name.endswith(".jsonl"):
            assert all(map(json.loads, content.decode().splitlines()))
            if writer in GROWING:
                assert content.startswith(before.get(name, b""))


@pytest.mark.parametrize("writer", WRITERS, ids=lambda w: w.__name__)
def test_a_full_disk(writer, disk, model, capsys):
    call(writer, disk, 1, model)
    fill(disk, leave=0 if writer in OF_ONE_SIZE else 4096)
    assert_refused_and_whole(writer, disk, model, "No space left on device")
    (disk / "filler").unlink()
    call(writer, disk, 1, model)  # and once there is room, all is as ever


def test_a_full_disk_costs_the_checkpoint_that_is_written_in_the_background(disk, model):
    config = SFTConfig(output_dir=str(disk / "out"), save_every=1)
    parts = {".": model_folder.ModelFolder(*model, "settings")}
    with small_runs.follow(config, parts) as run:
        run.after_step(1, {})
        run._pending.writing.join()
        fill(disk, leave=8192)
        run.after_step(2, {})
        run._pending.writing.join()
        (disk / "filler").unlink()
        run.after_step(3, {})
        told = run.report.lines[1]
        assert "checkpoint at step 2 could not be written" in told and "steps: 1." in told
        assert "No space left on device" in told and "--output_dir" in told
    assert sorted(os.listdir(disk / "out/checkpoints")) == ["step-000001", "step-000003"]
    for step in (1, 3):
        folder = manifest.folder_of(disk / "out", step)
        manifest.verify(folder, manifest.read(folder))
        assert (folder / "weights/model.safetensors").exists()


@pytest.mark.parametrize(
    "writer", [w for w in WRITERS if w not in (tensorboard, state_json)], ids=lambda w: w.__name__
)
def test_a_limit_on_file_size(writer, tmp_path, model, capsys):
    with small_files():
        assert_refused_and_whole(writer, tmp_path, model, "File too large", amount=30)


@pytest.mark.parametrize("writer", WRITERS, ids=lambda w: w.__name__)
def test_a_read_only_disk(writer, disk, model, capsys):
    call(writer, disk, 1, model)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert_refused_and_whole(writer, disk, model, "Read-only file system")


@pytest.mark.parametrize(
    "writer", [w for w in WRITERS if w is not curves_png], ids=lambda w: w.__name__
)
def test_a_folder_that_is_missing_is_made_and_a_file_in_its_place_is_told(writer, tmp_path, model):
    call(writer, tmp_path / "new" / "folder", 1, model)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError) as caught:
        call(writer, tmp_path / "file" / "folder", 1, model)
    assert "cannot write " in str(caught.value) and "a part of that path is a file" in str(
        caught.value
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_ends_with_the_message_and_no_traceback(monkeypatch, capsys, tmp_path):
    codes = []
    monkeypatch.setattr(program.os, "_exit", codes.append)
    (tmp_path / "file").write_text("")
    program.run(lambda: whole_files.write_text(tmp_path / "file" / "x", "text"))
    told = capsys.readouterr().err
    assert codes == [1] and told.startswith("error: cannot write ") and "Traceback" not in told


def test_a_program_that_fails_leaves_what_was_there(tmp_path):
    whole_files.write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), whole_files.writing(tmp_path / "a") as file:
        file.write("new" * 10_000)
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_an_unfinished_line_is_taken_back(tmp_path):
    """Where the system takes a part of a line and then no more."""

    class Full:
        def __init__(self):
            self.content = bytearray(b"old\n")

        def seek(self, offset, whence):
            return len(self.content)

        def write(self, data):
            if len(self.content) > 6:
                raise OSError(28, "No space left on device")
            self.content += bytes(data[:3])
            return 3

        def truncate(self, size):
            del self.content[size:]

    full = Full()
    with pytest.raises(OSError):
        whole_files.append(full, "a line of some length\n")
    assert full.content == b"old\n"
