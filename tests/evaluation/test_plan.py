"""The planner as a command."""

import subprocess
import sys

from evaluation import plan
from tests.helpers.llama_shape import LLAMA
from tests.helpers.running import ROOT
from utils.planner import shapes


def test_the_command_prints_a_table(tmp_path, monkeypatch, capsys):
    LLAMA.save_pretrained(tmp_path)
    folder = str(tmp_path)
    words = "plan --step ppo --ranks 8 --memory_gb 80 --zero_stage 3 --dtype bf16 --tflops 100 "
    words += f"--bandwidth 1000 --model_name_or_path {folder} --reward_model {folder}"
    monkeypatch.setattr(sys, "argv", words.split())
    plan.main()
    shown = capsys.readouterr().out
    assert f"actor: {shapes.read(folder, False).parameters:,} parameters" in shown
    assert "largest micro batch that fits: 8" in shown and "← peak" in shown
    assert "at 100.00 TFLOP/s and 1000 GB/s, as given" in shown


def test_the_old_command_is_told_its_new_name():
    command = [sys.executable, "-m", "utils.planner", "--step", "ppo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "python -m evaluation.plan" in done.stderr


def test_a_model_that_is_not_there_ends_as_a_message():
    command = [sys.executable, "-m", "evaluation.plan", "--step", "sft"]
    command += ["--model_name_or_path", "no/such/folder"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: "), done.stderr
    assert "no/such/folder" in done.stderr and "Traceback" not in done.stderr
