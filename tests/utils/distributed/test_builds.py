"""A build that was killed, a machine without a compiler."""

import os
import subprocess
import sys
import time

import pytest

from tests.helpers.running import ROOT
from utils.distributed import builds


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


class Told:
    """In place of the compiler."""

    built = 0


def build_once(monkeypatch, name="an_op"):
    """DeepSpeed's builder of an op, whose compiler only counts."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    class AnOp(OpBuilder):
        BUILD_VAR = "DS_BUILD_AN_OP"

        def absolute_name(self):
            return f"deepspeed.ops.{self.name}"

        def sources(self):
            return []

    def count(self, verbose=True):
        Told.built += 1

    Told.built = 0
    monkeypatch.setattr(OpBuilder, "jit_load", count)
    builds.watch()
    AnOp(name).jit_load()


def test_a_build_is_announced(extensions, monkeypatch, capsys):
    build_once(monkeypatch)
    assert Told.built == 1
    assert f"DeepSpeed compiles an_op into {extensions}" in capsys.readouterr().out
    (extensions / "an_op" / "an_op.so").write_text("")
    build_once(monkeypatch)
    assert Told.built == 1 and capsys.readouterr().out == ""


def test_a_lock_of_a_killed_build_is_named_and_a_live_one_waited_for(extensions, monkeypatch):
    build_once(monkeypatch)
    (lock,) = [folder / "lock" for folder in extensions.rglob("an_op")]
    hold = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); time.sleep(1000)"
    builder = subprocess.Popen([sys.executable, "-c", hold, str(lock)])
    try:
        while not lock.exists():
            time.sleep(0.01)
        build_once(monkeypatch)
        assert Told.built == 1, "somebody is building: DeepSpeed waits for it"
    finally:
        builder.kill()
        builder.wait()
    with pytest.raises(SystemExit) as caught:
        build_once(monkeypatch)
    assert Told.built == 0 and f"rm {lock}" in str(caught.value)


def test_a_machine_without_a_compiler_says_so_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    told = builds.missing_tools()
    assert told.startswith("no c++ and no ninja here") and "\n" not in told
    for tool in ("c++", "ninja"):
        (tmp_path / tool).write_text("#!/bin/sh\n")
        (tmp_path / tool).chmod(0o755)
    assert builds.missing_tools() is None


NO_COMPILER = "g++ gcc c++ cc clang nvcc ninja".split()


@pytest.mark.slow
@pytest.mark.parametrize("settings", ["0 none fp32", "2 optimizer bf16", "3 all fp32"])
def test_training_compiles_nothing(tiny, tmp_path, settings):
    """Compilers that fail and leave a trace stand first on the path."""
    stage, offload, dtype = settings.split()
    for tool in NO_COMPILER:
        (tmp_path / tool).write_text(f"#!/bin/sh\necho {tool} $@ >> {tmp_path}/called\nexit 1\n")
        (tmp_path / tool).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
    }
    command = [sys.executable, str(ROOT / "step1_sft/main.py"), "--max_steps", "2"]
    command += ["--model_name_or_path", tiny / "base_model", "--max_length", "128"]
    command += ["--sft_data", tiny / "data/sft.jsonl", "--output_dir", tmp_path / "out"]
    command += ["--global_batch_size", "4", "--micro_batch_size", "4", "--max_eval_rows", "4"]
    command += ["--zero_stage", stage, "--offload", offload, "--dtype", dtype]
    done = subprocess.run(
        [str(c) for c in command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # DeepSpeed asks gcc about a library as it is imported; it may have no for an answer.
    called = (
        (tmp_path / "called").read_text().splitlines() if (tmp_path / "called").exists() else []
    )
    assert all(line.startswith("gcc ") and "/test.c " in line for line in called), called
    assert not list(tmp_path.rglob("extensions/**/*.so"))
