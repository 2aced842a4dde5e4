"""Optimizers by name: those that another package holds, and their state in checkpoints."""

import pytest

from step1_sft.config import SFTConfig
from step3_ppo.config import PPOConfig
from tests.helpers.running import run_ranks
from tests.utils.settings.test_command_line import NEEDED, problems_of
from utils.distributed import optimizers
from utils.distributed.optimizers import OPTIMIZERS


def test_the_setting_names_every_optimizer():
    assert SFTConfig.__dataclass_fields__["optimizer"].metadata["choices"] == tuple(OPTIMIZERS)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    optimizers.check("adamw")
    with pytest.raises(SystemExit, match="package bitsandbytes, .* not installed: pip install"):
        optimizers.check("adamw8bit")


def test_a_trust_region_needs_moments_that_can_be_put_back():
    argv = ["--algorithm", "trpo", "--ppo_epochs", "1", "--optimizer", "adamw8bit"]
    (problem,) = problems_of(PPOConfig, [*NEEDED[PPOConfig], *argv])
    assert "optimizer=adamw8bit" in problem and "leave out --optimizer" in problem


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_moments_in_8_bits_under_every_layout(tiny, tmp_path, ranks):
    pytest.importorskip("bitsandbytes", reason="requirements-quantised.txt is not installed")
    checks = "tests/helpers/eight_bit_checks.py"
    said = run_ranks([(checks, [tiny / "base_model", tmp_path])], ranks)
    assert said.count("held: ") == 12 * ranks
