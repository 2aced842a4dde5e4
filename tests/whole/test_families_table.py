"""The table of families: it shows what fails, and all of it is walked with -m slow."""

import subprocess
import sys

import pytest

from tests import families_table
from tests.helpers.running import ROOT


def cells(**problems) -> dict[str, str]:
    named = {name.replace("_", " "): problem for name, problem in problems.items()}
    return dict.fromkeys(families_table.COLUMNS, "") | named


def test_a_failing_cell_is_named_and_what_it_kept_from_running_is_not(capsys):
    assert families_table.show({"One": cells()})
    skipped = {"reward_3": families_table.NOT_REACHED, "ppo_3": families_table.NOT_REACHED}
    assert not families_table.show({"One": cells(), "Two": cells(sft_3="no such token", **skipped)})
    table = capsys.readouterr().out
    assert "(1) Two, sft 3: no such token" in table and "(2)" not in table
    row = next(line for line in table.splitlines() if line.startswith("Two"))
    assert row.split()[1:] == ["ok", "FAILS", "(1)", "ok", "–", "ok", "–", "ok", "ok"]


def test_steps_under_zero_3_that_are_not_those_under_zero_0_fail():
    found = cells()
    figures = {"sft 0": {"loss": 2.0}, "sft 3": {"loss": 2.001}, "ppo 0": {"kl": 0.1}}
    families_table.differences(found, figures | {"ppo 3": {"kl": 0.2}})
    assert {name for name, problem in found.items() if problem} == {"ppo 3"}
    assert "not ZeRO-0's" in found["ppo 3"]


@pytest.mark.slow
def test_every_family_walks_every_step():
    result = subprocess.run(
        [sys.executable, "-m", "tests.families_table"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
