"""What machines must share: three pretended on one, each in a folder of its own."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.running import ROOT
from utils.distributed import shared_files
from utils.distributed.process_group import free_port

# Relative paths differ from machine to machine here, as local disks do. Ranks 0 and 1 are of a.
RANK = """
import json, os, socket, sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
from utils.distributed import peers, process_group, shared_files

dist.init_process_group("gloo")
me = dist.get_rank()
name = "aabc"[me]
os.chdir(os.path.join(sys.argv[2], name))
peers.machine = socket.gethostname = lambda: name
peers.look_after()
process_group.shut_down = process_group.barrier
for number, settings in enumerate(json.loads(sys.argv[3])):
    ended = 0
    try:
        shared_files.check(settings["output_dir"], settings)
    except SystemExit as end:
        ended = end.code
    assert process_group.gather_objects(ended) == [ended] * 4
    if me == 0:
        print(f"== {number} ended with {ended}", file=sys.stderr, flush=True)
peers.stop()
dist.barrier()
os._exit(0)
"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, str]:
    """What rank 0 said to each configuration; "" where it passed."""
    folder, common = tmp_path_factory.mktemp("machines"), tmp_path_factory.mktemp("shared")
    write(common / "data.jsonl", "shared")
    write(common / "reward.py", "def f(): ...")
    for name in "abc":
        write(folder / name / "equal.jsonl", "same everywhere")
        write(folder / name / "longer.jsonl", "x" * (2 if name == "b" else 1))
        write(folder / name / "changed.jsonl", "yes" if name == "c" else "no!")
        write(folder / name / "model/config.json", "{}")
        write(folder / name / "model/weights/part.bin", "1" if name == "b" else "0")
        write(folder / name / "model/checkpoints/step", name)
        write(folder / name / "model/.cache", name)
        write(folder / name / "other/model/config.json", "{}")
    write(folder / "a/only_a.jsonl", "x")
    write(folder / "c/occupied", "a file, and no folder")
    shared = str(common / "out")
    cases = {
        "equal": {"output_dir": shared, "sft_data": [str(common / "data.jsonl"), "equal.jsonl"]}
        | {"model_name_or_path": "other/model", "reward_function": f"{common}/reward.py:f"},
        "own folders": {"output_dir": "out", "sft_data": ["equal.jsonl"]},
        "occupied": {"output_dir": "occupied", "sft_data": []},
        "longer": {"output_dir": shared, "sft_data": ["equal.jsonl", "longer.jsonl"]},
        "changed": {"output_dir": shared, "sft_data": ["changed.jsonl"]},
        "missing": {"output_dir": shared, "sft_data": ["only_a.jsonl:train"]},
        "model": {"output_dir": shared, "sft_data": [], "model_name_or_path": "model"},
    }
    (folder / "rank.py").write_text(RANK)
    environment = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [sys.executable, folder / "rank.py", ROOT, folder, json.dumps(list(cases.values()))]
    ranks = [
        subprocess.Popen(
            words,
            env=os.environ | environment | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * 4, errors
    assert not list(folder.rglob(".machine-*")) + list(common.rglob(".machine-*"))
    found, text = {}, errors[0]
    for number, name in enumerate(cases):
        before, _, text = text.partition(f"== {number} ended with ")
        code, _, text = text.partition("\n")
        assert code == ("2" if before else "0"), (name, before)
        found[name] = before
    return found


def test_shared_folders_and_equal_copies_pass(told):
    assert told["equal"] == ""


@pytest.mark.parametrize("name", ["own folders", "occupied"])
def test_an_output_folder_that_is_not_shared_ends_the_run(told, name):
    if name == "occupied":
        assert "output_dir=occupied cannot be written to on c: [Errno 17]" in told[name]
    else:
        for writer, reader in ("ab", "ac", "ba", "bc", "ca", "cb"):
            line = f"output_dir=out: what {writer} writes there is not seen on {reader}; give a"
            assert line in told[name]


def test_inputs_that_differ_are_named_with_both_machines(told):
    assert "sft_data=longer.jsonl: 1 file of 1 bytes (" in told["longer"]
    assert " on a, 1 file of 2 bytes (" in told["longer"] and " on b; copy it" in told["longer"]
    assert "equal.jsonl" not in told["longer"]
    assert "sft_data=changed.jsonl: 1 file of 3 bytes (" in told["changed"]
    assert " on c; copy it to the same path" in told["changed"]
    assert "sft_data=only_a.jsonl:train: 1 file of 1 bytes (" in told["missing"]
    assert "on a, missing on b;" in told["missing"]
    assert "model_name_or_path=model: 2 files of 3 bytes (" in told["model"]
    for name in ("longer", "changed", "missing", "model"):
        assert told[name].startswith("the machines do not see the same files:\n  - ")
        assert len(told[name].splitlines()) == 2


def test_a_change_at_a_large_files_end_is_seen(tmp_path):
    size = 4 * shared_files.BYTES_COMPARED
    for name, last in (("one", b"a"), ("same", b"a"), ("other", b"b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_bytes(b"x" * size + last)
    prints = {n: shared_files._fingerprint(tmp_path / n) for n in ("one", "same", "other")}
    assert prints["one"] == prints["same"] != prints["other"]
    assert prints["one"][:2] == (1, size + 1)
