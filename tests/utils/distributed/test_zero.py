"""Engines: EMA, saved weights and the generator under every ZeRO stage (see distributed_checks.py);
dtypes and learning rates."""

import pytest
import torch

from tests.helpers.running import run_ranks
from utils.distributed import zero
from utils.distributed.zero import lr_factor


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_average_weights_and_generator_under_every_stage(tiny, ranks):
    jobs = [("tests/helpers/distributed_checks.py", [tiny / "base_model"])]
    settings = ["no_waiting", "overlapped", "moments"] if ranks == 1 else []
    output = run_ranks([*jobs, ("tests/helpers/engine_settings_checks.py", settings)], ranks)
    assert output.count("held: stage") == 8 * ranks, output
    for held in settings:
        assert f"held: {held.replace('_', ' ')}" in output, output


def test_a_rank_ends_before_python_takes_itself_down(tmp_path):
    """gloo's threads may let go of a tensor then, which aborts the process. Here that is planted:
    what runs at interpreter exit aborts on every rank."""
    program = tmp_path / "aborts_at_exit.py"
    program.write_text("import atexit, os\ndef main():\n    atexit.register(os.abort)\n")
    assert "Traceback" not in run_ranks([(str(program), [])], 2)


@pytest.mark.parametrize("flags", ["avx512_bf16", "amx_tile amx_bf16"])
def test_bf16_is_the_default_where_the_processor_computes_it(monkeypatch, flags):
    cpu = torch.device("cpu")
    for there, dtype in ((flags, "bf16"), ("avx2 avx512f", "fp32")):
        text = f"model name : any\nflags : fpu {there} sse\n"
        monkeypatch.setattr(zero.Path, "read_text", lambda self, text=text: text)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
        assert zero.resolve_dtype("auto", cpu) == dtype
        assert [zero.resolve_dtype(d, cpu) for d in ("fp32", "bf16")] == ["fp32", "bf16"]
    # A processor that has it, and an oneDNN that is told not to use it.
    monkeypatch.setattr(zero.Path, "read_text", lambda self: f"flags : {flags}\n")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert zero.resolve_dtype("auto", cpu) == "fp32"


@pytest.mark.parametrize("shape, end", [("cosine", 0.0), ("linear", 0.0), ("constant", 1.0)])
def test_learning_rate_warms_up_and_decays(shape, end):
    factors = [lr_factor(step, 100, 10, shape) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11) and factors[10] == 1.0
    assert factors[:11] == sorted(factors[:11]) and factors[10:] == sorted(factors[10:])[::-1]
    assert factors[100] == pytest.approx(end, abs=1e-12)
    if shape == "cosine":
        assert factors[55] == pytest.approx(0.5)
