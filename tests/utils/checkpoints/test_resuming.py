"""What --resume and --overwrite mean: which checkpoint, which refusal, what is deleted."""

import json
import re
import signal
from dataclasses import asdict, replace
from datetime import date
from types import SimpleNamespace

import pytest

from step1_sft.config import SFTConfig
from tests.helpers import small_runs
from utils.checkpoints import manifest, resuming
from utils.checkpoints.checkpoints import Checkpoints
from utils.run import output_of
from utils.settings import command_line


@pytest.fixture
def config(tmp_path):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield SFTConfig(
        output_dir=str(tmp_path / "out"), model_name_or_path="m", sft_data=["d"], learning_rate=1e-3
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)


def save(config, step: int, unknown: str = ""):
    """A checkpoint with one file and no engine, from before there was a setting `unknown`."""
    folder = manifest.folder_of(config.output_dir, step)
    temporary = folder.with_name(f".{folder.name}.writing")
    temporary.mkdir(parents=True)
    (temporary / "state").write_text(f"of step {step}")
    record = {
        "format": manifest.FORMAT,
        "step": step,
        "world_size": 1,
        "config": {name: value for name, value in asdict(config).items() if name != unknown},
        "facts": {},
    }
    manifest.seal(temporary, folder, record | {"files": manifest.listed(temporary, {})})
    return folder


def test_an_empty_folder_begins_and_a_used_one_asks(config, tmp_path, capsys):
    output_of(config).check()
    assert output_of(config).find() is None
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text("")  # of a run that ended before its first step
    output_of(config).check()
    for name in ("metrics.jsonl", "checkpoints", "result.json"):
        if name == "checkpoints":
            save(config, 2)
        else:
            (out / name).write_text("{}\n")
        with pytest.raises(SystemExit) as ended:
            output_of(config).check()
        said = capsys.readouterr().err
        assert ended.value.code == 2 and "--resume auto" in said and "--overwrite" in said
        assert name in said


def test_overwrite_deletes_the_run_and_leaves_other_files(config, tmp_path):
    out = tmp_path / "out"
    save(config, 2)
    for name in ("metrics.jsonl", "result.json", "notes.txt", "model.safetensors"):
        (out / name).write_text("x")
    config = replace(config, overwrite=True)
    output_of(config).check()
    assert output_of(config).find() is None
    assert {p.name for p in out.iterdir()} == {"notes.txt", "model.safetensors"}


def test_a_finished_run_is_left_as_it_is(config, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/result.json").write_text("{}")
    command_line.save(config, config.output_dir, 1)
    with pytest.raises(SystemExit) as ended:
        output_of(replace(config, resume="auto", log_every=3)).check()
    assert ended.value.code == 0 and "nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        output_of(replace(config, resume="auto", epochs=5.0)).check()
    assert ended.value.code == 2 and "epochs: 2.0 → 5.0" in capsys.readouterr().err
    output_of(replace(config, resume="auto", epochs=5.0, resume_anyway=True)).check()


@pytest.mark.parametrize("damage", ["lost", "flipped", "no manifest"])
def test_the_newest_whole_checkpoint_is_taken(config, capsys, damage):
    folders = [save(config, step) for step in (2, 4, 10)]
    auto = replace(config, resume="auto")
    assert output_of(auto).find().step == 10
    for folder, left in ((folders[2], 4), (folders[1], 2)):
        name = "manifest.json" if damage == "no manifest" else "state"
        data = bytearray((folder / name).read_bytes())
        (folder / name).unlink()
        if damage == "flipped":
            data[3] ^= 1
            (folder / name).write_bytes(data)
        assert output_of(auto).find().step == left
        assert f"{folder} is damaged" in capsys.readouterr().out
    (folders[0] / "state").unlink()
    with pytest.raises(SystemExit, match="none of the 3 checkpoints"):
        output_of(auto).find()


def test_unfinished_ones_are_removed_and_never_read(config, tmp_path):
    save(config, 2)
    checkpoints = tmp_path / "out/checkpoints"
    for name in (".step-000004.writing", ".step-000001.deleting"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "state").write_text("half")
    assert output_of(replace(config, resume="auto")).find().step == 2
    assert [p.name for p in checkpoints.iterdir()] == ["step-000002"]


def test_a_setting_that_is_newer_than_the_checkpoint_was_at_its_default(config, capsys):
    save(config, 2, unknown="weight_decay")
    auto = replace(config, resume="auto")
    assert output_of(auto).find().step == 2
    with pytest.raises(SystemExit):
        output_of(replace(auto, weight_decay=0.5)).find()
    assert "weight_decay: 0.0 → 0.5" in capsys.readouterr().err


def test_a_changed_setting_is_shown_and_refused_where_it_changes_what_is_learned(config, capsys):
    save(config, 2)
    auto = replace(config, resume="auto")
    changed = replace(auto, learning_rate=2e-3, seed=7, sft_data=["d", "e"])
    with pytest.raises(SystemExit) as ended:
        output_of(changed).find()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "--resume_anyway" in said
    for line in ("learning_rate: 0.001 → 0.002", "seed: 42 → 7", "sft_data: ['d'] → ['d', 'e']"):
        assert line in said
    assert output_of(replace(changed, resume_anyway=True)).find().step == 2
    assert "--resume_anyway: seed: 42 → 7" in capsys.readouterr().out
    assert output_of(replace(auto, zero_stage=3, micro_batch_size=2, log_every=1)).find().step == 2
    said = capsys.readouterr().out
    assert "zero_stage: 0 → 3: the same path up to rounding" in said and "log_every" not in said


def test_the_day_of_a_run_is_the_one_it_began_on(config, tmp_path, monkeypatch, capsys):
    def clock(day):
        today = SimpleNamespace(today=lambda: date.fromisoformat(day))
        monkeypatch.setattr(resuming, "datetime", SimpleNamespace(date=today))

    clock("2026-01-31")
    config.date = resuming.date_of(config.date)
    assert config.date == "2026-01-31"
    folder = save(config, 2)
    command_line.save(config, tmp_path / "out", 1)
    clock("2026-02-01")
    again = replace(config, date="", resume="auto")
    again.date = resuming.date_of(again.date, output_of(again).find())
    assert again.date == "2026-01-31"
    (tmp_path / "out/result.json").write_text("{}")  # and a finished one is finished
    with pytest.raises(SystemExit) as ended:
        output_of(replace(again, date="")).check()
    assert ended.value.code == 0

    flags = ["--config", str(tmp_path / "out/config.yaml"), "--output_dir", str(tmp_path / "new")]
    repeated = command_line.build(SFTConfig, flags, 1)
    repeated.date = resuming.date_of(repeated.date, None)
    assert repeated.date == "2026-01-31"
    other = replace(again, date="2026-02-01")
    with pytest.raises(SystemExit):
        output_of(other).find()
    assert "date: 2026-01-31 → 2026-02-01" in capsys.readouterr().err
    new = replace(config, date="", output_dir=str(tmp_path / "other"), resume=str(folder))
    new.date = resuming.date_of(new.date, output_of(new).find())
    assert new.date == "2026-01-31", "a branch of a run is of its day"


def test_differences_go_by_what_each_setting_says(config):
    """A setting that is unknown today counts as one that changes what is learned."""
    saved = asdict(config) | {"seed": 7, "packing": "off", "keep_last": 9, "gone": 1}
    assert resuming.differences(saved, asdict(config), config.on_resume()) == (
        ["gone: 1 → (not set)", f"seed: 7 → {config.seed}"],
        ["packing: off → auto"],
    )


def test_a_checkpoint_named_by_hand(config, tmp_path, capsys):
    folders = [save(config, step) for step in (2, 4)]
    elsewhere = replace(config, resume=str(folders[0]), output_dir=str(tmp_path / "branch"))
    assert output_of(elsewhere).find().step == 2
    assert output_of(replace(elsewhere, resume=config.output_dir)).find().step == 4
    here = replace(config, resume=str(folders[0]))
    with pytest.raises(SystemExit) as ended:
        output_of(here).find()
    assert ended.value.code == 2
    assert re.search(r"step-000004.*--overwrite", capsys.readouterr().err)
    assert output_of(replace(here, overwrite=True)).find().step == 2
    assert manifest.steps_in(config.output_dir) == [2]
    with pytest.raises(SystemExit, match="no checkpoint there"):
        output_of(replace(config, resume=str(tmp_path))).find()


def run_of(config, losses: list[float]) -> Checkpoints:
    """A main loop without engines, whose evaluations give `losses`."""
    run = small_runs.follow(config)
    with run:
        for step, loss in enumerate(losses, 1):
            run.after_step(step, {"eval/loss": loss})
    return run


def test_the_last_and_the_best_stay(config):
    losses = [5.0, 3.0, 4.0, 2.0, float("nan"), 6.0, 6.0, 6.0, 6.0]
    run_of(replace(config, save_every=3, keep_last=1, keep_best="eval/loss:min"), losses)
    assert manifest.steps_in(config.output_dir) == [9, 4]
    config = replace(config, output_dir=config.output_dir + "2")
    run_of(replace(config, save_every=4, keep_last=0, keep_best="eval/loss:max"), losses)
    assert manifest.steps_in(config.output_dir) == [8, 6, 4, 1]
    assert manifest.read(manifest.folder_of(config.output_dir, 8))["facts"]["best"] == {
        "metric": "eval/loss",
        "value": 6.0,
        "step": 6,
    }


def test_the_clock_saves_too(config, monkeypatch):
    now = 1e9
    monkeypatch.setattr("utils.checkpoints.checkpoints.time.time", lambda: now)
    with small_runs.follow(replace(config, save_every_minutes=2.0)) as run:
        for step in range(1, 9):
            now += 50.0
            run.after_step(step, {})
    assert manifest.steps_in(config.output_dir) == [6, 3]


def test_a_disk_that_is_full_costs_the_checkpoint_and_not_the_run(config, tmp_path, monkeypatch):
    run = run_of(replace(config, save_every=2), [1.0] * 2)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write_tensors", full)
    with run:
        run.after_step(4, {})
    assert "checkpoint at step 4 could not be written" in run.report.lines[-1]
    assert "No space left" in run.report.lines[-1] and "steps: 2" in run.report.lines[-1]
    assert [p.name for p in (tmp_path / "out/checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize(
    "flags, problem",
    [
        (dict(keep_best="eval/loss"), ": not METRIC:min or METRIC:max"),
        (dict(keep_best=":min"), ": not METRIC:min or METRIC:max"),
        (dict(resume="nowhere"), "resume='nowhere': neither auto"),
        (dict(resume="auto", overwrite=True), "give one of them"),
        (dict(resume_anyway=True), "resume_anyway=True is read only with --resume"),
        (dict(keep_last=-1), "keep_last=-1 must be at least 0"),
        (dict(save_every_minutes=-1.0), "save_every_minutes=-1.0 must be at least 0"),
    ],
)
def test_flags_that_contradict_each_other(config, flags, problem):
    assert config.problems(1) == []
    assert any(problem in found for found in replace(config, **flags).problems(1))


def test_metrics_are_kept_up_to_the_step(tmp_path):
    from utils.report import Report

    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in range(6)) + '{"step": 6, "lo')
    report = Report(str(tmp_path), 10, False, resumed_at=3)
    report.log(4, {"grad_norm": 1.0})
    report.close()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]
