"""The program that makes a whole model of an adapter folder; what it writes is in test_adapters."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.utils.models.test_adapters import IDS, load, logits_of, moved, saved
from utils.models import merge
from utils.models.adapters import Lora


def test_plain_transformers_loads_what_it_writes(tiny, tmp_path, monkeypatch, capsys):
    model = moved(load(tiny / "base_model", lora=Lora(4)))
    saved(model, tmp_path / "adapter", tiny / "base_model")
    words = ["merge", str(tmp_path / "adapter"), str(tmp_path / "whole")]
    monkeypatch.setattr(sys, "argv", words)
    merge.main()
    assert f"merged into {tiny / 'base_model'}" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        got = plain(input_ids=IDS).logits
    torch.testing.assert_close(got, logits_of(model), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(sys, "argv", ["merge", str(tmp_path / "whole"), str(tmp_path / "again")])
    with pytest.raises(SystemExit, match="holds no adapter"):
        merge.main()
