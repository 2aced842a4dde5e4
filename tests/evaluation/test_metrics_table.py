"""docs/metrics.md beside the registry it is made from."""

from evaluation import metrics_table


def test_the_page_holds_the_table_of_now():
    page = metrics_table.PAGE.read_text(encoding="utf-8")
    assert metrics_table.updated(page) == page, "run python -m evaluation.metrics_table"


def test_only_what_is_between_the_markers_changes(monkeypatch):
    monkeypatch.setattr(metrics_table, "table", lambda: "new\n")
    page = f"before {metrics_table.BEGIN} old {metrics_table.END} after {metrics_table.END}"
    expected = f"before {metrics_table.BEGIN}\nnew\n{metrics_table.END} after {metrics_table.END}"
    assert metrics_table.updated(page) == expected
