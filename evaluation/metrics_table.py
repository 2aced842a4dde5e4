"""Writes the table of docs/metrics.md from the registry of utils/metrics.py.

python -m evaluation.metrics_table
"""

from pathlib import Path

# Each main registers its step's metrics.
import step1_sft.main  # noqa: F401
import step2_reward.main  # noqa: F401
import step3_ppo.main  # noqa: F401
import step3_preference.main  # noqa: F401
from utils import metrics, whole_files

PAGE = Path(__file__).resolve().parent.parent / "docs/metrics.md"
BEGIN, END = "<!-- metrics table -->", "<!-- end -->"


def table() -> str:
    """Markdown: the prefixes, then a table for each step."""
    prefixes = "; ".join(f"`{prefix}…` {what}" for prefix, what in metrics.PREFIXES.items())
    lines = [f"A prefix says what a name is measured on: {prefixes}.", ""]
    for step, rows in sorted(metrics.TABLE.items()):
        lines += [f"### {step.capitalize()}", ""]
        lines += ["| metric | unit | means | look twice when |", "| --- | --- | --- | --- |"]
        for row in rows.values():
            lines.append(f"| `{row.name}` | {row.unit} | {row.meaning} | {row.look_twice} |")
        lines.append("")
    return "\n".join(lines)


def updated(page: str) -> str:
    """The page with the table of now between its two markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}{END}{after}"


if __name__ == "__main__":
    whole_files.write_text(PAGE, updated(PAGE.read_text(encoding="utf-8")))
