"""What a run writes and prints."""

import json

from utils import report as reporting


def test_every_step_is_written_at_once_and_is_strict_json(tmp_path, capsys):
    report = reporting.Report(str(tmp_path), log_every=10, tensorboard=True)
    report.expect(30)
    for step in range(1, 31):
        report.log(
            step,
            {"seconds": 1.0 / step, "grad_norm": float("nan")},
            show=("seconds", "learning_rate"),
        )
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == step, "a killed run keeps all it measured"

    def refuse(constant):
        raise AssertionError(constant)

    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert rows[3] == {"step": 4, "seconds": 0.25, "grad_norm": None}
    report.close()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed] == ["1/30", "10/30", "20/30", "30/30"]
    assert printed[1].endswith("seconds 0.1")
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_numbers_for_people():
    assert [reporting.brief(x) for x in (0.00012345, 3.14159, 12345.6, 1e9, 7)] == [
        "0.0001234",
        "3.142",
        "12346",
        "1e+09",
        "7",
    ]
    assert (
        reporting.table([("a", "1"), ("bcd", "")], ("x", "yy")) == "x    yy\n---  --\na    1\nbcd"
    )


def test_curves_are_labelled_by_what_they_are(tmp_path, monkeypatch):
    """Whatever --kl_estimator made of `kl`: here the reward is charged for k2."""
    from matplotlib import pyplot

    from evaluation import summary

    kls = {"kl_k1": [0.5, -0.25], "kl_k2": [0.75, 1.0], "kl_k3": [1.5, 2.0]}
    rows = [
        {"step": i + 1, "loss": 1.0, "score": 0.0, "kl": kls["kl_k2"][i]}
        | {name: values[i] for name, values in kls.items()}
        for i in range(2)
    ]
    monkeypatch.setattr(summary, "read_metrics", lambda folder: rows)
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    summary.plot(tmp_path, tmp_path, {"ppo": tmp_path})
    (axis,) = (a for a in drawn[0].axes if a.get_title().endswith("KL to the reference"))
    found = {f"kl_{line.get_label()}": line.get_ydata().tolist() for line in axis.lines}
    assert found == kls
