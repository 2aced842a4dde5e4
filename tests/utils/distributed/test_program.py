"""How a program ends on its errors, and where another rank hangs."""

import os
import subprocess
import sys

import pytest

from tests.helpers.running import ROOT
from utils.data.rows import DataError
from utils.distributed import program
from utils.distributed.process_group import free_port


@pytest.mark.parametrize("error", [DataError("f.jsonl:3: bad"), SystemExit("no such folder")])
def test_what_a_user_can_mend_ends_as_a_message(error, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(program.os, "_exit", codes.append)

    def main():
        raise error

    program.run(main)
    assert codes == [1] and capsys.readouterr().err == f"error: {error}\n"


def test_bugs_keep_their_traceback_and_exit_codes_are_kept():
    def bug():
        raise ZeroDivisionError

    def refused():
        raise SystemExit(2)

    with pytest.raises(ZeroDivisionError):
        program.run(bug)
    with pytest.raises(SystemExit) as caught:
        program.run(refused)
    assert caught.value.code == 2


# The limit is 3 s and counts for joining too: ranks join when both have imported everything.
HANG = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import deepspeed, torch, torch.distributed as dist
from utils.distributed import process_group, program

def main():
    ready = Path(sys.argv[2])
    (ready / f"ready{os.environ['RANK']}").touch()
    while len(list(ready.glob("ready*"))) < 2:
        time.sleep(0.02)
    device = process_group.init(0.05)
    group = dist.new_group()  # as DeepSpeed makes its own, without a timeout
    if process_group.rank() == 1:
        time.sleep(10_000)
    dist.all_reduce(torch.ones(1), group=group)

program.run(main)
"""


def test_a_rank_that_hangs_ends_the_run_with_one_line(tmp_path):
    (tmp_path / "hang.py").write_text(HANG)
    port, processes = free_port(), []
    for rank in range(2):
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(tmp_path / "hang.py"), str(ROOT), str(tmp_path)]
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        told = [p.communicate(timeout=600)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [1, 1]
    assert "error on rank 0: another rank did not come to a collective within" in told[0]
    assert "Traceback" not in told[0]
