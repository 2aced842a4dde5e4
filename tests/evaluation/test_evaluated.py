"""Results of other programs on a run's page."""

import json

from evaluation import evaluated


def test_any_result_becomes_tables():
    content = {
        "prompts": 512,
        "share": 0.123456,
        "interval": [0.1, 0.25],
        "win_rate": [0.5, 0.4, 0.625],
        "names": ["a", "b"],
        "models": [{"name": "a", "elo": 3.0}, {"name": "b", "wins": {"a": 1}}],
        "by": {"short": {"n": 1}, "long": {"n": 2, "m": None}},
        "deep": {"of": {"x": 1.5}, "y": 2},
    }
    plain, *more = evaluated.tables_of(content)
    assert plain["rows"] == [
        ["prompts", "512"],
        ["share", "0.1235"],
        ["interval", "0.1 to 0.25"],
        ["win_rate", "0.5 (0.4 to 0.625)"],
        ["names", "a, b"],
    ]
    shown = {table["title"]: (table["header"], table["rows"]) for table in more}
    assert shown["models"] == (["name", "elo", "wins"], [["a", "3", ""], ["b", "", "a 1"]])
    assert shown["by"] == (["", "n", "m"], [["short", "1", ""], ["long", "2", "–"]])
    assert shown["deep"][1] == [["y", "2"]] and shown["deep: of"][1] == [["x", "1.5"]]


def test_a_long_list_says_that_it_was_cut(tmp_path):
    rows = [{"n": n} for n in range(evaluated.ROWS + 5)]
    (tmp_path / "win_rate.json").write_text(json.dumps({"pairs": rows}))
    (found,) = evaluated.of_run(tmp_path)
    (table,) = found["tables"]
    assert found["title"] == "win rates" and len(table["rows"]) == evaluated.ROWS
    assert table["title"] == f"pairs (the first {evaluated.ROWS} of {evaluated.ROWS + 5})"
