"""Metrics and answers in the trackers of other programs."""

import json
import sys
from types import SimpleNamespace

import pytest

from step1_sft.config import SFTConfig
from tests.utils.settings.test_command_line import NEEDED, problems_of
from utils import report as reporting
from utils import tracking

ROWS = [{"prompt": "a", "score": 1.0}, {"prompt": "b", "score": 2.0}]
STEPS = [
    {"step": 1, "metrics": {"score": 0.5}, "tables": {"answers": ROWS}},
    {"step": 2, "metrics": {"eval/score:x": 0.75}, "tables": {}},
]
FAKE = """
import json, os, sys, time
def tell(name):
    def call(*given, **named):
        with open(os.environ["TOLD"], "a") as file:
            print(name, json.dumps([given, named]), file=file)
    return call
init, log, finish, Table = map(tell, ("init", "log", "finish", "Table"))
"""


class Library:
    """Notes what is called, and with what."""

    def __init__(self):
        self.told = []

    def __getattr__(self, name):
        def call(*given, **named):
            self.told.append((name, given, named))
            info = SimpleNamespace(run_id=named.get("run_id", "of mlflow"))
            return SimpleNamespace(info=info, given=given)

        return call


def begin(resumed: bool) -> dict:
    settings = {"seed": 3, "long": "x" * 9999}
    return {"name": "tiny/step3_ppo", "settings": settings, "resumed": resumed}


@pytest.mark.parametrize("name", tracking.TRACKERS)
def test_a_tracker_gets_settings_metrics_and_tables_and_a_resumed_run_goes_on(
    name, monkeypatch, tmp_path
):
    def told(*records) -> list:
        library = Library()
        monkeypatch.setitem(sys.modules, name, library)
        tracking.follow(iter(map(json.dumps, records)), name, tmp_path / "tracking.json")
        return library.told

    def known() -> str:
        return json.loads((tmp_path / "tracking.json").read_text())[name]

    first = told(begin(False), *STEPS, {"whole": True})
    called = {call: (given, named) for call, given, named in first}
    if name == "mlflow":
        assert called["start_run"] == ((), {"run_name": "tiny/step3_ppo"})
        assert called["log_params"][0] == ({"seed": "3", "long": "x" * 500},)
        sent = [(*given, named["step"]) for call, given, named in first if call == "log_metrics"]
        assert sent == [({"score": 0.5}, 1), ({"eval/score_x": 0.75}, 2)]
        columns = {"prompt": ["a", "b"], "score": [1.0, 2.0]}
        assert called["log_table"] == ((columns, "answers_1.json"), {})
        end, broken = ("end_run", ("FINISHED",), {}), ("end_run", ("FAILED",), {})
    else:
        assert called["init"][1]["config"] == begin(False)["settings"]
        logged = [(*given, named["step"]) for call, given, named in first if call == "log"]
        table = logged[0][0].pop("answers").given
        assert logged == [({"score": 0.5}, 1), ({"eval/score:x": 0.75}, 2)]
        assert table == (["prompt", "score"], [["a", 1.0], ["b", 2.0]])
        code = {"exit_code": 0} if name == "wandb" else {}
        end, broken = ("finish", (), code), ("finish", (), {n: 1 for n in code})
    assert first[-1] == end
    was = known()
    resumed = told(begin(True), STEPS[1])
    assert resumed[-1] == broken, "the run broke off"
    assert known() == was and was in str(resumed[0]), "the same tracked run"
    told(begin(False))
    assert name == "mlflow" or known() != was, "a new run in the same folder"


@pytest.fixture
def started(monkeypatch, tmp_path):
    """(a report with a tracker, whose library says `more` as well; what it warns of)"""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))

    def start(more: str):
        (tmp_path / "wandb.py").write_text(FAKE + more)
        said, report = [], reporting.Report(str(tmp_path / "out"), 10, False)
        report.tracking = tracking.Tracking(
            "wandb", str(tmp_path / "out"), {"seed": 3}, False, said.append
        )
        return report, said

    return start


def test_numbers_and_tables_arrive_by_another_process(started, tmp_path):
    report, said = started("")
    report.table("answers", ROWS)
    report.table("none", [])
    report.log(1, {"seconds": 0.5, "grad_norm": float("nan")})
    report.log(2, {"seconds": 0.75})
    report.close()
    lines = [line.split(" ", 1) for line in (tmp_path / "told").read_text().splitlines()]
    assert [name for name, _ in lines] == ["init", "Table", "log", "log", "finish"]
    logged = [json.loads(rest) for name, rest in lines if name == "log"]
    assert logged == [
        [[{"seconds": 0.5, "answers": None}], {"step": 1}],
        [[{"seconds": 0.75}], {"step": 2}],
    ]
    assert not said


@pytest.mark.parametrize(
    "fault, why",
    [
        ("def log(*_, **__): raise OSError('no network')", "ended with code 1"),
        ("def init(*_, **__): time.sleep(99)", "has not taken 5 records"),
        ("def finish(*_, **__): time.sleep(99)", "was not done 0 s after the run"),
    ],
)
def test_a_tracker_that_fails_or_hangs_is_told_once_and_costs_no_time(
    started, tmp_path, monkeypatch, fault, why
):
    monkeypatch.setattr(tracking, "WAITING", 5)
    monkeypatch.setattr(tracking, "SECONDS_TO_END", 0.3)
    report, said = started(fault)
    process = report.tracking.process
    report.table("answers", ROWS)
    report.log(1, {"seconds": 0.5})
    if "init" in fault:
        for step in range(2, 9):  # each more than a pipe holds
            report.table("answers", [{"answer": "x" * 100_000}])
            report.log(step, {"seconds": 0.5})
    if "log" in fault:
        process.wait(20)
        report.log(2, {"seconds": 0.5})
        assert "no network" in (tmp_path / "out/tracking.log").read_text()
    report.close()
    assert len(said) == 1 and why in said[0] and str(tmp_path / "out/tracking.log") in said[0]
    assert process.wait(20) != 0, "nothing of it is left"
    steps = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert len(steps) == {"init": 8, "log": 2}.get(fault[4:].partition("(")[0], 1)


def test_what_is_not_installed_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = problems_of(SFTConfig, [*NEEDED[SFTConfig], "--track", "mlflow"])
    assert problem.startswith("track='mlflow': it is not installed: pip install mlflow")
    (problem,) = problems_of(SFTConfig, [*NEEDED[SFTConfig], "--track", "paper"])
    assert "track=paper is not one of (nothing), wandb, mlflow, trackio" in problem
