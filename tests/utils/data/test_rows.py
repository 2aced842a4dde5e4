"""What becomes of rows that cannot be used."""

import json

import pytest

from utils.data.demonstrations import load_conversations
from utils.data.rows import BadRows, DataError


def test_too_many_bad_rows_are_named_the_first_twenty_and_the_rest_counted():
    bad = BadRows()
    for number in range(1, 26):
        bad.add(f"f.jsonl:{number}", "blank")
    bad.seen = 1000
    with pytest.raises(DataError) as caught:
        bad.finish("training data")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("training data: 25 bad row(s) of 1000, more than --max_bad_rows 0 ")
    assert lines[1:21] == [f"f.jsonl:{number}: blank" for number in range(1, 21)]
    assert lines[21] == "... and 5 more" and "--max_bad_rows 0.025" in lines[22]
    assert len(caught.value.problems) == 25 and len(bad) == 0


def test_bad_rows_left_out_are_kept_in_a_strict_report_once(tmp_path, capsys):
    report = tmp_path / "out" / "bad.jsonl"
    for extra in (0, 1):  # a resumed run reads the same rows again, and perhaps others
        bad = BadRows(1.0, str(report))
        bad.add("f:1", "blank", {"a": ""})
        bad.add("f:2", "surrogate", {"a": "\ud83d"})
        bad.add("f:3", "not finite", {"a": float("nan")})
        for number in range(extra):
            bad.add(f"g:{number}", "blank", {})
        bad.seen = 10
        assert bad.finish("training data") == 3 + extra and bad.finish("again") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == (
        f"training data: left out 3 bad row(s) of 10, kept in {report}; the first: f:1: blank"
    )

    def refuse(name):
        raise AssertionError(name)

    lines = report.read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["where"] for row in rows] == ["f:1", "f:2", "f:3", "g:0"]
    assert rows[0] == {"where": "f:1", "reason": "blank", "row": {"a": ""}}
    assert rows[1]["row"] == {"a": "\ud83d"} and rows[2]["row"] == '{"a": NaN}'


@pytest.mark.parametrize("empty, broken, stops", [(8, 2, False), (9, 2, True)])
def test_up_to_their_share_bad_rows_are_left_out(tmp_path, empty, broken, stops):
    """As Alpaca's 28 empty outputs of 52,002; lines that cannot be read count as rows."""
    good = {"instruction": "Name a colour.", "input": "", "output": "Blue."}
    lines = [json.dumps(good)] * (1000 - empty - broken)
    lines += [json.dumps({**good, "output": ""})] * empty + ["{"] * broken
    path = tmp_path / "alpaca.jsonl"
    path.write_text("\n".join(lines))
    bad = BadRows(0.01, str(tmp_path / "bad.jsonl"))
    found = load_conversations([str(path)], bad=bad)
    assert len(found) == 1000 - empty - broken
    if stops:
        with pytest.raises(DataError, match=r"11 bad row\(s\) of 1000.*"):
            bad.finish("sft_data")
    else:
        assert bad.finish("sft_data") == 10
        kept = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
        assert sum("output is empty" in row["reason"] for row in kept) == empty
