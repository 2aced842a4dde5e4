"""What Weights & Biases has written, by its own library, read from the file of the run."""

import json
import os
import subprocess
import sys

import pytest

from utils import report as reporting
from utils import tracking

PYTHON = os.environ.get("TRACK_PYTHON", sys.executable)  # of an environment with wandb
ROWS = [{"prompt": "a", "score": 1.0}, {"prompt": "王", "score": 2.0}]
# A .wandb file is a log of LevelDB's: after 7 bytes of header, blocks of 32 KiB with records of
# checksum (4 bytes), length (2), type (1: whole, 2 to 4: first, middle and last part), contents.
# https://github.com/google/leveldb/blob/main/doc/log_format.md
READ = """
import json, sys
from wandb.proto.wandb_internal_pb2 import Record
data, at, whole = open(sys.argv[1], "rb").read(), 7, b""
while at < len(data):
    if 32768 - at % 32768 < 7:
        at += 32768 - at % 32768
        continue
    length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
    whole += data[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):
        record, whole = Record.FromString(whole), b""
        which = record.WhichOneof("record_type")
        if which == "history":
            items = [(i.key or "/".join(i.nested_key), i.value_json) for i in record.history.item]
            row = {name: json.loads(value) for name, value in items}
            print(json.dumps(["history", record.history.step.num, row]))
        elif which == "run":
            settings = {i.key or i.nested_key[0]: i.value_json for i in record.run.config.update}
            print(json.dumps(["run", record.run.run_id, settings]))
        elif which == "exit":
            print(json.dumps(["exit", record.exit.exit_code, {}]))
"""


@pytest.fixture
def offline(monkeypatch, tmp_path):
    installed = subprocess.run([PYTHON, "-c", "import wandb"], capture_output=True)
    if installed.returncode:
        pytest.skip("wandb is not installed; TRACK_PYTHON names a Python that has it")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setattr(tracking.sys, "executable", PYTHON)


def follow(out, resumed: bool, logged: dict[int, dict], tables: dict) -> None:
    report, said = reporting.Report(str(out), 10, False), []
    report.tracking = tracking.Tracking("wandb", str(out), {"seed": 3}, resumed, said.append)
    for step, metrics in logged.items():
        for name, rows in tables.get(step, {}).items():
            report.table(name, rows)
        report.log(step, metrics)
    report.close()
    assert not said, (out / "tracking.log").read_text()


@pytest.mark.slow
def test_its_file_holds_each_number_by_step_and_name(offline, tmp_path):
    out = tmp_path / "tiny/step3_ppo"
    logged = {n: {"seconds": n / 8, "eval/grad_norm": 2.0**-n} for n in range(1, 400)}
    logged[7]["eval/grad_norm"] = float("nan")
    follow(out, False, logged, {1: {"answers": ROWS}})
    follow(out, True, {400: {"seconds": 50.0}}, {})
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and files[0].stat().st_size > 32768, "more than a block"
    told = []
    for file in files:
        read = [PYTHON, "-c", READ, file]
        lines = subprocess.run(read, stdout=subprocess.PIPE, text=True, check=True).stdout
        told.append([json.loads(line) for line in lines.splitlines()])
    known = json.loads((out / "tracking.json").read_text())["wandb"]
    for lines in told:
        assert [code for kind, code, _ in lines if kind == "exit"] == [0]
        ids = {what for kind, what, _ in lines if kind == "run"}
        assert ids == {known}, "a resumed run goes on in the same one"
    assert next(of for kind, _, of in told[0] if kind == "run")["seed"] == "3"
    history = {what: of for kind, what, of in told[0] if kind == "history"}
    found = {
        step: {n: v for n, v in row.items() if n in logged[step]} for step, row in history.items()
    }
    del logged[7]["eval/grad_norm"]  # there is no such number in JSON
    assert found == logged
    (kept,) = tmp_path.glob(f"wandb/offline-run-*/files/{history[1]['answers/path']}")
    content = json.loads(kept.read_text())
    assert content["columns"] == ["prompt", "score"]
    assert content["data"] == [list(row.values()) for row in ROWS]
    assert [(w, of["seconds"]) for kind, w, of in told[1] if kind == "history"] == [(400, 50.0)]
