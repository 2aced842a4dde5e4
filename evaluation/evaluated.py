"""What the programs of evaluation/ have written beside a run, as tables for its page."""

from pathlib import Path

from evaluation.run_folder import read_json
from utils.report import brief

# File → what it is.
FILES = {
    "win_rate.json": "win rates",
    "reward_report.json": "the reward model's report card",
    "benchmarks.json": "benchmarks",
    "methods.json": "policies side by side",
}
ROWS = 60  # of a list; the file has all


def cell(value) -> str:
    """A value as text. Three numbers, the first between the others, are an estimate with the ends
    of its interval, as evaluation/estimates.py gives them; two are an interval."""
    if isinstance(value, list):
        shown = [cell(one) for one in value]
        numbers = all(isinstance(one, (int, float)) for one in value)
        if numbers and len(value) == 3 and value[1] <= value[0] <= value[2]:
            return f"{shown[0]} ({shown[1]} to {shown[2]})"
        return (" to " if numbers and len(value) == 2 else ", ").join(shown)
    if isinstance(value, dict):
        return ", ".join(f"{name} {cell(v)}" for name, v in value.items())
    return "–" if value is None else brief(value) if isinstance(value, float) else str(value)


def tables_of(content: dict, title: str = "") -> list[dict]:
    """Any JSON object as tables {"title", "header", "rows"}: its plain values as one, each list of
    objects and each object as one more."""
    plain, more = [], []
    for name, value in content.items():
        inner = f"{title}: {name}" if title else name
        entries = value.items() if isinstance(value, dict) else ()
        if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            header = list(dict.fromkeys(n for row in value for n in row))
            rows = [[cell(row.get(n, "")) for n in header] for row in value[:ROWS]]
            note = f" (the first {ROWS} of {len(value)})" if len(value) > ROWS else ""
            more.append({"title": inner.replace("_", " ") + note, "header": header, "rows": rows})
        elif entries and all(isinstance(v, dict) for _, v in entries):
            header = list(dict.fromkeys(n for _, row in entries for n in row))
            rows = [[key, *(cell(row.get(n, "")) for n in header)] for key, row in entries]
            more.append({"title": inner.replace("_", " "), "header": ["", *header], "rows": rows})
        elif isinstance(value, dict):
            more += tables_of(value, inner)
        else:
            plain.append([name, cell(value)])
    first = [{"title": title, "header": ["measure", "value"], "rows": plain}] if plain else []
    return first + more


def of_run(folder: Path) -> list[dict]:
    """{"title", "tables"} of each file that is there, or in a folder there."""
    found = []
    for name, title in FILES.items():
        for path in sorted([*folder.glob(name), *folder.glob(f"*/{name}")]):
            content = read_json(path)
            whole = {"": content} if name == "methods.json" else content
            found.append({"title": title, "tables": tables_of(whole)})
    return found
