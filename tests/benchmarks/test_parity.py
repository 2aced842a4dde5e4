"""The parity with TRL: what counts as equal; and, where TRL is installed, that all of it is."""

import subprocess
import sys

import pytest
import torch

from benchmarks import measure, parity_rows, trl_environment
from benchmarks.parity_rows import Row, compare, of_norm


def test_what_differs_does_not_agree():
    ours = torch.tensor([1.0, 2.0, 4.0])
    assert compare("x", ours, ours + 1e-6).agrees and not compare("x", ours, ours + 1e-3).agrees
    assert not compare("x", ours, ours * torch.nan).agrees
    assert not Row("constants", 1e-9, 0.0, 1e-5).agrees and Row("constants", 0.0, 0.0, 0.0).agrees
    mask = torch.tensor([True, True, False])
    assert compare("x", ours, torch.tensor([1.0, 2.0, 9.0]), mask).agrees
    with pytest.raises(ValueError, match="x: \\(3,\\) beside \\(1, 3\\)"):
        compare("x", ours, ours[None])


def test_gradients_are_held_to_their_norm():
    ours = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    near = ours | {"b": torch.tensor([4.0 + 4e-5])}
    row = of_norm("gradient, update 1", ours, near, 1e-5)
    assert row.agrees and row.relative == pytest.approx(8e-6, rel=0.1)
    assert not of_norm("gradient", ours, ours | {"b": torch.tensor([-4.0])}, 1e-5).agrees
    (line,) = parity_rows.summary({"DPO": [row, Row("loss, update 1", 3e-7, 1.0, 1e-5)]})
    assert line == ("DPO", "", "", "", "", "3.0e-07", f"{row.relative:.1e}", "")


@pytest.mark.slow
@pytest.mark.skipif(not trl_environment.VENV.exists(), reason="benchmarks/.venv_trl is not made")
def test_every_number_is_trls(tmp_path):
    command = [sys.executable, str(measure.ROOT / "benchmarks/parity_trl.py"), "--skip_learning"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
