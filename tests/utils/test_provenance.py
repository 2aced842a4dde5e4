"""What a run ran on."""

import json
import subprocess
import sys

import torch

from utils import provenance


def test_versions_machine_and_command_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--reward_url", "https://me:word@host", "a b"])
    provenance.save(str(tmp_path), 3)
    found = json.loads((tmp_path / "machine.json").read_text())
    assert found["command"] == "main.py --reward_url https://(secret)@host 'a b'"
    assert found["torch"] == torch.__version__ and found["ranks"] == 3 and found["processor"]


def test_the_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)

    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() == ""
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "x")
    commit = provenance.commit()
    assert len(commit) == 12 and int(commit, 16) >= 0
    (tmp_path / "file").write_text("two")
    assert provenance.commit() == f"{commit}, changed"
